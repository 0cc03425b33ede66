"""A program that owns a service, for rows that kill owners: `python -m tests.faults.owner OPTIONS`.

It says on stdout which part of its life begins: "spawn", "idle", "batch", "leave". OPTIONS are those of `Options`, as
JSON.
"""

import ctypes
import itertools
import os
import signal
import sys
import time
from typing import Any

import msgspec
from msgspec import Struct

from gserve import LLMConfig, ServeConfig, VLLMService
from gserve_core import lease
from gserve_core.engines.echo import EchoEngine
from gserve_core.errors import BatchInterrupted
from gserve_launchers.local import SubprocessLauncher

DEMO = LLMConfig(
    "demo:smollm2-135m", dtype="float32", enforce_eager=True, gpu_memory_utilization=0.16, max_model_len=512
)
REAL = ServeConfig(startup_timeout=400.0, stall_timeout=10.0, max_restarts=100)
"""How real vLLM is served here: on a machine with two cores and much else to do."""


class Options(Struct, frozen=True, kw_only=True):
    """What the owner does. `echo`: options of that engine; None: real vLLM. Times are in seconds.

    `end`: what ends its batch, "exit" (`os._exit`) or "exception"; "" lets it finish. With `is_notebook` it works on
    batches for ever, and tells what each gave. `serve`: options of a `ServeConfig`. `ttl`: the time limit of the lease
    of a line that can be cut without an end, as that between machines; `is_line_cut`: the lines to its servers count as
    such. `hold`: at SIGUSR1 the interpreter lock is held for so long. `name`: of the service.
    """

    echo: dict[str, Any] | None = None
    servers: int = 1
    idle: float = 0.5
    batch: int = 200
    end: str = ""
    is_notebook: bool = False
    serve: dict[str, Any] = {}
    ttl: float | None = None
    is_line_cut: bool = False
    hold: int = 0
    name: str | None = None


class Elsewhere(SubprocessLauncher):
    """Starts servers here, and takes the lines to them for lines between machines."""

    @property
    def is_line_cut_silently(self) -> bool:
        """Say so."""
        return True


def main(options: Options) -> None:
    """Live the life of an owner."""
    if options.ttl is not None:
        lease.TTL = options.ttl
    signal.signal(signal.SIGUSR1, lambda *_: hold_lock(options.hold))
    serve = ServeConfig(servers=options.servers, **options.serve) if options.echo is not None else REAL
    engine = EchoEngine(**options.echo) if options.echo is not None else None
    llm = LLMConfig("m") if engine else DEMO
    launcher = Elsewhere() if options.is_line_cut else None
    say("spawn")
    with VLLMService(llm, serve, engine=engine, launcher=launcher, name=options.name) as service:
        say("idle")
        time.sleep(options.idle)
        if options.is_notebook:
            be_a_notebook(service)
        say("batch")
        for index, _ in enumerate(service.generate_iter(f"prompt {number}" for number in range(options.batch))):
            if options.end == "exit" and index == options.batch // 2:
                os._exit(0)
            if options.end == "exception" and index == options.batch // 2:
                raise RuntimeError("as ordered")
        say("leave")


def be_a_notebook(service: VLLMService) -> None:
    """Work on batches for ever; say how many items of each were finished, of how many, and whether all are right."""
    for number in itertools.count():
        prompts = [f"prompt {number}-{index}" for index in range(100)]
        say("batch")
        try:
            results: list[Any] = service.generate(prompts)
        except BatchInterrupted as interrupt:
            results = interrupt.results
        finished = [(prompt, it) for prompt, it in zip(prompts, results, strict=True) if it is not None]
        say(f"gave {len(finished)} {len(prompts)} {all(it == [prompt] for prompt, it in finished)}")


def hold_lock(seconds: int) -> None:
    """Let no other thread of Python's run, as a long call into C may."""
    say("holding")
    remaining = seconds
    while remaining:  # a signal that comes again ends a sleep early
        remaining = ctypes.PyDLL(None).sleep(remaining)
    say("held")


def say(line: str) -> None:
    """Tell the row."""
    sys.stdout.write(f"{line}\n")
    sys.stdout.flush()


if __name__ == "__main__":
    main(msgspec.json.decode(sys.argv[1], type=Options))
