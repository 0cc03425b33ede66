"""Updating: the time until two idle servers have new weights, without the check of the files, which is shown apart."""

import logging
import re
import time

from gserve import VLLMService

from . import machine
from .rounds import Benchmark, say
from .starting import PARAMS, PROMPT, service
from .table import GSERVE, no_figures

PHASES = re.compile(r"files checked in ([\d.]+) s")
"""The part of gserve's log that has the time of the check, in seconds."""


class Log(logging.Handler):
    """Keeps the messages of gserve."""

    def __init__(self) -> None:
        super().__init__(logging.INFO)
        self.text = ""

    def emit(self, record: logging.LogRecord) -> None:
        """Keep a message."""
        self.text += record.getMessage() + "\n"


def measure(bench: Benchmark, model: str) -> None:
    """Measure updates to the weights of the model itself, so that no answer may change."""
    arguments = machine.engine_arguments(model, 1 if machine.gpus() else 2)
    if "load_format" in arguments:
        raise RuntimeError(f"updating: {model} has no weights in files: name another --model")
    taken = no_figures("update", "update of two servers", GSERVE, model, "s")
    checks = no_figures("update check", "check of its files", GSERVE, model, "s")
    logger, log = logging.getLogger("gserve.service"), Log()
    logger.setLevel(logging.INFO)
    logger.addHandler(log)
    with service(arguments, 2) as two:
        two.start()
        before = two.generate([PROMPT], PARAMS)
        _update(two, arguments["model"], "warm-up", log)
        for turn in bench.turns("updating"):
            seconds, check = _update(two, arguments["model"], str(turn), log)
            taken.figures.append(seconds - check)
            checks.figures.append(check)
            say(f"updating, round {turn}: {seconds - check:.2f} s, and {check:.2f} s for the check of the files")
            answers = two.generate([PROMPT] * 64, PARAMS, return_extra=True)
            if {(it[0].text, it[0].weight_version) for it in answers} != {(before[0][0], str(turn))}:
                bench.problems.append(f"updating, round {turn}: the answers are not those of the same weights before")
    logger.removeHandler(log)
    bench.figures += [taken, checks]


def _update(two: VLLMService, folder: str, version: str, log: Log) -> tuple[float, float]:
    """Update the weights; return the time until all servers have them, and that of the check in it, in seconds."""
    log.text = ""
    began = time.perf_counter()
    two.update_weights(folder, version=version)
    seconds = time.perf_counter() - began
    match = PHASES.search(log.text)
    if match is None:
        raise RuntimeError(f"updating: no times in the log: {log.text!r}")
    return seconds, float(match[1])
