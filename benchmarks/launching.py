"""Launching: from `gserve launch` to ready, against the same service without a gateway and without OpenAI's API.

Each start is a new process. The engine `echo` starts at once, so its figures are those of gserve alone. It always
offers OpenAI's API; only that of vLLM can be left out.
"""

import json
import signal
import subprocess
import sys
import time
from collections.abc import Mapping, Sequence
from contextlib import ExitStack
from dataclasses import asdict
from pathlib import Path
from typing import Any

from . import gateway, machine
from .rounds import Benchmark, say
from .sides import READY_SECONDS, llm_config
from .table import GSERVE, no_figures

BARE, ECHO = "bare", "echo"
START = """
import signal, sys, time
from gserve import VLLMService

signal.signal(signal.SIGTERM, signal.default_int_handler)
path, name = sys.argv[1:]
with VLLMService.from_yaml(path, name=name):
    try:
        time.sleep(3600)
    except KeyboardInterrupt:
        pass
"""
"""The program of the bare side: a service without a gateway."""


def measure(bench: Benchmark, model: str) -> None:
    """Measure launches with the engine `echo`, and with vLLM and this model; "echo": without vLLM."""
    for kind in dict.fromkeys((ECHO, model)):
        taken = {side: no_figures("launch", "launch to ready", side, kind, "s") for side in (GSERVE, BARE)}
        added = no_figures("launch added", "launch to ready: added", GSERVE, kind, "s")
        sides = {GSERVE: _write(bench.folder, GSERVE, kind), BARE: _write(bench.folder, BARE, kind)}
        for side, config in sides.items():
            _launch(side, config)  # to warm up
        for turn in bench.turns(f"launching, {kind}"):
            for side, config in list(sides.items())[:: 1 if turn % 2 else -1]:
                taken[side].figures.append(_launch(side, config))
            added.figures.append(taken[GSERVE].figures[-1] - taken[BARE].figures[-1])
            said = " and ".join(f"{side} {taken[side].figures[-1]:.2f} s" for side in sides)
            say(f"round {turn}, {taken[GSERVE].model}: {said}, {added.figures[-1]:.2f} s added")
        bench.figures += [*taken.values(), added]


def _write(folder: Path, side: str, kind: str) -> Path:
    """Write the config of a side; return its file."""
    config: dict[str, Any] = {"serve": {"servers": 1, "startup_timeout": READY_SECONDS}}
    if kind == ECHO:
        config |= {"llm": {"model_name": ECHO}, "engine": {"type": ECHO}}
    else:
        arguments = machine.engine_arguments(kind, 1)
        config |= {"llm": asdict(llm_config(arguments)), "engine": {"type": "vllm", "openai": side == GSERVE}}
    path = folder / f"launching-{side}.yaml"
    path.write_text(json.dumps(config))
    return path


def _launch(side: str, config: Path) -> float:
    """Start the service of a side, and stop it; return the time until it was ready, in seconds."""
    python: Mapping[str, Sequence[str]] = {
        GSERVE: ("-m", "gserve.cli", "launch", str(config), "--name", gateway.NAME),
        BARE: ("-c", START, str(config), gateway.NAME),
    }
    with ExitStack() as stack:
        log = stack.enter_context(config.with_suffix(".log").open("a"))
        began = time.perf_counter()
        process = stack.enter_context(
            subprocess.Popen([sys.executable, *python[side]], stdout=subprocess.DEVNULL, stderr=log)
        )
        try:
            record = gateway.wait_ready(process, 1, READY_SECONDS)
            seconds = time.perf_counter() - began
        finally:
            process.send_signal(signal.SIGINT)
            process.wait()
    if (record.gateway is not None) != (side == GSERVE):
        raise RuntimeError(f"the service of the side {side} has a wrong gateway: {record.gateway}")
    return seconds
