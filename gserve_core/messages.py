"""The messages between a client and a server, as msgspec types.

Unknown fields are refused, except in the messages of a conversation: public data has fields of its own there.

The JSON bodies of `/chat` and `/generate` are `ChatRequest` and `GenerateRequest`. Their answers are lists of lists of
`ResponseOutput`. gserve's own client sends a `RunRequest`, and its server answers with a stream of lists of `Event`.
"""

import itertools
import math
from collections.abc import Mapping, Sequence
from typing import Annotated, Any

from msgspec import UNSET, Meta, Struct, UnsetType, structs

from .images import IMAGE_PARTS, check_url
from .plain import without_none
from .weights import FIRST

TEXT_PARTS = {"text": "text", "input_text": "text", "output_text": "text", "refusal": "refusal", "thinking": "thinking"}
"""Types of parts that are texts, each with the field that holds its text. As in vLLM, all of them count as `text`."""


class ImageUrl(Struct, frozen=True, omit_defaults=True):
    """The URL of an image: `data:image/png;base64,…`. In a part that is no image, it may be None."""

    url: str | None = None


class Part(Struct, frozen=True, omit_defaults=True):
    """A part of a message: a text, `{"type": "text", "text": …}`, or an image.

    Parts of the other `TEXT_PARTS` become such a text. All forms of an image become
    `{"type": "image_url", "image_url": {"url": …}}`.

    `text` None: the part is empty, and is left out.
    """

    type: str
    text: str | None = None
    refusal: str | None = None
    thinking: str | None = None
    image_url: Any = None
    image: Any = None

    def __post_init__(self) -> None:
        text = image = None
        if self.type in TEXT_PARTS:
            text = getattr(self, TEXT_PARTS[self.type])
        elif self.type in IMAGE_PARTS:
            image = _image(self.type, getattr(self, IMAGE_PARTS[self.type]))
        else:
            raise ValueError(f"a part of type '{self.type}' is not supported: only texts and images are")
        kind = "text" if image is None else "image_url"
        own = {"type": kind, "text": text, "refusal": None, "thinking": None, "image_url": image, "image": None}
        for name, value in own.items():
            structs.force_setattr(self, name, value)

    @property
    def url(self) -> str | None:
        """The data URL of an image; None for a text."""
        return self.image_url.url if isinstance(self.image_url, ImageUrl) else None


def _image(kind: str, given: Any) -> ImageUrl:
    """Return the URL of an image in its one form. Raises ValueError: it is no data URL."""
    if isinstance(given, Mapping):
        given = given.get("url")
    url = given.url if isinstance(given, ImageUrl) else given
    if url is None:
        raise ValueError(f"a part of type '{kind}' needs '{IMAGE_PARTS[kind]}'")
    if not isinstance(url, str):
        raise ValueError(f"expected the URL of an image as a text, got {type(url).__name__}")
    check_url(url)
    return ImageUrl(url)


class Message(Struct, frozen=True, omit_defaults=True):
    """One turn of a conversation, as in OpenAI's chat API. A field that is None is absent; unknown ones are ignored.

    `content` may be None. It may be absent only beside another field that says something.
    `reasoning_content`: another name of `reasoning`.
    `function_call`: the older form of `tool_calls`.
    """

    role: str
    content: str | list[Part] | UnsetType | None = UNSET
    name: str | None = None
    tool_calls: list[dict[str, Any]] | None = None
    tool_call_id: str | None = None
    reasoning: str | None = None
    reasoning_content: str | None = None
    refusal: str | None = None
    function_call: dict[str, Any] | None = None

    def __post_init__(self) -> None:
        if self.content is UNSET:
            others = self.tool_calls, self.reasoning, self.reasoning_content, self.refusal, self.function_call
            if all(other is None for other in others):
                raise ValueError("a message needs 'content'")
            structs.force_setattr(self, "content", None)
        if self.tool_calls is not None:
            structs.force_setattr(self, "tool_calls", without_none(self.tool_calls))
        if self.function_call is not None:
            structs.force_setattr(self, "function_call", without_none(self.function_call))

    @property
    def texts(self) -> list[str]:
        """The texts of its content."""
        if isinstance(self.content, str):
            return [self.content]
        return [part.text for part in self.content or () if part.text is not None]

    @property
    def images(self) -> list[str]:
        """The data URLs of its images."""
        if isinstance(self.content, str):
            return []
        return [url for part in self.content or () if (url := part.url) is not None]


class Conversation(Struct, frozen=True, forbid_unknown_fields=True, omit_defaults=True):
    """A conversation to continue. All fields after the first mean the same as in `vllm.LLM.chat`."""

    messages: list[Message]
    add_generation_prompt: bool = True
    continue_final_message: bool = False
    tools: list[dict[str, Any]] | None = None
    chat_template_kwargs: dict[str, Any] | None = None

    @property
    def has_images(self) -> bool:
        """Whether a message has an image."""
        return any(message.images for message in self.messages)


type Prompt = str | list[int] | Conversation
"""The prompt of one item: a text, a list of token ids, or a conversation."""

type Params = dict[str, Any]
"""Public fields of `vllm.SamplingParams`, by name."""


class ChatRequest(Struct, frozen=True, forbid_unknown_fields=True, omit_defaults=True):
    """Body of `POST /chat`. `params` None: the model's own defaults, as in `vllm.LLM.chat`.

    `model`: the name of the model, for a gateway with several. A server ignores it.
    `adapter`: see `Group.adapters`.
    """

    conversations: list[list[Message]]
    params: Params | None = None
    add_generation_prompt: bool = True
    continue_final_message: bool = False
    tools: list[dict[str, Any]] | None = None
    chat_template_kwargs: dict[str, Any] | None = None
    return_prompt_token_ids: bool = False
    model: str | None = None
    adapter: str | None = None


class GenerateRequest(Struct, frozen=True, forbid_unknown_fields=True, omit_defaults=True):
    """Body of `POST /generate`: texts, or lists of token ids. `model`: see `ChatRequest`. `adapter`: see `Group`."""

    prompts: list[str | list[int]]
    params: Params | None = None
    return_prompt_token_ids: bool = False
    model: str | None = None
    adapter: str | None = None


class Logprob(Struct, frozen=True, omit_defaults=True, gc=False):
    """The log probability of one token, as in `vllm.logprobs.Logprob`."""

    logprob: float
    rank: int | None = None
    decoded_token: str | None = None


type Logprobs = list[dict[int, Logprob] | None]
"""One entry per token: its log probabilities, by token id. The first entry for a prompt is None."""


class ResponseOutput(Struct, frozen=True, omit_defaults=True, gc=False):
    """One completion: the fields of `vllm.CompletionOutput`, and those of its prompt.

    `finish_reason`: "stop", "length" or "repetition"; "abort" if an update of the weights has ended it early.
    `stop_reason`: the stop string or token id that ended the completion.
    `prompt_tokens`: number of tokens of the prompt; None if the engine does not count them.
    `prompt_token_ids`: the tokens of the prompt, if the call requests them.
    `weight_version`: the version of the weights that made it, or its last token; see `VLLMService.update_weights`.
    `weight_spans`: the version, the first token and the end of each part, if several versions made it; else None.
    """

    text: str
    token_ids: list[int] = []
    finish_reason: str | None = None
    stop_reason: int | str | None = None
    cumulative_logprob: float | None = None
    logprobs: Logprobs | None = None
    prompt_logprobs: Logprobs | None = None
    prompt_tokens: int | None = None
    prompt_token_ids: list[int] | None = None
    weight_version: str = FIRST
    weight_spans: list[tuple[str, int, int]] | None = None


class FlatLogprobs(Struct, frozen=True, array_like=True, gc=False):
    """Log probabilities in few objects, as vLLM makes them, and as they are sent.

    `counts`: number of entries of each token; 0 where `Logprobs` has None.
    The other fields have one item per entry.
    """

    counts: list[int]
    token_ids: list[int]
    logprobs: list[float]
    ranks: list[int | None]
    decoded_tokens: list[str | None]

    def unfold(self) -> Logprobs:
        """Return them by token and token id. If a token has a token id twice, the second entry counts."""
        entries = zip(self.token_ids, map(Logprob, self.logprobs, self.ranks, self.decoded_tokens), strict=True)
        return [dict(itertools.islice(entries, count)) or None for count in self.counts]


class FlatOutput(ResponseOutput, frozen=True, omit_defaults=True, gc=False):
    """A completion with flat log probabilities. An engine may return it; users see it unfolded."""

    flat_logprobs: FlatLogprobs | None = None
    flat_prompt_logprobs: FlatLogprobs | None = None

    def unfold(self) -> ResponseOutput:
        """Return the completion as users see it."""
        flat, of_prompt = self.flat_logprobs, self.flat_prompt_logprobs
        return ResponseOutput(
            self.text, self.token_ids, self.finish_reason, self.stop_reason, self.cumulative_logprob,
            self.logprobs if flat is None else flat.unfold(),
            self.prompt_logprobs if of_prompt is None else of_prompt.unfold(),
            self.prompt_tokens, self.prompt_token_ids, self.weight_version, self.weight_spans,
        )  # fmt: skip


class VectorOutput(ResponseOutput, frozen=True, omit_defaults=True, gc=False):
    """The output of another task than "generate".

    `vector`: numbers as 32-bit floats, little-endian: an embedding, the probability of each class, or one score.
    """

    vector: bytes = b""


def unfolded(outputs: list[ResponseOutput]) -> list[ResponseOutput]:
    """Return completions as users see them."""
    for output in outputs:
        if isinstance(output, FlatOutput):
            return [it.unfold() if isinstance(it, FlatOutput) else it for it in outputs]
    return outputs


class Group(Struct, frozen=True, forbid_unknown_fields=True, omit_defaults=True):
    """Prompts that share their task and its parameters. `seeds` has one seed per prompt if `params` have none.

    `return_prompt_token_ids`: whether the outputs have the tokens of their prompts.
    `adapters`: the name of the adapter of each prompt; None: that of `lora_path`, or none if there is no such adapter.
    `task`: one of `tasks.TASKS`. A request may hold groups of several tasks, since calls share it.
    """

    prompts: list[str | list[int] | Conversation]
    params: Params | None = None
    seeds: list[Annotated[int, Meta(ge=0, le=(1 << 63) - 1)]] | None = None
    return_prompt_token_ids: bool = False
    adapters: list[str | None] | None = None
    task: str = "generate"


class RunRequest(Struct, frozen=True, forbid_unknown_fields=True, omit_defaults=True):
    """A piece of work. Its items are numbered through all groups, from 0.

    `heartbeat`: time between two heartbeats, in seconds.
    `id`: the id for a `CancelRequest`; "" for none. A gateway treats requests with the same text before the last "-" as
    requests of one client.
    `alone`: the server must work on nothing else, so that the cause of its death is clear.
    `model`: the name of the model, for a gateway with several.
    """

    groups: list[Group]
    heartbeat: float = 5.0
    id: str = ""
    alone: bool = False
    model: str | None = None


class CancelRequest(Struct, frozen=True, forbid_unknown_fields=True):
    """Cancels items of the `RunRequest` with this id. Each item that has not ended then ends as a `Failure`."""

    id: str
    items: list[int]


class Result(Struct, frozen=True, tag="result", array_like=True, gc=False):
    """Item `index` is finished. `outputs` has one output per requested completion."""

    index: int
    outputs: list[ResponseOutput]


class FlatResult(Result, frozen=True, tag="flat", array_like=True, gc=False):
    """A result with flat outputs. As a plain `Result`, they would lose their log probabilities."""

    outputs: list[FlatOutput]  # type: ignore[assignment]


class VectorResult(Result, frozen=True, tag="vector", array_like=True, gc=False):
    """A result of another task than "generate". As a plain `Result`, it would lose its numbers."""

    outputs: list[VectorOutput]  # type: ignore[assignment]


class Failure(Struct, frozen=True, tag="failure", array_like=True):
    """Item `index` failed. `invalid`: see `ItemError`. `lost`: it is an `ItemLost`; only a gateway sends that."""

    index: int
    message: str
    invalid: bool = True
    lost: bool = False


class Heartbeat(Struct, frozen=True, tag="heartbeat", array_like=True):
    """The server is alive and working. `running` items of this request remain."""

    running: int


type Event = Result | FlatResult | VectorResult | Failure | Heartbeat


ITEM_BYTES, TOKEN_BYTES, LOGPROB_BYTES = 500, 36, 150
"""Estimated memory in bytes: of a result without its text, of one token id, and of one log probability."""


def weight(outputs: Sequence[ResponseOutput]) -> int:
    """Return the estimated memory of a result with these outputs, in bytes."""
    size = ITEM_BYTES
    for output in outputs:
        size += 2 * len(output.text) + TOKEN_BYTES * len(output.token_ids)
        if output.prompt_token_ids is not None:
            size += TOKEN_BYTES * len(output.prompt_token_ids)
        for logprobs in (output.logprobs, output.prompt_logprobs):
            if logprobs is not None:
                size += LOGPROB_BYTES * sum(len(it or ()) for it in logprobs)
        if isinstance(output, VectorOutput):
            size += len(output.vector)
        if isinstance(output, FlatOutput):
            flat = (output.flat_logprobs, output.flat_prompt_logprobs)
            size += LOGPROB_BYTES * sum(len(it.token_ids) for it in flat if it is not None)
    return size


class Health(Struct, frozen=True, omit_defaults=True):
    """The answer of `GET /health`. `status` is "ok", or else the server's state. `phase` is the phase of that state."""

    status: str
    phase: str | None = None


LOWEST_LOGPROB = -9999.0
"""Replaces minus infinity, which JSON does not have. vLLM's own server uses the same value."""


def json_safe(output: ResponseOutput) -> ResponseOutput:
    """Return `output` with every log probability that JSON does not have replaced by `LOWEST_LOGPROB`."""

    def finite(value: float) -> float:
        return value if math.isfinite(value) else LOWEST_LOGPROB

    def clamp(logprobs: Logprobs | None) -> Logprobs | None:
        if logprobs is None:
            return None
        return [
            entry and {token: structs.replace(it, logprob=finite(it.logprob)) for token, it in entry.items()}
            for entry in logprobs
        ]

    if output.cumulative_logprob is None and output.logprobs is None and output.prompt_logprobs is None:
        return output
    return structs.replace(
        output,
        cumulative_logprob=None if output.cumulative_logprob is None else finite(output.cumulative_logprob),
        logprobs=clamp(output.logprobs),
        prompt_logprobs=clamp(output.prompt_logprobs),
    )
