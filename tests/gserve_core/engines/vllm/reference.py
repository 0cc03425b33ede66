"""Write what `vllm.LLM` itself answers, as JSON: the other side of the comparison in test_vllm_engine.py.

usage: python reference.py REQUESTS.json ANSWERS.json

REQUESTS is a list of {llm, lora_path, calls}: a `vllm.LLM` each, one after the other.
"""

import json
import sys
from functools import partial
from pathlib import Path
from typing import Any

from vllm import LLM, RequestOutput, SamplingParams
from vllm.lora.request import LoRARequest


def answer(asked: dict[str, Any]) -> list[Any]:
    """Return the outputs of every call."""
    arguments = dict(asked["llm"])
    template = arguments.pop("chat_template", None)  # before vLLM 0.32, `LLM.chat` does not use that of its `LLM`
    llm = LLM(**arguments)
    lora = LoRARequest("adapter", 1, asked["lora_path"]) if asked["lora_path"] else None
    answers = []
    run: Any
    for call in asked["calls"]:
        if call["kind"] == "chat":
            run, inputs = partial(llm.chat, chat_template=template), call["inputs"]
        else:
            run, inputs = (
                llm.generate,
                [{"prompt_token_ids": it} if isinstance(it, list) else it for it in call["inputs"]],
            )
        params = SamplingParams(**call["params"])
        outputs = run(inputs, params, use_tqdm=False, lora_request=lora, **call["options"])
        answers.append([plain(output) for output in outputs])
    return answers


def plain(output: RequestOutput) -> list[Any]:
    """Return the completions of one prompt."""
    of_prompt = logprobs(output.prompt_logprobs)
    return [
        [it.text, list(it.token_ids), it.finish_reason, it.stop_reason, logprobs(it.logprobs), of_prompt]
        for it in output.outputs
    ]


def logprobs(given: Any) -> list[Any] | None:
    """Return log probabilities in the order that they have, those of a token as [token id, …] each."""
    return given and [
        entry and [[token, it.logprob, it.rank, it.decoded_token] for token, it in entry.items()] for entry in given
    ]


if __name__ == "__main__":
    requests = json.loads(Path(sys.argv[1]).read_text())
    Path(sys.argv[2]).write_text(json.dumps([answer(asked) for asked in requests]))
