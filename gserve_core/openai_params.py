"""Sampling parameters in the form of OpenAI's chat API, as vLLM reads them there."""

from typing import Any

import msgspec
from msgspec import Struct

from .messages import Params


class _ChatParams(Struct, forbid_unknown_fields=True):
    """The sampling parameters that mean the same in both forms.

    The defaults are those of `vllm.SamplingParams`. In OpenAI's API an absent field is the model's own default instead.
    """

    n: int = 1
    temperature: float = 1.0
    top_p: float = 1.0
    top_k: int = 0
    min_p: float = 0.0
    presence_penalty: float = 0.0
    frequency_penalty: float = 0.0
    repetition_penalty: float = 1.0
    max_tokens: int | None = 16
    min_tokens: int = 0
    ignore_eos: bool = False
    seed: int | None = None
    stop: str | list[str] | None = None
    stop_token_ids: list[int] | None = None
    include_stop_str_in_output: bool = False
    skip_special_tokens: bool = True
    spaces_between_special_tokens: bool = True


def chat_fields(params: Params | None) -> dict[str, Any] | None:
    """Return the fields of a chat completion request that mean the same as `params`.

    None: there are no such fields. The parameters are wrong, or OpenAI's API has no equal of one.
    """
    if params is None:
        return {}
    try:
        made = msgspec.convert(params, _ChatParams)
    except msgspec.ValidationError:
        return None
    return {name: value for name, value in msgspec.structs.asdict(made).items() if value is not None}
