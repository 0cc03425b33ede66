"""The log of a server, as a process has it: small, without secrets, and never in its way."""

import logging
import os
import re
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from gserve_core.host import logs
from gserve_core.host.server_log import HEAD, LIMIT, LONGEST_LINE, PART, TAIL_LINES, BoundedLog, read_part

SECRET = "hf_canary_0123456789"
PREAMBLE = f"""
import os, signal, subprocess, sys, time
from gserve_core.host.server_log import ServerLog
log = ServerLog({{{SECRET!r}}})
"""


def start(program: str, log: Path, **options: int) -> "subprocess.Popen[bytes]":
    """Run a program as launchers run servers: its stderr is appended to the log."""
    with log.open("ab") as stream:
        ends: dict[str, Any] = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "stderr": stream} | options
        command = [sys.executable, "-W", "ignore", "-c", PREAMBLE + program]
        process: subprocess.Popen[bytes] = subprocess.Popen(command, **ends)
        return process


def run(program: str, log: Path, code: int = 0) -> str:
    """Run a program to its end; return its log. Its stdout must stay empty."""
    with start(program, log) as process:
        assert process.communicate(timeout=60)[0] == b""
    text = log.read_text()
    assert process.returncode == code, text
    return text


@pytest.fixture
def log(tmp_path: Path) -> Path:
    return tmp_path / "server.log"


def test_what_it_and_its_children_print_is_in_the_file_in_order(log: Path) -> None:
    log.write_text("before\n")
    program = """
print("from python", flush=True)
os.write(2, b"raw\\n")
subprocess.run(["sh", "-c", "echo out; echo err >&2"], check=True)
pid = os.fork()
if not pid:
    print("from a fork", flush=True)
    os._exit(0)
os.waitpid(pid, 0)
print("the last words")
log.close()
os._exit(0)
"""
    expected = ["before", "from python", "raw", "out", "err", "from a fork", "the last words"]
    assert run(program, log).splitlines() == expected


def test_an_unended_last_line_and_bytes_that_are_no_text_are_kept(log: Path) -> None:
    with start(r'os.write(1, b"\xff\x00 a\rb\r\n \xe2\x82\xac end"); log.close()', log) as process:
        process.communicate(timeout=60)
    assert log.read_bytes() == b"\xff\x00 a\rb\r\n \xe2\x82\xac end\n"


def test_a_flood_leaves_the_beginning_and_the_end_and_says_what_is_missing(log: Path) -> None:
    program = """
for start in range(0, 2_000_000, 10_000):
    os.write(1, b"".join(b"line %08d %s\\n" % (i, b"x" * 85) for i in range(start, start + 10_000)))
log.close()
"""
    with start(program, log) as process:
        process.communicate(timeout=200)
    assert process.returncode == 0
    content = log.read_bytes()
    assert LIMIT // 4 < len(content) <= LIMIT
    (note,) = re.findall(rb"^\[gserve: .*\]\n", content, re.MULTILINE)
    head, tail = content.split(note)
    assert HEAD - 200 < len(head) <= HEAD
    dropped = re.search(rb"(\d+) bytes of this log were dropped", note)
    assert dropped
    assert int(dropped[1]) == 2_000_000 * 100 - len(head) - len(tail)
    numbers = [int(line[5:13]) for line in (head + tail).splitlines()]
    assert numbers[: len(head) // 100] == list(range(len(head) // 100))
    assert numbers[len(head) // 100 :] == list(range(2_000_000 - len(tail) // 100, 2_000_000))


def test_a_file_that_was_large_already_keeps_its_beginning(log: Path) -> None:
    log.write_bytes(b"".join(b"old %07d %s\n" % (i, b"x" * 87) for i in range(LIMIT // 100)))
    text = run("print('new'); log.close()", log)
    assert len(text) < LIMIT
    assert text.startswith("old 0000000")
    assert text.endswith("new\n")
    assert text.count("dropped here") == 1


def test_the_owner_keeps_a_log_bounded_to_which_another_program_appends(log: Path) -> None:
    log.touch()
    bounded = BoundedLog(log, limit=3 * HEAD)
    longest = 0
    with log.open("ab") as stream:
        for number in range(200_000):
            stream.write(b"line %d of a program that knows no bound\n" % number)
            if number % 1000 == 999:
                stream.flush()
                bounded.look()
                longest = max(longest, log.stat().st_size)
    bounded.look()
    bounded.close()
    text = log.read_text()
    assert longest <= 3 * HEAD
    assert text.startswith("line 0 of")
    assert text.endswith("line 199999 of a program that knows no bound\n")
    assert "bytes of this log were dropped here" in text


def test_secrets_are_hidden_also_when_they_come_in_pieces(log: Path) -> None:
    program = f"""
print("whole", {SECRET!r}, flush=True)
for piece in ["pieces ", *{SECRET!r}, " end\\n"]:
    os.write(2, piece.encode())
    time.sleep(0.01)
subprocess.run(["echo", "from a child:", {SECRET!r}], check=True)
os.write(2, b"x" * 70_000 + b"{SECRET}")
os.write(1, b"{SECRET}" + b"y" * 200_000 + b"\\n")
os.write(2, b"unended {SECRET}")
log.close()
"""
    text = run(program, log)
    assert text.splitlines()[:3] == ["whole ***", "pieces *** end", "from a child: ***"]
    assert text.endswith("\nunended ***\n")
    assert SECRET[:6] not in text


def test_a_long_line_is_cut(log: Path) -> None:
    program = """
for _ in range(300):
    os.write(1, b"a" * 10_000)
os.write(1, b"\\n")
print("b" * 100_000, "c", sep="\\n")
log.close()
"""
    lines = run(program, log).splitlines()
    assert lines == ["a" * LONGEST_LINE + " [cut]", "b" * LONGEST_LINE + " [cut]", "c"]


def test_progress_bars_are_seen_while_they_move(log: Path) -> None:
    program = """
os.write(2, b"\\r 10%")
os.write(2, b"\\r 20%\\r")
sys.stdin.read()
"""
    with start(program, log) as process:
        eventually_in(log, "20%")
        process.communicate(timeout=30)


def eventually_in(log: Path, text: str) -> None:
    deadline = time.monotonic() + 60
    while text not in log.read_text():
        assert time.monotonic() < deadline, log.read_text()
        time.sleep(0.02)


def test_the_last_lines_are_there_also_where_none_can_be_written() -> None:
    program = f"""
answer = os.dup(0)
for i in range(10_000):
    print("line", i)
print({SECRET!r})
log.close()
assert log.tail() == [f"line {{i}}" for i in range(10_000 - {TAIL_LINES} + 1, 10_000)] + ["***"], log.tail()
os._exit(7)
"""
    with Path("/dev/full").open("ab") as full:
        done = subprocess.run([sys.executable, "-c", PREAMBLE + program], stderr=full, timeout=60)
    assert done.returncode == 7


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Path]:
    """Return a folder on a disk of one megabyte."""
    folder = tmp_path / "disk"
    folder.mkdir()
    mounted = subprocess.run(
        ["mount", "-t", "tmpfs", "-o", "size=1m", "tmpfs", str(folder)], capture_output=True, text=True
    )
    if mounted.returncode:
        pytest.skip(f"needs the right to mount: {mounted.stderr.strip()}")
    try:
        yield folder
    finally:
        subprocess.run(["umount", "-l", str(folder)], check=True)


def test_a_full_disk_loses_lines_and_the_log_goes_on_when_there_is_room(small_disk: Path) -> None:
    ballast = small_disk / "ballast"
    ballast.write_bytes(b"x" * 500_000)
    log = small_disk / "server.log"
    program = """
for i in range(20_000):
    print(f"line {i:05} " + "x" * 88)
sys.stdout.flush()
print("written", file=sys.stderr)
while True:
    print(sys.stdin.readline().strip(), flush=True)
"""
    with start(program, log) as process:
        assert process.stdin is not None
        deadline = time.monotonic() + 60
        while log.stat().st_size < 400_000:
            assert time.monotonic() < deadline
            time.sleep(0.05)
        process.stdin.write(b"lost too\n")
        process.stdin.flush()
        time.sleep(2)  # the disk is full, and all of this is lost
        assert process.poll() is None
        ballast.unlink()
        process.stdin.write(b"found\n")
        process.stdin.flush()
        eventually_in(log, "found")
        process.kill()
    lines = log.read_text().splitlines()
    assert lines[-1] == "found"
    note = re.fullmatch(r"\[gserve: (\d+) lines could not be written here: No space left on device\]", lines[-2])
    assert note, lines[-3:]
    assert all(re.fullmatch(r"line \d{5} x{88}", line) for line in lines[:-3])  # the one before was torn, perhaps
    assert len(lines) - 2 + int(note[1]) in (20_002, 20_003)


def test_a_log_that_nobody_reads_does_not_stop_the_process() -> None:
    program = """
told = os.dup(0)
for i in range(100_000):
    print(f"line {i:05} " + "x" * 88)
sys.stdout.flush()
os.write(told, b"done")
log.close()
os._exit(0)
"""
    ours, theirs = os.pipe()
    read, write = os.pipe()
    with subprocess.Popen([sys.executable, "-c", PREAMBLE + program], stdin=theirs, stderr=write) as process:
        for descriptor in (theirs, write):
            os.close(descriptor)
        assert os.read(ours, 10) == b"done"
        assert process.wait(30) == 0
    with os.fdopen(read, "rb") as stream:
        assert stream.readline() == b"line 00000 " + b"x" * 88 + b"\n"
    os.close(ours)


def test_what_was_written_before_close_is_in_the_file(log: Path) -> None:
    program = """
os.write(2, b"x" * 99 + b"\\n")
while log.tail() == []:
    time.sleep(0.01)
block = (b"y" * 99 + b"\\n") * 1000
for _ in range(50):
    os.write(2, block)
os.write(2, b"the last words")
log.close()
log.close()
os.write(2, b"after it\\n")
os._exit(0)
"""
    text = run(program, log)
    assert len(text.splitlines()) == 50_003
    assert text.endswith("\nthe last words\nafter it\n")


def test_close_ends_in_time_while_a_child_floods(log: Path) -> None:
    program = """
child = subprocess.Popen(["yes"])
time.sleep(0.3)
began = time.monotonic()
log.close()
took = time.monotonic() - began
child.kill()
child.wait()
os._exit(0 if took < 5 else 1)
"""
    with start(program, log) as process:
        process.communicate(timeout=60)
    assert process.returncode == 0
    assert log.stat().st_size <= LIMIT


def test_a_child_that_outlives_the_process_finds_the_pipe_broken_also_when_forked(log: Path) -> None:
    program = """
parent = os.getpid()
if not os.fork():
    signal.alarm(30)
    while os.getppid() == parent:
        time.sleep(0.01)
    try:
        while True:
            os.write(2, b"x" * 10_000)
    except BrokenPipeError:
        open(sys.stdin.readline().strip(), "w").close()
    os._exit(0)
os.kill(os.getpid(), 9)
"""
    with start(program, log) as process:
        assert process.stdin is not None
        found = log.with_name("found")
        process.stdin.write(f"{found}\n".encode())
        process.stdin.flush()
        assert process.wait(30) == -signal.SIGKILL
        deadline = time.monotonic() + 60
        while not found.exists():
            assert time.monotonic() < deadline
            time.sleep(0.02)


def test_the_stack_of_a_crash_is_in_the_file(log: Path) -> None:
    program = f"""
print("running", flush=True)
while not os.path.getsize({str(log)!r}):
    time.sleep(0.01)
os.abort()
"""
    text = run(program, log, code=-signal.SIGABRT)
    assert text.startswith("running\n")
    assert "Fatal Python error: Aborted" in text


def test_a_handler_that_waits_holds_up_no_thread_that_must_not_wait(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(logs, "BACKLOG_LINES", 10)
    may_go = threading.Event()
    seen: list[str] = []

    class Waiting(logging.Handler):
        def emit(self, record: logging.LogRecord) -> None:
            assert may_go.wait(30)
            seen.append(record.getMessage())

    logger, handler = logging.getLogger("gserve.waiting"), Waiting()

    def log() -> None:
        logs.keep_logging_from_waiting()
        for number in range(100):
            logger.warning("record %d", number)

    logging.getLogger().addHandler(handler)
    try:
        thread = threading.Thread(target=log)
        thread.start()
        thread.join(10)
        assert not thread.is_alive()
        may_go.set()
        logs.flush(10)
    finally:
        may_go.set()
        logging.getLogger().removeHandler(handler)
    assert seen[-10:] == [f"record {number}" for number in range(90, 100)]
    notes = [it for it in seen if it.endswith("records were dropped here: a log handler takes none")]
    assert len(seen) - len(notes) + sum(int(it.split()[0]) for it in notes) == 100, "every record is seen, or counted"
    assert notes


# -------------------------------------------------------------------------------------------------------------- reading


def test_a_log_is_read_line_by_line_as_it_grows(tmp_path: Path) -> None:
    log = tmp_path / "log"
    log.write_text("one\ntwo\nthr")
    assert read_part(log, None) == ("one\ntwo\n", 8)
    assert read_part(log, 8) == ("", 8)
    with log.open("a") as stream:
        stream.write("ee\n50%\r")
    assert read_part(log, 8) == ("three\n50%\r", 18)
    assert read_part(log, 4) == ("two\nthree\n50%\r", 18)
    log.write_text("")
    assert read_part(log, None) == ("", 0)


def test_a_long_log_is_read_from_its_end_or_in_parts(tmp_path: Path) -> None:
    log = tmp_path / "log"
    lines = "".join(f"line {number} \N{SNOWMAN}\n" for number in range(20_000))
    log.write_text(lines)
    text, end = read_part(log, None)
    assert end == log.stat().st_size
    assert PART - 30 < len(text.encode()) <= PART
    assert text.startswith("line ")
    assert lines.endswith(text)
    text, end = "", 0
    while end < log.stat().st_size:
        part, end = read_part(log, end)
        assert 0 < len(part.encode()) <= PART
        text += part
    assert text == lines


def test_a_line_longer_than_a_part_is_read_in_pieces(tmp_path: Path) -> None:
    log = tmp_path / "log"
    log.write_text("x" * (PART + 10) + "\nend\n")
    assert read_part(log, 0) == ("x" * PART, PART)
    assert read_part(log, PART) == ("x" * 10 + "\nend\n", PART + 15)
    log.write_text("x" * (PART + 10))
    assert read_part(log, None) == ("x" * PART, PART + 10)


def test_a_log_that_has_lost_its_middle_is_read_from_its_end(tmp_path: Path) -> None:
    log = tmp_path / "log"
    log.write_text("one\ntwo\n")
    assert read_part(log, 1000) == ("one\ntwo\n", 8)


def test_bytes_that_are_no_text_are_replaced(tmp_path: Path) -> None:
    log = tmp_path / "log"
    log.write_bytes(b"a\xff\xfeb\n")
    assert read_part(log, None) == ("a\ufffd\ufffdb\n", 5)
