"""`VLLMClient`, and the two calls that clients and services share: `chat` and `generate`."""

import math
import weakref
from collections.abc import Iterable, Iterator, Mapping, Sequence
from types import TracebackType
from typing import Any, Literal, Self, overload

from .. import plugins
from ..batch.batch import OnError, collect, collect_async, outcome_lists
from ..batch.dispatcher import Dispatcher
from ..batch.item_queue import Outcome
from ..batch.items import Items, Seeds, check_list, conversation_reader, read_prompt
from ..config import Config, LLMConfig
from ..errors import ConfigError, ItemError
from ..host import tokens
from ..interfaces import Access, Address, Connection, Transport
from ..schema import Health, ResponseOutput, unfolded

UNKNOWN_CAPACITY = 1024
"""Items that a server works on at once, where nobody has told."""


class Inference:
    """The calls that send batches. A subclass says through which dispatcher they go.

    Calls may come from any thread, from within a running event loop (where the twins that end in `_async` do not block
    it), and from a process that was forked: it talks to the same servers, over connections of its own.
    """

    _seeds = Seeds()
    """The seeds of items; a subclass that knows the seed of its model has its own."""

    def _dispatcher(self) -> Dispatcher:
        raise NotImplementedError

    @overload
    def chat(
        self, conversations: Iterable[Any], sampling_params: Any = None, return_extra: Literal[False] = False, *,
        on_error: OnError = "raise", deadline: float | None = None,
        add_generation_prompt: bool = True, continue_final_message: bool = False,
    ) -> list[list[str]]: ...  # fmt: skip
    @overload
    def chat(
        self, conversations: Iterable[Any], sampling_params: Any = None, *, return_extra: Literal[True],
        on_error: OnError = "raise", deadline: float | None = None,
        add_generation_prompt: bool = True, continue_final_message: bool = False,
    ) -> list[list[ResponseOutput]]: ...  # fmt: skip
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
        """Continue conversations; return for each, in order, its completions.

        conversations: lists of messages `{"role": …, "content": …}`. sampling_params: a `vllm.SamplingParams`, a
        mapping of its fields, a list with one of these per item, or None for the model's defaults. A completion is a
        text, or a `ResponseOutput` with `return_extra`. The last two flags are those of `vllm.LLM.chat`.

        on_error: "raise" raises BatchError once all items have finished; it carries every result. "return" returns an
        ItemError in the place of an item that failed. deadline: seconds after which what is not finished is cancelled,
        and its error is DeadlineExceeded. Raises ConfigError: an argument is wrong; BatchInterrupted: Ctrl-C.
        """
        flags = {"add_generation_prompt": add_generation_prompt, "continue_final_message": continue_final_message}
        items = self._conversations(conversations, sampling_params, **flags)
        return collect(self._dispatcher(), items, _checked(deadline), return_extra, on_error)

    @overload
    def generate(
        self, prompts: Iterable[Any], sampling_params: Any = None, return_extra: Literal[False] = False, *,
        on_error: OnError = "raise", deadline: float | None = None,
    ) -> list[list[str]]: ...  # fmt: skip
    @overload
    def generate(
        self, prompts: Iterable[Any], sampling_params: Any = None, *, return_extra: Literal[True],
        on_error: OnError = "raise", deadline: float | None = None,
    ) -> list[list[ResponseOutput]]: ...  # fmt: skip
    def generate(
        self,
        prompts: Iterable[Any],
        sampling_params: Any = None,
        return_extra: bool = False,
        *,
        on_error: OnError = "raise",
        deadline: float | None = None,
    ) -> Any:
        """Complete prompts (texts, or lists of token ids); return for each, in order, its completions.

        Arguments, results and errors are those of `chat`.
        """
        items = self._prompts(prompts, sampling_params)
        return collect(self._dispatcher(), items, _checked(deadline), return_extra, on_error)

    def chat_iter(
        self,
        conversations: Iterable[Any],
        sampling_params: Any = None,
        *,
        deadline: float | None = None,
        add_generation_prompt: bool = True,
        continue_final_message: bool = False,
    ) -> Iterator[tuple[int, Outcome]]:
        """Like `chat`, but yield the index and the outcome of each item the moment it is ready.

        Conversations are read as they are worked off, so that they may come from an iterator without end. Closing the
        iterator early cancels the rest.
        """
        flags = {"add_generation_prompt": add_generation_prompt, "continue_final_message": continue_final_message}
        items = self._conversations(conversations, sampling_params, **flags)
        return self._kept(_outcomes(self._dispatcher(), items, _checked(deadline)))

    def generate_iter(
        self, prompts: Iterable[Any], sampling_params: Any = None, *, deadline: float | None = None
    ) -> Iterator[tuple[int, Outcome]]:
        """Like `generate`, but yield the index and the outcome of each item the moment it is ready.

        Prompts are read as they are worked off. Closing the iterator early cancels the rest.
        """
        items = self._prompts(prompts, sampling_params)
        return self._kept(_outcomes(self._dispatcher(), items, _checked(deadline)))

    def _kept(self, outcomes: Iterator[tuple[int, Outcome]]) -> Iterator[tuple[int, Outcome]]:
        """Yield what there is: who iterates keeps this object alive, and its servers with it."""
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
        """Like `chat`, without blocking the event loop. Cancelling the call cancels what is not finished."""
        flags = {"add_generation_prompt": add_generation_prompt, "continue_final_message": continue_final_message}
        items = self._conversations(conversations, sampling_params, **flags)
        return await collect_async(self._dispatcher(), items, _checked(deadline), return_extra, on_error)

    async def generate_async(
        self,
        prompts: Iterable[Any],
        sampling_params: Any = None,
        return_extra: bool = False,
        *,
        on_error: OnError = "raise",
        deadline: float | None = None,
    ) -> list[Any]:
        """Like `generate`, without blocking the event loop. Cancelling the call cancels what is not finished."""
        items = self._prompts(prompts, sampling_params)
        return await collect_async(self._dispatcher(), items, _checked(deadline), return_extra, on_error)

    def _conversations(self, given: Iterable[Any], sampling_params: Any, **flags: bool) -> Items:
        check_list(given, "conversations", "[[{'role': 'user', 'content': …}], …]")
        if isinstance(given, Sequence) and given and isinstance(given[0], Mapping):
            raise ConfigError("expected a list of conversations, got one conversation: put it into a list")
        return Items(given, sampling_params, conversation_reader(**flags), self._seeds.of_next_call())

    def _prompts(self, given: Iterable[Any], sampling_params: Any) -> Items:
        check_list(given, "prompts", '["a prompt", …]')
        return Items(given, sampling_params, read_prompt, self._seeds.of_next_call())


def _checked(deadline: float | None) -> float | None:
    if deadline is not None and not (isinstance(deadline, (int, float)) and 0 < deadline < math.inf):
        raise ConfigError(f"expected a deadline in seconds above 0, or None, got {deadline!r}")
    return deadline


def _outcomes(dispatcher: Dispatcher, items: Items, deadline: float | None) -> Iterator[tuple[int, Outcome]]:
    """Yield the outcomes of all items as they come. Nothing is sent before the first is asked for."""
    for outcomes in outcome_lists(dispatcher, items, deadline):
        for index, outcome in outcomes:
            yield index, outcome if isinstance(outcome, ItemError) else unfolded(outcome)


class VLLMClient(Inference):
    """Sends batches to one server, at `host` and `port`.

    timeout: seconds without any sign of life from a server that has work; None: no limit. token: None takes that of a
    server of this user on this machine, where there is one. Use it as a context manager, or call `close`; what is
    collected is closed too.
    """

    def __init__(
        self,
        host: str = "127.0.0.1",
        port: int = 8000,
        timeout: float | None = 30.0,
        *,
        token: str | None = None,
        control: str | None = None,
        transport: Transport | None = None,
        instance: str | None = None,
        capacity: int = UNKNOWN_CAPACITY,
    ) -> None:
        if timeout is not None and not timeout > 0:
            raise ConfigError(f"expected a timeout in seconds above 0, or None, got {timeout!r}")
        if token is None:
            found = tokens.find_access(host, port)
            token, control = found.token, found.control
        if transport is None:
            transport = plugins.assemble(Config(LLMConfig("any"))).transport
        self.host = host
        self.port = port
        access = Access(token=token, control=control, instance=instance, timeout=timeout)

        def connect() -> Connection:
            return transport.connect(Address([host], port), access)

        self._key = f"{host}:{port}"
        self._only = Dispatcher()
        weakref.finalize(self, self._only.ask_to_close).atexit = False
        self._only.add(self._key, connect, capacity, timeout, is_watched=False)

    def _dispatcher(self) -> Dispatcher:
        return self._only

    def health(self) -> Health:
        """Return the server's state. Raises `TransportError`."""
        return self._only.ask_server(self._key, lambda connection: connection.health())

    def shutdown(self) -> None:
        """Ask the server to end. Raises `TransportError`."""
        self._only.ask_server(self._key, lambda connection: connection.shut_down())

    def close(self) -> None:
        """End calls that are left, and close the connection. Idempotent."""
        self._only.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()
