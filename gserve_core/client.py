"""`VLLMClient`, and the two calls that clients and services share: `chat` and `generate`."""

from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import suppress
from types import TracebackType
from typing import Annotated, Any, Literal, Self, overload

import msgspec

from . import plugins, runtime
from .config import Config, LLMConfig
from .dispatch import Dispatcher
from .errors import BatchError, ConfigError, ItemError
from .interfaces import Access, Address, Transport
from .sampling import params_from
from .schema import Conversation, Health, Message, Params, Prompt, ResponseOutput

UNKNOWN_CAPACITY = 1024
"""Items that a server works on at once, where nobody has told."""

TokenId = Annotated[int, msgspec.Meta(ge=0, lt=1 << 31)]

type OnError = Literal["raise", "return"]


class Inference:
    """The calls that send batches. A subclass says through which dispatcher they go."""

    def _dispatcher(self) -> Dispatcher:
        raise NotImplementedError

    @overload
    def chat(
        self, conversations: Iterable[Any], sampling_params: Any = None, return_extra: Literal[False] = False, *,
        on_error: OnError = "raise", add_generation_prompt: bool = True, continue_final_message: bool = False,
    ) -> list[list[str]]: ...  # fmt: skip
    @overload
    def chat(
        self, conversations: Iterable[Any], sampling_params: Any = None, *, return_extra: Literal[True],
        on_error: OnError = "raise", add_generation_prompt: bool = True, continue_final_message: bool = False,
    ) -> list[list[ResponseOutput]]: ...  # fmt: skip
    def chat(
        self,
        conversations: Iterable[Any],
        sampling_params: Any = None,
        return_extra: bool = False,
        *,
        on_error: OnError = "raise",
        add_generation_prompt: bool = True,
        continue_final_message: bool = False,
    ) -> Any:
        """Continue conversations; return for each, in order, its completions.

        conversations: lists of messages `{"role": …, "content": …}`. sampling_params: a `vllm.SamplingParams`, a
        mapping of its fields, a list with one of these per item, or None for the model's defaults. A completion is a
        text, or a `ResponseOutput` with `return_extra`. The last two flags are those of `vllm.LLM.chat`.

        on_error: "raise" raises BatchError once all items have finished; it carries every result. "return" returns an
        ItemError in the place of an item that failed. Raises ConfigError: an argument is wrong.
        """
        each = self.chat_iter(
            conversations,
            sampling_params,
            add_generation_prompt=add_generation_prompt,
            continue_final_message=continue_final_message,
        )
        return _collect(each, return_extra, on_error)

    @overload
    def generate(
        self, prompts: Iterable[Any], sampling_params: Any = None, return_extra: Literal[False] = False, *,
        on_error: OnError = "raise",
    ) -> list[list[str]]: ...  # fmt: skip
    @overload
    def generate(
        self, prompts: Iterable[Any], sampling_params: Any = None, *, return_extra: Literal[True],
        on_error: OnError = "raise",
    ) -> list[list[ResponseOutput]]: ...  # fmt: skip
    def generate(
        self,
        prompts: Iterable[Any],
        sampling_params: Any = None,
        return_extra: bool = False,
        *,
        on_error: OnError = "raise",
    ) -> Any:
        """Complete prompts (texts, or lists of token ids); return for each, in order, its completions.

        Arguments, results and errors are those of `chat`.
        """
        return _collect(self.generate_iter(prompts, sampling_params), return_extra, on_error)

    def chat_iter(
        self,
        conversations: Iterable[Any],
        sampling_params: Any = None,
        *,
        add_generation_prompt: bool = True,
        continue_final_message: bool = False,
    ) -> Iterator[tuple[int, list[ResponseOutput] | ItemError]]:
        """Like `chat`, but yield the index and the outcome of each item the moment it is ready.

        Closing the iterator early cancels the rest.
        """

        def conversation(given: Any) -> Conversation:
            messages = msgspec.convert(given, list[Message])
            if not messages:
                raise ItemError("the conversation is empty")
            made = Conversation(messages, add_generation_prompt, continue_final_message)
            return msgspec.msgpack.decode(msgspec.msgpack.encode(made, enc_hook=_plain_text), type=Conversation)

        items = _listed(conversations, "conversations", "[[{'role': 'user', 'content': …}], …]")
        if items and isinstance(items[0], Mapping):
            raise ConfigError("expected a list of conversations, got one conversation: put it into a list")
        return self._each(items, sampling_params, conversation)

    def generate_iter(
        self, prompts: Iterable[Any], sampling_params: Any = None
    ) -> Iterator[tuple[int, list[ResponseOutput] | ItemError]]:
        """Like `generate`, but yield the index and the outcome of each item the moment it is ready.

        Closing the iterator early cancels the rest.
        """

        def prompt(given: Any) -> str | list[int]:
            if isinstance(given, str):
                text = str.__str__(given)  # an instance of a subclass, such as NumPy's, cannot travel
                if not text.isascii():
                    text.encode()
                return text
            if isinstance(given, (list, tuple)):
                return msgspec.convert(given, list[TokenId])
            raise ItemError(f"expected a text or a list of token ids, got {type(given).__name__}")

        return self._each(_listed(prompts, "prompts", '["a prompt", …]'), sampling_params, prompt)

    def _each(
        self, given: Sequence[Any], sampling_params: Any, read: Any
    ) -> Iterator[tuple[int, list[ResponseOutput] | ItemError]]:
        """Check all items, submit the good ones, and yield all outcomes."""
        params = _each_params(sampling_params, len(given))
        good: list[tuple[int, Prompt, Params | None]] = []
        bad: list[tuple[int, ItemError]] = []
        for index, item in enumerate(given):
            own = params if params is None or isinstance(params, dict) else params[index]
            try:
                if isinstance(own, ItemError):
                    raise own
                good.append((index, read(item), own))
            except ItemError as error:
                bad.append((index, ItemError(str(error), index=index)))
            except msgspec.ValidationError as error:
                bad.append((index, ItemError(f"not as expected: {str(error).replace('`', '')}", index=index)))
            except (UnicodeEncodeError, RecursionError, OverflowError) as error:
                bad.append((index, ItemError(f"cannot be sent: {error}", index=index)))
        return _outcomes(self._dispatcher(), good, bad)


def _plain_text(given: Any) -> str:
    """Return the text that an instance of a subclass of `str` holds, such as one of NumPy's."""
    if isinstance(given, str):
        return str.__str__(given)
    raise TypeError(f"expected a text, got {type(given).__name__}")


def _outcomes(
    dispatcher: Dispatcher, good: list[tuple[int, Prompt, Params | None]], bad: list[tuple[int, ItemError]]
) -> Iterator[tuple[int, list[ResponseOutput] | ItemError]]:
    """Submit the good items and yield all outcomes. Nothing is sent before the first is asked for."""
    call = dispatcher.submit(good, len(good) + len(bad))
    try:
        if bad:
            call.deliver([*bad])
        yield from call
    except BaseException:  # Ctrl-C, or the caller wants no more: the servers need not go on
        with suppress(Exception):
            dispatcher.cancel(call)
        raise


def _listed(given: Iterable[Any], what: str, example: str) -> Sequence[Any]:
    if isinstance(given, (str, bytes, Mapping)) or not isinstance(given, Iterable):
        raise ConfigError(f"expected a list of {what} like {example}, got {type(given).__name__}")
    return given if isinstance(given, Sequence) else list(given)


def _each_params(given: Any, size: int) -> Params | list[Params | ItemError | None] | None:
    """Read sampling parameters: one for all, or a list with one per item."""
    if not isinstance(given, (list, tuple)):
        try:
            return params_from(given)
        except ItemError as error:
            raise ConfigError(str(error)) from error
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


def _collect(
    each: Iterator[tuple[int, list[ResponseOutput] | ItemError]], return_extra: bool, on_error: OnError
) -> list[Any]:
    if on_error not in ("raise", "return"):
        raise ConfigError(f"expected on_error as 'raise' or 'return', got {on_error!r}")
    found: dict[int, Any] = {}
    failed = False
    for index, outcome in each:
        if isinstance(outcome, ItemError):
            failed = True
            found[index] = outcome
        else:
            found[index] = outcome if return_extra else [output.text for output in outcome]
    results = [found[index] for index in range(len(found))]
    if failed and on_error == "raise":
        raise BatchError(results)
    return results


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
        transport: Transport | None = None,
        instance: str | None = None,
        capacity: int = UNKNOWN_CAPACITY,
    ) -> None:
        if timeout is not None and not timeout > 0:
            raise ConfigError(f"expected a timeout in seconds above 0, or None, got {timeout!r}")
        if token is None:
            token = runtime.find_token(host, port)
        if transport is None:
            transport = plugins.assemble(Config(LLMConfig("any"))).transport
        self.host = host
        self.port = port
        access = Access(token=token, instance=instance, timeout=timeout)
        self._connection = transport.connect(Address([host], port), access)
        self._only = Dispatcher()
        self._only.add(f"{host}:{port}", self._connection, capacity, timeout)

    def _dispatcher(self) -> Dispatcher:
        return self._only

    def health(self) -> Health:
        """Return the server's state. Raises `TransportError`."""
        return self._only.ask(self._connection.health())

    def shutdown(self) -> None:
        """Ask the server to end. Raises `TransportError`."""
        self._only.ask(self._connection.shut_down())

    def close(self) -> None:
        """End calls that are left, and close the connection. Idempotent."""
        self._only.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()
