"""The engine `vllm`, and all that gserve knows of vLLM."""
