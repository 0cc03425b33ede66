"""Why a server failed, told from what vLLM and its like said: real lines, from runs or from the installed sources."""

import os
import pickle
import re
import socket
import subprocess
import sys
from pathlib import Path

import pytest

from gserve_core import diagnosis
from gserve_core.engines.vllm.engine import VLLMEngine
from gserve_core.engines.vllm.known_errors import KNOWN_ERRORS, LOG_FORM
from gserve_core.errors import ServerExited
from gserve_core.host import control_group, ports

LAST = "RuntimeError: Engine core initialization failed. See root cause above. Failed core proc(s): {}"
PLUGIN = """\
(VllmWorker-0 pid=3) ERROR 11-22 18:32:14 [__init__.py:72] Failed to load plugin gserve
(VllmWorker-0 pid=3) ERROR 11-22 18:32:14 [__init__.py:72] Traceback (most recent call last):
(VllmWorker-0 pid=3) ERROR 11-22 18:32:14 [__init__.py:72]   File "/env/importlib/metadata.py", line 205, in load
(VllmWorker-0 pid=3) ERROR 11-22 18:32:14 [__init__.py:72] ModuleNotFoundError: No module named 'gserve_core.orphans'
"""
WORKER_FAILED = f"""\
(MainProcess pid=1) WARNING 11-22 16:23:01 [vllm.py:1703] Enforce eager set, disabling torch.compile.
{PLUGIN}\
(Worker pid=3) ERROR 11-22 16:23:28 [multiproc_executor.py:1063] WorkerProc hit an exception.
(Worker pid=3) ERROR 11-22 16:23:28 [multiproc_executor.py:1063] Traceback (most recent call last):
(Worker pid=3) ERROR 11-22 16:23:28 [multiproc_executor.py:1063]     raise RuntimeError(
(Worker pid=3) ERROR 11-22 16:23:28 [multiproc_executor.py:1063] RuntimeError: aot_compile is not supported
(EngineCore pid=2) ERROR 11-22 16:23:29 [core.py:1510] EngineCore failed to start.
(EngineCore pid=2) ERROR 11-22 16:23:29 [core.py:1510] Traceback (most recent call last):
(EngineCore pid=2) ERROR 11-22 16:23:29 [core.py:1510] RuntimeError: Worker failed with error 'aot_compile is not', \
please check the stack trace above for the root cause
{LAST}
"""
TWO_WORKERS = """\
(Worker_TP1 pid=4) ERROR 11-22 18:32:40 [multiproc_executor.py:953] WorkerProc failed to start.
(Worker_TP0 pid=3) INFO 11-22 18:32:40 [default_loader.py:501] Loading weights took 1.06 seconds
(Worker_TP1 pid=4) ERROR 11-22 18:32:40 [multiproc_executor.py:953] Traceback (most recent call last):
(Worker_TP1 pid=4) ERROR 11-22 18:32:40 [multiproc_executor.py:953]   File "/env/torch/storage.py", line 1, in load
(Worker_TP0 pid=3) ERROR 11-22 18:32:40 [multiproc_executor.py:953] WorkerProc failed to start.
(Worker_TP1 pid=4) ERROR 11-22 18:32:40 [multiproc_executor.py:953] torch.OutOfMemoryError: CUDA out of memory. \
Tried to allocate 2.00 GiB. GPU 1 has a total capacity of 79.11 GiB of which 1.21 GiB is free.
(Worker_TP0 pid=3) ERROR 11-22 18:32:40 [multiproc_executor.py:953] Traceback (most recent call last):
(Worker_TP0 pid=3) ERROR 11-22 18:32:40 [multiproc_executor.py:953] ConnectionResetError: [Errno 104] Connection reset
"""
WORKER_KILLED = f"""\
(EngineCore pid=2) ERROR 11-22 18:39:50 [core.py:1510] EngineCore failed to start.
(EngineCore pid=2) ERROR 11-22 18:39:50 [core.py:1510] Traceback (most recent call last):
(EngineCore pid=2) ERROR 11-22 18:39:50 [core.py:1510] Exception: WorkerProc initialization failed due to an \
exception in a background process. See stack trace for root cause.
2026-11-22 18:40:14,811 ERROR gserve.serving: failed: {LAST}
Traceback (most recent call last):
{LAST}
"""
TOKENIZER = "OSError: Can't load the tokenizer as it should be"
CHAINED = f"""\
2026-11-22 18:31:56,477 ERROR gserve.serving: failed: {TOKENIZER}
Traceback (most recent call last):
  File "/env/huggingface_hub/utils/_http.py", line 720, in hf_raise_for_status
httpx.HTTPStatusError: Client error '401 Unauthorized' for url 'https://hub/x/resolve/main/config.json'

The above exception was the direct cause of the following exception:

Traceback (most recent call last):
  File "/env/transformers/utils/hub.py", line 419, in cached_files
huggingface_hub.errors.GatedRepoError: 401 Client Error.

Cannot access gated repo for url https://hub/x/resolve/main/config.json.

The above exception was the direct cause of the following exception:

Traceback (most recent call last):
  File "/home/user/gserve_core/serving.py", line 350, in _serve
{TOKENIZER}
/env/multiprocessing/resource_tracker.py:254: UserWarning: resource_tracker: There appear to be 1 leaked semaphore
"""


def exited(log: Path, cause: str | None, returncode: int | None = 1, kills: int | None = None) -> ServerExited:
    return diagnosis.exited(
        "server-0", phase="starting the engine", cause=cause, returncode=returncode, log=log, kills=kills,
        engine=VLLMEngine,
    )  # fmt: skip


def written(folder: Path, text: str) -> Path:
    log = folder / "log"
    log.write_text(text)
    return log


def test_the_first_fatal_failure_is_the_cause_where_the_last_one_points_to_it(tmp_path: Path) -> None:
    log = written(tmp_path, WORKER_FAILED)
    first, *rest = str(exited(log, LAST)).splitlines()
    assert first == (
        f"server-0 failed while starting the engine: RuntimeError: aot_compile is not supported (log: {log})"
    )
    assert rest[0] == "its process exited unexpectedly with code 1"
    assert rest[1] == "last lines of the log:"
    assert rest[-2:] == [f"  | {LAST}", first], (
        "the cause is not known, so the log is shown: the cause comes last again"
    )


def test_what_to_try_comes_after_the_end_of_the_log(tmp_path: Path) -> None:
    log = written(tmp_path, "the last line\n")
    first, *rest = str(error := exited(log, None, -9)).splitlines()
    assert rest == ["last lines of the log:", "  | the last line", first, f"what to try: {error.hint}"]


def test_of_several_workers_the_one_counts_that_failed_first(tmp_path: Path) -> None:
    error = exited(written(tmp_path, TWO_WORKERS), LAST)
    assert error.cause == "the GPU ran out of memory"
    assert "original error: OutOfMemoryError: CUDA out of memory. Tried to allocate 2.00 GiB." in str(error)


def test_what_an_earlier_life_said_in_the_same_log_does_not_count(tmp_path: Path) -> None:
    log = written(tmp_path, TWO_WORKERS)
    since = log.stat().st_size
    with log.open("a") as stream:
        stream.write(WORKER_FAILED)
    error = diagnosis.exited(
        "server-0", phase="serving", cause=LAST, returncode=1, log=log, since=since, engine=VLLMEngine
    )
    assert error.cause == "RuntimeError: aot_compile is not supported"


def test_a_cause_that_says_all_is_kept(tmp_path: Path) -> None:
    error = exited(written(tmp_path, WORKER_FAILED), "did not move for 60 s")
    assert error.cause == "did not move for 60 s"
    assert error.hint == ""


def test_what_had_caused_the_last_exception_explains_it(tmp_path: Path) -> None:
    error = exited(written(tmp_path, CHAINED), TOKENIZER)
    assert error.cause == "the model hub refuses access to the model"
    assert f"original error: {TOKENIZER}\n" in str(error)
    assert str(error).endswith(f"\nwhat to try: {error.hint}"), "the end of the log does not come after it"
    handled = CHAINED.replace(diagnosis.CAUSED, diagnosis.HANDLED)
    assert exited(written(tmp_path, handled), TOKENIZER).cause == TOKENIZER, "what was only handled is no cause"


def test_without_a_log_the_servers_own_words_stand(tmp_path: Path) -> None:
    error = exited(tmp_path / "none", "ValueError: never seen before")
    assert str(error) == (
        f"server-0 failed while starting the engine: ValueError: never seen before (log: {tmp_path / 'none'})\n"
        "its process exited unexpectedly with code 1"
    )


def test_the_error_carries_all_that_is_known_and_its_message_ends_with_what_to_try(tmp_path: Path) -> None:
    log = written(tmp_path, "".join(f"line {number}\n\n" for number in range(80)) + "x" * 10_000 + "\n")
    cause = (
        "vLLM 0.32.0 refuses its keyword arguments: AsyncEngineArgs.__init__() got an unexpected keyword argument 'a'"
    )
    error = exited(log, cause)
    assert error.cause == "vLLM has no argument 'a'"
    assert "llm_kwargs" in error.hint
    assert (error.phase, error.log, error.returncode) == ("starting the engine", log, 1)
    assert len(error.tail) == 50
    assert error.tail[:2] == ["line 31", "line 32"]
    assert len(error.tail[-1]) < 500
    assert str(error).splitlines() == [
        f"server-0 failed while starting the engine: vLLM has no argument 'a' (log: {log})",
        f"original error: {cause}",
        f"what to try: {error.hint}",
    ]
    again = pickle.loads(pickle.dumps(error))
    assert (str(again), again.hint, again.tail) == (str(error), error.hint, error.tail)


@pytest.mark.parametrize(
    ("returncode", "said", "hint"),
    [
        (3, "its process exited unexpectedly with code 3", ""),
        (0, "its process exited unexpectedly with code 0", ""),
        (-9, "its process was killed by SIGKILL", "memory"),
        (137, "its process exited with code 137, which means SIGKILL", "memory"),
        (-11, "its process was killed by SIGSEGV", ""),
        (-40, "its process was killed by signal 40", ""),
        (255, "its process exited unexpectedly with code 255", ""),
        (None, "the server closed its control connection", ""),
    ],
)
def test_without_a_word_the_end_of_the_process_is_told(
    tmp_path: Path, returncode: int | None, said: str, hint: str
) -> None:
    error = exited(tmp_path / "none", None, returncode)
    assert error.cause == said
    assert (hint in error.hint) if hint else not error.hint


def test_a_program_that_python_ended_tells_why_in_its_log(tmp_path: Path) -> None:
    crash = (
        "Traceback (most recent call last):\n  File \"s.py\", line 1\nModuleNotFoundError: No module named 'msgspec'\n"
    )
    log = written(tmp_path, crash + "srun: error: node7: task 0: Exited with exit code 1\n")
    assert exited(log, None).cause == "the Python module 'msgspec' is not installed"
    assert exited(log, None, -9).cause == "its process was killed by SIGKILL"


def test_an_engine_that_ended_without_a_word_is_said_to_have(tmp_path: Path) -> None:
    log = written(tmp_path, PLUGIN + WORKER_KILLED)
    error = exited(log, LAST)
    assert error.cause == "a process of the engine ended without an error message"
    assert "memory" in error.hint
    killed = WORKER_KILLED.replace("proc(s): {}", "proc(s): {'EngineCore': -9}")
    assert exited(written(tmp_path, killed), LAST).cause == "a process of the engine was killed by SIGKILL"


def test_the_systems_count_of_kills_for_memory_is_named_where_it_has_risen(tmp_path: Path) -> None:
    kills = control_group.memory_kills()
    if kills is None:
        pytest.skip("the memory controller of the control group cannot be read here")
    assert exited(tmp_path / "none", None, -9, kills).cause == "its process was killed by SIGKILL"
    error = exited(tmp_path / "none", None, -9, kills - 1)
    assert error.cause == "its process was killed by SIGKILL, after memory had run out"
    assert exited(tmp_path / "none", None, -11, kills - 1).cause == "its process was killed by SIGSEGV"


OUT_OF_MEMORY = """
import os, subprocess, sys
from pathlib import Path
from gserve_core import diagnosis
from gserve_core.host import control_group

Path(sys.argv[1], "cgroup.procs").write_text(str(os.getpid()))
assert control_group.usable_memory() == 100 << 20
kills = control_group.memory_kills()
child = subprocess.run([sys.executable, "-c", "b'x' * (1 << 30)"])
how = {"phase": "loading", "cause": None, "returncode": child.returncode, "log": Path(sys.argv[1], "none")}
print(diagnosis.exited("server-0", **how, kills=kills).cause)
"""


def test_a_process_that_was_killed_for_want_of_memory_is_told_from_others() -> None:
    groups = Path("/proc/self/cgroup").read_text().splitlines()
    ours = [Path("/sys/fs/cgroup/memory" + line.split(":", 2)[2]) for line in groups if ":memory:" in line]
    if not ours or not os.access(ours[0], os.W_OK):
        pytest.skip("no control group with a limit on memory can be made here")
    group = ours[0] / f"gserve-test-{os.getpid()}"
    group.mkdir()
    try:
        (group / "memory.limit_in_bytes").write_text(str(100 << 20))
        done = subprocess.run(
            [sys.executable, "-c", OUT_OF_MEMORY, str(group)], capture_output=True, text=True, check=False
        )
        assert done.stdout == "its process was killed by SIGKILL, after memory had run out\n", done.stderr
    finally:
        group.rmdir()


SAID = [
    entry.splitlines()
    for entry in (Path(__file__).parent.parent / "data" / "said.txt").read_text().split("\n\n")
    if not entry.startswith("#")
]


@pytest.mark.parametrize(("said", "sentence", "hint"), SAID, ids=[sentence[:40] for _, sentence, _ in SAID])
def test_what_is_known_is_said_in_a_sentence_with_a_hint(tmp_path: Path, said: str, sentence: str, hint: str) -> None:
    error = exited(tmp_path / "none", said)
    assert sentence in error.cause
    assert hint in error.hint
    assert re.sub(r"\W+", "", said)[:40] in re.sub(r"\W+", "", str(error)), "the exception's own words are kept"


def test_every_known_cause_has_been_tried() -> None:
    for pattern, _, _ in (*diagnosis.KNOWN, *KNOWN_ERRORS):
        assert any(re.search(pattern, said) for said, _, _ in SAID), pattern


def test_who_holds_a_port_is_named_by_process_and_program() -> None:
    with socket.create_server(("127.0.0.1", 0)) as ours:
        port = ours.getsockname()[1]
        assert (ports.port_holder(port) or "").startswith(f"process {os.getpid()} (")
    assert ports.port_holder(port) is None
    program = (
        "import socket,sys; s = socket.create_server(('::1', 0), family=socket.AF_INET6); print(s.getsockname()[1],"
    )
    child = subprocess.Popen(
        [sys.executable, "-c", f"{program} flush=True); sys.stdin.read()", "secret"],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
    )
    try:
        assert child.stdout is not None
        holder = ports.port_holder(int(child.stdout.readline()))
        assert holder == f"process {child.pid} ({Path(sys.executable).name})"
    finally:
        child.communicate()
    assert child.returncode == 0


@pytest.mark.parametrize(
    ("text", "step"),
    [
        ("Loading safetensors checkpoint shards:  33% Completed | 1/3 [00:00<00:01]", "loading weights 1/3"),
        (
            "Capturing CUDA graphs (mixed prefill-decode, PIECEWISE):  50%|█████ | 33/67 [00:01]",
            "capturing CUDA graphs 33/67",
        ),
        ("[cpu_model_runner.py:68] Starting to load model /m...\nother", "loading weights"),
        ("nothing of the kind", None),
    ],
)
def test_steps_of_a_start_are_read_from_its_log(text: str, step: str | None) -> None:
    assert diagnosis.step(text, LOG_FORM) == step


def test_the_rank_that_failed_stands_before_every_explanation(tmp_path: Path) -> None:
    (tmp_path / "log").write_text(TWO_WORKERS)

    def of(cause: str) -> ServerExited:
        return diagnosis.exited(
            "server-0", phase="loading", cause=cause, returncode=1, log=tmp_path / "log", engine=VLLMEngine
        )

    assert of("rank 1 on n2: No space left on device").cause == "rank 1 on n2: a disk is full"
    assert of("rank 1 on n2: something new").cause == "rank 1 on n2: something new"
    found = of("rank 1 on n2: a worker has ended; see the root cause above, in the log").cause
    assert found.startswith("rank 1 on n2: ")
    assert "out of memory" in found.lower() or "memory" in found
