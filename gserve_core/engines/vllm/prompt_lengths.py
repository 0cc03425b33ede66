"""The lengths of prompts in tokens, without an engine: only the tokenizer of the model is loaded."""

from collections.abc import Mapping, Sequence
from typing import Any

import msgspec

from ...config import LLMConfig
from ...errors import GserveError
from ...messages import Conversation, Prompt
from . import demo_model
from .files import chat_template


def prompt_lengths(llm: LLMConfig, template_kwargs: Mapping[str, Any], prompts: Sequence[Prompt]) -> list[int]:
    """Return the number of tokens of each prompt.

    `template_kwargs`: variables for the chat template.

    Raises GserveError: the tokenizer cannot be loaded here, or cannot read a prompt.
    """
    arguments = llm.engine_kwargs
    name = demo_model.resolve(arguments.get("tokenizer") or arguments["model"], lambda phase: None)
    template = chat_template(arguments.get("chat_template"))
    try:
        from transformers import AutoTokenizer

        tokenizer: Any = AutoTokenizer.from_pretrained(
            name, trust_remote_code=llm.trust_remote_code, revision=llm.tokenizer_revision or llm.revision
        )
        lengths = []
        for prompt in prompts:
            if isinstance(prompt, Conversation):
                lengths.append(_chat_length(tokenizer, template, template_kwargs, prompt))
            else:
                lengths.append(len(prompt if isinstance(prompt, list) else tokenizer(prompt).input_ids))
    except Exception as error:  # of transformers: of any type
        raise GserveError(f"the tokens cannot be counted here: {' '.join(str(error).split())}") from error
    return lengths


def _chat_length(tokenizer: Any, template: str | None, variables: Mapping[str, Any], chat: Conversation) -> int:
    if chat.has_images:
        raise ValueError("only a server counts those of images")
    text = tokenizer.apply_chat_template(
        msgspec.to_builtins(chat.messages), tools=chat.tools, chat_template=template, tokenize=False,
        add_generation_prompt=chat.add_generation_prompt, continue_final_message=chat.continue_final_message,
        **variables, **(chat.chat_template_kwargs or {}),
    )  # fmt: skip
    return len(tokenizer(text, add_special_tokens=False).input_ids)
