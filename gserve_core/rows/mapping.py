"""Rows of a table in memory, answered, as the same kind of table: see `Inference.map`."""

import itertools
import logging
from collections.abc import Iterator
from typing import Any

from ..batch.batch import in_order, outcome_lists
from ..batch.dispatcher import Dispatcher
from ..batch.items import SeedOf
from ..errors import ItemError
from .answers import ERROR, WEIGHT_VERSION, Answers
from .kinds import row_with, table_of
from .prompts import Prompts
from .reading import Row
from .row_items import RowItems

logger = logging.getLogger("gserve.rows")


def map_rows(
    dispatcher: Dispatcher, given: Any, prompts: Prompts, answers: Answers, seed: SeedOf | None,
    deadline: float | None,
) -> Any:  # fmt: skip
    """Return the rows with the columns of their answers, in order, as the kind of table that was given.

    If the kind is read one by one, so is the result: it is a generator of rows.

    Raises ConfigError: these are no rows, or they have a column of the answers.
    """
    table = table_of(given)
    for name in table.columns or ():
        answers.check_columns({name: None})
    rows = (Row(place, place + 1, "", values) for place, values in enumerate(table.rows()))
    items = RowItems(rows, prompts, answers, seed, dispatcher, is_at_hand=not table.is_lazy)
    if table.is_lazy:
        return _yield_rows(dispatcher, items, answers, deadline)
    found = [answer for _, answer in _answered(dispatcher, items, answers, deadline)]
    missing = (table.size or 0) - len(found)  # the service has ended
    found += [{answers.prefix + ERROR: f"not answered: {dispatcher.ending}"}] * missing
    version, error = answers.prefix + WEIGHT_VERSION, answers.prefix + ERROR
    failed = sum(error in answer for answer in found)
    if failed:
        logger.warning("%d of %d rows failed: see the column '%s'", failed, len(found), error)
    names = dict.fromkeys(answers.names)
    if any(version in answer for answer in found):
        names[version] = None
    return table.with_answers(found, [*names, *([error] if failed else ())])


def _yield_rows(
    dispatcher: Dispatcher, items: RowItems, answers: Answers, deadline: float | None
) -> Iterator[dict[str, Any]]:
    for row, answer in _answered(dispatcher, items, answers, deadline):
        yield row_with(row.values or {}, answer)


def _answered(
    dispatcher: Dispatcher, items: RowItems, answers: Answers, deadline: float | None
) -> Iterator[tuple[Row, dict[str, Any]]]:
    """Yield each row with the columns of its answer, or of its error, in order."""
    for index, outcome in in_order(itertools.chain.from_iterable(outcome_lists(dispatcher, items, deadline))):
        try:
            if isinstance(outcome, ItemError):
                raise outcome
            answer = answers.columns(outcome)
        except ItemError as error:
            answer = {answers.prefix + ERROR: str(error)}
        yield items.take(index), answer
