"""A program that owns a service in odd surroundings: `python -m tests.faults.place FILE`.

It works, kills a server and the nursery, works on, and writes to FILE what came of it: its stdout may be closed.
"""

import json
import os
import sys
import traceback
from pathlib import Path
from typing import Any

import psutil

from gserve import LLMConfig, ServeConfig, VLLMService
from gserve_core.engines.echo import EchoEngine

from . import oracles
from .oracles import Tally, until

HEAL_SECONDS = 60.0


def main(said: Path) -> None:
    """Do all that, and say what came of it."""
    found: dict[str, Any] = {"pid": os.getpid()}
    try:
        work(found)
    except BaseException:
        found["error"] = traceback.format_exc(limit=-3)
    said.with_suffix(".new").write_text(json.dumps(found))
    said.with_suffix(".new").rename(said)


def work(found: dict[str, Any]) -> None:
    """Own a service."""
    tally = Tally()
    with VLLMService(LLMConfig("m"), ServeConfig(servers=2), engine=EchoEngine(latency=0.005), name="here") as service:
        tally.batch(service, 200)
        first = oracles.of(service.servers[0])["server"]
        oracles.kill([it for it in oracles.marked() if it.pid == first or it.role == "nursery"])
        tally.batch(service, 200)
        until(lambda: restarts(service) and service_is_whole(service), HEAL_SECONDS, "both servers ready again")
        tally.batch(service, 200)
        found["restarts"] = restarts(service)
    ended = [it for it in psutil.process_iter(["status", "ppid"]) if it.info["status"] == psutil.STATUS_ZOMBIE]
    zombies = [it.pid for it in ended if it.info["ppid"] == os.getpid()]
    found |= {"items": tally.items, "lost": tally.lost, "wrong": tally.out_of_order, "zombies": len(zombies)}


def restarts(service: VLLMService) -> int:
    return sum(status.restarts for status in service.status())


def service_is_whole(service: VLLMService) -> bool:
    return all(server.is_running() for server in service.servers)


if __name__ == "__main__":
    main(Path(sys.argv[1]))
