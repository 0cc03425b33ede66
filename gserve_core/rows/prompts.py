"""Prompts out of rows: by a template, by a column, or by a column with a known name."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import msgspec

from ..batch.items import ADAPTER, ConversationReader, read_adapter, read_prompt
from ..errors import ConfigError, ItemError
from ..messages import Params, Prompt
from ..sampling import params_from
from ..tasks import GENERATE, read_options
from .templates import Template, column_names

TEXT_COLUMNS = ("prompt", "text")
"""Columns that hold the prompt if nothing else is asked for, the first one first."""
MESSAGE_COLUMNS = ("messages", "conversations")
CHAT_COLUMNS = (*MESSAGE_COLUMNS, *TEXT_COLUMNS)
"""The same for conversations. A text is a message of the user."""
ROLES = {"human": "user", "gpt": "assistant", "bing": "assistant", "chatgpt": "assistant", "bard": "assistant"}
"""Roles of ShareGPT's form that OpenAI's API names otherwise."""
PARAMS, TOOLS, TEMPLATE_KWARGS = "params", "tools", "chat_template_kwargs"
"""Columns with options of a row."""


@dataclass(frozen=True, kw_only=True)
class RowOptions:
    """How prompts are made of rows.

    `is_chat`: whether a prompt is a conversation.
    `task`: "generate", or "embed".
    `template`: a template of Jinja2 over the columns of a row. It makes a text.
    `column`: the column with the prompt.
    `system`: a template for the system message of a conversation that has none.
    `params`: sampling parameters: a `vllm.SamplingParams`, or a mapping of its fields.
    `tools`: tools for all conversations, in OpenAI's form.
    `schema`: a JSON schema for the answers.
    `drop_answer`: whether a final message of the assistant is left out.
    `adapter`: the adapter of rows that name no other.
    `media_root`: the folder below which the images of conversations may be files; None: they are data URLs.

    Without `template` and `column`, the prompt is the column `prompt` or `text`, and for a conversation also `messages`
    or `conversations`. The columns `params`, `tools`, `chat_template_kwargs` and `adapter` of a row are its own
    options.
    """

    is_chat: bool = False
    task: str = GENERATE
    template: str | None = None
    column: str | None = None
    system: str | None = None
    params: Any = None
    tools: Sequence[Any] | None = None
    schema: Mapping[str, Any] | None = None
    drop_answer: bool = False
    adapter: str | None = None
    media_root: str | Path | None = None


def schema_of(given: Any) -> Mapping[str, Any] | None:
    """Return a JSON schema as a mapping. It may be given as a class of pydantic. Raises ConfigError: it is neither."""
    if given is None or isinstance(given, Mapping):
        return given
    if isinstance(given, type) and hasattr(given, "model_json_schema"):
        found: Mapping[str, Any] = given.model_json_schema()
        return found
    raise ConfigError(f"expected a JSON schema as a mapping, or a class of pydantic, got {type(given).__name__}")


class Prompts:
    """Makes prompts out of rows. Raises ConfigError: the options are wrong."""

    def __init__(self, options: RowOptions) -> None:
        if options.template is not None and options.column is not None:
            raise ConfigError("expected a template or a column, not both")
        for name in ("system", "tools", "drop_answer", "media_root"):
            if getattr(options, name) not in (None, False) and not options.is_chat:
                raise ConfigError(f"'{name}' is for conversations: use chat")
        if options.task != GENERATE and options.schema is not None:
            raise ConfigError("'schema' is for answers that are texts: use generate or chat")
        self._options = options
        self.task = options.task
        self._text = None if options.template is None else Template(options.template, "the template")
        self._system = None if options.system is None else Template(options.system, "the system message")
        try:
            shared = params_from(options.params)
            if self.task != GENERATE:
                read_options(shared)
        except ItemError as error:
            raise ConfigError(str(error)) from error
        if options.schema is not None:
            if shared is not None and "structured_outputs" in shared:
                raise ConfigError("expected a schema or 'structured_outputs' in the parameters, not both")
            shared = (shared or {}) | {"structured_outputs": {"json": dict(options.schema)}}
        self.params: Params | None = shared
        """The parameters of rows that have none of their own."""
        by_default = CHAT_COLUMNS if options.is_chat else TEXT_COLUMNS
        self._names = by_default if options.column is None else (options.column,)
        self._read_conversation = ConversationReader(tools=options.tools, media_root=options.media_root)

    def make(self, row: Mapping[str, Any]) -> tuple[Prompt, int, Params | None]:
        """Return the prompt of a row, its size in bytes, and its sampling parameters.

        Raises ItemError, msgspec.ValidationError, UnicodeEncodeError or RecursionError: none can be made of it.
        """
        params = self.params
        if PARAMS in row and (own := _decoded(row[PARAMS], dict, PARAMS)) is not None:
            set_ = {name: value for name, value in own.items() if value is not None}  # in Arrow, a row has all keys
            params = (params or {}) | (params_from(set_) or {})
        given = self._given(row)
        if not self._options.is_chat:
            if type(given) is not str and isinstance(given, (list, tuple)) and given and isinstance(given[0], Mapping):
                raise ItemError("expected a text or a list of token ids, got a conversation: use chat")
            prompt, size = read_prompt(given)
            return prompt, size, params
        messages = self._messages(given)
        if self._system is not None and not _has_system(messages):
            messages = [{"role": "system", "content": self._system.render(row)}, *messages]
        tools = _decoded(row.get(TOOLS), list, TOOLS)
        kwargs = _decoded(row.get(TEMPLATE_KWARGS), dict, TEMPLATE_KWARGS)
        if tools is None and kwargs is None:
            return (*self._read_conversation(messages), params)
        return (*self._read_conversation({"messages": messages, TOOLS: tools, TEMPLATE_KWARGS: kwargs}), params)

    def adapter(self, row: Mapping[str, Any]) -> str | None:
        """Return the name of the adapter of a row; None: the default. Raises ItemError: the row has something else."""
        given = row.get(ADAPTER)
        return self._options.adapter if given is None else read_adapter(given) or self._options.adapter

    def _given(self, row: Mapping[str, Any]) -> Any:
        """Return what a row says: a text, token ids or messages."""
        if self._text is not None:
            return self._text.render(row)
        names = self._names
        for name in names:
            if (given := row.get(name)) is not None:
                return given
        if names is TEXT_COLUMNS and any(row.get(name) is not None for name in MESSAGE_COLUMNS):
            raise ItemError("the row holds a conversation: use chat")
        if empty := [name for name in names if name in row]:
            raise ItemError(f"the column '{empty[0]}' is null")
        wanted = f"the column '{names[0]}'" if len(names) == 1 else f"one of the columns {', '.join(names)}"
        raise ItemError(f"expected {wanted}, or a template; the row has {column_names(row)}")

    def _messages(self, given: Any) -> list[Any]:
        """Return the messages of a conversation in OpenAI's form."""
        if isinstance(given, str):
            found = _json(given, list) if self._text is None and given.lstrip().startswith("[") else None
            if not found or not all(isinstance(it, dict) for it in found):
                return [{"role": "user", "content": given}]
            given = found
        if not isinstance(given, (list, tuple)):
            raise ItemError(f"expected a text or a list of messages, got {type(given).__name__}")
        messages = [_message(message) for message in given]
        if self._options.drop_answer:
            while messages and isinstance(messages[-1], Mapping) and messages[-1].get("role") == "assistant":
                messages.pop()
        if not messages:
            raise ItemError("the conversation is empty")
        return messages


def _message(message: Any) -> Any:
    """Return a message in OpenAI's form. ShareGPT's form has `from` and `value`."""
    if isinstance(message, (dict, Mapping)) and message.get("role") is None and message.get("from") is not None:
        role = message["from"]
        return {"role": ROLES.get(role, role), "content": message.get("value")}
    return message


def _has_system(messages: Sequence[Any]) -> bool:
    """Return whether a conversation begins with a system message."""
    return bool(messages) and isinstance(messages[0], Mapping) and messages[0].get("role") == "system"


def _decoded[T](value: Any, kind: type[T], column: str) -> T | None:
    """Return the value of an option's column. In a CSV file it is JSON text. Raises ItemError: it is something else."""
    if value is None or isinstance(value, kind):
        return value
    found = _json(value, kind) if isinstance(value, str) else None
    if found is None:
        what = "a mapping" if kind is dict else "a list"
        raise ItemError(f"expected {what} in the column '{column}', got {type(value).__name__}")
    return found


def _json[T](text: str, kind: type[T]) -> T | None:
    """Return the value of a JSON text; None if it is no such value."""
    try:
        found = msgspec.json.decode(text)
    except (ValueError, RecursionError):
        return None
    return found if isinstance(found, kind) else None
