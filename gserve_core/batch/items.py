"""Items: the input of users, which is read, checked and measured item by item."""

import contextlib
import hashlib
import itertools
from collections.abc import Callable, Iterable, Iterator, Mapping
from pathlib import Path
from typing import Annotated, Any, Protocol

import msgspec

from ..errors import ConfigError, ItemError
from ..images import ImageFiles
from ..messages import Conversation, Message, Params, Prompt
from ..plain import encodable, is_missing, is_table, plain
from ..sampling import TRUNCATE, check_value, params_from
from ..tasks import GENERATE, PAIR, pair_of
from ..template_kwargs import MAX_DEPTH, check_template_kwargs
from .pieces import Call, Item

TOKEN_SIZE = 5
"""Maximum size of a token id in a request, in bytes."""

ADAPTER = "adapter"
"""Key of an item's mapping, and column of a row, that names its adapter."""
MAX_KNOWN_PARAMS = 1024
"""Maximum number of sampling parameters of single items that are remembered, as many items may share an object."""

TokenId = Annotated[int, msgspec.Meta(ge=0, lt=1 << 31)]

type Read = Callable[[Any], tuple[Prompt, int]]
"""Reads an item as the user gave it, and returns it with its size in bytes. Raises ItemError, or an encoding error."""

INVALID = ItemError, msgspec.ValidationError, UnicodeEncodeError, RecursionError, OverflowError
"""What reading an item raises if the item is invalid."""

type SeedOf = Callable[[int], int]
"""Returns the seed of an item by its index."""


class Seeds:
    """The seeds of items whose parameters have none. There are none if the model's seed is 0.

    They follow from the model's seed, the number of the call and the index of the item. Then two runs of a program give
    the same results, and so does a retry.
    """

    def __init__(self, seed: int = 0) -> None:
        self.begin(seed)

    def begin(self, seed: int) -> None:
        """Begin anew with another seed of the model. The next call is the first one."""
        self._seed = seed
        self._calls = itertools.count()

    def of_next_call(self) -> SeedOf | None:
        """Return the seeds of the next call's items; None if they have none."""
        call = next(self._calls)
        if not self._seed:
            return None

        def seed(index: int) -> int:
            digest = hashlib.blake2b(f"{self._seed} {call} {index}".encode(), digest_size=4).digest()
            return int.from_bytes(digest) >> 1

        return seed


class ItemSource(Protocol):
    """The items of a call.

    `size`: number of items; None if unknown.
    `is_at_hand`: whether reading an item never blocks.
    """

    size: int | None
    is_at_hand: bool

    def read(self, call: Call) -> Iterator[Item | ItemError]:
        """Yield each item, or its error. Raises what the source raises."""
        raise NotImplementedError


class Items:
    """The items of a call as the user gave them, with their parameters. An `ItemSource`.

    `truncate_prompt_tokens`: number of tokens to which prompts are truncated; None: as the parameters say.
    `return_prompt_token_ids`: whether the outputs have the tokens of their prompts.
    `adapter`: the adapter of items that name no other; None: the default.
    `seed`: the seeds of items that may be sampled and have none; None: they get none.
    `task`: see `Group`. Only items that generate have seeds.

    Raises ConfigError: the parameters are wrong, or their number differs from the number of items. For an iterator,
    `read` raises this error at its end.
    """

    def __init__(
        self,
        given: Iterable[Any],
        sampling_params: Any,
        read: Read,
        seed: SeedOf | None,
        *,
        truncate_prompt_tokens: int | None = None,
        return_prompt_token_ids: bool = False,
        adapter: str | None = None,
        task: str = GENERATE,
    ) -> None:
        self._task = task
        self._given = given
        self._read = read
        self._seed = seed
        self._returns_prompt = return_prompt_token_ids
        self._adapter = adapter
        self._params: Iterable[tuple[Params | ItemError | None, int]]
        self._params_count: int | None = None
        self._counts_params = False
        """Whether it is only known at the end whether each item has parameters."""
        self.is_at_hand = isinstance(given, (list, tuple))
        self.size = _length(given)
        more = {} if truncate_prompt_tokens is None else {TRUNCATE: truncate_prompt_tokens}
        if not isinstance(sampling_params, Iterable) or isinstance(sampling_params, (Mapping, str)):
            try:
                self._params = itertools.repeat((_read_params(sampling_params, more), 0))
            except ItemError as error:
                raise ConfigError(str(error)) from error
            return
        self._params_count = _length(sampling_params)
        self._counts_params = self.size is None or self._params_count is None
        if not self._counts_params and self.size != self._params_count:
            raise _one_each(self._params_count, str(self.size))
        self.is_at_hand &= isinstance(sampling_params, (list, tuple))
        self._params = _each_params(sampling_params, more)

    def read(self, call: Call) -> Iterator[Item | ItemError]:
        """Yield each item, or its error. Raises what the source raises."""
        read, seed, returns_prompt, adapter = self._read, self._seed, self._returns_prompt, self._adapter
        task = self._task
        known: object = self  # the parameters that `needs_seed` is for: most items share them
        needs_seed, item_seed = True, None
        index = -1
        own = iter(self._params)
        each = _until_missing(own) if self._counts_params else own
        for (index, given), (params, params_size) in zip(enumerate(self._given), each, strict=False):
            try:
                if isinstance(params, ItemError):
                    raise params
                if params is not known:
                    known, item_seed = params, None
                    needs_seed = seed is not None and task == GENERATE and may_be_sampled(params)
                named, given = _own_adapter(given)
                prompt, size = read(given)
                if seed is not None and needs_seed:
                    item_seed = seed(index)
                yield Item(
                    call, index, prompt, params, item_seed, size + params_size, returns_prompt, task=task,
                    adapter=named or adapter,
                )  # fmt: skip
            except INVALID as error:
                yield error_of(error, index)
        if self._counts_params:
            for _ in own:
                raise _one_each(self._params_count, str(index + 1))


def _own_adapter(given: Any) -> tuple[str | None, Any]:
    """Return the adapter that a mapping names, and the mapping without it. Raises ItemError: it is not a name."""
    if type(given) is str or not isinstance(given, Mapping) or ADAPTER not in given:
        return None, given
    return read_adapter(given[ADAPTER]), {name: value for name, value in given.items() if name != ADAPTER}


def read_adapter(given: Any) -> str | None:
    """Return the name of an adapter; None for none. Raises ItemError: it is something else."""
    if isinstance(given, str):
        return str(given) or None
    if not is_missing(given):
        raise ItemError(f"expected the name of an adapter as a text, got {type(given).__name__}")
    return None


def _until_missing[T](params: Iterator[T]) -> Iterator[T]:
    """Yield sampling parameters. Raise ConfigError when those of one more item are requested."""
    count = 0
    for one in params:
        count += 1
        yield one
    raise _one_each(count, f"more than {count}")


def _length(given: Any) -> int | None:
    """Return the length of a value, if it has one."""
    with contextlib.suppress(TypeError):
        return len(given)
    return None


def error_of(error: Exception, index: int) -> ItemError:
    """Return an error of `INVALID` as that of the item with this index."""
    if isinstance(error, ItemError):
        return ItemError(str(error), index=index, invalid=error.invalid)
    if isinstance(error, msgspec.ValidationError):
        return ItemError(f"invalid item: {str(error).replace('`', '')}", index=index)
    return ItemError(f"cannot be sent: {error}", index=index)


def may_be_sampled(params: Params | None) -> bool:
    """Return whether items with these parameters may be sampled, and have no seed."""
    return params is None or (params.get("seed") is None and params.get("temperature") != 0)


def _one_each(params: int | None, items: str) -> ConfigError:
    got = "more" if params is None else params
    return ConfigError(f"expected one sampling_params for all items, or one per item ({items}); got {got}")


def _read_params(given: Any, more: Params) -> Params | None:
    """Return sampling parameters as a caller gave them, with some more. Raises ItemError."""
    params = params_from(given)
    if not more:
        return params
    if params is None:
        return more  # the model's own defaults still apply
    return {"n": 1} | params | more


def _each_params(given: Iterable[Any], more: Params) -> Iterator[tuple[Params | ItemError | None, int]]:
    """Yield the sampling parameters of each item, and their sizes in bytes. Equal objects are read once."""
    known: dict[int, tuple[Any, tuple[Params | ItemError | None, int]]] = {}
    for one in given:
        if id(one) not in known:
            made: tuple[Params | ItemError | None, int]
            try:
                params = _read_params(one, more)
                made = params, len(msgspec.msgpack.encode(params))
            except ItemError as error:
                made = error, 0
            if len(known) >= MAX_KNOWN_PARAMS:
                known.clear()
            known[id(one)] = one, made  # while it is kept here, no other object has its id
        yield known[id(one)][1]


# -------------------------------------------------------------------------------------------------------------- prompts


def list_prompts(given: Any) -> Iterable[Any]:
    """Return the prompts of a call. As in `vllm.LLM`, one prompt may stand alone. Raises ConfigError: they are none."""
    if isinstance(given, str) or _is_prompt(given):
        return [given]
    if isinstance(given, (list, tuple)) and given and all(type(token) is int for token in given):
        return [given]
    return _listed(given, "prompts", '["a prompt", …]', "prompt")


def _is_prompt(given: Any) -> bool:
    """Return whether a mapping is one prompt, in a form of vLLM. If it holds lists of them, it is a table."""
    if not isinstance(given, Mapping):
        return False
    ids: Any = given.get("prompt_token_ids")
    if _length(ids) is None:
        return isinstance(given.get("prompt"), str)
    return all(_length(token) is None for token in itertools.islice(ids, 1))


def read_prompt(given: Any) -> tuple[str | list[int], int]:
    """Return a text or a list of token ids, and its size in bytes. Raises ItemError: it is neither."""
    if isinstance(given, str):
        text = given if type(given) is str else str.__str__(given)  # subclasses, such as NumPy's, cannot be sent
        return text, len(text) if text.isascii() else len(text.encode())
    if isinstance(given, (list, tuple)):
        try:
            return msgspec.convert(given, list[TokenId]), TOKEN_SIZE * len(given)
        except msgspec.ValidationError:  # perhaps its numbers are NumPy's
            ids = plain(given)
            return msgspec.convert(ids, list[TokenId]), TOKEN_SIZE * len(ids)
    if isinstance(given, Mapping):
        return read_prompt(_prompt_of(given))
    if isinstance(known := plain(given), (str, list)):
        return read_prompt(known)
    raise ItemError(f"expected a text or a list of token ids, got {type(given).__name__}")


def _prompt_of(given: Mapping[str, Any]) -> Any:
    """Return the prompt in a mapping, as `vllm.LLM` takes it. Raises ItemError."""
    fields = {name: value for name, value in given.items() if value is not None}
    prompt = fields.pop("prompt", None)
    prompt = fields.pop("prompt_token_ids", prompt)
    if fields or prompt is None:
        names = ", ".join(map(repr, given)) or "nothing"
        raise ItemError(f"expected a mapping with 'prompt' or 'prompt_token_ids', got one with {names}")
    return prompt


# ---------------------------------------------------------------------------------------------------------------- pairs


def list_pairs(given: Any) -> Iterable[Any]:
    """Return the pairs of a call. One pair of texts may stand alone. Raises ConfigError: they are none."""
    if isinstance(given, tuple) and len(given) == 2 and all(isinstance(text, str) for text in given):
        return [given]
    return _listed(given, "pairs of texts", '[("a query", "a document"), …]', "pair")


def read_pair(given: Any) -> tuple[Conversation, int]:
    """Return two texts as one prompt, and their size in bytes. Raises ItemError, or an encoding error."""
    texts = [given.get(role) for role in PAIR] if isinstance(given, Mapping) else plain(given)
    if not isinstance(texts, list) or len(texts) != 2 or not all(isinstance(text, str) for text in texts):
        got = f"{given!r:.100}" if isinstance(given, (list, tuple, Mapping)) else type(given).__name__
        raise ItemError(f"expected a pair of texts like ('a query', 'a document'), got {got}")
    return pair_of(map(plain, texts)), sum(len(text.encode()) for text in texts)


# -------------------------------------------------------------------------------------------------------- conversations


def list_conversations(given: Any) -> Iterable[Any]:
    """Return the conversations of a call. As in `vllm.LLM`, one may stand alone. Raises ConfigError: they are none."""
    if isinstance(given, Conversation) or (isinstance(given, Mapping) and _is_conversation(given)):
        return [given]
    if isinstance(given, (list, tuple)) and given and _is_message(given[0]):
        return [given]
    return _listed(given, "conversations", "[[{'role': 'user', 'content': …}], …]", "messages")


def _is_message(given: Any) -> bool:
    return isinstance(given, Message) or (isinstance(given, Mapping) and "role" in given)


def _is_conversation(given: Mapping[str, Any]) -> bool:
    """Return whether a mapping is one conversation. If its messages are lists, it is a table."""
    messages: Any = given.get("messages")
    return _length(messages) is not None and all(map(_is_message, itertools.islice(messages, 1)))


class ConversationReader:
    """Reads conversations: lists of messages, or mappings with `messages` and options of their own.

    The options mean the same as in `vllm.LLM.chat`. They are for conversations that have no own ones.

    `media_root`: see `ImageFiles`.

    Raises ConfigError: an option is wrong.
    """

    def __init__(
        self,
        *,
        add_generation_prompt: bool = True,
        continue_final_message: bool = False,
        tools: Any = None,
        chat_template_kwargs: Any = None,
        media_root: str | Path | None = None,
    ) -> None:
        self._images = ImageFiles(media_root)
        try:
            self._shared = Conversation(
                [], add_generation_prompt, continue_final_message, _tools(tools), _variables(chat_template_kwargs)
            )
            self._size = len(msgspec.msgpack.encode(self._shared))
        except ItemError as error:
            raise ConfigError(str(error)) from error
        except (TypeError, ValueError, OverflowError, RecursionError) as error:
            raise ConfigError(f"tools or chat_template_kwargs cannot be sent: {error}") from error

    def __call__(self, given: Any) -> tuple[Conversation, int]:
        """Return a conversation, and its size in bytes. Raises ItemError, or an encoding error."""
        shared, size = self._shared, self._size
        if isinstance(given, Conversation):
            given = msgspec.structs.asdict(given)
        if not isinstance(given, list) and isinstance(given, Mapping):  # the first test is much faster
            shared, size = self._own(given)
            given = given.get("messages")
        given = self._images.embed(given)
        try:
            messages = msgspec.convert(given, list[Message])
        except msgspec.ValidationError:  # perhaps it is an array, or holds some
            messages = msgspec.convert(plain(given), list[Message])
        if not messages:
            raise ItemError("the conversation is empty")
        encoded = _encode(messages)
        made = Conversation(
            _DECODER.decode(encoded), shared.add_generation_prompt, shared.continue_final_message, shared.tools,
            shared.chat_template_kwargs,
        )  # fmt: skip
        return made, len(encoded) + size

    def _own(self, given: Mapping[str, Any]) -> tuple[Conversation, int]:
        """Return a conversation's options without its messages, and their size in bytes. Raises ItemError."""
        fields = {name: value for name, value in given.items() if name != "messages" and value is not None}
        if unknown := fields.keys() - _OPTIONS:
            name = min(unknown, key=str)
            raise ItemError(f"a conversation has no field {name!r}; expected messages, {', '.join(_OPTIONS)}")
        fields["tools"] = _tools(fields.get("tools"))
        fields["chat_template_kwargs"] = _variables(fields.get("chat_template_kwargs"))
        own = {name: value for name, value in fields.items() if value is not None}
        made = msgspec.convert(msgspec.structs.asdict(self._shared) | own, Conversation)
        return made, len(_encode(made))


_DECODER = msgspec.msgpack.Decoder(list[Message])
_OPTIONS = dict.fromkeys(Conversation.__struct_fields__[1:])


def _encode(value: Any) -> bytes:
    try:
        return msgspec.msgpack.encode(value, enc_hook=encodable)
    except TypeError as error:
        raise ItemError(str(error)) from error


def _tools(given: Any) -> list[dict[str, Any]] | None:
    """Return tools as plain values. Raises ItemError: they are no list of mappings."""
    if given is None:
        return None
    tools = plain(given)
    if not isinstance(tools, list) or not all(isinstance(tool, dict) for tool in tools):
        raise ItemError(f"expected tools as a list like [{{'type': 'function', 'function': …}}], got {given!r:.100}")
    check_value("'tools'", tools, MAX_DEPTH)
    return tools


def _variables(given: Any) -> dict[str, Any] | None:
    """Return variables for the chat template as plain values. Raises ItemError: they are no mapping, or not allowed."""
    if given is None:
        return None
    variables = plain(given)
    if not isinstance(variables, dict):
        raise ItemError(f"expected chat_template_kwargs as a mapping, got {type(given).__name__}")
    check_template_kwargs(variables)
    return variables


def _listed(given: Any, what: str, example: str, column: str) -> Iterable[Any]:
    """Return items. Raises ConfigError: they are not a list or another iterable, or they are a table."""
    if is_table(given):
        kind = f"{type(given).__module__.partition('.')[0]}.{type(given).__name__}"
        kind = "a dict of columns" if isinstance(given, dict) else f"a table ({kind})"
        raise ConfigError(
            f"expected a list of {what}, got {kind}: pass a column, as in df['{column}'], or use service.map(df)"
        )
    if isinstance(given, (str, bytes, Mapping)) or not isinstance(given, Iterable):
        raise ConfigError(f"expected a list of {what} like {example}, got {type(given).__name__}")
    return given
