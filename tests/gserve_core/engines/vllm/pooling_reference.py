"""Write what `vllm.LLM` itself computes, as JSON: the other side of the comparison in test_vllm_pooling.py.

usage: python pooling_reference.py REQUESTS.json ANSWERS.json

REQUESTS is a list of {llm, calls}: a `vllm.LLM` each, one after the other.
"""

import contextlib
import json
import sys
from pathlib import Path
from typing import Any

from vllm import LLM, PoolingParams
from vllm.distributed import cleanup_dist_env_and_memory


def answer(asked: dict[str, Any]) -> list[Any]:
    """Return the numbers of every call."""
    llm = LLM(**asked["llm"])
    answers = []
    for call in asked["calls"]:
        params = PoolingParams(**call["params"]) if call["params"] else None
        if call["kind"] == "score":
            firsts, seconds = zip(*call["inputs"], strict=True)
            found = llm.score([*firsts], [*seconds], pooling_params=params, use_tqdm=False)
            answers.append([it.outputs.score for it in found])
            continue
        inputs = [{"prompt_token_ids": it} if isinstance(it, list) else it for it in call["inputs"]]
        if call["kind"] == "classify":
            answers.append([it.outputs.probs for it in llm.classify(inputs, pooling_params=params, use_tqdm=False)])
        else:
            answers.append([it.outputs.embedding for it in llm.embed(inputs, pooling_params=params, use_tqdm=False)])
    del llm
    with contextlib.suppress(Exception):
        cleanup_dist_env_and_memory()
    return answers


if __name__ == "__main__":
    requests = json.loads(Path(sys.argv[1]).read_text())
    Path(sys.argv[2]).write_text(json.dumps([answer(asked) for asked in requests]))
