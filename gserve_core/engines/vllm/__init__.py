"""The engine `vllm`, and everything in gserve that is specific to vLLM."""
