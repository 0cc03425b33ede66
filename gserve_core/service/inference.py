"""The calls that clients and services share: `chat`, `generate` and their variants."""

from collections.abc import Generator, Iterable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, TypedDict, Unpack, overload

from ..batch.batch import OnError, check_deadline, collect, collect_async, outcomes, texts_of
from ..batch.items import ConversationReader, Items, Seeds, list_conversations, list_prompts, read_prompt
from ..batch.pieces import Outcome
from ..batch.results import Results
from ..errors import ConfigError
from ..messages import ResponseOutput, unfolded
from .vector_calls import VectorCalls

if TYPE_CHECKING:
    from ..rows.job import Report, Run
    from ..rows.output import Totals


class PromptOptions(TypedDict, total=False):
    """Options of all calls.

    `deadline`: time after which unfinished items are cancelled, in seconds. They fail with DeadlineExceeded.
    `truncate_prompt_tokens`: maximum number of tokens of a prompt; -1: as many as the model can take.
    `return_prompt_token_ids`: whether each `ResponseOutput` has the tokens of its prompt.
    `lora_request`: must be None.
    `adapter`: the name of the adapter of all items that name no other; see `LLMConfig.adapters`. A mapping names its
    own with the key `adapter`.
    """

    deadline: float | None
    truncate_prompt_tokens: int | None
    return_prompt_token_ids: bool
    lora_request: None
    adapter: str | None


class ChatOptions(PromptOptions, total=False):
    """Options of calls with conversations: see `vllm.LLM.chat`."""

    add_generation_prompt: bool
    continue_final_message: bool
    tools: Iterable[Any] | None
    chat_template_kwargs: Any


class Inference(VectorCalls):
    """The calls that send batches. A subclass provides the dispatcher.

    You may call them from any thread, and from a running event loop: the variants ending in `_async` do not block it.
    You may also call them from a forked process. It uses the same servers, over its own connections.
    """

    _seeds = Seeds()
    """The seeds of items. A subclass that knows the seed of its model replaces them."""

    @overload
    def chat(
        self, conversations: Iterable[Any], sampling_params: Any = None, return_extra: Literal[False] = False, *,
        on_error: Literal["raise"] = "raise", use_tqdm: Any = None, **options: Unpack[ChatOptions],
    ) -> Results[list[str]]: ...  # fmt: skip
    @overload
    def chat(
        self, conversations: Iterable[Any], sampling_params: Any = None, *, return_extra: Literal[True],
        on_error: Literal["raise"] = "raise", use_tqdm: Any = None, **options: Unpack[ChatOptions],
    ) -> Results[list[ResponseOutput]]: ...  # fmt: skip
    @overload
    def chat(
        self, conversations: Iterable[Any], sampling_params: Any = None, return_extra: bool = False, *,
        on_error: Literal["return"], use_tqdm: Any = None, **options: Unpack[ChatOptions],
    ) -> Results[Any]: ...  # fmt: skip
    def chat(
        self,
        conversations: Iterable[Any],
        sampling_params: Any = None,
        return_extra: bool = False,
        *,
        on_error: OnError = "raise",
        use_tqdm: Any = None,
        **options: Unpack[ChatOptions],
    ) -> Any:
        """Continue conversations. Return a list with the completions of each conversation, in order.

        Its attribute `usage` holds the numbers of tokens.

        `conversations`: lists of messages `{"role": …, "content": …}`, or mappings with `messages` and with `tools` or
        `chat_template_kwargs` of their own. One conversation alone counts as a list of one.
        `sampling_params`: a `vllm.SamplingParams`, a mapping of its fields, or an iterable with one of these per item.
        None uses the model's defaults.
        `return_extra`: whether a completion is a `ResponseOutput` instead of a text.
        `on_error`: "raise" raises BatchError once all items have finished; it contains every result. "return" returns
        an ItemError in the place of each failed item.
        `use_tqdm`: True shows a progress bar if tqdm is installed. See `vllm.LLM.chat`.
        `options`: see `ChatOptions`.

        Raises BatchError: items failed, and `on_error` is "raise".
        Raises ConfigError: an argument is wrong.
        Raises BatchInterrupted: Ctrl-C was pressed.
        """
        items, deadline = self._conversations(conversations, sampling_params, **options)
        value_of = unfolded if return_extra else texts_of
        return collect(self._dispatcher(), items, deadline, value_of, on_error, use_tqdm)

    @overload
    def generate(
        self, prompts: Iterable[Any], sampling_params: Any = None, return_extra: Literal[False] = False, *,
        on_error: Literal["raise"] = "raise", use_tqdm: Any = None, **options: Unpack[PromptOptions],
    ) -> Results[list[str]]: ...  # fmt: skip
    @overload
    def generate(
        self, prompts: Iterable[Any], sampling_params: Any = None, *, return_extra: Literal[True],
        on_error: Literal["raise"] = "raise", use_tqdm: Any = None, **options: Unpack[PromptOptions],
    ) -> Results[list[ResponseOutput]]: ...  # fmt: skip
    @overload
    def generate(
        self, prompts: Iterable[Any], sampling_params: Any = None, return_extra: bool = False, *,
        on_error: Literal["return"], use_tqdm: Any = None, **options: Unpack[PromptOptions],
    ) -> Results[Any]: ...  # fmt: skip
    def generate(
        self,
        prompts: Iterable[Any],
        sampling_params: Any = None,
        return_extra: bool = False,
        *,
        on_error: OnError = "raise",
        use_tqdm: Any = None,
        **options: Unpack[PromptOptions],
    ) -> Any:
        """Complete prompts. Return a list with the completions of each prompt, in order.

        `prompts`: texts, lists of token ids, or mappings with a `prompt` or `prompt_token_ids`. One prompt alone counts
        as a list of one. `options`: see `PromptOptions`. For the rest see `chat`.
        """
        items, deadline = self._prompts(prompts, sampling_params, **options)
        value_of = unfolded if return_extra else texts_of
        return collect(self._dispatcher(), items, deadline, value_of, on_error, use_tqdm)

    def chat_iter(
        self, conversations: Iterable[Any], sampling_params: Any = None, **options: Unpack[ChatOptions]
    ) -> Generator[tuple[int, Outcome]]:
        """Like `chat`, but yield the index and the outcome of each item as soon as it is ready.

        Conversations are read lazily, so an infinite iterator works. Closing the returned iterator early cancels the
        unfinished items.
        """
        items, deadline = self._conversations(conversations, sampling_params, **options)
        return self._keep_alive(outcomes(self._dispatcher(), items, deadline, unfolded))

    def generate_iter(
        self, prompts: Iterable[Any], sampling_params: Any = None, **options: Unpack[PromptOptions]
    ) -> Generator[tuple[int, Outcome]]:
        """Like `generate`, but yield the index and the outcome of each item as soon as it is ready.

        Prompts are read lazily. Closing the returned iterator early cancels the unfinished items.
        """
        items, deadline = self._prompts(prompts, sampling_params, **options)
        return self._keep_alive(outcomes(self._dispatcher(), items, deadline, unfolded))

    async def chat_async(
        self,
        conversations: Iterable[Any],
        sampling_params: Any = None,
        return_extra: bool = False,
        *,
        on_error: OnError = "raise",
        use_tqdm: Any = None,
        **options: Unpack[ChatOptions],
    ) -> Results[Any]:
        """Like `chat`, without blocking the event loop. Cancelling the call cancels its unfinished items."""
        items, deadline = self._conversations(conversations, sampling_params, **options)
        return await collect_async(
            self._dispatcher(), items, deadline, unfolded if return_extra else texts_of, on_error, use_tqdm
        )

    async def generate_async(
        self,
        prompts: Iterable[Any],
        sampling_params: Any = None,
        return_extra: bool = False,
        *,
        on_error: OnError = "raise",
        use_tqdm: Any = None,
        **options: Unpack[PromptOptions],
    ) -> Results[Any]:
        """Like `generate`, without blocking the event loop. Cancelling the call cancels its unfinished items."""
        items, deadline = self._prompts(prompts, sampling_params, **options)
        return await collect_async(
            self._dispatcher(), items, deadline, unfolded if return_extra else texts_of, on_error, use_tqdm
        )

    def map(
        self,
        rows: Any,
        *,
        chat: bool = False,
        template: str | None = None,
        column: str | None = None,
        system: str | None = None,
        sampling_params: Any = None,
        tools: Sequence[Any] | None = None,
        schema: Any = None,
        drop_answer: bool = False,
        prefix: str = "",
        extra: bool = False,
        deadline: float | None = None,
        adapter: str | None = None,
        media_root: str | Path | None = None,
    ) -> Any:
        """Answer each row of a table. Return all rows in order, in the same kind, with their answers beside them.

        The columns of an answer are `response`, `finish_reason`, `prompt_tokens` and `completion_tokens`. With several
        completions per row, the first two are lists. If rows fail, a column `error` says why; the others are null then.

        `rows`: a list of mappings, a mapping of columns, a DataFrame of pandas or polars, an Arrow table, a
        `datasets.Dataset`; or an iterator, a streaming dataset or an Arrow reader, whose rows are read and yielded one
        by one.
        `chat`: whether a prompt is a conversation.
        `template`: a template of Jinja2 over the columns of a row.
        `column`: the column with the prompt. Without both it is `prompt` or `text`, and in a chat also `messages` or
        `conversations`. The columns `params`, `tools`, `chat_template_kwargs` and `adapter` of a row are its own
        options.
        `system`: a template for the system message of conversations that have none.
        `sampling_params`: a `vllm.SamplingParams`, or a mapping of its fields.
        `tools`: tools for all conversations, in OpenAI's form.
        `schema`: a JSON schema, or a class of pydantic, for the answers. It adds the column `parsed`; a row whose
        answer does not fit fails.
        `drop_answer`: whether a final message of the assistant is left out.
        `prefix`: begins the names of the answers' columns.
        `extra`: whether token ids and log probabilities are added.
        `deadline`: see `chat`.
        `adapter`: the adapter of rows that name no other in their column `adapter`.
        `media_root`: the folder below which the images of conversations may be files; None: they are data URLs.

        Raises ConfigError: an argument is wrong, these are no rows, or they have a column of the answers already.
        """
        from ..rows.answers import Answers
        from ..rows.mapping import map_rows
        from ..rows.prompts import Prompts, RowOptions, schema_of

        _check_adapter(adapter)
        schema = schema_of(schema)
        options = RowOptions(
            is_chat=chat, template=template, column=column, system=system, params=sampling_params, tools=tools,
            schema=schema, drop_answer=drop_answer, adapter=adapter, media_root=media_root,
        )  # fmt: skip
        answers = Answers(prefix=prefix, extra=extra, schema=schema)
        self.check_params(sampling_params)
        seed, deadline = self._seeds.of_next_call(), check_deadline(deadline)
        return map_rows(self._dispatcher(), rows, Prompts(options), answers, seed, deadline)

    def run_file(
        self,
        source: str | Path,
        output: str | Path,
        *,
        chat: bool = False,
        template: str | None = None,
        column: str | None = None,
        system: str | None = None,
        sampling_params: Any = None,
        tools: Sequence[Any] | None = None,
        schema: Any = None,
        drop_answer: bool = False,
        prefix: str = "",
        extra: bool = False,
        input_format: str | None = None,
        ordered: bool = False,
        failed: str | Path | None = None,
        limit: int | None = None,
        shard: str | None = None,
        overwrite: bool = False,
        on_progress: "Report | None" = None,
        adapter: str | None = None,
        media_root: str | Path | None = None,
    ) -> "Totals":
        """Answer each row of a file, and write the rows with their answers to another file. Return the totals.

        The same call continues a job that was interrupted. Rows that fail are written to a file of their own.

        `source`: a file, a folder, or a pattern such as `data/*.parquet`.
        `output`: a file, whose name tells its format.
        `input_format`: the format of the input, if its name does not tell, such as "csv".
        `ordered`: whether JSON lines are in the order of the input. Tables always are.
        `failed`: the file for failed rows; None: beside the output, with the suffix `.failed.jsonl`.
        `limit`: number of rows of the input to work on; None: all.
        `shard`: "I/N": work on every N-th row, from the I-th on, counted from 1.
        `overwrite`: whether an earlier output is discarded.
        `on_progress`: called with the totals after each step.
        For the other arguments see `map`.

        Raises ConfigError: an argument or the input is wrong, or the output is written by another process or was made
        with another model, input or parameters.
        Raises GserveError: the output cannot be written, or the service ends before all rows are answered.
        """
        from ..rows.job import FileJob
        from ..rows.prompts import RowOptions, schema_of

        _check_adapter(adapter)
        options = RowOptions(
            is_chat=chat, template=template, column=column, system=system, params=sampling_params, tools=tools,
            schema=schema_of(schema), drop_answer=drop_answer, adapter=adapter, media_root=media_root,
        )  # fmt: skip
        job = FileJob(
            source=source, output=Path(output), prompts=options, format=input_format, prefix=prefix, extra=extra,
            ordered=ordered, failed=None if failed is None else Path(failed), limit=limit, shard=shard,
            overwrite=overwrite,
        )  # fmt: skip
        self.check_params(sampling_params)
        with job.begin(self.model_facts()) as run:
            if run.remaining != 0:
                return self.answer_rows(run, on_progress)
            run.complete()
            return run.totals

    def answer_rows(self, run: "Run", report: "Report | None" = None) -> "Totals":
        """Answer the rows of a job on a file that has begun. Return the totals. Most callers use `run_file`.

        `report`: called with the totals after each step.

        Raises GserveError: the output cannot be written, or the service ends before all rows are answered.
        """
        return run.answer(self._dispatcher(), self._seeds.of_next_call(), report)

    def check_params(self, sampling_params: Any) -> None:
        """Check sampling parameters as far as it takes no server.

        Raises ConfigError: they are wrong.
        """

    def model_facts(self) -> dict[str, Any]:
        """Return what is known about the model and decides its answers. `run_file` compares it with earlier runs."""
        return {}

    def _conversations(
        self,
        given: Any,
        sampling_params: Any,
        *,
        deadline: float | None = None,
        truncate_prompt_tokens: int | None = None,
        return_prompt_token_ids: bool = False,
        lora_request: None = None,
        adapter: str | None = None,
        **options: Any,
    ) -> tuple[Items, float | None]:
        _check_adapter(adapter, lora_request)
        items = Items(
            list_conversations(given), sampling_params, ConversationReader(**options), self._seeds.of_next_call(),
            truncate_prompt_tokens=truncate_prompt_tokens, return_prompt_token_ids=return_prompt_token_ids,
            adapter=adapter,
        )  # fmt: skip
        return items, check_deadline(deadline)

    def _prompts(
        self,
        given: Any,
        sampling_params: Any,
        *,
        deadline: float | None = None,
        truncate_prompt_tokens: int | None = None,
        return_prompt_token_ids: bool = False,
        lora_request: None = None,
        adapter: str | None = None,
    ) -> tuple[Items, float | None]:
        _check_adapter(adapter, lora_request)
        items = Items(
            list_prompts(given), sampling_params, read_prompt, self._seeds.of_next_call(),
            truncate_prompt_tokens=truncate_prompt_tokens, return_prompt_token_ids=return_prompt_token_ids,
            adapter=adapter,
        )  # fmt: skip
        return items, check_deadline(deadline)


def _check_adapter(adapter: Any, lora_request: Any = None) -> None:
    """Raise ConfigError if an adapter is given in another form than by its name."""
    if lora_request is not None:
        raise ConfigError("lora_request is not supported: set adapters in the LLMConfig, and pass adapter=NAME")
    if adapter is not None and not (isinstance(adapter, str) and adapter):
        raise ConfigError(f"expected the name of an adapter as a text, or None, got {adapter!r}")
