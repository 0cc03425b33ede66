"""The calls that clients and services share: `chat`, `generate` and their variants."""

import math
from collections.abc import Generator, Iterable
from typing import Any, Literal, TypedDict, Unpack, overload

from ..batch.batch import OnError, collect, collect_async, outcome_lists
from ..batch.dispatcher import Dispatcher
from ..batch.items import ConversationReader, Items, Seeds, list_conversations, list_prompts, read_prompt
from ..batch.pieces import Outcome
from ..batch.results import Results
from ..errors import ConfigError, ItemError
from ..messages import ResponseOutput, unfolded


class PromptOptions(TypedDict, total=False):
    """Options of all calls.

    `deadline`: time after which unfinished items are cancelled, in seconds. They fail with DeadlineExceeded.
    `truncate_prompt_tokens`: maximum number of tokens of a prompt; -1: as many as the model can take.
    `return_prompt_token_ids`: whether each `ResponseOutput` has the tokens of its prompt.
    `lora_request`: must be None.
    """

    deadline: float | None
    truncate_prompt_tokens: int | None
    return_prompt_token_ids: bool
    lora_request: None


class ChatOptions(PromptOptions, total=False):
    """Options of calls with conversations: see `vllm.LLM.chat`."""

    add_generation_prompt: bool
    continue_final_message: bool
    tools: Iterable[Any] | None
    chat_template_kwargs: Any


class Inference:
    """The calls that send batches. A subclass provides the dispatcher.

    You may call them from any thread, and from a running event loop: the variants ending in `_async` do not block it.
    You may also call them from a forked process. It uses the same servers, over its own connections.
    """

    _seeds = Seeds()
    """The seeds of items. A subclass that knows the seed of its model replaces them."""

    def _dispatcher(self) -> Dispatcher:
        raise NotImplementedError

    @overload
    def chat(
        self, conversations: Iterable[Any], sampling_params: Any = None, return_extra: Literal[False] = False, *,
        on_error: Literal["raise"] = "raise", use_tqdm: Any = None, **options: Unpack[ChatOptions],
    ) -> Results[list[str]]: ...  # fmt: skip
    @overload
    def chat(
        self, conversations: Iterable[Any], sampling_params: Any = None, *, return_extra: Literal[True],
        on_error: Literal["raise"] = "raise", use_tqdm: Any = None, **options: Unpack[ChatOptions],
    ) -> Results[list[ResponseOutput]]: ...  # fmt: skip
    @overload
    def chat(
        self, conversations: Iterable[Any], sampling_params: Any = None, return_extra: bool = False, *,
        on_error: Literal["return"], use_tqdm: Any = None, **options: Unpack[ChatOptions],
    ) -> Results[Any]: ...  # fmt: skip
    def chat(
        self,
        conversations: Iterable[Any],
        sampling_params: Any = None,
        return_extra: bool = False,
        *,
        on_error: OnError = "raise",
        use_tqdm: Any = None,
        **options: Unpack[ChatOptions],
    ) -> Any:
        """Continue conversations. Return a list with the completions of each conversation, in order.

        Its attribute `usage` holds the numbers of tokens.

        `conversations`: lists of messages `{"role": …, "content": …}`, or mappings with `messages` and with `tools` or
        `chat_template_kwargs` of their own. One conversation alone counts as a list of one.
        `sampling_params`: a `vllm.SamplingParams`, a mapping of its fields, or an iterable with one of these per item.
        None uses the model's defaults.
        `return_extra`: whether a completion is a `ResponseOutput` instead of a text.
        `on_error`: "raise" raises BatchError once all items have finished; it contains every result. "return" returns
        an ItemError in the place of each failed item.
        `use_tqdm`: True shows a progress bar if tqdm is installed. See `vllm.LLM.chat`.
        `options`: see `ChatOptions`.

        Raises BatchError: items failed, and `on_error` is "raise".
        Raises ConfigError: an argument is wrong.
        Raises BatchInterrupted: Ctrl-C was pressed.
        """
        items, deadline = self._conversations(conversations, sampling_params, **options)
        return collect(self._dispatcher(), items, deadline, return_extra, on_error, use_tqdm)

    @overload
    def generate(
        self, prompts: Iterable[Any], sampling_params: Any = None, return_extra: Literal[False] = False, *,
        on_error: Literal["raise"] = "raise", use_tqdm: Any = None, **options: Unpack[PromptOptions],
    ) -> Results[list[str]]: ...  # fmt: skip
    @overload
    def generate(
        self, prompts: Iterable[Any], sampling_params: Any = None, *, return_extra: Literal[True],
        on_error: Literal["raise"] = "raise", use_tqdm: Any = None, **options: Unpack[PromptOptions],
    ) -> Results[list[ResponseOutput]]: ...  # fmt: skip
    @overload
    def generate(
        self, prompts: Iterable[Any], sampling_params: Any = None, return_extra: bool = False, *,
        on_error: Literal["return"], use_tqdm: Any = None, **options: Unpack[PromptOptions],
    ) -> Results[Any]: ...  # fmt: skip
    def generate(
        self,
        prompts: Iterable[Any],
        sampling_params: Any = None,
        return_extra: bool = False,
        *,
        on_error: OnError = "raise",
        use_tqdm: Any = None,
        **options: Unpack[PromptOptions],
    ) -> Any:
        """Complete prompts. Return a list with the completions of each prompt, in order.

        `prompts`: texts, lists of token ids, or mappings with a `prompt` or `prompt_token_ids`. One prompt alone counts
        as a list of one. `options`: see `PromptOptions`. For the rest see `chat`.
        """
        items, deadline = self._prompts(prompts, sampling_params, **options)
        return collect(self._dispatcher(), items, deadline, return_extra, on_error, use_tqdm)

    def chat_iter(
        self, conversations: Iterable[Any], sampling_params: Any = None, **options: Unpack[ChatOptions]
    ) -> Generator[tuple[int, Outcome]]:
        """Like `chat`, but yield the index and the outcome of each item as soon as it is ready.

        Conversations are read lazily, so an infinite iterator works. Closing the returned iterator early cancels the
        unfinished items.
        """
        items, deadline = self._conversations(conversations, sampling_params, **options)
        return self._keep_alive(_outcomes(self._dispatcher(), items, deadline))

    def generate_iter(
        self, prompts: Iterable[Any], sampling_params: Any = None, **options: Unpack[PromptOptions]
    ) -> Generator[tuple[int, Outcome]]:
        """Like `generate`, but yield the index and the outcome of each item as soon as it is ready.

        Prompts are read lazily. Closing the returned iterator early cancels the unfinished items.
        """
        items, deadline = self._prompts(prompts, sampling_params, **options)
        return self._keep_alive(_outcomes(self._dispatcher(), items, deadline))

    def _keep_alive(self, outcomes: Iterable[tuple[int, Outcome]]) -> Generator[tuple[int, Outcome]]:
        """Yield the outcomes. The iterator keeps this object and its servers alive."""
        yield from outcomes

    async def chat_async(
        self,
        conversations: Iterable[Any],
        sampling_params: Any = None,
        return_extra: bool = False,
        *,
        on_error: OnError = "raise",
        use_tqdm: Any = None,
        **options: Unpack[ChatOptions],
    ) -> Results[Any]:
        """Like `chat`, without blocking the event loop. Cancelling the call cancels its unfinished items."""
        items, deadline = self._conversations(conversations, sampling_params, **options)
        return await collect_async(self._dispatcher(), items, deadline, return_extra, on_error, use_tqdm)

    async def generate_async(
        self,
        prompts: Iterable[Any],
        sampling_params: Any = None,
        return_extra: bool = False,
        *,
        on_error: OnError = "raise",
        use_tqdm: Any = None,
        **options: Unpack[PromptOptions],
    ) -> Results[Any]:
        """Like `generate`, without blocking the event loop. Cancelling the call cancels its unfinished items."""
        items, deadline = self._prompts(prompts, sampling_params, **options)
        return await collect_async(self._dispatcher(), items, deadline, return_extra, on_error, use_tqdm)

    def _conversations(
        self,
        given: Any,
        sampling_params: Any,
        *,
        deadline: float | None = None,
        truncate_prompt_tokens: int | None = None,
        return_prompt_token_ids: bool = False,
        lora_request: None = None,
        **options: Any,
    ) -> tuple[Items, float | None]:
        _refuse_lora(lora_request)
        items = Items(
            list_conversations(given), sampling_params, ConversationReader(**options), self._seeds.of_next_call(),
            truncate_prompt_tokens=truncate_prompt_tokens, return_prompt_token_ids=return_prompt_token_ids,
        )  # fmt: skip
        return items, _check_deadline(deadline)

    def _prompts(
        self,
        given: Any,
        sampling_params: Any,
        *,
        deadline: float | None = None,
        truncate_prompt_tokens: int | None = None,
        return_prompt_token_ids: bool = False,
        lora_request: None = None,
    ) -> tuple[Items, float | None]:
        _refuse_lora(lora_request)
        items = Items(
            list_prompts(given), sampling_params, read_prompt, self._seeds.of_next_call(),
            truncate_prompt_tokens=truncate_prompt_tokens, return_prompt_token_ids=return_prompt_token_ids,
        )  # fmt: skip
        return items, _check_deadline(deadline)


def _refuse_lora(lora_request: Any) -> None:
    if lora_request is not None:
        raise ConfigError(
            "lora_request is not supported: set the adapter as lora_path in the LLMConfig; it applies to all items"
        )


def _check_deadline(deadline: float | None) -> float | None:
    if deadline is not None and not (isinstance(deadline, (int, float)) and 0 < deadline < math.inf):
        raise ConfigError(f"expected a deadline in seconds above 0, or None, got {deadline!r}")
    return deadline


def _outcomes(dispatcher: Dispatcher, items: Items, deadline: float | None) -> Generator[tuple[int, Outcome]]:
    """Yield the outcomes of all items as they come. Sends nothing before the first `next`."""
    for outcomes in outcome_lists(dispatcher, items, deadline):
        for index, outcome in outcomes:
            yield index, outcome if isinstance(outcome, ItemError) else unfolded(outcome)
