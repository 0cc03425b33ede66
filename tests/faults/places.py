"""Odd surroundings of an owner: closed descriptors, PID 1, a disk that is read-only. And very many restarts."""

import json
import os
import signal
import subprocess
import sys
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from pathlib import Path

from gserve import LLMConfig, ServeConfig, VLLMService
from gserve_core.engines.echo import EchoEngine

from . import oracles
from .frame import ROOT, Outcome, Scale
from .oracles import until

HEAL_SECONDS = 60.0
PLACES = {
    "descriptors 0, 1 and 2 closed": 'exec "$@" 0<&- 1>&- 2>&-',
    "owner is PID 1": 'exec unshare --pid --fork --kill-child --mount-proc "$@"',
    "root and home are read-only": (
        'exec unshare -m sh -ec \'mount --make-rprivate /; mount --bind "$TMPDIR" "$TMPDIR";'
        ' mount -o remount,bind,ro /; unset XDG_STATE_HOME XDG_RUNTIME_DIR; ! touch "$HOME"/x 2>/dev/null;'
        ' exec "$@"\' sh "$@"'
    ),
}
"""What the surroundings are called, and the shell's words that run a command in them."""
TRIES = {
    "owner is PID 1": "unshare --pid --fork --mount-proc true",
    "root and home are read-only": "unshare -m sh -ec 'mount --make-rprivate /; mount -o remount,bind,ro /'",
}
"""What must be permitted for them."""


def places(scale: Scale) -> list[Outcome]:
    """Own a service in odd surroundings."""
    return [place(scale, name) for name in PLACES]


def place(scale: Scale, name: str) -> Outcome:
    """Run a whole program there."""
    outcome = Outcome(fault=name)
    if name in TRIES and (done := subprocess.run(TRIES[name], shell=True, capture_output=True, text=True)).returncode:
        outcome.skipped = f"not permitted here: {done.stderr.strip()}"
        return outcome
    folder = Path(os.environ["TMPDIR"])
    for number in range(scale.of(1, 5)):
        with outcome.trial(name):
            said = folder / f"{len(name)}-{number}.json"
            began = time.monotonic()
            command = [sys.executable, "-m", "tests.faults.place", str(said)]
            done = subprocess.run(
                ["sh", "-c", PLACES[name], "sh", *command], cwd=ROOT, capture_output=True, timeout=90.0, text=True
            )
            outcome.recover.append(time.monotonic() - began)
            assert done.returncode == 0, f"exit code {done.returncode}: {done.stderr[-500:]}"
            found = json.loads(said.read_text())
            assert "error" not in found, found["error"]
            outcome.lost += len(found["lost"])
            outcome.out_of_order += found["wrong"]
            outcome.figures |= {"items": found["items"], "restarts": found["restarts"]}
            assert (found["pid"] == 1) == (name == "owner is PID 1"), "the surroundings are not as they should be"
            assert found["restarts"] == 1, f"{found['restarts']} restarts"
            assert found["zombies"] == 0, f"{found['zombies']} zombies"
            assert not oracles.marked(), f"left behind: {oracles.marked()}"
    return outcome


def restarts(scale: Scale) -> Outcome:
    """Kill one server again and again while it works, some hundred times: it is started again, and nothing is lost."""
    count = scale.of(20, 300)
    outcome = Outcome(fault=f"one server killed -9 {count} times while it works")
    serve = ServeConfig(max_restarts=1000)
    finished = 0
    over = threading.Event()

    def work(service: VLLMService) -> None:
        nonlocal finished
        number = 0
        while not over.is_set():
            prompts = [f"item-{number}-{index}" for index in range(200)]
            number += 1
            seen = set()
            for index, result in service.generate_iter(prompts, deadline=HEAL_SECONDS):
                outcome.duplicated += index in seen
                seen.add(index)
                if not isinstance(result, list):
                    outcome.lost += 1
                    outcome.problems[:] = outcome.problems[:3] or [f"{prompts[index]}: {result}"]
                elif result[0].text != prompts[index]:
                    outcome.out_of_order += 1
                finished += 1
            outcome.lost += len(prompts) - len(seen)

    def beyond(items: int) -> bool:
        return finished > items

    def lives_again(life: int) -> bool:
        return service.servers[0].status().generation > life

    with (
        VLLMService(LLMConfig("m"), serve, engine=EchoEngine(latency=0.01, capacity=4)) as service,
        ThreadPoolExecutor(1) as pool,
    ):
        working = pool.submit(work, service)
        try:
            for number in range(count):
                with outcome.trial(f"kill {number}"):
                    since = time.monotonic()
                    until(service.servers[0].is_running, HEAL_SECONDS, "the server ready")
                    before = finished  # an item must not see three deaths: those that saw the last one finish first
                    until(partial(beyond, before + 30), HEAL_SECONDS, "work")
                    if number:
                        outcome.recover.append(time.monotonic() - since)
                    life = service.servers[0].status().generation
                    os.kill(oracles.of(service.servers[0])["server"], signal.SIGKILL)
                    until(partial(lives_again, life), HEAL_SECONDS, "its next life")
        finally:
            over.set()
        working.result(2 * HEAL_SECONDS)
        outcome.figures |= {"items": finished, "status says": service.status()[0].restarts}
    return outcome
