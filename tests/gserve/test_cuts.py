"""What a user is told of answers that were cut."""

from typing import Any

import pytest

from gserve.cli.cuts import cut_notice
from gserve_core.errors import ItemError
from gserve_core.messages import ResponseOutput


def answer(tokens: int, reason: str = "length") -> ResponseOutput:
    return ResponseOutput("…", [0] * tokens, reason)


CUT = "answers were cut at max_tokens=16, the default: use --params"


@pytest.mark.parametrize(
    ("outcomes", "params", "expected"),
    [
        ([], None, None),
        ([[answer(16, "stop")], ItemError("no")], None, None),
        ([[answer(16)], [answer(3, "stop")]], None, "1 answer was cut at max_tokens=16, the default: use --params "
         """'{"max_tokens":256}'"""),
        ([[answer(16), answer(16)], ItemError("no")], {}, f"""2 {CUT} '{{"max_tokens":256}}'"""),
        ([[answer(16)] * 2], {"temperature": 0}, f"""2 {CUT} '{{"temperature":0,"max_tokens":256}}'"""),
        ([[answer(100)]], {"max_tokens": 100}, """1 answer was cut at max_tokens=100: use --params """
         """'{"max_tokens":400}'"""),
        ([[answer(90)]], {"max_tokens": None}, "1 answer was cut at the end of the model's context (max_model_len)"),
        ([[answer(8)], [answer(5)]], {"max_tokens": 8}, """1 answer was cut at max_tokens=8: use --params """
         """'{"max_tokens":256}'; 1 answer was cut at the end of the model's context (max_model_len)"""),
        ([[answer(8)]], {"stop": "'", "max_tokens": 8}, """1 answer was cut at max_tokens=8: use --params """
         """'{"stop":"'\\''","max_tokens":256}'"""),
    ],
)  # fmt: skip
def test_a_cut_answer_is_told_with_the_parameters_that_make_it_longer(
    outcomes: Any, params: Any, expected: str | None
) -> None:
    assert cut_notice(outcomes, params) == expected
