"""Settings of real vLLM, measured on this machine: the search ends in its time, and its file is a good one."""

import json
import logging
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

logger = logging.getLogger(__name__)
SECONDS = 180.0
"""Time for the search, in seconds."""
LEAST = 0.90
"""Minimum rate of the file when it is measured again, as a part of the highest one in the table."""


@pytest.mark.skipif(not os.environ.get("LONG"), reason="takes four minutes: LONG=1 runs it")
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
        found = opened.search(lambda it: logger.info("%s", it))
        opened.write(found.best, "tuned")
    took = time.monotonic() - began
    logger.info("%.1f s; noise %.3f; best %s; untried %s", took, found.noise, found.best, found.untried)
    assert took <= SECONDS

    monkeypatch.setattr(trials, "dimensions", lambda *_: ())
    with trials.Trials(tuned, [], job, model=None, seconds=SECONDS, output=tmp_path / "again.yaml") as opened:
        again = opened.search(lambda it: logger.info("again: %s", it))
    best = max(found.rate(it.setting) for it in found.measured)
    logger.info("again %.1f of %.1f rows/s, %.3f", again.rate(GIVEN), best, again.rate(GIVEN) / best)
    assert again.rate(GIVEN) >= LEAST * best
