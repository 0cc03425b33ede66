"""The log of a server, read from its end, and followed."""

from pathlib import Path

import pytest

from gserve.cli.log_tail import LogTail
from gserve_core.errors import GserveError
from gserve_core.host.folders import log_file, newest_logs


def write(folder: Path, number: int, text: str) -> Path:
    path = log_file(folder, "server-0", number)
    with path.open("a") as stream:
        stream.write(text)
    return path


@pytest.mark.parametrize(
    ("lines", "expected"), [(0, []), (1, ["99999"]), (3, ["99997", "99998", "99999"]), (100_001, 100_000)]
)
def test_it_begins_with_the_last_lines_of_a_large_file(tmp_path: Path, lines: int, expected: list[str] | int) -> None:
    path = write(tmp_path, 1, "".join(f"{number}\n" for number in range(100_000)))
    found = list(LogTail("server-0", path, lines).finish())
    assert (found if isinstance(expected, list) else len(found)) == expected


def test_it_yields_new_lines_once_they_are_complete_and_the_rest_at_the_end(tmp_path: Path) -> None:
    path = write(tmp_path, 1, "old\none\ntw")
    tail = LogTail("server-0", path, 2)
    assert list(tail.read()) == ["one"]
    write(tmp_path, 1, "o\nprogress 1\rprogress 2\rth")
    assert list(tail.read()) == ["two", "progress 1", "progress 2"]
    assert list(tail.finish()) == ["th"]


def test_it_goes_on_with_the_logs_of_restarted_servers(tmp_path: Path) -> None:
    tail = LogTail("server-0", write(tmp_path, 2, "a\n"), 10)
    write(tmp_path, 2, "b\nc")
    write(tmp_path, 3, "d\n")
    write(tmp_path, 4, "e\nf")
    assert list(tail.read()) == ["a", "b", "c", "d", "e"]
    write(tmp_path, 4, "g\n")
    assert list(tail.finish()) == ["fg"]


def test_it_goes_on_at_the_end_of_a_log_whose_oldest_lines_were_dropped(tmp_path: Path) -> None:
    path = write(tmp_path, 1, "one\ntwo\nthree\n")
    tail = LogTail("server-0", path, 1)
    assert list(tail.read()) == ["three"]
    path.write_text("three\n")
    assert list(tail.read()) == []
    write(tmp_path, 1, "four\n")
    assert list(tail.finish()) == ["four"]


def test_the_newest_log_of_each_server_is_found_and_no_other_file(tmp_path: Path) -> None:
    for name in ("server-0.log", "server-0.2.log", "server-0.10.log", "server-1.log", "nursery.log", ".gserve"):
        (tmp_path / name).touch()
    assert newest_logs(tmp_path) == {"server-0": tmp_path / "server-0.10.log", "server-1": tmp_path / "server-1.log"}
    assert newest_logs(tmp_path / "nowhere") == {}


def test_a_log_that_is_gone_is_an_error(tmp_path: Path) -> None:
    with pytest.raises(GserveError, match=r"cannot read the log .*server-0\.log: No such file"):
        LogTail("server-0", tmp_path / "server-0.log", 1)
