"""`make scale` at a tiny size: what it writes, and that it does not let a wrong answer pass."""

import re
from pathlib import Path

import pytest

from benchmarks import scale
from gserve import LLMConfig, VLLMService
from gserve_core.engines.echo import EchoEngine


def test_each_call_has_its_row_and_the_limit_of_a_client_is_told(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    scale.main(["--servers", "1", "2", "--items", "300", "900", "--to", str(tmp_path)])
    text = (tmp_path / "scale.md").read_text()
    rows = [re.findall(r"[^| ]+", line) for line in text.splitlines() if re.match(r"\| \d", line)]
    assert [row[:3] for row in rows] == [
        [servers, items, call] for servers in "12" for items in ("300", "900") for call in scale.CALLS
    ]
    for *_, rate, client, below, total, _memory in rows:
        assert int(rate.replace(",", "")) > 0
        assert float(client) > 0
        assert float(below) > 0
        assert float(total) == pytest.approx(float(client) + float(below), abs=0.11)
    assert "one client is the limit from" in text
    assert capsys.readouterr().out.count("\n") == len(rows)
    assert (tmp_path / "scale.png").read_bytes().startswith(b"\x89PNG")


def test_a_wrong_answer_ends_it() -> None:
    short_of_room = LLMConfig("echo", max_model_len=40)
    with VLLMService(short_of_room, engine=EchoEngine()) as service:
        for call in scale.CALLS:
            with pytest.raises(AssertionError, match="10 of 10 answers are wrong"):
                scale._once(service, [], call, 10)
