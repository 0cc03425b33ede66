"""The commands about launched services: `launch`, `wait`, `env`, `ps`, `stop`, `reap`."""

import os
import shlex
import signal
import time
from contextlib import suppress
from typing import Annotated

import typer

import gserve
from gserve_core.errors import ConfigError, GserveError

from .display import TICK, print_stderr, print_table
from .options import ConfigFile, Overrides, Verbose
from .service import changes, drain_service, names_down, serving
from .signals import Signalled

END_SECONDS = 30.0
"""Maximum time for a service to end after the time for its items in flight is over, in seconds."""


def launch(
    config: ConfigFile,
    name: Annotated[str | None, typer.Option(help="Name for --attach and stop [default: CONFIG's].")] = None,
    overrides: Overrides = None,
    verbose: Verbose = False,
) -> None:
    """Start the servers of CONFIG, and run them until Ctrl-C, SIGTERM, SIGHUP or `gserve stop`.

    The gateway offers all servers at one address: OpenAI's API, /chat and /generate.
    After `stop` and SIGTERM the servers first finish their items in flight. A second signal stops them at once.
    """
    name = name or config.stem
    service = gserve.VLLMService.from_yaml(
        config, overrides=changes(overrides, verbose), name=name, gateway=gserve.GatewayConfig()
    )
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
            if service.base_url is not None:
                print_stderr(f"OpenAI's API: {service.base_url}")
                print_stderr(f'its key: eval "$(gserve env {shlex.quote(name)})"')
            generations = {server.name: server.generation for server in service.status()}
            while len(down := names_down(service)) < len(service.servers):
                died |= down  # the log has the cause
                for server in service.status():
                    if server.usable and server.generation > generations[server.name]:
                        generations[server.name] = server.generation
                        print_stderr(f"{server.name} is ready again")
                time.sleep(TICK)
            raise GserveError("no server is running any more")
        except Signalled as signalled:  # a signal is the normal way to end it
            if signalled.number == signal.SIGTERM:
                drain_service(service)
        print_stderr("shutting down")
    if died:
        raise GserveError(f"these servers failed: {', '.join(sorted(died))}")


def wait(
    name: Annotated[str, typer.Argument(metavar="NAME", help="A launched service, or one that will be.")],
    timeout: Annotated[float, typer.Option(metavar="SECONDS", min=0, help="Maximum time to wait.")] = 600.0,
) -> None:
    """Wait until a service is ready, also if it has not been launched yet."""
    from gserve_core.service import records

    records.check_form(name)
    deadline = time.monotonic() + timeout
    while True:
        try:
            record = records.wait_service(name, max(0.0, deadline - time.monotonic()))
            break
        except ConfigError as error:  # it has not been launched yet
            if time.monotonic() >= deadline:
                raise GserveError(f"no service '{name}' was launched within {timeout:g} s: {error}") from error
            time.sleep(TICK)
    if record.status != "ready":
        cause = f": {record.error}" if record.error else ""
        raise GserveError(f"the service '{name}' cannot be used, it is {record.status}{cause}")


def env(
    name: Annotated[str, typer.Argument(metavar="NAME", help="A launched service.")],
) -> None:
    """Print the lines that set a shell's variables for OpenAI's clients: eval "$(gserve env NAME)"."""
    from gserve_core.service import records

    gateway = records.find_service(name).gateway
    if gateway is None:
        raise GserveError(f"the service '{name}' has no gateway: start it with gserve launch, or give it one")
    print(f"export OPENAI_BASE_URL={shlex.quote(gateway.base_url)}")
    print(f"export OPENAI_API_KEY={shlex.quote(gateway.api_key)}")


def ps() -> None:
    """List the launched services of this user on this machine."""
    from gserve_core.service import records

    services, unreadable = records.services(), records.unreadable()
    for file in unreadable:
        print_stderr(f"error: {file}")
    if not services:
        if not unreadable:
            print_stderr("no service is running")
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
        float, typer.Option(metavar="SECONDS", min=0, help="Time for the items in flight to finish.")
    ] = 60.0,
    now: Annotated[bool, typer.Option("--now", help="Stop it at once: unfinished items are lost.")] = False,
) -> None:
    """Stop a launched service after its servers have finished the items in flight, and wait until it has ended."""
    from gserve_core.service import records

    record = records.find_service(name)
    seconds = 0.0 if now else timeout
    deadline = time.monotonic() + seconds
    try:
        records.write_stop(record, seconds)
    except GserveError as error:  # a full disk, for one
        print_stderr(f"{error}; stopping it anyway, with its own time limit for the items in flight")
    try:
        _terminate(record.pid)
        while record.is_alive and time.monotonic() < deadline:
            time.sleep(TICK)
        if record.is_alive and not now:
            _terminate(record.pid)  # a second SIGTERM ends it at once
        deadline = time.monotonic() + END_SECONDS
        while record.is_alive:
            if time.monotonic() > deadline:
                raise GserveError(f"'{name}' (process {record.pid}) did not stop within {seconds + END_SECONDS:g} s")
            time.sleep(TICK)
    finally:
        records.remove_stop(record.pid)
    print_stderr(f"stopped '{name}'")


def _terminate(pid: int) -> None:
    with suppress(ProcessLookupError):
        os.kill(pid, signal.SIGTERM)


def reap(
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Only show what would be ended and removed.")] = False,
) -> None:
    """Remove the leftovers of killed services: processes, temporary folders, state files.

    Also the files of SLURM jobs that were cancelled before they ran.
    """
    from gserve_core import reap as leftovers
    from gserve_launchers.slurm.batch import stale_orders

    orphans = leftovers.orphans()
    shown = [str(process) for process in orphans]  # before they end: then their commands cannot be read
    stuck = [] if dry_run else leftovers.end(orphans)
    for process, text in zip(orphans, shown, strict=True):
        print(f"{'found' if dry_run else 'stuck' if process in stuck else 'ended'}: {text}")
    files = leftovers.unused_files() + stale_orders()
    for path in files:
        if not dry_run:
            leftovers.remove(path)
        print(f"{'found' if dry_run else 'removed'}: {path}")
    unreadable = leftovers.unreadable()
    for file in unreadable:
        print_stderr(f"skipped: {file}")
    if not orphans and not files and not unreadable:
        print_stderr("nothing to do")
