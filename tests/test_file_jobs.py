"""Jobs on files, under faults: whatever interrupts them, each row ends up in the output exactly once."""

import gzip
import itertools
import json
import os
import random
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from functools import partial
from pathlib import Path
from typing import Any

import pytest

from tests.gserve.place import Place, eventually

IS_LONG = "LONG" in os.environ
LONG = pytest.mark.skipif(not IS_LONG, reason="takes minutes: LONG=1 runs it")
WAITING = "--params", '{"max_tokens": 400, "ignore_eos": true}'
"""Parameters with which the shared service takes 2 seconds for a row."""
SLOW: dict[str, Any] = {"latency": 0.05, "capacity": 8}
"""A server of this engine answers 160 rows a second, if each is one word."""
MAX_MEMORY = 250
"""Maximum memory of the command for any number of rows, in MiB."""


@pytest.fixture(scope="module")
def shared(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Place]:
    """Return a place where a service named "shared" runs, 5 ms a word, which fails at prompts with "POISON"."""
    place = Place(tmp_path_factory.mktemp("shared"))
    launch(place, place.config("shared", latency=0.005, capacity=1024, error_on="POISON"), "shared")
    yield place
    place.run("stop", "shared")
    place.assert_nothing_is_left()


@pytest.fixture
def place(shared: Place, tmp_path: Path) -> Iterator[Place]:
    """Return a place from which the shared service is seen, with a folder "to" for outputs."""
    place = Place(tmp_path)
    place.environ["XDG_RUNTIME_DIR"] = shared.environ["XDG_RUNTIME_DIR"]
    (tmp_path / "to").mkdir()
    yield place
    place.assert_nothing_is_left()


def launch(place: Place, config: str, name: str) -> "subprocess.Popen[str]":
    """Launch a service, and return its process once it is ready."""
    process = place.start("launch", config, "--name", name, start_new_session=True)
    place.run("wait", name)
    return process


def generate(output: Path | str, *more: str, source: str = "in.jsonl") -> list[str]:
    """Return the arguments of a job on the shared service."""
    return ["generate", "--attach", "shared", "-i", source, "-o", str(output), *more]


def write_rows(place: Place, count: int, first: int = 0) -> Path:
    """Append rows with spaces and nested values, of which each prompt is one word, to the input."""
    path = place.folder / "in.jsonl"
    with path.open("a") as file:
        for number in range(first, first + count):
            file.write(f'{{"number":  {number}, "prompt": "row-{number}", "tags": [{{"b": {number}.50}}]}}\n')
    return path


def text_of(path: Path) -> bytes:
    return gzip.decompress(path.read_bytes()) if path.suffix == ".gz" else path.read_bytes()


def lines_of(path: Path) -> list[Any]:
    text = text_of(path)
    assert not text or text.endswith(b"\n")
    return [json.loads(line) for line in text.splitlines()]


def written(output: Path) -> int:
    """Return the number of answers that a job has written so far."""
    for path in (output.with_name(f".{output.name}.gserve.journal"), output):
        with suppress(FileNotFoundError):  # the journal goes when the output is there
            return path.read_bytes().count(b"\n")
    return 0


def rows_of(output: Path) -> list[dict[str, Any]]:
    """Return the rows of an output in its order."""
    if output.suffix == ".parquet":
        import pyarrow.parquet as pq

        found: list[dict[str, Any]] = pq.read_table(output).to_pylist()
        return found
    return lines_of(output)


def check_each_once(output: Path, source: Path) -> None:
    """Check that the output has each row of the input once, with its columns and its answer, and is all there is."""
    given, rows = lines_of(source), rows_of(output)
    is_table = output.suffix != ".jsonl"
    places = list(range(len(rows))) if is_table else [row.pop("_row") for row in rows]
    assert sorted(places) == list(range(len(given)))
    wrong = [
        (row, given[place])
        for place, row in zip(places, rows, strict=True)
        if row
        != given[place]
        | {"response": given[place]["prompt"], "finish_reason": "stop", "prompt_tokens": 1, "completion_tokens": 1}
    ]
    assert not wrong, wrong[:3]
    if output.suffix != ".parquet":
        own = {line[:-1] for line in source.read_bytes().splitlines()}
        lines = text_of(output).splitlines()
        assert {line.partition(b',"response"')[0].partition(b',"_row"')[0] for line in lines} == own
    assert beside(output) == [f".{output.name}.gserve.json"]


def beside(output: Path) -> list[str]:
    """Return the names of the other files in the folder of an output."""
    return sorted(path.name for path in output.parent.iterdir() if path != output)


def kill(process: "subprocess.Popen[str]") -> None:
    """Kill the process group of a job."""
    os.killpg(process.pid, signal.SIGKILL)
    process.wait()


# ---------------------------------------------------------------------------------------------------------- kills -9

type Moment = Callable[[Path], object]
"""Returns whether a job on an output has come to a moment."""


def moments_of_answering(chance: random.Random, rows: int, kills: int, start: float) -> Iterator[Moment]:
    """Yield moments while a job starts or answers, without end. `start`: time that it takes to start, in seconds."""
    after = 0
    for number in itertools.count():
        began = time.monotonic()
        if number % 3 == 0:
            delay = chance.uniform(0, start)
            yield lambda output, at=began + delay: time.monotonic() > at  # type: ignore[misc]
        else:
            after = (after + chance.randrange(1, rows // kills)) % rows
            yield lambda output, after=after: written(output) > after  # type: ignore[misc]


def moments_of_writing(chance: random.Random) -> Iterator[Moment]:
    """Yield moments while a job writes its table, without end."""
    for number in itertools.count():
        if number % 3 == 2:  # the table is there, and its journal still is
            yield lambda output: output.exists() and any(".journal" in name for name in beside(output))
        else:
            delay = chance.uniform(0, 0.1) * (number % 3)

            def is_being_written(output: Path, delay: float = delay) -> bool:
                if not any(name.endswith(".part") for name in beside(output)):
                    return False
                time.sleep(delay)
                return True

            yield is_being_written


def kill_again_and_again(place: Place, output: Path, moments: Iterator[Moment], kills: int) -> None:
    """Start a job and kill it, until it has been killed this often."""
    killed = runs = 0
    while killed < kills:
        assert runs < 20 + 5 * kills, f"only {killed} of {runs} runs were killed before they ended"
        runs += 1
        has_come = next(moments)
        process = place.start(*generate(output), start_new_session=True)
        while process.poll() is None and not has_come(output):
            time.sleep(0.001)
        if process.poll() is None:
            kill(process)
            killed += process.returncode == -signal.SIGKILL  # else it has ended just before
        else:
            assert process.returncode == 0, place.stderr
        if process.returncode == 0:
            for path in output.parent.iterdir():  # it has ended too soon: begin anew
                path.unlink()


@pytest.mark.parametrize(
    ("name", "rows", "kills"),
    [
        ("out.jsonl", 5000, 6),
        ("out.parquet", 5000, 5),
        ("out.jsonl.gz", 5000, 3),
        pytest.param("out.jsonl", 50_000, 60, marks=LONG),
        pytest.param("out.parquet", 50_000, 60, marks=LONG),
        pytest.param("out.jsonl.gz", 50_000, 60, marks=LONG),
    ],
)
def test_a_job_that_is_killed_again_and_again_has_each_row_once(place: Place, name: str, rows: int, kills: int) -> None:
    seed = random.randrange(1 << 32)
    sys.stdout.write(f"seed {seed}\n")
    chance = random.Random(seed)
    source, output = write_rows(place, rows), place.folder / "to" / name
    of_writing = 0 if name.endswith(".jsonl") else kills // 3
    kill_again_and_again(place, output, moments_of_answering(chance, rows, kills, start=1.5), kills - of_writing)
    kill_again_and_again(place, output, moments_of_writing(chance), of_writing)
    place.run(*generate(output))
    check_each_once(output, source)
    content = output.read_bytes()
    assert f"all {rows:,} rows are answered already" in place.run(*generate(output)).stderr
    assert output.read_bytes() == content


def test_a_kill_of_a_server_and_then_of_the_job_leaves_each_row_once_and_no_process(place: Place) -> None:
    source, output = write_rows(place, 3000), place.folder / "to" / "out.jsonl"
    command = ["generate", place.config(servers=2, **SLOW), "-i", "in.jsonl", "-o", str(output)]
    process = place.start(*command, start_new_session=True)
    eventually(lambda: written(output) > 50)
    place.servers()[0].kill()
    before = written(output)
    eventually(lambda: written(output) > before + 100)
    kill(process)
    eventually(lambda: not place.processes())
    assert written(output) < 3000
    place.run(*command, "--set", "engine.latency=0")
    check_each_once(output, source)


@pytest.mark.parametrize("name", ["out.jsonl", "out.parquet"])
def test_a_job_that_was_killed_after_its_last_answer_is_completed_without_servers(place: Place, name: str) -> None:
    source, output = write_rows(place, 20), place.folder / "to" / name
    place.run(*generate(output, "--limit", "20"))
    fingerprint = output.with_name(f".{name}.gserve.json")
    fingerprint.write_text(json.dumps(json.loads(fingerprint.read_text()) | {"progress": None}))
    if name == "out.jsonl":
        output.with_name("out.failed.jsonl").touch()
    else:
        output.unlink()
    assert "interrupted" in place.run("status", "to").stdout
    config = place.config(fail_start="boom")
    place.run("generate", config, "-i", "in.jsonl", "-o", str(output))
    check_each_once(output, source)
    assert "done" in place.run("status", "to").stdout


# ------------------------------------------------------------------------------------------------------- a full disk


class Disk:
    """A small disk of its own at a folder, which only the commands that run on it see."""

    def __init__(self, place: Place, folder: Path, size: str) -> None:
        self._place, self._folder = place, folder
        as_root = [] if os.geteuid() == 0 else ["--map-root-user"]
        script = 'mount -t tmpfs -o "size=$2" tmpfs "$1" && echo ready && exec sleep 600'
        self._holder = subprocess.Popen(
            ["unshare", "--mount", *as_root, "sh", "-c", script, "sh", folder, size], stdout=subprocess.PIPE, text=True
        )
        assert self._holder.stdout is not None
        assert self._holder.stdout.readline() == "ready\n", "no disk can be mounted here"
        self.seen = Path(f"/proc/{self._holder.pid}/root{folder}")
        """The folder as others see it."""

    def __enter__(self) -> "Disk":
        return self

    def __exit__(self, *exc: object) -> None:
        self._holder.kill()
        self._holder.communicate()

    def run(self, *command: str) -> "subprocess.CompletedProcess[str]":
        """Run a command that sees the disk."""
        own = [] if os.geteuid() == 0 else ["--user", "--preserve-credentials"]
        return subprocess.run(
            ["nsenter", f"--target={self._holder.pid}", "--mount", *own, *command],
            env=self._place.environ, capture_output=True, text=True, timeout=60, check=False,
        )  # fmt: skip

    def gserve(self, *arguments: str) -> "subprocess.CompletedProcess[str]":
        """Run gserve on the disk."""
        return self.run(sys.executable, "-m", "gserve.cli", *arguments)

    def grow(self, size: str) -> None:
        """Make space."""
        assert self.run("mount", "-o", f"remount,size={size}", str(self._folder)).returncode == 0


@pytest.mark.parametrize(
    ("name", "size", "full"),
    [
        ("out.jsonl", "256k", "out.jsonl"),
        ("out.parquet", "128k", ".out.parquet.gserve.journal"),
        ("out.csv", "640k", "out.csv"),
        ("out.parquet", "640k", "out.parquet"),
    ],
    ids=["JSON lines", "the journal", "the final table of CSV", "the final table of Parquet"],
)
def test_a_full_disk_is_an_error_that_names_the_file_and_the_job_continues_once_there_is_space(
    place: Place, name: str, size: str, full: str
) -> None:
    chance = random.Random(5)
    rows = [{"prompt": f"row-{number}", "text": chance.randbytes(250).hex()} for number in range(3000)]
    source = place.write("in.jsonl", *rows)
    folder = place.folder / "to"
    command = generate(folder / name, source=str(source))
    with Disk(place, folder, size) as disk:
        for _ in range(2):  # it says so as often as it is run
            done = disk.gserve(*command)
            assert done.returncode in (1, 2), done.stderr
            error = done.stderr.splitlines()[-1]
            assert error.startswith(f"error: {folder / full}: cannot write the results: "), done.stderr
            assert "No space left on device" in error
            assert "Traceback" not in done.stderr
            assert not any(path.name.endswith((".part", ".lock")) for path in disk.seen.iterdir())
        before = written(disk.seen / name)
        assert before
        disk.grow("16m")
        done = disk.gserve(*command)
        assert done.returncode == 0, done.stderr
        assert f"{before:,} answered before" in done.stderr or before == len(rows)
        if name.endswith(".csv"):
            lines = (disk.seen / name).read_text().splitlines()[1:]
            assert lines == [f"{row['prompt']},{row['text']},{row['prompt']},stop,1,1" for row in rows]
        else:
            answered = rows_of(disk.seen / name)
            if name.endswith(".jsonl"):
                answered.sort(key=lambda row: row["_row"])
            assert [{"prompt": row["response"], "text": row["text"]} for row in answered] == rows
        assert beside(disk.seen / name) == [f".{name}.gserve.json"]


# ------------------------------------------------------------------------------------------------ outputs as they are


def test_a_second_job_with_the_same_output_is_refused_at_once(place: Place) -> None:
    source, output = write_rows(place, 2100), place.folder / "to" / "out.jsonl"
    first = place.start(*generate(output, *WAITING))
    eventually(lambda: written(output))
    first.send_signal(signal.SIGSTOP)  # it must not end before the second has begun
    refused = place.run(*generate(output, *WAITING), code=2)
    assert f"error: {output}: already being written by process {first.pid} on " in refused.stderr
    first.send_signal(signal.SIGCONT)
    assert first.wait(60) == 0
    assert sorted(row["_row"] for row in lines_of(output)) == list(range(len(lines_of(source))))


@pytest.mark.parametrize("torn", ["half a line", "zeros"])
def test_a_torn_last_line_is_answered_again_and_no_other(place: Place, torn: str) -> None:
    source, output = write_rows(place, 100), place.folder / "to" / "out.jsonl"
    place.run(*generate(output))
    lines = output.read_bytes().splitlines(keepends=True)
    output.write_bytes(b"".join(lines[:60]) + (lines[60][:40] if torn == "half a line" else bytes(40)))
    assert "rows: 40 answered, 60 answered before" in place.run(*generate(output)).stderr
    assert output.read_bytes().startswith(b"".join(lines[:60]))
    check_each_once(output, source)


def test_a_torn_journal_is_completed(place: Place) -> None:
    source, output = write_rows(place, 100), place.folder / "to" / "out.parquet"
    place.run(*generate(output, "--limit", "60"))
    journal = output.with_name(".out.parquet.gserve.journal")
    journal.write_bytes(journal.read_bytes()[:-30])
    assert "rows: 41 answered, 59 answered before" in place.run(*generate(output)).stderr
    check_each_once(output, source)


def refuse(place: Place, output: Path, *arguments: str) -> str:
    """Check that a job is refused and leaves the output as it is. Return what it says."""
    content = output.read_bytes()
    refused = place.run(*arguments, code=2)
    assert output.read_bytes() == content
    assert "choose another --output, or --overwrite" in refused.stderr
    return refused.stderr


@pytest.mark.parametrize("name", ["out.jsonl", "out.parquet"])
def test_an_output_that_another_job_has_made_is_refused_with_what_differs(place: Place, name: str) -> None:
    source, output = write_rows(place, 20), place.folder / "to" / name
    place.run(*generate(output, "--template", "{{prompt}}", "--params", '{"max_tokens": 9}'))
    same = generate(output, "--template", "{{prompt}}", "--params", '{"max_tokens": 9}')
    assert "with parameters.max_tokens 9, not 8" in refuse(place, output, *same[:-1], '{"max_tokens": 8}')
    assert 'with template "{{prompt}}", not "{{number}}"' in refuse(
        place, output, *[word.replace("{{prompt}}", "{{number}}") for word in same]
    )
    other = {"llm": {"model_name": "other"}, "engine": {"type": "echo"}}
    (place.folder / "other.yaml").write_text(json.dumps(other))
    assert 'with model "demo-model", not "other"' in refuse(place, output, same[0], "other.yaml", *same[3:])
    source.write_bytes(source.read_bytes().replace(b"row-7", b"ROW-7"))
    assert f"{name} was made with input.in.jsonl " in refuse(place, output, *same)
    fingerprint = output.with_name(f".{name}.gserve.json")
    fingerprint.unlink()
    assert f"{name} exists and gserve does not know what made it" in refuse(place, output, *same)


def test_rows_that_were_appended_to_the_input_are_answered_too(place: Place) -> None:
    source, output = write_rows(place, 20), place.folder / "to" / "out.jsonl"
    place.run(*generate(output))
    write_rows(place, 10, first=20)
    assert "rows: 10 answered, 20 answered before" in place.run(*generate(output)).stderr
    check_each_once(output, source)


def test_a_finished_table_names_itself_when_rows_were_appended_and_is_done_for_a_smaller_limit(place: Place) -> None:
    _, output = write_rows(place, 20), place.folder / "to" / "out.csv"
    place.run(*generate(output))
    content = output.read_bytes()
    assert f"all 5 rows are answered already: {output}" in place.run(*generate(output, "--limit", "5")).stderr
    write_rows(place, 1, first=20)
    refused = place.run(*generate(output), code=2)
    assert f"error: {output}: this output is finished, with 20 rows, and the input has 21 now: " in refused.stderr
    assert output.read_bytes() == content


def test_of_several_inputs_only_the_last_may_grow(place: Place) -> None:
    """Rows that are appended to another one would move those of the last one to other places."""
    output = place.folder / "to" / "out.jsonl"
    (place.folder / "rows").mkdir()
    place.write("rows/a.txt", "one", "two")
    place.write("rows/b.txt", "three")
    place.run(*generate(output, source="rows"))
    place.write("rows/b.txt", "three", "four")
    assert "rows: 1 answered, 3 answered before" in place.run(*generate(output, source="rows")).stderr
    place.write("rows/a.txt", "one", "two", "more")
    assert "out.jsonl was made with input.a.txt " in refuse(place, output, *generate(output, source="rows"))
    assert [row["response"] for row in lines_of(output)] == ["one", "two", "three", "four"]


@pytest.mark.parametrize("before", ["one\ntwo", "prompt\none\ntwo"], ids=["text", "CSV"])
def test_a_last_line_that_has_grown_is_an_edited_row(place: Place, before: str) -> None:
    name = "in.csv" if before.startswith("prompt") else "in.txt"
    source, output = place.folder / name, place.folder / "to" / "out.jsonl"
    source.write_text(before)
    place.run(*generate(output, source=name))
    source.write_text(f"{before}-and-more\nthree\n")
    assert f"out.jsonl was made with input.{name} " in refuse(place, output, *generate(output, source=name))
    source.write_text(f"{before}\nthree\n")
    assert "rows: 1 answered, 2 answered before" in place.run(*generate(output, source=name)).stderr
    assert sorted((row["_row"], row["response"]) for row in lines_of(output)) == [(0, "one"), (1, "two"), (2, "three")]


# ------------------------------------------------------------------------------------------ rows that are not answered


def test_failed_rows_are_in_a_file_of_their_own_and_are_tried_again(place: Place) -> None:
    output = place.folder / "to" / "out.jsonl"
    text = '{"prompt": "one", "a": 1}\n\n{"prompt": "POISON", "a": 2}\n{"prompt": \n{"prompt": "four", "a": 4}\n'
    (place.folder / "in.jsonl").write_text(text)
    for answered in ("rows: 2 answered, ", "2 answered before, "):
        done = place.run(*generate(output), code=1)
        assert answered in done.stderr
        assert "2 failed" in done.stderr
        assert f"the failed rows: {output.with_name('out.failed.jsonl')}" in done.stderr
        assert sorted(row["response"] for row in lines_of(output)) == ["four", "one"]
        poison, bad = sorted(lines_of(output.with_name("out.failed.jsonl")), key=lambda row: row["_row"])
        assert poison.pop("error") == "an error, as requested"
        assert poison == {"prompt": "POISON", "a": 2, "_row": 1, "_line": 3}
        assert bad.pop("error")
        assert bad == {"_row": 2, "_line": 4}
    config = place.config(**SLOW)  # the same model, without the fault
    done = place.run("generate", config, "-i", "in.jsonl", "-o", str(output), code=1)
    assert "rows: 1 answered, 2 answered before, 1 failed" in done.stderr
    assert [row["_row"] for row in lines_of(output.with_name("out.failed.jsonl"))] == [2]


def test_a_job_in_a_run_that_ends_leaves_the_rest_to_the_same_command(place: Place) -> None:
    source, output = write_rows(place, 1500), place.folder / "to" / "out.parquet"
    job = [sys.executable, "-m", "gserve.cli", "generate", "-i", "in.jsonl", "-o", str(output)]
    command = ["run", place.config(**SLOW), "--", *job]
    process = place.start(*command)
    eventually(lambda: written(output) > 50)
    process.send_signal(signal.SIGUSR1)
    assert process.wait(60) == 1
    assert "; the other rows were not answered: " in place.stderr
    done = written(output)
    assert 50 < done < 1500
    assert f"{done:,} answered before" in place.run(*command).stderr
    check_each_once(output, source)


def test_a_job_whose_service_is_stopped_continues_with_another_service(place: Place) -> None:
    """Rows take from 0.05 to 5 s, so that the end of the service does not come and go between two looks at it."""
    rows = [{"prompt": " ".join(["word"] * (1 + 37 * number % 100))} for number in range(200)]
    place.write("in.jsonl", *rows)
    output = place.folder / "to" / "out.jsonl"
    launch(place, place.config("stopped", latency=0.05, capacity=24), "stopped")
    job = generate(output, "--params", '{"max_tokens": 100}')
    process = place.start(*[word.replace("shared", "stopped") for word in job])
    eventually(lambda: written(output) > 50)
    place.run("stop", "stopped")
    assert process.wait(60) == 1
    assert "; the other rows were not answered: the service 'stopped' is ending" in place.stderr
    done = written(output)
    assert 50 < done < 200
    told = place.run(*job).stderr
    assert f"rows: {200 - done:,} answered, {done:,} answered before" in told
    assert sorted((row["_row"], row["response"]) for row in lines_of(output)) == [
        (number, row["prompt"]) for number, row in enumerate(rows)
    ]
    assert beside(output) == [".out.jsonl.gserve.json"]


# -------------------------------------------------------------------------------------------------- another machine


@contextmanager
def another_machine() -> Iterator[tuple[str, list[str]]]:
    """Make a network namespace. Yield its address, and the words that start a command in it."""
    if os.geteuid() or shutil.which("ip") is None:
        pytest.skip("needs root and iproute2")
    tag, net = f"gs{os.getpid() % 100_000}", f"10.{random.randrange(200, 250)}.{random.randrange(256)}"
    ip = partial(subprocess.run, check=True, capture_output=True)
    ip(["ip", "netns", "add", tag])
    try:
        ip(["ip", "link", "add", f"{tag}a", "type", "veth", "peer", "name", f"{tag}b", "netns", tag])
        ip(["ip", "addr", "add", f"{net}.1/24", "dev", f"{tag}a"])
        ip(["ip", "link", "set", f"{tag}a", "up"])
        for words in (f"addr add {net}.2/24 dev {tag}b", f"link set {tag}b up", "link set lo up"):
            ip(["ip", "-n", tag, *words.split()])
        yield f"{net}.2", ["ip", "netns", "exec", tag]
    finally:
        ip(["ip", "netns", "del", tag])


def test_a_job_through_the_gateway_of_another_machine_makes_the_same_output(place: Place, tmp_path: Path) -> None:
    write_rows(place, 2000)
    place.run(*generate("near.jsonl", "--ordered"))
    (tmp_path / "far").mkdir()
    far = Place(tmp_path / "far")
    config = json.loads((far.folder / far.config(servers=2)).read_text()) | {"gateway": {"port": 8000}}
    with another_machine() as (host, inside):
        config["gateway"]["host"] = host
        (far.folder / "demo.yaml").write_text(json.dumps(config))
        key = "sk-0123456789abcdef"
        command = [*inside, sys.executable, "-m", "gserve.cli", "launch", "demo.yaml", "--name", "far"]
        service = subprocess.Popen(
            command, cwd=far.folder, env=far.environ | {"GSERVE_API_KEY": key}, stderr=subprocess.DEVNULL
        )
        try:
            far.run("wait", "far")
            job = ["generate", "--url", f"http://{host}:8000", "-i", "in.jsonl", "-o", "far.jsonl", "--ordered"]
            assert "refuses the API key" in place.run(*job, code=1, GSERVE_API_KEY="sk-fedcba9876543210").stderr
            place.run(*job, GSERVE_API_KEY=key)
        finally:
            service.terminate()
            service.wait(60)
    assert (place.folder / "far.jsonl").read_bytes() == (place.folder / "near.jsonl").read_bytes()
    far.assert_nothing_is_left()


# ----------------------------------------------------------------------------------------------- inputs and outputs


@pytest.mark.parametrize("name", ["out.jsonl", "out.parquet"])
def test_a_killed_job_on_stdin_continues_with_the_same_stdin(place: Place, name: str) -> None:
    source, output = write_rows(place, 2100), place.folder / "to" / name
    command = generate(output, "--format", "jsonl", source="-")
    with source.open() as stdin:
        process = place.start(*command, stdin=stdin, start_new_session=True)
    eventually(lambda: written(output) > 100 or process.poll() is not None)
    if process.poll() is None:
        kill(process)
    place.run(*command, stdin=source.read_text())
    check_each_once(output, source)
    other = place.run(*command, stdin=source.read_text().replace("row-7", "ROW-7"), code=2)
    assert f"{name} was made with input.stdin " in other.stderr


def test_an_output_that_is_a_link_to_another_file_system_remains_a_link(place: Place) -> None:
    source = write_rows(place, 200)
    folder = Path(tempfile.mkdtemp(dir="/dev/shm" if Path("/dev/shm").is_dir() else None))
    try:
        for name in ("out.jsonl", "out.parquet"):
            target, output = folder / name[::-1] / name, place.folder / "to" / name
            target.parent.mkdir()
            output.symlink_to(target)
            place.run(*generate(output, "--limit", "120"))
            place.run(*generate(output))
            assert output.readlink() == target
            check_each_once(target, source)
        assert beside(output) == ["out.jsonl"], "nothing lies beside the links"
    finally:
        shutil.rmtree(folder)


@pytest.mark.parametrize("name", ["out.jsonl", "out.csv", "out.parquet", "out.json"])
def test_an_empty_input_makes_an_output_without_rows(place: Place, name: str) -> None:
    write_rows(place, 0)
    output = place.folder / "to" / name
    for _ in range(2):
        place.run(*generate(output))
        assert output.exists()
        assert beside(output) == [f".{name}.gserve.json"]
    write_rows(place, 3)
    place.run(*generate(output), code=0 if name == "out.jsonl" else 2)


# ------------------------------------------------------------------------------------------------------------- memory


@pytest.mark.parametrize("rows", [200_000, pytest.param(2_000_000, marks=LONG)])
def test_the_memory_of_a_job_does_not_grow_with_its_rows(place: Place, rows: int) -> None:
    write_rows(place, rows)
    output = place.folder / "to" / "out.jsonl"
    process = place.start(*generate(output), start_new_session=True)
    peak = 0
    while process.poll() is None:
        peak = max(peak, peak_memory(process.pid))
        time.sleep(0.05)
    assert process.returncode == 0, place.stderr
    sys.stdout.write(f"{rows:,} rows: {peak} MiB\n")
    assert 0 < peak < MAX_MEMORY
    assert written(output) == rows


def peak_memory(pid: int) -> int:
    """Return the highest memory of a process so far, in MiB; 0: it has ended."""
    with suppress(OSError, StopIteration):
        status = Path(f"/proc/{pid}/status").read_text().splitlines()
        return int(next(line.split()[1] for line in status if line.startswith("VmHWM"))) // 1024
    return 0
