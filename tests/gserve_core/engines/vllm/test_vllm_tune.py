"""Settings of real vLLM, measured on this machine: the search ends in its time, and its file is a good one."""

import json
import os
import time
from pathlib import Path

import pytest

from benchmarks import models
from benchmarks.workloads import Workload
from gserve_core.rows.job import FileJob
from gserve_core.rows.prompts import RowOptions
from gserve_core.tune import trials
from gserve_core.tune.search import GIVEN

SECONDS = 420.0
LEAST = 0.90
"""Minimum rate of the file when it is measured again, as a part of the highest one in the table."""


@pytest.mark.skipif(not os.environ.get("LONG"), reason="takes eight minutes: LONG=1 runs it")
def test_it_ends_in_its_time_and_its_file_is_as_fast_as_the_best_of_its_table(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    llm = {
        "model_name": models.find("tiny"), "enforce_eager": True, "gpu_memory_utilization": 0.16, "max_model_len": 256,
    }  # fmt: skip
    given, tuned = tmp_path / "given.yaml", tmp_path / "tuned.yaml"
    given.write_text(json.dumps({"llm": llm}))
    prompts = Workload("short", 8192, 30, 16, {}).work(0).prompts
    params = {"temperature": 0, "max_tokens": 16, "ignore_eos": True}
    job = FileJob(source=[{"prompt": it} for it in prompts], prompts=RowOptions(params=params))

    began = time.monotonic()
    with trials.Trials(given, [], job, model=None, seconds=SECONDS, output=tuned) as opened:
        found = opened.search(lambda it: print(trials.setting_text(it.setting), it))
        opened.write(found.best, "tuned")
    took = time.monotonic() - began
    print(f"{took:.1f} s; noise {found.noise:.3f}; best {found.best}; untried {found.untried}")
    assert took <= SECONDS

    monkeypatch.setattr(trials, "dimensions", lambda *_: ())
    with trials.Trials(tuned, [], job, model=None, seconds=SECONDS, output=tmp_path / "again.yaml") as opened:
        again = opened.search(lambda it: print("again", it))
    best = max(found.rate(it.setting) for it in found.measured)
    print(f"again {again.rate(GIVEN):.1f} of {best:.1f} rows/s, {again.rate(GIVEN) / best:.3f}")
    assert again.rate(GIVEN) >= LEAST * best
