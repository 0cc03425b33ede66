"""The commands about launched services: `launch`, `ps`, `stop`, `reap`."""

import os
import signal
import time
from contextlib import suppress
from typing import Annotated

import typer

import gserve
from gserve_core.errors import GserveError

from .display import TICK, print_table, say
from .options import ConfigFile, Overrides, Verbose
from .service import changes, drain_service, names_down, serving
from .signals import Signalled

END_SECONDS = 30.0
"""Maximum time for a service to end after the time for its items in flight is over, in seconds."""


def launch(
    config: ConfigFile,
    name: Annotated[str | None, typer.Option(help="The name for --attach and stop [default: CONFIG's].")] = None,
    overrides: Overrides = None,
    verbose: Verbose = False,
) -> None:
    """Start the servers of CONFIG, and keep them until Ctrl-C, SIGTERM, SIGHUP or `gserve stop`.

    After `stop` and SIGTERM the servers first finish what they have; a second signal ends them at once.
    """
    service = gserve.VLLMService.from_yaml(config, overrides=changes(overrides, verbose), name=name or config.stem)
    died: set[str] = set()
    with serving(service):
        try:
            print_table(
                ("name", "address", "GPUs", "model", "state"),
                [
                    (
                        server.name,
                        f"{server.host}:{server.port}",
                        ",".join(map(str, server.gpu_ids)) if server.gpu_ids else "-",
                        server.info.model if server.info else "-",
                        server.state,
                    )
                    for server in service.status()
                ],
            )
            while len(down := names_down(service)) < len(service.servers):
                died |= down  # the log has the cause
                time.sleep(TICK)
            raise GserveError("no server is running any more")
        except Signalled as signalled:  # a signal is the normal way to end it
            if signalled.number == signal.SIGTERM:
                drain_service(service)
        say("shutting down")
    if died:
        raise GserveError(f"ended without having been asked to: {', '.join(sorted(died))}")


def ps() -> None:
    """List the launched services of this user on this machine."""
    from gserve_core.service import records

    services, unreadable = records.services(), records.unreadable()
    for file in unreadable:
        say(f"error: {file}")
    if not services:
        if not unreadable:
            say("no service is running")
        return
    rows: list[tuple[str, ...]] = []
    for record in services:
        rows += [
            (record.name, str(record.pid), server.name, str(server.address), server.model) for server in record.servers
        ] or [(record.name, str(record.pid), "-", record.status, "-")]
    print_table(("name", "pid", "server", "address", "model"), rows)


def stop(
    name: Annotated[str, typer.Argument(metavar="NAME", help="A launched service.")],
    timeout: Annotated[
        float, typer.Option(metavar="SECONDS", min=0, help="How long its servers may finish what they have.")
    ] = 60.0,
    now: Annotated[bool, typer.Option("--now", help="End it at once: items that are not finished are lost.")] = False,
) -> None:
    """End a launched service once its servers have finished what they have, and wait until it has ended."""
    from gserve_core.service import records

    record = records.find_service(name)
    seconds = 0.0 if now else timeout
    deadline = time.monotonic() + seconds
    try:
        records.write_stop(record, seconds)
    except GserveError as error:  # a full disk, for one
        say(f"{error}; it is told to end all the same, and decides itself how long its servers may finish")
    try:
        _terminate(record.pid)
        while record.is_alive and time.monotonic() < deadline:
            time.sleep(TICK)
        if record.is_alive and not now:
            _terminate(record.pid)  # a second SIGTERM ends it at once
        deadline = time.monotonic() + END_SECONDS
        while record.is_alive:
            if time.monotonic() > deadline:
                raise GserveError(
                    f"'{name}' (process {record.pid}) was told to end, and has not within {seconds + END_SECONDS:g} s"
                )
            time.sleep(TICK)
    finally:
        records.remove_stop(record.pid)
    say(f"stopped '{name}'")


def _terminate(pid: int) -> None:
    with suppress(ProcessLookupError):
        os.kill(pid, signal.SIGTERM)


def reap(
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Only show what is there, and leave it.")] = False,
) -> None:
    """End and remove what services have left that were killed: processes, temporary folders, state files.

    Also the files of SLURM jobs that were cancelled before they ran.
    """
    from gserve_core import reap as left_behind
    from gserve_launchers.slurm.batch import stale_orders

    orphans = left_behind.orphans()
    shown = [str(process) for process in orphans]  # before they end: then their commands cannot be read
    stuck = [] if dry_run else left_behind.end(orphans)
    for process, text in zip(orphans, shown, strict=True):
        print(f"{'left' if dry_run else 'stuck' if process in stuck else 'ended'}: {text}")
    files = left_behind.unused_files() + stale_orders()
    for path in files:
        if not dry_run:
            left_behind.remove(path)
        print(f"{'left' if dry_run else 'removed'}: {path}")
    unreadable = left_behind.unreadable()
    for file in unreadable:
        say(f"left alone: {file}")
    if not orphans and not files and not unreadable:
        say("nothing to do")
