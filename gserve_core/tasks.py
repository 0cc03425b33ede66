"""The tasks of a model: texts are generated, or vectors, classes and scores are computed."""

from collections.abc import Sequence
from typing import Annotated, Any

import msgspec
from msgspec import Meta, Struct

from .errors import ItemError, did_you_mean, reworded
from .messages import Conversation, Message, Params, Prompt
from .sampling import TRUNCATE, split_prompt_params

GENERATE, EMBED, CLASSIFY, SCORE = "generate", "embed", "classify", "score"
TASKS = (GENERATE, EMBED, CLASSIFY, SCORE)
CALLS = {GENERATE: "generate and chat", EMBED: "embed", CLASSIFY: "classify", SCORE: "score and rerank"}
"""The calls that need a task."""
PAIR = ("query", "document")
"""The roles of the two messages in which a pair of texts travels, as in vLLM's templates for pairs."""


class PoolingOptions(Struct, frozen=True, kw_only=True):
    """The parameters of all tasks but "generate", as in `vllm.PoolingParams`.

    `dimensions`: numbers of a shortened embedding; None: all. Only models made for this (Matryoshka) can do it.
    `use_activation`: whether embeddings have the length 1, and classes are probabilities; None: as the model says.
    """

    dimensions: Annotated[int, Meta(ge=1, lt=1 << 31)] | None = None
    use_activation: bool | None = None


def read_options(params: Params | None) -> tuple[PoolingOptions, int | None]:
    """Return checked parameters that came from outside, and the number of tokens to which a prompt is truncated.

    That number is None if it is not truncated, and -1 if it is as long as the model takes.

    Raises ItemError: they are wrong.
    """
    options, kept = split_prompt_params(params)
    known = PoolingOptions.__struct_fields__
    for name in options or ():
        if name not in known:
            raise ItemError(f"unknown parameter {name!r}{did_you_mean(str(name), [*known, TRUNCATE])}")
    try:
        return msgspec.convert(options or {}, PoolingOptions), kept
    except msgspec.ValidationError as error:
        text, place = reworded(error)
        name = place.removeprefix("$.")
        raise ItemError(f"wrong parameter '{name}': {text}, got {(options or {}).get(name)!r:.50}") from error


def check_task(task: str, tasks: Sequence[str], model: str) -> None:
    """Raise ItemError if a task is not among those of a model."""
    if task in tasks:
        return
    offered = " and ".join(f"'{it}' ({CALLS[it]})" for it in tasks if it in CALLS) or "only requests of OpenAI's API"
    raise ItemError(f"the model '{model}' does not have the task '{task}': it has {offered}")


def pair_of(texts: Any) -> Conversation:
    """Return two texts as one prompt. Raises msgspec.ValidationError: they are no texts."""
    return Conversation([Message(role=role, content=text) for role, text in zip(PAIR, texts, strict=True)])


def texts_of(prompt: Prompt) -> tuple[str, str]:
    """Return the two texts of a prompt. Raises ItemError: it is no pair."""
    if isinstance(prompt, Conversation) and tuple(message.role for message in prompt.messages) == PAIR:
        first, second = (message.content for message in prompt.messages)
        if isinstance(first, str) and isinstance(second, str):
            return first, second
    raise ItemError("expected a pair of texts: two messages with the roles 'query' and 'document'")
