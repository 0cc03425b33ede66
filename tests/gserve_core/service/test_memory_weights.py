"""Weights from memory: tensors become a folder, which is there as long as a service has them."""

import os
import shutil
import signal
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy
import pytest

from gserve import ConfigError, GserveError, LLMConfig, ServeConfig, VLLMService
from gserve_core import reap
from gserve_core.engines.echo import EchoEngine
from gserve_core.host import scratch
from gserve_core.service import memory_weights
from tests.gserve_core.fake_servers import until
from tests.listeners import server_pid

pytest.importorskip("safetensors", reason="comes with vLLM")
SOME = {"a": numpy.arange(6, dtype=numpy.float32).reshape(2, 3), "b": numpy.array([1.5], numpy.float16)}


@pytest.fixture(autouse=True)
def shared(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Return the folder of this test in the place of shared memory."""
    folder = tmp_path / "shm"
    folder.mkdir()
    monkeypatch.setattr(scratch, "SHARED", folder)
    return folder


@pytest.fixture
def service() -> Iterator[VLLMService]:
    engine = EchoEngine(show_weights=True, error_on="never")
    with VLLMService(LLMConfig("m"), ServeConfig(servers=1), engine=engine) as running:
        yield running


def read(folder: Path) -> dict[str, Any]:
    from safetensors.numpy import load_file

    return {name: it for file in sorted(folder.glob("*.safetensors")) for name, it in load_file(file).items()}


def test_tensors_are_written_to_a_private_folder_and_removed(shared: Path) -> None:
    folder = memory_weights.write(iter(SOME.items()))
    assert folder.path.parent == shared
    assert folder.path.stat().st_mode & 0o777 == 0o700
    assert {name: it.tolist() for name, it in read(folder.path).items()} == {
        "a": [[0, 1, 2], [3, 4, 5]],
        "b": [1.5],
    }
    assert folder.path not in reap.unused_files(), "it is in use"
    folder.remove()
    folder.remove()
    assert not list(shared.iterdir())


def test_tensors_of_torch_keep_their_types_and_may_share_memory() -> None:
    torch = pytest.importorskip("torch")
    from safetensors.torch import load_file

    base = torch.arange(12, dtype=torch.bfloat16).reshape(3, 4)
    given = {"row": base[0], "all": base, "same": base, "turned": base.T, "number": torch.tensor(2)}
    folder = memory_weights.write({name: torch.nn.Parameter(it, requires_grad=False) for name, it in given.items()})
    found = load_file(folder.path / "model-00001.safetensors")
    assert found.keys() == given.keys()
    assert all(torch.equal(found[name], it) and found[name].dtype == it.dtype for name, it in given.items())
    folder.remove()


def test_an_iterable_may_use_one_buffer_for_all_tensors() -> None:
    torch = pytest.importorskip("torch")
    for buffer in (numpy.zeros(3, "f4"), torch.zeros(3)):

        def tensors(buffer: Any = buffer) -> Iterator[tuple[str, Any]]:
            for number in range(3):
                buffer[:] = number
                yield f"t{number}", buffer

        folder = memory_weights.write(tensors())
        assert {name: it.tolist() for name, it in read(folder.path).items()} == {f"t{it}": [it] * 3 for it in range(3)}
        folder.remove()


def test_large_weights_are_written_in_files_of_bounded_size(monkeypatch: pytest.MonkeyPatch) -> None:
    torch = pytest.importorskip("torch")
    monkeypatch.setattr(memory_weights, "SHARD_BYTES", 4000)

    def tensors() -> Iterator[tuple[str, Any]]:
        for number in range(10):
            yield f"t{number}", numpy.full(400, number, "f4") if number < 7 else torch.full((400,), float(number))

    folder = memory_weights.write(tensors())
    sizes = [file.stat().st_size for file in sorted(folder.path.glob("*.safetensors"))]
    assert len(sizes) == 6, "two of numpy in each, then those of torch"
    assert max(sizes) < 4000
    assert {name: float(it[0]) for name, it in read(folder.path).items()} == {f"t{it}": it for it in range(10)}
    folder.remove()


def test_weights_move_to_another_place_when_shared_memory_is_full(
    shared: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    temporary = tmp_path / "tmp"
    temporary.mkdir()
    monkeypatch.setattr(scratch, "weight_bases", lambda: [shared, temporary])
    monkeypatch.setattr(memory_weights, "SHARD_BYTES", 1)
    rooms = iter([1 << 40, 0])  # room for the first file, and none for the second
    monkeypatch.setattr(memory_weights, "room", lambda at: 1 << 40 if at.is_relative_to(temporary) else next(rooms, 0))
    folder = memory_weights.write(SOME)
    assert folder.path.parent == temporary
    assert read(folder.path).keys() == SOME.keys()
    assert not list(shared.iterdir())
    folder.remove()
    monkeypatch.setattr(memory_weights, "room", lambda at: 1 << 20)
    with pytest.raises(GserveError, match=r"no room for .* MiB of weights.*shm has room for 1 MiB.*tmp has room for"):
        memory_weights.write(SOME)
    assert not list(shared.iterdir()) + list(temporary.iterdir())


@pytest.mark.parametrize(
    ("given", "said"),
    [
        ({}, "expected weights as tensors by name, got none"),
        (7, r"or tensors by name such as model.named_parameters\(\), got int"),
        ([SOME["a"]], "got ndarray in place of a name and a tensor"),
        ([("a", SOME["a"]), ("a", SOME["a"])], "two of the weights have the name 'a'"),
        ({"a": [1.0]}, "expected torch tensors or numpy arrays, got list as 'a'"),
        ({"a": numpy.array(["text"])}, "'a' is an array of <U4, and weights are numbers"),
        ({"": SOME["a"]}, "expected the name of a tensor, got ''"),
        ({3: SOME["a"]}, "expected the name of a tensor, got 3"),
    ],
)
def test_what_is_no_tensors_is_refused_and_nothing_remains(given: Any, said: str, shared: Path) -> None:
    with pytest.raises(ConfigError, match=said):
        memory_weights.write(given)
    assert not list(shared.iterdir())


def test_a_service_has_weights_from_memory_until_others_take_their_place(
    service: VLLMService, shared: Path, tmp_path: Path
) -> None:
    def answer() -> tuple[str, str]:
        (output,) = service.generate(["a"], return_extra=True)[0]
        return output.text, output.weight_version

    service.update_weights(SOME, version="1")
    (first,) = shared.iterdir()
    assert service.weights.path == str(first)
    assert answer() == (f"a weights={first.name}", "1")
    service.update_weights(iter(SOME.items()), version="1")  # again: nothing happens
    with pytest.raises(ConfigError, match="got none"):
        service.update_weights({}, version="2")
    assert list(shared.iterdir()) == [first]

    os.kill(server_pid(service.servers[0]), signal.SIGKILL)
    until(lambda: service.status()[0].generation > 1 and service.is_running(), 30)
    assert answer() == (f"a weights={first.name}", "1")

    service.update_weights(SOME, version="2")
    (second,) = shared.iterdir()
    assert second != first
    (tmp_path / "v3").mkdir()
    (tmp_path / "v3" / "model.safetensors").touch()
    service.update_weights(tmp_path / "v3", version="3")
    assert not list(shared.iterdir())

    service.update_weights(SOME, version="4")
    service.shutdown()
    assert not list(shared.iterdir())
    service.start()
    assert answer() == ("a", "0")
    assert service.weights.version == "0"


def test_weights_from_memory_that_no_server_can_load_leave_nothing(shared: Path) -> None:
    engine = EchoEngine(show_weights=True, error_on="gserve-weights")
    with VLLMService(LLMConfig("m"), ServeConfig(servers=1), engine=engine) as service:
        with pytest.raises(GserveError, match="all servers have the old ones again"):
            service.update_weights(SOME, version="1")
        assert not list(shared.iterdir())


PROGRAM = """
import json, os, sys, time
from pathlib import Path
import numpy
from gserve import LLMConfig, VLLMService
from gserve_core.engines.echo import EchoEngine
from gserve_core.host import scratch
scratch.SHARED = Path(sys.argv[1])
service = VLLMService(LLMConfig("m"), engine=EchoEngine())
service.start()
service.update_weights({"a": numpy.zeros(3)}, version="1")
print(service.weights.path, flush=True)
if os.fork() == 0:
    sys.exit()  # a process that was forked removes nothing
os.wait()
assert Path(service.weights.path).exists()
sys.stdin.readline()
"""


def test_weights_of_a_program_that_ends_are_removed_and_those_of_a_killed_one_are_found(shared: Path) -> None:
    for is_killed in (False, True):
        with subprocess.Popen(
            [sys.executable, "-c", PROGRAM, str(shared)], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
        ) as program:
            assert program.stdout is not None
            path = Path(program.stdout.readline().strip())
            assert path.is_dir()
            if is_killed:
                program.terminate()  # it has no handler
            else:
                program.communicate("\n", timeout=30)
        assert path.exists() == is_killed
    until(lambda: path in reap.unused_files())
    again = shutil.copytree(path, shared / "again")
    memory_weights.write(SOME).remove()
    assert not path.exists(), "the next weights from memory remove it, as gserve reap does"
    again.rename(path)
    with VLLMService(LLMConfig("m"), ServeConfig(servers=1), engine=EchoEngine()):
        assert not path.exists(), "so does the next start of a service"
