"""Conversations in the form in which vLLM renders them."""

from collections.abc import Iterable
from typing import Any

import msgspec

from ...messages import Conversation, Message

type Options = tuple[bool, bool, bytes | None]
"""The options of a conversation. Conversations with equal ones are rendered together."""


def options_of(chat: Conversation) -> Options:
    """Return the options of a conversation."""
    more = None
    if chat.tools is not None or chat.chat_template_kwargs is not None:
        more = msgspec.msgpack.encode((chat.tools, chat.chat_template_kwargs))
    return chat.add_generation_prompt, chat.continue_final_message, more


def messages_of(chat: Conversation) -> list[dict[str, Any]]:
    """Return the messages of a conversation, of which vLLM may change the values."""
    return [_message(message, made) for message, made in zip(chat.messages, _builtins(chat.messages), strict=True)]


def _builtins(messages: Iterable[Message]) -> list[dict[str, Any]]:
    made: list[dict[str, Any]] = msgspec.to_builtins(messages)
    return made


def _message(message: Message, made: dict[str, Any]) -> dict[str, Any]:
    """Replace the fields with which vLLM does nothing by those that mean the same."""
    if message.reasoning_content is not None:  # so does vLLM's own chat completion
        made.setdefault("reasoning", made.pop("reasoning_content"))
    if message.function_call is not None:
        made.setdefault("tool_calls", [{"type": "function", "function": made.pop("function_call")}])
    return made
