"""The variables for a model's chat template that may come from outside: `chat_template_kwargs`."""

from typing import Any

from .errors import ItemError
from .sampling import check_value

RESERVED = {
    "chat_template": "it is a program that the server would run; set it in the config of the server",
    "tools": "use 'tools' beside 'chat_template_kwargs'",
    "add_generation_prompt": "set it beside 'chat_template_kwargs'",
    "continue_final_message": "set it beside 'chat_template_kwargs'",
    **dict.fromkeys(("conversation", "messages"), "the messages themselves are sent"),
    **dict.fromkeys(
        (
            "tokenize", "padding", "truncation", "max_length", "return_tensors", "return_dict",
            "return_assistant_tokens_mask", "tokenizer_kwargs", "processor_kwargs",
        ),
        "it is an argument of the tokenizer, which the server sets",
    ),
}  # fmt: skip
"""Names that are arguments of the rendering and not variables of a template, and what to do instead."""
MAX_DEPTH = 128
"""Maximum number of levels to which variables and tools may be nested."""


def check_template_kwargs(given: Any) -> None:
    """Raise ItemError if `chat_template_kwargs` set an argument of the rendering. Nothing is wrong with None."""
    for name in RESERVED.keys() & given.keys() if isinstance(given, dict) else ():
        if given[name] is not None:
            raise ItemError(f"'{name}' is not allowed in chat_template_kwargs: {RESERVED[name]}")
    check_value("'chat_template_kwargs'", given, MAX_DEPTH)
