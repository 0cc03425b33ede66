"""Real vLLM with a model so small that its matrix products do without AMX, where the CPU has it."""

from benchmarks import models
from gserve import LLMConfig, VLLMService


def test_a_small_model_in_bfloat16_starts_and_answers_a_prompt_of_one_token() -> None:
    llm = LLMConfig(models.find("tiny"), max_model_len=64, llm_kwargs={"enforce_eager": True})
    assert llm.dtype == "bfloat16"
    with VLLMService(llm) as service:
        (text,) = service.generate([[1]], {"temperature": 0, "max_tokens": 4, "ignore_eos": True})
    assert text
