"""Why a server did not start, or died, in one sentence: from what it said, how its process ended, and its log.

A log explains; it never decides what state a server is in.
"""

import re
import signal
from pathlib import Path

TAIL_LINES = 20
STEPS = (
    (re.compile(r"checkpoint shards:.*\| *(\d+/\d+)"), "loading weights {}"),
    (re.compile(r"Starting to load model"), "loading weights"),
    (re.compile(r"Capturing CUDA graphs.*\| *(\d+/\d+)"), "capturing CUDA graphs {}"),
    (re.compile(r"Dynamo bytecode transform time|Compiling a graph"), "compiling"),
    (re.compile(r"KV cache size"), "warming up"),
)
"""Lines of vLLM's log that tell a step of the start of its engine."""


def step(text: str) -> str | None:
    """Return the step of vLLM's start that the end of a piece of its log tells; None where it tells none."""
    for line in reversed(re.split(r"[\r\n]", text)):
        for pattern, name in STEPS:
            if match := pattern.search(line):
                return name.format(*match.groups())
    return None


ELSEWHERE = re.compile(r"\babove\b|stack trace|background process", re.IGNORECASE)
"""What vLLM's errors say where another process, whose words are in the log only, has failed first."""
FAILURE = re.compile(r"^(?:\(\w+ pid=\d+\) )?(?:ERROR \S+ \S+ \[\S+\] )?([\w.]*(?:Error|Exception|Exit): .+)$")


def first_failure(log: Path) -> str | None:
    """Return the first exception that a log tells and that does not point to another one; None where it tells none."""
    try:
        with log.open(errors="replace") as lines:
            for line in lines:
                if (match := FAILURE.match(line.rstrip())) and not ELSEWHERE.search(match[1]):
                    return match[1]
    except OSError:
        pass
    return None


def explain(name: str, *, phase: str, cause: str | None, returncode: int | None, log: Path) -> str:
    """Return the message of an error about a server that has failed.

    `phase` is what it was doing, `cause` what it said itself before it ended, `returncode` that of its process.
    """
    if cause is not None and ELSEWHERE.search(cause):
        cause = first_failure(log) or cause
    ended = f"{name} failed while {phase}: {cause or _ended(returncode)}"
    tail = last_lines(log)
    shown = "".join(f"\n  | {line}" for line in tail)
    return f"{ended} (log: {log})" + (f"\nlast lines of the log:{shown}" if tail else "")


def _ended(returncode: int | None) -> str:
    if returncode is None:
        return "it closed its line to us"
    if returncode >= 0:
        return f"its process ended with exit code {returncode}, unasked"
    name = signal.Signals(-returncode).name if -returncode in list(signal.Signals) else f"signal {-returncode}"
    hint = " (the system kills so what needs too much memory)" if name == "SIGKILL" else ""
    return f"its process was killed by {name}{hint}"


def last_lines(log: Path, count: int = TAIL_LINES) -> list[str]:
    """Return the last lines of a log, without empty ones; none where it cannot be read."""
    try:
        with log.open("rb") as stream:
            stream.seek(max(0, log.stat().st_size - (64 << 10)))
            text = stream.read().decode(errors="replace")
    except OSError:
        return []
    return [line.rpartition("\r")[2] for line in text.splitlines() if line.strip()][-count:]
