"""`VLLMClient`, and the two calls that clients and services share: `chat` and `generate`."""

import asyncio
import itertools
import math
import queue
import random
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import suppress
from types import TracebackType
from typing import Annotated, Any, Literal, Self, overload

import msgspec

from . import plugins, runtime
from .config import Config, LLMConfig
from .dispatch import Call, Dispatcher, Item, Outcome
from .errors import BatchError, BatchInterrupted, ConfigError, DeadlineExceeded, ItemError
from .interfaces import Access, Address, Transport
from .sampling import params_from
from .schema import Conversation, Health, Message, Params, Prompt, ResponseOutput, unfolded

UNKNOWN_CAPACITY = 1024
"""Items that a server works on at once, where nobody has told."""

AHEAD = 1 << 16
"""Items of a call that are under way at most, unless the servers hold more: what bounds the memory of a long call."""
FEED = 1 << 12
"""Items that are read and submitted in one go; fewer where reading them takes longer than `FEED_SECONDS`."""
FEED_SECONDS = 0.05

TokenId = Annotated[int, msgspec.Meta(ge=0, lt=1 << 31)]

type OnError = Literal["raise", "return"]
type Read = Callable[[Any], Prompt]
"""Reads an item as it was given. Raises ItemError, msgspec.ValidationError and what cannot be encoded raises."""


class Inference:
    """The calls that send batches. A subclass says through which dispatcher they go.

    Calls may come from any thread, from within a running event loop (where the twins that end in `_async` do not block
    it), and from a process that was forked: it talks to the same servers, over connections of its own.
    """

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
        items = self._conversations(_whole(conversations), sampling_params, **flags)
        return _collect(self._dispatcher(), items, _checked(deadline), return_extra, on_error)

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
        items = self._prompts(_whole(prompts), sampling_params)
        return _collect(self._dispatcher(), items, _checked(deadline), return_extra, on_error)

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
        items = self._conversations(_whole(conversations), sampling_params, **flags)
        return await _collect_async(self._dispatcher(), items, _checked(deadline), return_extra, on_error)

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
        items = self._prompts(_whole(prompts), sampling_params)
        return await _collect_async(self._dispatcher(), items, _checked(deadline), return_extra, on_error)

    def _conversations(
        self, given: Iterable[Any], sampling_params: Any, *, add_generation_prompt: bool, continue_final_message: bool
    ) -> "_Items":
        def conversation(given: Any) -> Conversation:
            messages = msgspec.convert(given, list[Message])
            if not messages:
                raise ItemError("the conversation is empty")
            made = Conversation(messages, add_generation_prompt, continue_final_message)
            return msgspec.msgpack.decode(msgspec.msgpack.encode(made, enc_hook=_plain_text), type=Conversation)

        _check_list(given, "conversations", "[[{'role': 'user', 'content': …}], …]")
        if isinstance(given, Sequence) and given and isinstance(given[0], Mapping):
            raise ConfigError("expected a list of conversations, got one conversation: put it into a list")
        return _Items(given, sampling_params, conversation)

    def _prompts(self, given: Iterable[Any], sampling_params: Any) -> "_Items":
        def prompt(given: Any) -> str | list[int]:
            if isinstance(given, str):
                text = str.__str__(given)  # an instance of a subclass, such as NumPy's, cannot travel
                if not text.isascii():
                    text.encode()
                return text
            if isinstance(given, (list, tuple)):
                return msgspec.convert(given, list[TokenId])
            raise ItemError(f"expected a text or a list of token ids, got {type(given).__name__}")

        _check_list(given, "prompts", '["a prompt", …]')
        return _Items(given, sampling_params, prompt)


def _whole(given: Any) -> Any:
    """Return items as a sequence: a call that returns them all has to know how many there are."""
    return list(given) if isinstance(given, Iterable) and not isinstance(given, (Sequence, Mapping)) else given


def _check_list(given: Any, what: str, example: str) -> None:
    if isinstance(given, (str, bytes, Mapping)) or not isinstance(given, Iterable):
        raise ConfigError(f"expected a list of {what} like {example}, got {type(given).__name__}")


def _checked(deadline: float | None) -> float | None:
    if deadline is not None and not (isinstance(deadline, (int, float)) and 0 < deadline < math.inf):
        raise ConfigError(f"expected a deadline in seconds above 0, or None, got {deadline!r}")
    return deadline


def _plain_text(given: Any) -> str:
    """Return the text that an instance of a subclass of `str` holds, such as one of NumPy's."""
    if isinstance(given, str):
        return str.__str__(given)
    raise TypeError(f"expected a text, got {type(given).__name__}")


class _Items:
    """The items of a call as they were given, and their parameters: read one by one. Raises ConfigError."""

    def __init__(self, given: Iterable[Any], sampling_params: Any, read: Read) -> None:
        self._read = read
        if isinstance(sampling_params, (list, tuple)):
            given = given if isinstance(given, Sequence) else list(given)
            params: Iterable[Params | ItemError | None] = _each_params(sampling_params, len(given))
        else:
            try:
                params = itertools.repeat(params_from(sampling_params))
            except ItemError as error:
                raise ConfigError(str(error)) from error
        self.size = len(given) if isinstance(given, Sequence) else None
        self.are_read = False
        self._given = zip(enumerate(given), params, strict=False)

    def take(self, call: Call) -> tuple[list[Item], list[tuple[int, Outcome]]]:
        """Read the next items; return those that are good, and the errors of the others."""
        good: list[Item] = []
        bad: list[tuple[int, Outcome]] = []
        enough = time.monotonic() + FEED_SECONDS
        for (index, given), own in itertools.islice(self._given, FEED):
            try:
                if isinstance(own, ItemError):
                    raise own
                good.append(Item(call, index, self._read(given), own, _seed(own)))
            except ItemError as error:
                bad.append((index, ItemError(str(error), index=index)))
            except msgspec.ValidationError as error:
                bad.append((index, ItemError(f"not as expected: {str(error).replace('`', '')}", index=index)))
            except (UnicodeEncodeError, RecursionError, OverflowError) as error:
                bad.append((index, ItemError(f"cannot be sent: {error}", index=index)))
            if time.monotonic() > enough:
                return good, bad
        self.are_read = len(good) + len(bad) < FEED
        return good, bad


def _seed(params: Params | None) -> int | None:
    """Return a seed for an item that may be sampled and has none: sent again, it is to sample the same."""
    if params is not None and (params.get("seed") is not None or params.get("temperature") == 0):
        return None
    return random.getrandbits(31)


def _each_params(given: Sequence[Any], size: int) -> list[Params | ItemError | None]:
    """Read sampling parameters, one per item; equal ones once."""
    if len(given) != size:
        raise ConfigError(f"expected one sampling_params for all or {size}, one per item; got {len(given)}")
    known: dict[int, Params | ItemError | None] = {}
    for one in given:
        if id(one) not in known:
            try:
                known[id(one)] = params_from(one)
            except ItemError as error:
                known[id(one)] = error
    return [known[id(one)] for one in given]


class _Batch:
    """A call on its way: its items go to the dispatcher as others are worked off, their outcomes to `deliver`."""

    def __init__(
        self,
        dispatcher: Dispatcher,
        items: _Items,
        deadline: float | None,
        deliver: Callable[[list[tuple[int, Outcome]]], object],
    ) -> None:
        self._dispatcher = dispatcher
        self._items = items
        self._deliver = deliver
        self._call = dispatcher.open(deliver)
        self._deadline = deadline
        self._ends = None if deadline is None else time.monotonic() + deadline
        self._open: set[int] | None = None if deadline is None else set()
        self._under_way = 0

    def feed(self) -> bool:
        """Submit some items, where there is room; return whether outcomes are to come."""
        if not self._is_full:
            good, bad = self._items.take(self._call)
            self._under_way += len(good) + len(bad)
            if self._open is not None:
                self._open.update([item.index for item in good], [index for index, _ in bad])
            if bad:
                self._deliver(bad)
            if good:
                self._dispatcher.submit(good)
        return self._under_way > 0 or not self._items.are_read

    @property
    def _is_full(self) -> bool:
        ahead = max(AHEAD, 2 * self._dispatcher.room)
        return self._items.are_read or self._under_way > ahead - FEED

    @property
    def patience(self) -> float | None:
        """How many seconds to wait for outcomes, before `feed` or the deadline; None: as long as it takes."""
        if not self._is_full:
            return 0.0
        return None if self._ends is None else max(0.0, self._ends - time.monotonic())

    @property
    def is_late(self) -> bool:
        """Say whether the deadline has come."""
        return self._ends is not None and time.monotonic() >= self._ends

    def count(self, outcomes: list[tuple[int, Outcome]]) -> list[tuple[int, Outcome]]:
        """Take note of outcomes that have come; return them."""
        self._under_way -= len(outcomes)
        if self._open is not None:
            self._open.difference_update([index for index, _ in outcomes])
        return outcomes

    def expire(self) -> Iterator[list[tuple[int, Outcome]]]:
        """End the call at its deadline; yield the errors of what is not finished."""
        self.cancel()
        message = f"the deadline of {self._deadline:g} s came before this was finished"
        late = sorted(self._open or ())
        while True:
            yield [(index, DeadlineExceeded(message, index=index, invalid=False)) for index in late]
            if self._items.are_read or self._items.size is None:  # of those in an iterator there may be no end
                return
            good, bad = self._items.take(self._call)
            yield bad
            late = [item.index for item in good]

    def cancel(self) -> None:
        """Drop what is not finished, also on the servers."""
        with suppress(Exception):
            self._dispatcher.cancel(self._call)


def _outcomes(dispatcher: Dispatcher, items: _Items, deadline: float | None) -> Iterator[tuple[int, Outcome]]:
    """Yield the outcomes of all items as they come. Nothing is sent before the first is asked for."""
    for outcomes in _outcome_lists(dispatcher, items, deadline):
        for index, outcome in outcomes:
            yield index, outcome if isinstance(outcome, ItemError) else unfolded(outcome)


def _outcome_lists(
    dispatcher: Dispatcher, items: _Items, deadline: float | None
) -> Iterator[list[tuple[int, Outcome]]]:
    """Yield what `_outcomes` yields, as many at once as there are."""
    news: queue.SimpleQueue[list[tuple[int, Outcome]]] = queue.SimpleQueue()
    batch = _Batch(dispatcher, items, deadline, news.put)
    try:
        while batch.feed():
            try:
                come = news.get(timeout=batch.patience)
            except queue.Empty:
                if batch.is_late:
                    yield from batch.expire()
                    return
                continue
            yield batch.count(come)
    except BaseException:  # Ctrl-C, or the caller wants no more: the servers need not go on
        batch.cancel()
        raise


def _collect(
    dispatcher: Dispatcher, items: _Items, deadline: float | None, return_extra: bool, on_error: OnError
) -> list[Any]:
    """Return all outcomes in the order of the call. Raises BatchError, BatchInterrupted."""
    found = _Found(items, return_extra, on_error)
    try:
        for outcomes in _outcome_lists(dispatcher, items, deadline):
            found.add(outcomes)
    except KeyboardInterrupt as interrupt:
        raise BatchInterrupted(found.so_far) from interrupt
    return found.all()


async def _collect_async(
    dispatcher: Dispatcher, items: _Items, deadline: float | None, return_extra: bool, on_error: OnError
) -> list[Any]:
    """Return what `_collect` returns."""
    found = _Found(items, return_extra, on_error)
    loop = asyncio.get_running_loop()
    news: asyncio.Queue[list[tuple[int, Outcome]]] = asyncio.Queue()

    def deliver(outcomes: list[tuple[int, Outcome]]) -> None:
        with suppress(RuntimeError):  # the caller's event loop is closed
            loop.call_soon_threadsafe(news.put_nowait, outcomes)

    batch = _Batch(dispatcher, items, deadline, deliver)
    try:
        while batch.feed():
            try:
                async with asyncio.timeout(batch.patience):
                    come = await news.get()
            except TimeoutError:
                if batch.is_late:
                    for outcomes in batch.expire():
                        found.add(outcomes)
                    break
                continue
            found.add(batch.count(come))
    except BaseException:
        batch.cancel()
        raise
    return found.all()


class _Found:
    """The outcomes of a call so far, in its order; None where there is none yet."""

    def __init__(self, items: _Items, return_extra: bool, on_error: OnError) -> None:
        if on_error not in ("raise", "return"):
            raise ConfigError(f"expected on_error as 'raise' or 'return', got {on_error!r}")
        assert items.size is not None
        self.so_far: list[Any] = [None] * items.size
        self._return_extra = return_extra
        self._raises = on_error == "raise"
        self._failed = False

    def add(self, outcomes: list[tuple[int, Outcome]]) -> None:
        for index, outcome in outcomes:
            if isinstance(outcome, ItemError):
                self._failed = True
                self.so_far[index] = outcome
            else:
                self.so_far[index] = unfolded(outcome) if self._return_extra else [output.text for output in outcome]

    def all(self) -> list[Any]:
        if self._failed and self._raises:
            raise BatchError(self.so_far)
        return self.so_far


class VLLMClient(Inference):
    """Sends batches to one server, at `host` and `port`.

    timeout: seconds without any sign of life from a server that has work; None: no limit. token: None takes that of a
    server of this user on this machine, where there is one. Use it as a context manager, or call `close`.
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
            found = runtime.find_access(host, port)
            token, control = found.token, found.control
        if transport is None:
            transport = plugins.assemble(Config(LLMConfig("any"))).transport
        self.host = host
        self.port = port
        access = Access(token=token, control=control, instance=instance, timeout=timeout)
        self._capacity = capacity
        self._transport = transport
        self._access = access
        self._connect()

    def _connect(self) -> None:
        self._connection = self._transport.connect(Address([self.host], self.port), self._access)
        self._only = Dispatcher()
        self._only.add(f"{self.host}:{self.port}", self._connection, self._capacity, self._access.timeout)

    def _dispatcher(self) -> Dispatcher:
        if self._only.is_foreign:
            self._connect()
        return self._only

    def health(self) -> Health:
        """Return the server's state. Raises `TransportError`."""
        return self._dispatcher().ask(self._connection.health())

    def shutdown(self) -> None:
        """Ask the server to end. Raises `TransportError`."""
        self._dispatcher().ask(self._connection.shut_down())

    def close(self) -> None:
        """End calls that are left, and close the connection. Idempotent."""
        self._only.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()
