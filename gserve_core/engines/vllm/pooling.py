"""Pooling models in vLLM: embeddings, classes and scores, as `vllm.LLM.embed`, `classify` and `score` make them."""

import asyncio
from collections.abc import Awaitable, Callable, Iterable, Sequence
from typing import Any, NamedTuple

from ...errors import ItemError
from ...messages import Params, Prompt, VectorOutput
from ...tasks import CLASSIFY, EMBED, SCORE, read_options, texts_of
from . import differences

LOWEST_LENGTH = 1e-8
"""Lowest length of an embedding in a score, so that nothing is divided by 0. torch has the same value."""

type Encode = Callable[[Any, Any, int, Any], Awaitable[Any]]
"""Works on an input of vLLM with `vllm.PoolingParams`, a priority and a LoRA request; returns vLLM's output."""
type Render = Callable[[Sequence[Prompt], int | None], Iterable[Any]]
"""Renders texts and token ids, truncated to a number of tokens: returns an input of vLLM, or an ItemError, for each."""


class Vector(NamedTuple):
    """A prepared item: one input of vLLM whose vector is the output, or two whose similarity is."""

    parts: "tuple[_Part, ...]"
    priority: int = 0
    lora: Any = None

    def with_lora(self, lora: Any) -> "Vector":
        """Return the item with a LoRA request. It shares no work with others, which may have another adapter."""
        return Vector(tuple(_Part(part.made, part.params) for part in self.parts), self.priority, lora)


class Pooling:
    """The tasks of a pooling model.

    `config`: vLLM's config. `renderer`: vLLM's renderer.
    `supported`: the tasks that vLLM has found in the model.
    `template`: the chat template that the user has set. It may be one for pairs.
    """

    def __init__(
        self, config: Any, renderer: Any, supported: Sequence[str], template: str | None, render: Render, encode: Encode
    ) -> None:
        self._render = render
        self._encode = encode
        self._renderer = renderer
        self._template = template
        self._params = differences.find("vllm:PoolingParams")
        with differences.expected("reading the tasks of the model"):
            self.task: str = config.model_config.get_pooling_task(supported)
            labels = getattr(config.model_config.hf_config, "num_labels", 0)
        self._cross_encoder: Any = None
        """vLLM's own object that makes one prompt of a pair, if the model reads both texts at once."""
        if self.task == CLASSIFY and labels == 1:
            with differences.optional("scores of pairs"):
                self._cross_encoder = self._processors(config, supported)["cross-encoder"]
        can_score = self.task == EMBED or self._cross_encoder is not None
        self.tasks = (*((self.task,) if self.task in (EMBED, CLASSIFY) else ()), *((SCORE,) if can_score else ()))
        """The tasks of gserve that the model has."""

    def _processors(self, config: Any, supported: Sequence[str]) -> Any:
        make = differences.find("vllm.entrypoints.pooling.factories:init_pooling_io_processors")
        template = differences.find_first(
            "vllm.renderers.chat_utils:ChatTemplateConfig", "vllm.entrypoints.chat_utils:ChatTemplateConfig"
        )
        return differences.call(
            make, supported_tasks=supported, vllm_config=config, renderer=self._renderer,
            chat_template_config=template(chat_template=self._template),
        )  # fmt: skip

    def prepare(self, task: str, prompts: Sequence[Prompt], params: Params | None) -> list[Vector | ItemError]:
        """Return the input of `run`, or an error, for each prompt. Raises ItemError: the parameters are wrong."""
        options, kept = read_options(params)
        own = self.params(options.dimensions, options.use_activation)
        if task != SCORE:
            return [
                made if isinstance(made, ItemError) else Vector((_Part(made, own),))
                for made in self._render(prompts, kept)
            ]
        pairs = [_pair(prompt) for prompt in prompts]
        if self._cross_encoder is not None:
            return [it if isinstance(it, ItemError) else self._joined(it, own, kept) for it in pairs]
        texts = list(dict.fromkeys(text for pair in pairs if not isinstance(pair, ItemError) for text in pair))
        parts = {
            text: made if isinstance(made, ItemError) else _Part(made, own)
            for text, made in zip(texts, self._render(texts, kept), strict=True)
        }  # a text is embedded once, such as the query of a reranking
        return [it if isinstance(it, ItemError) else _both(parts[it[0]], parts[it[1]]) for it in pairs]

    def params(self, dimensions: int | None = None, use_activation: bool | None = None) -> Any:
        """Return `vllm.PoolingParams` for the task of the model."""
        return self._params(task=self.task, dimensions=dimensions, use_activation=use_activation)

    def _joined(self, pair: tuple[str, str], params: Any, kept: int | None) -> Vector | ItemError:
        """Return the input for a pair whose texts the model reads at once."""
        try:
            tokens = self._renderer.default_cmpl_tok_params
            if kept is not None:
                tokens = tokens.with_kwargs(truncate_prompt_tokens=kept)
            made = self._cross_encoder.render({
                "data_1": pair[0], "data_2": pair[1], "chat_template": self._template,
                "max_tokens_per_query": 0, "max_tokens_per_doc": 0, "tok_params": tokens, "prompt_extras": None,
                "skip_mm_cache": False, "params": params, "lora_requests": None, "priorities": 0,
            })  # fmt: skip
            return Vector((_Part(made["prompts"], made["params"]),))
        except Exception as error:
            return ItemError(f"the pair cannot be read: {error}")

    async def run(self, item: Vector) -> list[VectorOutput]:
        """Return the vector of one prepared prompt, or the score of a pair.

        Raises ItemError: vLLM rejects the item. Raises what the work on it raises.
        """
        if len(item.parts) == 1:
            found = [await self._encode(item.parts[0].made, item.parts[0].params, item.priority, item.lora)]
        else:
            found = await asyncio.gather(*(part.output(self._encode, item.priority, item.lora) for part in item.parts))
        for output in found:
            if (error := getattr(output, "error", None)) is not None:
                raise ItemError(f"vLLM cannot take this item: {error.message}", invalid=False)
        with differences.expected("reading a vector"):
            vectors = [output.outputs.data.float().reshape(-1).cpu() for output in found]
            tokens = sum(len(output.prompt_token_ids) for output in found)
            if len(vectors) == 2:
                lengths = [vector.norm().clamp(min=LOWEST_LENGTH) for vector in vectors]
                vectors = [((vectors[0] @ vectors[1]) / (lengths[0] * lengths[1])).reshape(-1)]
            return [VectorOutput("", vector=vectors[0].numpy().astype("<f4").tobytes(), prompt_tokens=tokens)]


class _Part:
    """An input of vLLM. Items that share it share the work on it, which ends when the last of them is cancelled."""

    def __init__(self, made: Any, params: Any) -> None:
        self.made = made
        self.params = params
        self._work: asyncio.Future[Any] | None = None
        self._waiting = 0

    async def output(self, encode: Encode, priority: int, lora: Any) -> Any:
        """Return vLLM's output. Raises what `encode` raises."""
        if self._work is None:
            self._work = asyncio.ensure_future(encode(self.made, self.params, priority, lora))
        work = self._work
        self._waiting += 1
        try:
            return await asyncio.shield(work)
        finally:
            self._waiting -= 1
            if not self._waiting and not work.done():
                work.cancel()
                self._work = None


def _pair(prompt: Prompt) -> tuple[str, str] | ItemError:
    try:
        return texts_of(prompt)
    except ItemError as error:
        return error


def _both(first: _Part | ItemError, second: _Part | ItemError) -> Vector | ItemError:
    if isinstance(first, ItemError):
        return first
    return second if isinstance(second, ItemError) else Vector((first, second))
