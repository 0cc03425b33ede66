"""Embeddings, classes and scores of the engine `echo` over OpenAI's and vLLM's routes."""

import array
import asyncio
import base64
import itertools
from collections.abc import Sequence
from typing import Any, Protocol, cast

import msgspec

from ..errors import ItemError
from ..interfaces import EngineInfo
from ..messages import Params, Prompt, ResponseOutput, VectorOutput
from ..tasks import CLASSIFY, EMBED, SCORE, TASKS, pair_of

PATHS = {
    "/v1/embeddings": EMBED, "/classify": CLASSIFY, "/pooling": None,
    **dict.fromkeys(("/score", "/v1/score", "/rerank", "/v1/rerank", "/v2/rerank"), SCORE),
}  # fmt: skip
"""The routes, with the task of each. A request to `/pooling` names its task itself."""
PARAMS = {"dimensions": "dimensions", "use_activation": "use_activation"}
PARAMS |= {"normalize": "use_activation", "truncate_prompt_tokens": "truncate_prompt_tokens"}


class Preparing(Protocol):
    """The part of a running engine that these routes need. For the methods, see `RunningEngine`."""

    info: EngineInfo

    async def prepare_vectors(self, task: str, prompts: Sequence[Prompt], params: Params | None) -> Sequence[Any]:
        """Check prompts."""

    async def run(self, prepared: Any) -> list[ResponseOutput]:
        """Return the vector of a prompt."""


def task_of(path: str, asked: dict[str, Any]) -> str | None:
    """Return the task of a request; None if its route is none of `PATHS`."""
    task = PATHS.get(path)
    return asked.get("task", EMBED) if path == "/pooling" else task


async def answer(engine: Preparing, path: str, asked: dict[str, Any], number: str) -> dict[str, Any]:
    """Return the answer to a request. `number`: its id.

    Raises ItemError or msgspec.ValidationError: it is wrong.
    """
    task = task_of(path, asked)
    if task not in TASKS:
        raise ItemError(f"unknown task {task!r}")
    params = {ours: asked[name] for name, ours in PARAMS.items() if asked.get(name) is not None}
    pairs = _pairs(asked, is_rerank="rerank" in path) if task == SCORE else []
    prompts: list[Prompt] = [pair_of(pair) for pair in pairs] if task == SCORE else _inputs(asked.get("input"))
    prepared = await engine.prepare_vectors(task, prompts, params)
    for item in prepared:
        if isinstance(item, ItemError):
            raise item
    outputs = [cast(VectorOutput, found[0]) for found in await asyncio.gather(*map(engine.run, prepared))]
    vectors = [array.array("f", output.vector).tolist() for output in outputs]
    tokens = sum(output.prompt_tokens or 0 for output in outputs)
    head = {"id": number, "object": "list", "model": engine.info.model}
    usage = {"prompt_tokens": tokens, "total_tokens": tokens}
    if "rerank" in path:
        results = [
            {"index": index, "document": {"text": pairs[index][1]}, "relevance_score": score}
            for index, (score,) in sorted(enumerate(vectors), key=lambda it: -it[1][0])[: asked.get("top_n") or None]
        ]
        return head | {"usage": usage, "results": results}
    data: list[dict[str, Any]] = []
    for index, vector in enumerate(vectors):
        if path == "/v1/embeddings":
            is_base64 = asked.get("encoding_format") == "base64"
            value = base64.b64encode(outputs[index].vector).decode() if is_base64 else vector
            data.append({"index": index, "object": "embedding", "embedding": value})
        elif path == "/classify":
            label = f"LABEL_{vector.index(max(vector))}"
            data.append({"index": index, "label": label, "probs": vector, "num_classes": len(vector)})
        elif path == "/pooling":
            data.append({"index": index, "object": "pooling", "data": vector})
        else:
            data.append({"index": index, "object": "score", "score": vector[0]})
    return head | {"data": data, "usage": usage}


def _inputs(given: Any) -> list[Prompt]:
    several = given if isinstance(given, list) and given and not isinstance(given[0], int) else [given]
    return [msgspec.convert(prompt, str | list[int]) for prompt in several]


def _pairs(asked: dict[str, Any], *, is_rerank: bool) -> list[tuple[str, str]]:
    """Return the pairs of a request: one text with each of several, or each with its own."""
    if is_rerank:
        firsts, seconds = asked.get("query"), asked.get("documents")
    else:
        firsts, seconds = (
            next((asked[name] for name in names if name in asked), None)
            for names in (("text_1", "data_1", "queries"), ("text_2", "data_2", "documents"))
        )
    first, second = (
        msgspec.convert(it if isinstance(it, list) else [it], list[str]) for it in (firsts, seconds)
    )  # fmt: skip
    if len(first) == 1:
        return list(zip(itertools.repeat(first[0], len(second)), second, strict=True))
    if len(first) != len(second):
        raise ItemError(
            f"expected as many texts on both sides, or one on the first, got {len(first)} and {len(second)}"
        )
    return list(zip(first, second, strict=True))
