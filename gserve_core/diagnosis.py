"""The cause of a server's failure, from its own message, the exit of its process, and its log.

A log explains a failure; it never decides the state of a server.
"""

import re
import signal
from collections.abc import Iterator, Sequence
from pathlib import Path

from .errors import ServerExited
from .host.control_group import memory_kills
from .host.server_log import TAIL_LINES
from .interfaces import Engine, KnownError, LogForm

TAIL_BYTES = 256 << 10
"""Maximum size of the end of a log that is read for these lines, in bytes."""
MAX_SHOWN = 400
"""Maximum length of a shown log line or exception text, in characters."""


def step(text: str, form: LogForm) -> str | None:
    """Return the last step of an engine's start in a piece of its log; None if it has none."""
    for line in reversed(re.split(r"[\r\n]", text)):
        for pattern, name in form.steps:
            if match := pattern.search(line):
                return name.format(*match.groups())
    return None


SILENT = "a process of the engine ended without an error message"
RANK = re.compile(r"rank \d+ on \S+: ")
"""The beginning of a cause that another rank than 0 has reported. It is kept in front of every explanation."""
MEMORY_HINT = "start fewer servers, lower gpu_memory_utilization or max_model_len, or take a smaller model"


def exited(
    name: str,
    *,
    phase: str,
    cause: str | None,
    returncode: int | None,
    log: Path,
    since: int = 0,
    kills: int | None = None,
    engine: type[Engine] = Engine,
) -> ServerExited:
    """Return the error for a failed server. Its first line is the cause; the message ends with cause and hint.

    The message includes the end of the log only if the cause is unknown. The error's `tail` always has it.

    `phase`: the step in which the server failed.
    `cause`: the error that the server reported before it ended; None: it reported none.
    `returncode`: the exit code of its process (negative: a signal's number); None: not known.
    `since`: the offset in the log, in bytes, at which this generation of the server begins.
    `kills`: the result of `memory_kills` at that time.
    `engine`: its class has known errors, and the form of its log.
    """
    lines, form = _lines(log, since), engine.log_form
    place = (RANK.match(cause or "") or [""])[0]
    cause = cause and cause.removeprefix(place)
    evidence = _evidence(cause, returncode, lines, form)
    error, ended = _cut(evidence[0]) if evidence else "", _describe_exit(returncode)
    known = _known(evidence, (*engine.known_errors, *KNOWN))
    if known:
        sentence, hint = _cut(known[0]) or error, known[1]
    elif error and not form.elsewhere.search(error):
        sentence, hint = error, ""
    else:
        sentence, hint = _explain_exit(_describe_engine_exit(lines, form) if error else ended, kills)
    tail = last_lines(log)
    sentence = place + sentence
    headline = f"{name} failed while {phase}: {sentence} (log: {log})"
    message = [headline]
    if error and place + error != sentence:
        message.append(f"original error: {error}")
    if not known and ended not in sentence:
        message.append(ended)
    if not known and tail:  # the log may explain it; the headline is repeated below it, where the user sees it
        message += ["last lines of the log:", *(f"  | {line}" for line in tail), headline]
    if hint:
        message.append(f"what to try: {hint}")
    return ServerExited(
        "\n".join(message), log=log, returncode=returncode, cause=sentence, hint=hint, phase=phase, tail=tail
    )


def _known(evidence: Sequence[str], errors: Sequence[KnownError]) -> tuple[str, str] | None:
    """Return the sentence and the hint for the first text that matches a known cause; None if none does."""
    for text in evidence:
        for pattern, sentence, hint in errors:
            if match := re.search(pattern, text):
                groups = [group for group in match.groups() if group is not None]
                return sentence.format(*groups), hint.format(*groups)
    return None


def _explain_exit(end: str, kills: int | None) -> tuple[str, str]:
    """Return the sentence and the hint for a process that gave no cause. `end`: how it ended, in words."""
    if not end.endswith((signal.SIGKILL.name, SILENT)):
        return end, ""
    now = memory_kills()
    if kills is not None and now is not None and now > kills:
        return f"{end}, after memory had run out", MEMORY_HINT
    return end, f"most likely the system killed it because memory ran out: {MEMORY_HINT}"


def _describe_engine_exit(lines: Sequence[str], form: LogForm) -> str:
    for line in lines:
        if match := form.killed.search(line):
            return f"a process of the engine was killed by {_signal(int(match[1]))}"
    return SILENT


def _describe_exit(returncode: int | None) -> str:
    if returncode is None:
        return "the server closed its control connection"
    if returncode < 0:
        return f"its process was killed by {_signal(-returncode)}"
    if returncode > 128 and (name := _signal(returncode - 128)).startswith("SIG"):
        return f"its process exited with code {returncode}, which means {name}"
    return f"its process exited unexpectedly with code {returncode}"


def _signal(number: int) -> str:
    return signal.Signals(number).name if number in list(signal.Signals) else f"signal {number}"


# ------------------------------------------------------------------------------------------------------ reading the log

OURS = re.compile(r"ERROR gserve\.serving: failed: ")
"""The line above the traceback that ends the server, written by the logger `gserve.serving`."""
TRACEBACK = "Traceback (most recent call last):"
CAUSED = "The above exception was the direct cause of the following exception:"
HANDLED = "During handling of the above exception, another exception occurred:"
AFTER = re.compile(r"\S+: |\d{4}-\d\d-\d\d |\(\w")
"""A line that does not continue an exception's text: output of another program, a warning, or a log record."""


def _evidence(cause: str | None, returncode: int | None, lines: Sequence[str], form: LogForm) -> list[str]:
    """Return the exceptions that explain a failure, as "type: text": the one that ended the server, then its causes."""
    if cause is not None and not form.elsewhere.search(cause):
        return [cause, *_last_chain(_ours(lines))[1:]]
    for record in _fatal_records(lines, form):
        for chain in _chains(record):
            if not form.elsewhere.search(chain[0]):
                return [*chain, *([cause] if cause else [])]
    if cause is not None:
        return [cause]
    if returncode is not None and 0 < returncode < 128:  # no report: Python ended the process with a traceback
        return _last_chain([line for line in lines[-TAIL_LINES:] if not form.record.match(line)])
    return []


def _lines(log: Path, since: int) -> list[str]:
    try:
        with log.open("rb") as stream:
            stream.seek(since)
            return stream.read().decode(errors="replace").splitlines()
    except OSError:
        return []


def _ours(lines: Sequence[str]) -> Sequence[str]:
    """Return the lines below the last one in which the server reports its failure."""
    for place in reversed(range(len(lines))):
        if OURS.search(lines[place]):
            return lines[place + 1 :]
    return ()


def _fatal_records(lines: Sequence[str], form: LogForm) -> Iterator[list[str]]:
    """Yield the records in a log about fatal errors of the engine's processes, in order of their first lines.

    A record holds the lines that one process logs from one place of its code. Lines of other processes may come between
    them.
    """
    records: dict[tuple[str, str], list[str]] = {}
    for line in lines:
        if (match := form.record.match(line)) and match["level"] == "ERROR":
            key = match["process"], match["place"]
            if form.fatal.match(match["text"]):
                records.setdefault(key, [])
            elif key in records:
                records[key].append(match["text"])
    yield from records.values()


def _last_chain(lines: Sequence[str]) -> list[str]:
    chains = list(_chains(lines))
    return chains[-1] if chains else []


def _chains(lines: Sequence[str]) -> Iterator[list[str]]:
    """Yield the exceptions in the tracebacks of some lines, as "type: text", each with its causes after it."""
    chain: list[str] = []
    is_cause = in_frames = in_text = False
    for line in lines:
        if line == TRACEBACK:
            if chain and not is_cause:
                yield chain
                chain = []
            in_frames, in_text, is_cause = True, False, False
        elif line == CAUSED:
            is_cause, in_text = True, False
        elif line == HANDLED:  # a handled exception is no cause
            chain, in_text = [], False
        elif in_frames and line.strip() and not line[0].isspace():
            chain.insert(0, re.sub(r"^[\w.]+\.(?=\w+(?::|$))", "", line))
            in_frames, in_text = False, True
        elif in_text and line.strip() and not AFTER.match(line):
            chain[0] += f" {' '.join(line.split())}"
        else:
            in_text = False
    if chain:
        yield chain


def last_lines(log: Path, count: int = TAIL_LINES) -> list[str]:
    """Return the last lines of a log, without empty ones; an empty list if it cannot be read."""
    try:
        with log.open("rb") as stream:
            stream.seek(max(0, log.stat().st_size - TAIL_BYTES))
            text = stream.read().decode(errors="replace")
    except OSError:
        return []
    return [_cut(line.rpartition("\r")[2]) for line in text.splitlines() if line.strip()][-count:]


def _cut(text: str) -> str:
    return text if len(text) <= MAX_SHOWN else f"{text[:MAX_SHOWN]} …"


# -------------------------------------------------------------------------------------------------------- what is known


KNOWN = (
    KnownError(
        r"No module named '([^']+)'",
        "the Python module '{0}' is not installed",
        "install it into the environment of the server; see Install in the README",
    ),
    KnownError(
        r"No space left on device",
        "a disk is full",
        "free space where the model, caches and temporary files are: download_dir, HF_HOME, ~/.cache, TMPDIR, /dev/shm",
    ),
    KnownError(
        r"Too many open files",
        "a process has reached its limit of open files",
        "raise the limit: 'ulimit -n 65536' before you start",
    ),
    KnownError(
        r"Permission denied: '([^']+)'",
        "no permission to read or write '{0}'",
        "check its owner, and download_dir, HF_HOME and TMPDIR",
    ),
    KnownError(
        r"[Aa]ddress already in use|cannot listen on .*: Permission denied",
        "",
        "choose another port under serve, from 1024 up, or leave it out: each server then takes a free one",
    ),
    KnownError(
        r"cannot listen on ",
        "",
        "check host under serve: an address or a name of the machine that the server runs on",
    ),
)
"""Known errors of any server; those of its engine come first. The first match counts."""
