"""The calls for models that do not generate: `embed`, `classify`, `score`, `rerank` and their variants.

Their numbers are NumPy arrays of 32-bit floats.
"""

from collections.abc import Callable, Generator, Iterable
from typing import TYPE_CHECKING, Any, TypedDict, Unpack, cast

from msgspec import Struct

from ..batch.batch import OnError, check_deadline, collect, collect_async, outcomes
from ..batch.dispatcher import Dispatcher
from ..batch.items import Items, list_pairs, list_prompts, read_adapter, read_pair, read_prompt
from ..errors import BatchError, ConfigError, ItemError
from ..messages import ResponseOutput, VectorOutput
from ..tasks import CLASSIFY, EMBED, SCORE, read_options

if TYPE_CHECKING:
    import numpy as np

type Array = "np.ndarray[Any, np.dtype[np.float32]]"


class VectorOptions(TypedDict, total=False):
    """Options of all these calls.

    `deadline`: time after which unfinished items are cancelled, in seconds. They fail with DeadlineExceeded.
    `truncate_prompt_tokens`: maximum number of tokens of a text; -1: as many as the model can take. None: a text that
    is longer than the model can take fails.
    `adapter`: name of the LoRA adapter of items that name no other; None: that of `lora_path`, if there is one.
    """

    deadline: float | None
    truncate_prompt_tokens: int | None
    adapter: str | None


class Ranked(Struct, frozen=True):
    """A text of `rerank`: its place among the texts, and its score."""

    index: int
    score: float


class VectorCalls:
    """The calls. A subclass provides the dispatcher."""

    def _dispatcher(self) -> Dispatcher:
        raise NotImplementedError

    def embed(
        self,
        texts: Iterable[Any],
        *,
        dimensions: int | None = None,
        normalize: bool | None = None,
        on_error: OnError = "raise",
        use_tqdm: Any = None,
        **options: Unpack[VectorOptions],
    ) -> Any:
        """Embed texts. Return an array of 32-bit floats, with a row for each text, in order.

        `texts`: texts, or lists of token ids. One text alone counts as a list of one.
        `dimensions`: length of the vectors, for models that can shorten them (Matryoshka). None: all.
        `normalize`: whether each vector has the length 1. None: as the model says, which mostly is yes.
        `on_error`: "raise" raises BatchError once all items have finished; it contains every result. "return" returns a
        list of vectors if items failed, with an ItemError in the place of each of them.
        `use_tqdm`: True shows a progress bar if tqdm is installed.
        `options`: see `VectorOptions`.

        Raises BatchError: items failed, and `on_error` is "raise". So do all if the model makes no embeddings.
        Raises ConfigError: an argument is wrong, or NumPy is not installed.
        Raises BatchInterrupted: Ctrl-C was pressed.
        """
        items, deadline = _embeddings(texts, dimensions, normalize, **options)
        return _rows(collect(self._dispatcher(), items, deadline, vector_of, on_error, use_tqdm))

    def embed_iter(
        self,
        texts: Iterable[Any],
        *,
        dimensions: int | None = None,
        normalize: bool | None = None,
        **options: Unpack[VectorOptions],
    ) -> "Generator[tuple[int, Array | ItemError]]":
        """Like `embed`, but yield the index and the vector, or the error, of each text as soon as it is ready.

        Texts are read lazily, so an infinite iterator works. Closing the returned iterator early cancels the unfinished
        items.
        """
        items, deadline = _embeddings(texts, dimensions, normalize, **options)
        return self._keep_alive(outcomes(self._dispatcher(), items, deadline, vector_of))

    async def embed_async(
        self,
        texts: Iterable[Any],
        *,
        dimensions: int | None = None,
        normalize: bool | None = None,
        on_error: OnError = "raise",
        use_tqdm: Any = None,
        **options: Unpack[VectorOptions],
    ) -> Any:
        """Like `embed`, without blocking the event loop. Cancelling the call cancels its unfinished items."""
        items, deadline = _embeddings(texts, dimensions, normalize, **options)
        return _rows(await collect_async(self._dispatcher(), items, deadline, vector_of, on_error, use_tqdm))

    def classify(
        self, texts: Iterable[Any], *, on_error: OnError = "raise", use_tqdm: Any = None,
        **options: Unpack[VectorOptions],
    ) -> Any:  # fmt: skip
        """Sort texts into classes. Return an array with a row for each text, which holds the probability of each class.

        The order of the classes is that of `id2label` in the model's config. For the rest see `embed`.
        """
        items, deadline = _items(CLASSIFY, list_prompts(texts), read_prompt, **options)
        return _rows(collect(self._dispatcher(), items, deadline, vector_of, on_error, use_tqdm))

    async def classify_async(
        self, texts: Iterable[Any], *, on_error: OnError = "raise", use_tqdm: Any = None,
        **options: Unpack[VectorOptions],
    ) -> Any:  # fmt: skip
        """Like `classify`, without blocking the event loop. Cancelling the call cancels its unfinished items."""
        items, deadline = _items(CLASSIFY, list_prompts(texts), read_prompt, **options)
        return _rows(await collect_async(self._dispatcher(), items, deadline, vector_of, on_error, use_tqdm))

    def score(
        self, pairs: Iterable[Any], *, on_error: OnError = "raise", use_tqdm: Any = None,
        **options: Unpack[VectorOptions],
    ) -> Any:  # fmt: skip
        """Score pairs of texts. Return an array with one number for each pair, in order.

        A cross-encoder, a model with one class, reads both texts at once. With a model for embeddings, the score is the
        cosine similarity of the two embeddings.

        `pairs`: tuples of two texts, or mappings with `query` and `document`. For the rest see `embed`.
        """
        items, deadline = _items(SCORE, list_pairs(pairs), read_pair, **options)
        return _numbers(collect(self._dispatcher(), items, deadline, _score_of, on_error, use_tqdm))

    async def score_async(
        self, pairs: Iterable[Any], *, on_error: OnError = "raise", use_tqdm: Any = None,
        **options: Unpack[VectorOptions],
    ) -> Any:  # fmt: skip
        """Like `score`, without blocking the event loop. Cancelling the call cancels its unfinished items."""
        items, deadline = _items(SCORE, list_pairs(pairs), read_pair, **options)
        return _numbers(await collect_async(self._dispatcher(), items, deadline, _score_of, on_error, use_tqdm))

    def rerank(
        self, query: str, texts: Iterable[str], *, top_n: int | None = None, use_tqdm: Any = None,
        **options: Unpack[VectorOptions],
    ) -> list[Ranked]:  # fmt: skip
        """Score each text for a query. Return the texts' places with their scores, the best first.

        `top_n`: number of texts to return. None: all.

        Raises BatchError: a text cannot be scored. `results` has the scores of the others.
        Raises ConfigError, BatchInterrupted: see `embed`.
        """
        items, deadline = _ranked_items(query, texts, top_n, **options)
        return _ranking(collect(self._dispatcher(), items, deadline, _score_of, "return", use_tqdm), top_n)

    async def rerank_async(
        self, query: str, texts: Iterable[str], *, top_n: int | None = None, use_tqdm: Any = None,
        **options: Unpack[VectorOptions],
    ) -> list[Ranked]:  # fmt: skip
        """Like `rerank`, without blocking the event loop. Cancelling the call cancels its unfinished items."""
        items, deadline = _ranked_items(query, texts, top_n, **options)
        results = await collect_async(self._dispatcher(), items, deadline, _score_of, "return", use_tqdm)
        return _ranking(results, top_n)

    def _keep_alive[T](self, found: Iterable[T]) -> Generator[T]:
        """Yield the outcomes. The iterator keeps this object and its servers alive."""
        yield from found


def vector_of(outputs: list[ResponseOutput]) -> "Array":
    """Return the vector of an item as an array."""
    vector: Array = _numpy().frombuffer(bytearray(cast(VectorOutput, outputs[0]).vector), dtype="<f4")
    return vector


def _score_of(outputs: list[ResponseOutput]) -> float:
    return float(vector_of(outputs)[0])


def _numpy() -> Any:
    try:
        import numpy as np
    except ImportError as error:
        raise ConfigError("these results are arrays, and NumPy is not installed: pip install numpy") from error
    return np


def _embeddings(
    texts: Any, dimensions: int | None, normalize: bool | None, **options: Unpack[VectorOptions]
) -> tuple[Items, float | None]:
    read: Callable[[Any], Any] = read_prompt
    return _items(EMBED, list_prompts(texts), read, dimensions=dimensions, use_activation=normalize, **options)


def _items(
    task: str,
    given: Iterable[Any],
    read: Callable[[Any], Any],
    *,
    deadline: float | None = None,
    adapter: str | None = None,
    **params: Any,
) -> tuple[Items, float | None]:
    """Return the items of a call with their parameters, and its deadline. Raises ConfigError: an argument is wrong."""
    _numpy()
    try:
        wanted = {name: value for name, value in params.items() if value is not None}
        read_options(wanted)
        adapter = read_adapter(adapter)
    except ItemError as error:
        raise ConfigError(str(error)) from error
    return Items(given, wanted or None, read, lambda index: 0, task=task, adapter=adapter), check_deadline(deadline)


def _rows(results: list[Any]) -> Any:
    """Return vectors as one array, or as a list if items failed."""
    np = _numpy()
    if any(isinstance(it, ItemError) for it in results):
        return [*results]
    return np.stack(results) if results else np.empty((0, 0), dtype=np.float32)


def _numbers(results: list[Any]) -> Any:
    """Return numbers as one array, or as a list if items failed."""
    if any(isinstance(it, ItemError) for it in results):
        return [*results]
    np = _numpy()
    return np.array(results, dtype=np.float32)


def _ranked_items(
    query: str, texts: Iterable[str], top_n: int | None, **options: Unpack[VectorOptions]
) -> tuple[Items, float | None]:
    """Return the pairs of a ranking as items, and its deadline. Raises ConfigError: an argument is wrong."""
    if "on_error" in options:
        raise ConfigError(
            "rerank has no on_error, since a ranking of some of the texts would be wrong: use"
            ' score(pairs, on_error="return")'
        )
    if not isinstance(query, str):
        raise ConfigError(f"expected a text as query, got {type(query).__name__}")
    if top_n is not None and (not isinstance(top_n, int) or top_n < 1):
        raise ConfigError(f"expected top_n of at least 1, or None, got {top_n!r}")
    pairs = [(query, text) for text in list_prompts(texts)]
    return _items(SCORE, list_pairs(pairs), read_pair, **options)


def _ranking(scores: list[Any], top_n: int | None) -> list[Ranked]:
    """Return the places of the best scores. Raises BatchError: a score is missing."""
    if any(isinstance(score, ItemError) for score in scores):
        raise BatchError(scores, takes_on_error=False)
    order = sorted(range(len(scores)), key=lambda index: -scores[index])
    return [Ranked(index, float(scores[index])) for index in order[:top_n]]
