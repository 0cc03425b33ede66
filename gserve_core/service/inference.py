"""The calls that clients and services share: `chat`, `generate` and their variants."""

import math
from collections.abc import Generator, Iterable, Mapping, Sequence
from typing import Any, Literal, overload

from ..batch.batch import OnError, collect, collect_async, outcome_lists
from ..batch.dispatcher import Dispatcher
from ..batch.items import Items, Seeds, check_list, conversation_reader, read_prompt
from ..batch.pieces import Outcome
from ..errors import ConfigError, ItemError
from ..messages import ResponseOutput, unfolded


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
        on_error: Literal["raise"] = "raise", deadline: float | None = None,
        add_generation_prompt: bool = True, continue_final_message: bool = False,
    ) -> list[list[str]]: ...  # fmt: skip
    @overload
    def chat(
        self, conversations: Iterable[Any], sampling_params: Any = None, *, return_extra: Literal[True],
        on_error: Literal["raise"] = "raise", deadline: float | None = None,
        add_generation_prompt: bool = True, continue_final_message: bool = False,
    ) -> list[list[ResponseOutput]]: ...  # fmt: skip
    @overload
    def chat(
        self, conversations: Iterable[Any], sampling_params: Any = None, return_extra: bool = False, *,
        on_error: Literal["return"], deadline: float | None = None,
        add_generation_prompt: bool = True, continue_final_message: bool = False,
    ) -> list[Any]: ...  # fmt: skip
    def chat(
        self,
        conversations: Iterable[Any],
        sampling_params: Any = None,
        return_extra: bool = False,
        *,
        on_error: OnError = "raise",
        deadline: float | None = None,
        add_generation_prompt: bool = True,
        continue_final_message: bool = False,
    ) -> Any:
        """Continue conversations. Return a list with the completions of each conversation, in order.

        `conversations`: lists of messages `{"role": …, "content": …}`.
        `sampling_params`: a `vllm.SamplingParams`, a mapping of its fields, or a list with one of these per item. None
        uses the model's defaults.
        `return_extra`: whether a completion is a `ResponseOutput` instead of a text.
        `on_error`: "raise" raises BatchError once all items have finished; it contains every result. "return" returns
        an ItemError in the place of each failed item.
        `deadline`: time after which unfinished items are cancelled, in seconds. They fail with DeadlineExceeded.
        `add_generation_prompt`, `continue_final_message`: see `vllm.LLM.chat`.

        Raises BatchError: items failed, and `on_error` is "raise".
        Raises ConfigError: an argument is wrong.
        Raises BatchInterrupted: Ctrl-C was pressed.
        """
        flags = {"add_generation_prompt": add_generation_prompt, "continue_final_message": continue_final_message}
        items = self._conversations(conversations, sampling_params, **flags)
        return collect(self._dispatcher(), items, _check_deadline(deadline), return_extra, on_error)

    @overload
    def generate(
        self, prompts: Iterable[Any], sampling_params: Any = None, return_extra: Literal[False] = False, *,
        on_error: Literal["raise"] = "raise", deadline: float | None = None,
    ) -> list[list[str]]: ...  # fmt: skip
    @overload
    def generate(
        self, prompts: Iterable[Any], sampling_params: Any = None, *, return_extra: Literal[True],
        on_error: Literal["raise"] = "raise", deadline: float | None = None,
    ) -> list[list[ResponseOutput]]: ...  # fmt: skip
    @overload
    def generate(
        self, prompts: Iterable[Any], sampling_params: Any = None, return_extra: bool = False, *,
        on_error: Literal["return"], deadline: float | None = None,
    ) -> list[Any]: ...  # fmt: skip
    def generate(
        self,
        prompts: Iterable[Any],
        sampling_params: Any = None,
        return_extra: bool = False,
        *,
        on_error: OnError = "raise",
        deadline: float | None = None,
    ) -> Any:
        """Complete prompts. Return a list with the completions of each prompt, in order.

        `prompts`: texts, or lists of token ids. For the other arguments, the results and the errors see `chat`.
        """
        items = self._prompts(prompts, sampling_params)
        return collect(self._dispatcher(), items, _check_deadline(deadline), return_extra, on_error)

    def chat_iter(
        self,
        conversations: Iterable[Any],
        sampling_params: Any = None,
        *,
        deadline: float | None = None,
        add_generation_prompt: bool = True,
        continue_final_message: bool = False,
    ) -> Generator[tuple[int, Outcome]]:
        """Like `chat`, but yield the index and the outcome of each item as soon as it is ready.

        Conversations are read lazily, so an infinite iterator works. Closing the returned iterator early cancels the
        unfinished items.
        """
        flags = {"add_generation_prompt": add_generation_prompt, "continue_final_message": continue_final_message}
        items = self._conversations(conversations, sampling_params, **flags)
        return self._keep_alive(_outcomes(self._dispatcher(), items, _check_deadline(deadline)))

    def generate_iter(
        self, prompts: Iterable[Any], sampling_params: Any = None, *, deadline: float | None = None
    ) -> Generator[tuple[int, Outcome]]:
        """Like `generate`, but yield the index and the outcome of each item as soon as it is ready.

        Prompts are read lazily. Closing the returned iterator early cancels the unfinished items.
        """
        items = self._prompts(prompts, sampling_params)
        return self._keep_alive(_outcomes(self._dispatcher(), items, _check_deadline(deadline)))

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
        deadline: float | None = None,
        add_generation_prompt: bool = True,
        continue_final_message: bool = False,
    ) -> list[Any]:
        """Like `chat`, without blocking the event loop. Cancelling the call cancels its unfinished items."""
        flags = {"add_generation_prompt": add_generation_prompt, "continue_final_message": continue_final_message}
        items = self._conversations(conversations, sampling_params, **flags)
        return await collect_async(self._dispatcher(), items, _check_deadline(deadline), return_extra, on_error)

    async def generate_async(
        self,
        prompts: Iterable[Any],
        sampling_params: Any = None,
        return_extra: bool = False,
        *,
        on_error: OnError = "raise",
        deadline: float | None = None,
    ) -> list[Any]:
        """Like `generate`, without blocking the event loop. Cancelling the call cancels its unfinished items."""
        items = self._prompts(prompts, sampling_params)
        return await collect_async(self._dispatcher(), items, _check_deadline(deadline), return_extra, on_error)

    def _conversations(self, given: Iterable[Any], sampling_params: Any, **flags: bool) -> Items:
        check_list(given, "conversations", "[[{'role': 'user', 'content': …}], …]")
        if isinstance(given, Sequence) and given and isinstance(given[0], Mapping):
            raise ConfigError("expected a list of conversations, got one conversation: put it into a list")
        return Items(given, sampling_params, conversation_reader(**flags), self._seeds.of_next_call())

    def _prompts(self, given: Iterable[Any], sampling_params: Any) -> Items:
        check_list(given, "prompts", '["a prompt", …]')
        return Items(given, sampling_params, read_prompt, self._seeds.of_next_call())


def _check_deadline(deadline: float | None) -> float | None:
    if deadline is not None and not (isinstance(deadline, (int, float)) and 0 < deadline < math.inf):
        raise ConfigError(f"expected a deadline in seconds above 0, or None, got {deadline!r}")
    return deadline


def _outcomes(dispatcher: Dispatcher, items: Items, deadline: float | None) -> Generator[tuple[int, Outcome]]:
    """Yield the outcomes of all items as they come. Sends nothing before the first `next`."""
    for outcomes in outcome_lists(dispatcher, items, deadline):
        for index, outcome in outcomes:
            yield index, outcome if isinstance(outcome, ItemError) else unfolded(outcome)
