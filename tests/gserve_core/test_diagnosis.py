"""Why a server failed, told from logs that vLLM wrote."""

from pathlib import Path

import pytest

from gserve_core import diagnosis

WORKER_FAILED = """\
(MainProcess pid=1) WARNING 11-22 16:23:01 [vllm.py:1703] Enforce eager set, disabling torch.compile.
(Worker pid=3) ERROR 11-22 16:23:28 [multiproc_executor.py:1063] Traceback (most recent call last):
(Worker pid=3) ERROR 11-22 16:23:28 [multiproc_executor.py:1063]     raise RuntimeError(
(Worker pid=3) ERROR 11-22 16:23:28 [multiproc_executor.py:1063] RuntimeError: aot_compile is not supported
(EngineCore pid=2) ERROR 11-22 16:23:29 [core.py:1510] RuntimeError: Worker failed with error 'aot_compile is not'
RuntimeError: Engine core initialization failed. See root cause above. Failed core proc(s): {}
"""
LAST = "RuntimeError: Engine core initialization failed. See root cause above. Failed core proc(s): {}"


def explain(log: Path, cause: str | None, returncode: int | None = 1) -> str:
    return diagnosis.explain("server-0", phase="starting the engine", cause=cause, returncode=returncode, log=log)


def test_the_first_failure_is_the_cause_where_the_last_one_points_to_it(tmp_path: Path) -> None:
    log = tmp_path / "log"
    log.write_text(WORKER_FAILED)
    first, *rest = explain(log, LAST).splitlines()
    assert first == (
        f"server-0 failed while starting the engine: RuntimeError: aot_compile is not supported (log: {log})"
    )
    assert rest[-1] == f"  | {LAST}"


def test_a_cause_that_says_all_is_kept(tmp_path: Path) -> None:
    log = tmp_path / "log"
    log.write_text(WORKER_FAILED)
    assert "while starting the engine: no LoRA adapter in /x" in explain(log, "no LoRA adapter in /x")


def test_without_a_log_the_servers_own_words_stand(tmp_path: Path) -> None:
    assert explain(tmp_path / "none", LAST).startswith(f"server-0 failed while starting the engine: {LAST} (log: ")


@pytest.mark.parametrize(
    ("returncode", "said"),
    [(3, "exit code 3, unasked"), (0, "exit code 0, unasked"), (-9, "killed by SIGKILL (the system"), (-11, "SIGSEGV")],
)
def test_without_a_word_the_end_of_the_process_is_told(tmp_path: Path, returncode: int, said: str) -> None:
    assert said in explain(tmp_path / "none", None, returncode)


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
    assert diagnosis.step(text) == step
