"""Items: the input of users, which is read, checked and measured item by item."""

import hashlib
import itertools
import random
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import Annotated, Any, NoReturn

import msgspec

from ..errors import ConfigError, ItemError
from ..host.forks import call_in_child
from ..messages import Conversation, Message, Params, Prompt
from ..sampling import params_from
from .pieces import Call, Item

TOKEN_SIZE = 5
"""Maximum size of a token id in a request, in bytes."""

TokenId = Annotated[int, msgspec.Meta(ge=0, lt=1 << 31)]

type Read = Callable[[Any], tuple[Prompt, int]]
"""Reads an item as the user gave it, and returns it with its size in bytes. Raises ItemError, or an encoding error."""

# Our own generator, so that the program's global one keeps its seed. The system's (`secrets`) would release the GIL for
# every item, and wait until another thread gives it back.
_CHANCE = random.Random()  # noqa: S311
call_in_child(_CHANCE.seed)


class Seeds:
    """The seeds of items whose parameters have none, so that a retry samples the same.

    They are random if the model's seed is 0. Otherwise they follow from the model's seed, the number of the call and
    the index of the item. Then two runs of a program give the same results.
    """

    def __init__(self, seed: int = 0) -> None:
        self.begin(seed)

    def begin(self, seed: int) -> None:
        """Begin anew with another seed of the model. The next call is the first one."""
        self._seed = seed
        self._calls = itertools.count()

    def of_next_call(self) -> Callable[[int], int]:
        """Return a function that returns the seed of an item by its index."""
        call = next(self._calls)
        if not self._seed:
            return lambda index: _CHANCE.getrandbits(31)

        def seed(index: int) -> int:
            digest = hashlib.blake2b(f"{self._seed} {call} {index}".encode(), digest_size=4).digest()
            return int.from_bytes(digest) >> 1

        return seed


class Items:
    """The items of a call as the user gave them, with their parameters.

    `size`: number of items; None if unknown.
    `is_at_hand`: whether reading an item never blocks.

    Raises ConfigError: the parameters are wrong, or their number differs from the number of items. For an iterator,
    `read` raises this error at its end.
    """

    def __init__(self, given: Iterable[Any], sampling_params: Any, read: Read, seed: Callable[[int], int]) -> None:
        self._read = read
        self._seed = seed
        self._params: Iterable[tuple[Params | ItemError | None, int]]
        self._count: int | None = None
        """Number of items that an iterator must have, because there are so many parameters."""
        self.is_at_hand = isinstance(given, (list, tuple))
        self.size = len(given) if isinstance(given, Sequence) else None
        if isinstance(sampling_params, (list, tuple)):
            if self.size not in (None, len(sampling_params)):
                raise _one_each(len(sampling_params), str(self.size))
            self._params = _each_params(sampling_params)
            if self.size is None:
                self._count = len(sampling_params)
                self._params = itertools.chain(self._params, _too_few(self._count))
        else:
            try:
                self._params = itertools.repeat((params_from(sampling_params), 0))
            except ItemError as error:
                raise ConfigError(str(error)) from error
        self._given = given

    def read(self, call: Call) -> Iterator[Item | ItemError]:
        """Yield each item, or its error. Raises what the source raises."""
        read, seed = self._read, self._seed
        known: object = self  # the parameters that `needs_seed` is for: most items share them
        needs_seed = True
        index = -1
        for (index, given), (params, params_size) in zip(enumerate(self._given), self._params, strict=False):
            try:
                if isinstance(params, ItemError):
                    raise params
                if params is not known:
                    known, needs_seed = params, _may_be_sampled(params)
                prompt, size = read(given)
                yield Item(call, index, prompt, params, seed(index) if needs_seed else None, size + params_size)
            except ItemError as error:
                yield ItemError(str(error), index=index)
            except msgspec.ValidationError as error:
                yield ItemError(f"invalid item: {str(error).replace('`', '')}", index=index)
            except (UnicodeEncodeError, RecursionError, OverflowError) as error:
                yield ItemError(f"cannot be sent: {error}", index=index)
        if self._count is not None and index + 1 < self._count:
            raise _one_each(self._count, str(index + 1))


def _may_be_sampled(params: Params | None) -> bool:
    """Return whether items with these parameters may be sampled, and have no seed."""
    return params is None or (params.get("seed") is None and params.get("temperature") != 0)


def _one_each(params: int, items: str) -> ConfigError:
    return ConfigError(f"expected one sampling_params for all items, or one per item ({items}); got {params}")


def _too_few(params: int) -> Iterator[NoReturn]:
    """Raise ConfigError when the parameters of one more item are requested."""
    raise _one_each(params, f"more than {params}")
    yield


def _each_params(given: Sequence[Any]) -> list[tuple[Params | ItemError | None, int]]:
    """Return the sampling parameters of each item, and their sizes in bytes. Equal objects are read once."""
    known: dict[int, tuple[Params | ItemError | None, int]] = {}
    for one in given:
        if id(one) not in known:
            try:
                params = params_from(one)
                known[id(one)] = params, len(msgspec.msgpack.encode(params))
            except ItemError as error:
                known[id(one)] = error, 0
    return [known[id(one)] for one in given]


def read_prompt(given: Any) -> tuple[str | list[int], int]:
    """Return a text or a list of token ids, and its size in bytes. Raises ItemError: it is neither."""
    if isinstance(given, str):
        text = given if type(given) is str else str.__str__(given)  # subclasses, such as NumPy's, cannot be sent
        return text, len(text) if text.isascii() else len(text.encode())
    if isinstance(given, (list, tuple)):
        return msgspec.convert(given, list[TokenId]), TOKEN_SIZE * len(given)
    raise ItemError(f"expected a text or a list of token ids, got {type(given).__name__}")


def conversation_reader(*, add_generation_prompt: bool, continue_final_message: bool) -> Read:
    """Return a function that reads lists of messages. The flags mean the same as in `vllm.LLM.chat`."""

    def read(given: Any) -> tuple[Conversation, int]:
        messages = msgspec.convert(given, list[Message])
        if not messages:
            raise ItemError("the conversation is empty")
        made = Conversation(messages, add_generation_prompt, continue_final_message)
        encoded = msgspec.msgpack.encode(made, enc_hook=_plain_text)
        return msgspec.msgpack.decode(encoded, type=Conversation), len(encoded)

    return read


def check_list(given: Any, what: str, example: str) -> None:
    """Raise ConfigError if items are not a list or another iterable, or if they are a text or mapping."""
    if isinstance(given, (str, bytes, Mapping)) or not isinstance(given, Iterable):
        raise ConfigError(f"expected a list of {what} like {example}, got {type(given).__name__}")


def _plain_text(given: Any) -> str:
    """Return the text of an instance of a subclass of `str`, such as NumPy's."""
    if isinstance(given, str):
        return str.__str__(given)
    raise TypeError(f"expected a text, got {type(given).__name__}")
