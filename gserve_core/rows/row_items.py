"""The items of rows: each row is made into a prompt when it is sent, and kept until its item has ended."""

from collections.abc import Callable, Iterator

from ..batch.dispatcher import Dispatcher
from ..batch.items import INVALID, SeedOf, error_of, may_be_sampled
from ..batch.pieces import Call, Item
from ..errors import ConfigError, ItemError
from ..tasks import GENERATE
from .answers import Answers
from .prompts import Prompts
from .reading import Row

CHECKED = 64
"""Number of rows between two checks whether the service ends."""


class RowItems:
    """The items of rows, for a `Batch`. An `ItemSource`.

    `prompts`: makes the prompts. `answers`: knows the columns that a row may not have.
    `seed`: returns the seed of an item by the place of its row; None: there are no seeds.
    `check_row`: raises ConfigError for a row that cannot be written beside its answer, so that it is not sent.
    `is_at_hand`: whether reading a row never blocks.
    """

    size: int | None = None

    def __init__(
        self,
        rows: Iterator[Row],
        prompts: Prompts,
        answers: Answers,
        seed: SeedOf | None,
        dispatcher: Dispatcher,
        *,
        check_row: Callable[[Row], object] | None = None,
        is_at_hand: bool = True,
    ) -> None:
        self._rows = rows
        self._prompts = prompts
        self._answers = answers
        self._seed = seed
        self._dispatcher = dispatcher
        self._check_row = check_row
        self.is_at_hand = is_at_hand
        self._kept: dict[int, Row] = {}
        self.take: Callable[[int], Row] = self._kept.pop
        """Returns the row of an item that has ended, and forgets it."""

    def read(self, call: Call) -> Iterator[Item | ItemError]:
        """Yield each item, or its error, until the service ends. Raises what the rows raise."""
        make, seed, check, kept = self._prompts.make, self._seed, self._answers.check_columns, self._kept
        check_row = self._check_row
        adapter, task = self._prompts.adapter, self._prompts.task
        returns_prompt = self._answers.has_extra
        known: object = self  # the parameters that `needs_seed` is for: most rows share them
        needs_seed, item_seed = True, None
        for index, row in enumerate(self._rows):
            if not index % CHECKED and self._dispatcher.ending is not None:
                return
            kept[index] = row
            values, raw = row.values, row.raw
            try:
                if values is None:
                    raise ItemError(row.error or "it cannot be read")
                check(values)
                if check_row is not None:
                    check_row(row)
                prompt, size, params = make(values)
                if params is not known:
                    known, item_seed = params, None
                    needs_seed = seed is not None and task == GENERATE and may_be_sampled(params)
                size += size if raw is None else len(raw)  # the row is kept too
                if seed is not None and needs_seed:
                    item_seed = seed(row.place)
                own = adapter(values)
                yield Item(call, index, prompt, params, item_seed, size, returns_prompt, task=task, adapter=own)
            except ConfigError as error:  # a column with the name of an answer's, or of bytes
                yield ItemError(str(error), index=index)
            except INVALID as error:
                yield error_of(error, index)
