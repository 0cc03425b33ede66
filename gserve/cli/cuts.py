"""The notice that answers were cut, where a user sees nothing but their texts."""

from collections import Counter
from collections.abc import Iterable

import msgspec

from gserve_core.errors import ItemError
from gserve_core.messages import Params, ResponseOutput

LARGER, FACTOR = 256, 4
"""The suggested `max_tokens`: at least this number of tokens, and this multiple of the one that cut the answers."""


def cut_notice(outcomes: Iterable[list[ResponseOutput] | ItemError], params: Params | None) -> str | None:
    """Return one line on the answers that were cut, and how to get longer ones; None if none was.

    `params`: the sampling parameters of all items.
    """
    lengths = Counter(
        len(output.token_ids)
        for outcome in outcomes
        if not isinstance(outcome, ItemError)
        for output in outcome
        if output.finish_reason == "length"
    )
    if not lengths:
        return None
    params = params or {}
    # By default, the longest answers have reached the limit, and shorter ones the end of the context.
    limit: int | None = params.get("max_tokens", max(lengths))
    parts = []
    if limit is not None and (at_limit := lengths.pop(limit, 0)):
        longer = msgspec.json.encode(params | {"max_tokens": max(LARGER, FACTOR * limit)}).decode()
        longer = longer.replace("'", "'\\''")
        default = ", the default" if "max_tokens" not in params else ""
        parts.append(f"{_cut(at_limit)} at max_tokens={limit}{default}: use --params '{longer}'")
    if rest := sum(lengths.values()):
        parts.append(f"{_cut(rest)} at the end of the model's context (max_model_len)")
    return "; ".join(parts)


def _cut(answers: int) -> str:
    return "1 answer was cut" if answers == 1 else f"{answers} answers were cut"
