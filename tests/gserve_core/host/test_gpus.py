"""GPUs are locked among processes of this machine."""

import asyncio
import json
import os
import pwd
import signal
import subprocess
import sys
import time
import uuid
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from gserve_core.errors import LaunchError
from gserve_core.host import gpu_locks, gpus
from tests.gserve_core.fake_cuda import make_driver

HOLDER = """
import asyncio, json, os, sys, time
from gserve_core.host import gpu_locks
from gserve_core.errors import LaunchError

def say(**what):
    print(json.dumps({"at": time.monotonic(), **what}), flush=True)

share = sys.argv[1] in ("share", "beside")
if user := os.environ.get("AS_USER"):
    os.umask(0o077)
    os.setuid(int(user))
try:
    held = gpu_locks.hold(sys.argv[2:], share=share)
except LaunchError as error:
    say(refused=str(error))
    sys.exit(1)
say(held=True)
asyncio.run(held.turn(lambda text: say(report=text), shared=sys.argv[1] == "beside"))
say(turn=True)
for line in sys.stdin:
    if line == "started\\n":
        held.started()
    elif line == "fork\\n":
        say(forked=os.fork() or sys.exit(sys.stdin.readline()))
"""


class Holder:
    """A process that holds GPUs, or tries to."""

    def __init__(self, how: str, *ids: str, **environ: str) -> None:
        self.process = subprocess.Popen(
            [sys.executable, "-c", HOLDER, how, *ids],
            env=os.environ | environ, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True,
        )  # fmt: skip

    @property
    def pid(self) -> int:
        return self.process.pid

    def hear(self, what: str) -> Any:
        """Return the next thing that it says, which must be `what`."""
        assert self.process.stdout is not None
        said = json.loads(self.process.stdout.readline())
        assert what in said, said
        return said[what]

    def say(self, what: str) -> None:
        assert self.process.stdin is not None
        self.process.stdin.write(f"{what}\n")
        self.process.stdin.flush()

    def end(self, number: int = signal.SIGKILL) -> None:
        self.process.send_signal(number)
        self.process.wait()

    def close(self) -> None:
        self.process.kill()
        self.process.communicate()


@pytest.fixture
def gpu() -> Iterator[str]:
    """Return the id of a GPU that nobody else has."""
    name = f"test-{uuid.uuid4().hex}"
    yield name
    for path in gpu_locks.FOLDER.glob(f"gserve-gpu-{name}*"):
        path.unlink()


@pytest.fixture
def holder() -> Iterator[Callable[..., Holder]]:
    made: list[Holder] = []

    def make(how: str, *ids: str, **environ: str) -> Holder:
        made.append(Holder(how, *ids, **environ))
        return made[-1]

    yield make
    for one in made:
        one.close()


def lock_file(gpu: str) -> Path:
    return gpu_locks.FOLDER / f"gserve-gpu-{gpu}.lock"


def test_a_gpu_that_is_held_is_refused_and_the_holder_named(gpu: str, holder: Callable[..., Holder]) -> None:
    first = holder("alone", gpu)
    assert first.hear("held")
    began = time.monotonic()
    with pytest.raises(LaunchError) as refused:
        gpu_locks.hold([gpu], share=False)
    assert time.monotonic() - began < 20
    user = pwd.getpwuid(os.getuid()).pw_name
    assert f"GPU {gpu} is held by process {first.pid} of {user} ({sys.executable}" in str(refused.value)
    assert str(refused.value).endswith("choose other gpu_ids, or set share_gpu: true for all that use it")
    assert f"process {first.pid} of" in holder("alone", gpu).hear("refused")
    assert f"process {first.pid} of" in holder("share", gpu).hear("refused")


def test_the_kernel_frees_it_with_the_process(gpu: str, holder: Callable[..., Holder]) -> None:
    first = holder("alone", gpu)
    assert first.hear("held")
    first.end(signal.SIGKILL)
    gpu_locks.hold([gpu], share=False).release()
    gpu_locks.hold([gpu], share=False).release()


def test_one_of_several_that_is_held_gives_the_others_free(gpu: str, holder: Callable[..., Holder]) -> None:
    first = holder("alone", f"{gpu}-b")
    assert first.hear("held")
    with pytest.raises(LaunchError, match=f"GPU {gpu}-b is held"):
        gpu_locks.hold([f"{gpu}-a", f"{gpu}-b"], share=False)
    gpu_locks.hold([f"{gpu}-a"], share=False).release()


def test_what_a_dead_holder_has_forked_holds_it_on(gpu: str, holder: Callable[..., Holder]) -> None:
    first = holder("alone", gpu)
    assert first.hear("held")
    assert first.hear("turn")
    first.say("fork")
    assert first.hear("forked")
    first.end(signal.SIGKILL)
    with pytest.raises(LaunchError, match=f"held by what process {first.pid} has left behind"):
        gpu_locks.hold([gpu], share=False)
    first.say("end")  # which the forked one reads
    deadline = time.monotonic() + 60
    while True:
        try:
            gpu_locks.hold([gpu], share=False).release()
            break
        except LaunchError:
            assert time.monotonic() < deadline
            time.sleep(0.05)


def test_a_program_that_a_holder_runs_does_not_hold_it(gpu: str) -> None:
    held = gpu_locks.hold([gpu], share=False)
    with subprocess.Popen(["sleep", "60"], close_fds=False) as below:
        held.release()
        gpu_locks.hold([gpu], share=False).release()
        below.kill()


def test_sharers_hold_it_together_and_start_one_after_the_other(gpu: str, holder: Callable[..., Holder]) -> None:
    first = holder("share", gpu)
    assert first.hear("held")
    assert first.hear("turn")
    second = holder("share", gpu)
    assert second.hear("held")
    assert second.hear("report") == f"waiting for process {first.pid}, which starts on GPU {gpu}"
    refused = holder("alone", gpu).hear("refused")
    assert any(f"is held by process {sharer.pid} of" in refused for sharer in (first, second))
    first.say("started")
    assert second.hear("turn")
    third = holder("share", gpu)
    assert third.hear("held")
    assert third.hear("report") == f"waiting for process {second.pid}, which starts on GPU {gpu}"
    second.end(signal.SIGKILL)  # while it starts: it is the next one's turn
    assert third.hear("turn")
    assert first.process.poll() is None


def test_sharers_of_several_gpus_in_another_order_do_not_wait_for_each_other(
    gpu: str, holder: Callable[..., Holder]
) -> None:
    ids = [f"{gpu}-{name}" for name in "abc"]
    sharers = [holder("share", *order) for order in (ids, ids[::-1], [*ids[1:], ids[0]])]
    for sharer in sharers:
        assert sharer.hear("held")
    started: list[Holder] = []
    deadline = time.monotonic() + 60
    for sharer in sharers:
        os.set_blocking(sharer.process.stdout.fileno(), False)  # type: ignore[union-attr]
    while len(started) < 3:
        assert time.monotonic() < deadline
        for sharer in sharers:
            line = sharer.process.stdout.readline()  # type: ignore[union-attr]
            if '"turn"' in line:
                started.append(sharer)
                sharer.say("started")
        time.sleep(0.01)


def test_servers_that_measure_nothing_start_beside_each_other_but_not_beside_one_that_does(
    gpu: str, holder: Callable[..., Holder]
) -> None:
    first, second = holder("beside", gpu), holder("beside", gpu)
    for one in (first, second):
        assert one.hear("held")
        assert one.hear("turn")
    measuring = holder("share", gpu)
    assert measuring.hear("held")
    assert f"which starts on GPU {gpu}" in measuring.hear("report")
    first.say("started")
    second.say("started")
    assert measuring.hear("turn")
    third = holder("beside", gpu)
    assert third.hear("held")
    assert f"waiting for process {measuring.pid}" in third.hear("report")
    measuring.say("started")
    assert third.hear("turn")


def test_waiting_for_ones_turn_can_be_cancelled(gpu: str, holder: Callable[..., Holder]) -> None:
    first = holder("share", gpu)
    assert first.hear("held")
    assert first.hear("turn")

    async def wait() -> None:
        held = gpu_locks.hold([gpu], share=True)
        with pytest.raises(TimeoutError):
            await asyncio.wait_for(held.turn(lambda _: None), 0.3)
        held.release()

    asyncio.run(wait())


@pytest.mark.skipif(os.getuid() != 0, reason="needs the right to be another user")
def test_users_lock_each_others_files(gpu: str, holder: Callable[..., Holder]) -> None:
    other = holder("alone", gpu, AS_USER="65534")
    assert other.hear("held")
    assert lock_file(gpu).stat().st_uid == 65534
    name = pwd.getpwuid(65534).pw_name
    with pytest.raises(LaunchError, match=f"is held by process {other.pid} of {name} "):
        gpu_locks.hold([gpu], share=False)
    other.end()
    held = gpu_locks.hold([gpu], share=False)
    assert f"process {os.getpid()} of root" in holder("alone", gpu, AS_USER="65534").hear("refused")
    held.release()


def test_a_link_in_place_of_the_file_is_not_followed(gpu: str, tmp_path: Path) -> None:
    lock_file(gpu).symlink_to(tmp_path / "target")
    with pytest.raises(LaunchError, match="cannot lock"):
        gpu_locks.hold([gpu], share=False)
    assert not (tmp_path / "target").exists()


def test_an_id_stays_a_file_of_the_folder(gpu: str) -> None:
    held = gpu_locks.hold([f"{gpu}/../x y\n"], share=False)
    assert (gpu_locks.FOLDER / f"gserve-gpu-{gpu}_.._x_y_.lock").is_file()
    held.release()


# ------------------------------------------------------------------------------------------------------------- visible


@pytest.fixture
def smi(tmp_path: Path) -> Callable[[str], dict[str, str]]:
    """Return what makes a machine whose nvidia-smi is this shell script: the environment for it."""

    def make(script: str) -> dict[str, str]:
        program = tmp_path / "nvidia-smi"
        program.write_text(f"#!/bin/sh\n{script}\n")
        program.chmod(0o755)
        return {"PATH": f"{tmp_path}:/usr/bin:/bin"}

    return make


THREE = """
[ "$*" = "--query-gpu=index,uuid --format=csv,noheader" ] || exit 2
printf '0, GPU-aaaa-1\\n1, GPU-aabb-2\\n2, GPU-cccc-3\\n'
"""


@pytest.mark.parametrize(
    ("listed", "wanted", "expected"),
    [
        ("2,0", 2, ["GPU-cccc-3", "GPU-aaaa-1"]),
        ("2,0", 1, ["GPU-cccc-3"]),
        (" 1 , 2", 8, ["GPU-aabb-2", "GPU-cccc-3"]),
        ("GPU-cc,GPU-aa", 2, ["GPU-cccc-3", "GPU-aa"]),  # the second one fits two, as it is
        ("MIG-x,1", 2, ["MIG-x", "GPU-aabb-2"]),
        ("0,-1,2", 3, ["GPU-aaaa-1"]),
        ("", 1, []),
        ("-1", 1, []),
        ("NoDevFiles", 1, []),
        (None, 2, ["GPU-aaaa-1", "GPU-aabb-2"]),
    ],
)
def test_gpus_are_known_by_their_uuid(
    smi: Callable[[str], dict[str, str]], listed: str | None, wanted: int, expected: list[str]
) -> None:
    environ = smi(THREE)
    if listed is not None:
        environ["CUDA_VISIBLE_DEVICES"] = listed
    assert gpus.visible(environ, wanted) == expected


def test_a_number_that_no_gpu_has_is_told_with_those_that_there_are(smi: Callable[[str], dict[str, str]]) -> None:
    with pytest.raises(LaunchError, match="there is no GPU 7 here, only 0, 1, 2: choose other gpu_ids"):
        gpus.visible(smi(THREE) | {"CUDA_VISIBLE_DEVICES": "0,7"}, 2)


SLOW = "sleep 0.5\n" + THREE


def test_a_slow_nvidia_smi_is_waited_for(smi: Callable[[str], dict[str, str]]) -> None:
    assert gpus.visible(smi(SLOW) | {"CUDA_VISIBLE_DEVICES": "1"}, 1) == ["GPU-aabb-2"]


@pytest.mark.parametrize(
    ("script", "why"),
    [
        ("exec sleep 60", "it did not answer within 0.2 s"),
        ("echo 'GPU is lost' >&2; exit 15", "it ended with exit code 15: GPU is lost"),
        ("exit 255", "it ended with exit code 255: no output"),
        ("", "it ended with exit code 0: no output"),
        ("echo what?", r"it ended with exit code 0: what\?"),
        ("printf '\\377\\n'", "it ended with exit code 0: \ufffd"),
        ("echo '0, [N/A]'", r"it ended with exit code 0: 0, \[N/A\]"),
    ],
)
def test_a_gpu_whose_identity_is_unknown_is_not_locked_by_its_number(
    smi: Callable[[str], dict[str, str]], monkeypatch: pytest.MonkeyPatch, script: str, why: str
) -> None:
    if "sleep" in script:  # the others may take their time
        monkeypatch.setattr(gpus, "QUERY_SECONDS", 0.2)
    for environ in (smi(script), smi(script) | {"CUDA_VISIBLE_DEVICES": "0"}):
        with pytest.raises(LaunchError, match=f"cannot tell from nvidia-smi which GPUs to lock: {why}; see whether"):
            gpus.visible(environ, 1)


def test_whole_uuids_need_no_nvidia_smi(smi: Callable[[str], dict[str, str]]) -> None:
    uuids = [f"GPU-{uuid.uuid4()}", f"MIG-{uuid.uuid4()}"]
    assert gpus.visible(smi("exit 15") | {"CUDA_VISIBLE_DEVICES": ",".join(uuids)}, 2) == uuids
    assert gpus.visible(smi("exit 15") | {"CUDA_VISIBLE_DEVICES": ""}, 2) == []


def test_numbers_that_are_not_those_of_nvidia_smi_are_refused(smi: Callable[[str], dict[str, str]]) -> None:
    environ = smi(THREE) | {"CUDA_DEVICE_ORDER": "FASTEST_FIRST"}
    for listed in ({}, {"CUDA_VISIBLE_DEVICES": "GPU-cc,0"}):
        with pytest.raises(LaunchError, match="CUDA_DEVICE_ORDER=FASTEST_FIRST: expected PCI_BUS_ID, since"):
            gpus.visible(environ | listed, 2)
    assert gpus.visible(environ | {"CUDA_VISIBLE_DEVICES": "GPU-cc"}, 1) == ["GPU-cccc-3"]
    one = smi("echo '0, GPU-aaaa-1'") | {"CUDA_DEVICE_ORDER": "FASTEST_FIRST"}
    assert gpus.visible(one, 1) == ["GPU-aaaa-1"]


@pytest.mark.parametrize("script", ["echo 'no driver'; exit 9", "exit 12"])
def test_gpus_are_known_by_their_number_where_there_is_no_driver(
    smi: Callable[[str], dict[str, str]], script: str
) -> None:
    environ = smi(script)
    assert gpus.visible(environ | {"CUDA_VISIBLE_DEVICES": "1,0"}, 2) == ["1", "0"]
    assert gpus.visible(environ, 2) == []


def test_a_driver_without_a_gpu_is_an_error_only_where_one_is_asked_for(smi: Callable[[str], dict[str, str]]) -> None:
    environ = smi("echo 'No devices were found'; exit 6")
    assert gpus.visible(environ, 1) == []
    assert gpus.visible(environ | {"CUDA_VISIBLE_DEVICES": ""}, 1) == []
    with pytest.raises(LaunchError, match="it ended with exit code 6: No devices were found; see whether"):
        gpus.visible(environ | {"CUDA_VISIBLE_DEVICES": "0"}, 1)


def test_without_nvidia_smi_and_a_list_there_are_no_gpus(tmp_path: Path) -> None:
    assert gpus.visible({"PATH": str(tmp_path)}, 2) == []
    assert gpus.visible({"PATH": str(tmp_path), "CUDA_VISIBLE_DEVICES": "3"}, 1) == ["3"]


# --------------------------------------------------------------------------------------------------------------- facts


def test_the_sizes_of_gpus_are_those_of_cuda(tmp_path: Path) -> None:
    make_driver(tmp_path)
    large, small = gpus.GPU("Large", 80 << 30, 132), gpus.GPU("Small", 24 << 30, 50)
    environ = {"LD_LIBRARY_PATH": str(tmp_path)}
    assert gpus.facts(environ) == [large, small]
    assert gpus.facts(environ | {"CUDA_VISIBLE_DEVICES": "1,0"}) == [small, large]
    assert gpus.facts(environ | {"CUDA_VISIBLE_DEVICES": ""}) == []
    assert gpus.facts(environ | {"CUDA_IS_BROKEN": "1"}) == []


def test_without_a_driver_there_are_no_gpus(tmp_path: Path) -> None:
    assert gpus.facts({"LD_LIBRARY_PATH": str(tmp_path)}) == []
