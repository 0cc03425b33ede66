"""The commands that handle launched services: `launch`, `wait`, `env`, `scale`, `reload`, `stop`, `reap`."""

import gc
import math
import os
import re
import shlex
import signal
import time
from collections.abc import Mapping
from contextlib import suppress
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

import gserve
from gserve_core.errors import ChangeInProgress, ConfigError, GserveError, RemoteError

from .display import TICK, print_stderr, print_table
from .options import ConfigFile, Model, Overrides, Verbose
from .service import changes, drain_service, is_down, serving
from .signals import Signalled

if TYPE_CHECKING:
    from gserve_core.commands import Command, Done

Drain = Annotated[float, typer.Option(metavar="SECONDS", min=0, help="Time for the items in flight to finish.")]
END_SECONDS = 30.0
"""Maximum time for a service to end after the time for its items in flight is over, in seconds."""
ERRORS: Mapping[int, type[GserveError]] = {400: ConfigError, 409: ChangeInProgress}
"""The errors of commands, by the status with which the gateway answers."""
FULL_COLLECTION = 100
"""Number of collections of the second generation before a full one, in a launched service. Python's default is 10."""
TELL_SECONDS = 2.0
"""Time until `wait` tells that it waits for a launch, in seconds."""


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
        _make_full_collections_rare()
        try:
            print_table(
                ("name", "address", "GPUs", "model", "state"),
                [
                    (
                        server.name,
                        f"{server.host}:{server.port}{f' ({server.machine})' if server.machine else ''}",
                        ",".join(map(str, server.gpu_ids)) if server.gpu_ids else "-",
                        server.info.model if server.info else "-",
                        server.state,
                    )
                    for server in service.status()
                ],
            )
            if service.base_url is not None:
                print_stderr(f"OpenAI's API: {service.base_url}")
                print_stderr(f"status page: {service.base_url.removesuffix('v1')}")
                print_stderr(f'its key: eval "$(gserve env {shlex.quote(name)})"')
            announced = {server.name: server.instance for server in service.status()}
            while not all(map(is_down, servers := service.status())):
                died = {server.name for server in servers if is_down(server)}  # the log has the cause
                for server in servers:
                    if server.usable and server.instance != announced.get(server.name):
                        print_stderr(f"{server.name} is ready{' again' if server.generation > 1 else ''}")
                        announced[server.name] = server.instance
                time.sleep(TICK)
            raise GserveError("no server is running any more")
        except Signalled as signalled:  # a signal is the normal way to end it
            if signalled.number == signal.SIGTERM:
                drain_service(service)
        print_stderr("shutting down")
    if died:
        raise GserveError(f"these servers failed: {', '.join(sorted(died))}")


def _make_full_collections_rare() -> None:
    """Make full garbage collections rare, and skip what was imported. One stops the gateway for up to 0.2 s."""
    gc.collect()
    gc.freeze()
    gc.set_threshold(*gc.get_threshold()[:2], FULL_COLLECTION)


def wait(
    name: Annotated[str, typer.Argument(metavar="NAME", help="A launched service, or one that will be.")],
    timeout: Annotated[float, typer.Option(metavar="SECONDS", min=0, help="Maximum time to wait.")] = 600.0,
    model: Model = None,
) -> None:
    """Wait until a service is ready, also if it has not been launched yet."""
    from gserve_core.service import records

    records.check_form(name)
    deadline = time.monotonic() + timeout
    telling = time.monotonic() + TELL_SECONDS
    while True:
        try:
            record = records.wait_service(name, max(0.0, deadline - time.monotonic()))
            break
        except ConfigError as error:  # it has not been launched yet
            if time.monotonic() >= deadline:
                raise GserveError(f"no service '{name}' was launched within {timeout:g} s: {error}") from error
            if time.monotonic() >= telling:
                print_stderr(f"{error}; waiting for its launch, {timeout:g} s in all")
                telling = math.inf
            time.sleep(TICK)
    if record.status != "ready":
        cause = f": {record.error}" if record.error else ""
        raise GserveError(f"the service '{name}' cannot be used, it is {record.status}{cause}")
    while model is not None:  # it may join later than the others
        from gserve_core.service.attached import models_of
        from gserve_core.service.model_names import find_model

        models = models_of(record)
        find_model({it: it for it in models}, model)
        if (status := models[model].status) == "ready":
            break
        if status == "failed" or time.monotonic() >= deadline:
            raise GserveError(f"the model '{model}' of the service '{name}' cannot be used, it is {status}")
        time.sleep(TICK)
        record = records.find_service(name)


def env(
    name: Annotated[str, typer.Argument(metavar="NAME", help="A launched service.")],
    control: Annotated[bool, typer.Option("--control", help="Print the control secret too, and TRL's URL.")] = False,
) -> None:
    """Print the lines that set a shell's variables for OpenAI's clients: eval "$(gserve env NAME)"."""
    from gserve_core.service import records

    gateway = records.find_service(name).gateway
    if gateway is None:
        raise GserveError(f"the service '{name}' has no gateway: start it with gserve launch, or give it one")
    if control and not gateway.control:
        raise GserveError(f"the service '{name}' has no control secret: start it again with this version of gserve")
    print(f"export OPENAI_BASE_URL={shlex.quote(gateway.base_url)}")
    print(f"export OPENAI_API_KEY={shlex.quote(gateway.api_key)}")
    if control:
        print(f"export GSERVE_CONTROL_SECRET={shlex.quote(gateway.control)}")
        if gateway.trl_url:
            print(f"export GSERVE_TRL_URL={shlex.quote(gateway.trl_url)}")


def scale(
    name: Annotated[str, typer.Argument(metavar="NAME", help="A launched service.")],
    servers: Annotated[int, typer.Argument(metavar="N", min=1, help="The number of servers that it shall have.")],
    timeout: Drain = 60.0,
    model: Model = None,
) -> None:
    """Change the number of servers of a launched service, or of one of its models, while they work.

    Removed servers first finish their items in flight. Ctrl-C ends the command, not the change.
    """
    from gserve_core.commands import Scale

    _command(name, Scale(servers, timeout, model))


def reload(
    name: Annotated[str, typer.Argument(metavar="NAME", help="A launched service.")],
    config: Annotated[
        Path | None, typer.Argument(metavar="CONFIG", help="A YAML file [default: that of the start].", exists=True)
    ] = None,
    overrides: Overrides = None,
    in_place: Annotated[
        bool, typer.Option("--in-place", help="Replace one server after another, even if both fit side by side.")
    ] = False,
    only_gateway: Annotated[
        bool, typer.Option("--only-gateway", help="Apply only the keys and the queue_timeout; keep the servers.")
    ] = False,
    timeout: Drain = 60.0,
) -> None:
    """Replace the servers of a launched service by those of a config, while it works.

    If there is room, all new servers start beside the old ones, and get the work at the same moment. Otherwise one is
    replaced after another. If a new server fails, the old ones go on. Ctrl-C ends the command, not the change.
    Of several models, those whose section has not changed keep their servers.
    """
    from gserve_core.commands import Reload

    if overrides and config is None:
        raise ConfigError("--set changes a CONFIG: name it, as in gserve reload NAME CONFIG --set KEY=VALUE")
    path = None if config is None else str(config.absolute())
    _command(name, Reload(path, list(overrides or ()), in_place, only_gateway, timeout))


def adapters(
    name: Annotated[str, typer.Argument(metavar="NAME", help="A launched service.")],
    action: Annotated[str, typer.Argument(metavar="add|remove|list", help="What to do.")] = "list",
    adapter: Annotated[str | None, typer.Argument(metavar="ADAPTER", help="The name of an adapter.")] = None,
    path: Annotated[Path | None, typer.Argument(metavar="PATH", help="add: the folder of the adapter.")] = None,
    model: Model = None,
    timeout: Drain = 60.0,
) -> None:
    """Add, remove or list the LoRA adapters of a launched service, while it works.

    All servers get an added adapter, or none does. Items in flight with a removed one finish first.
    """
    from gserve_core.commands import AddAdapter, ListAdapters, RemoveAdapter

    command: Command
    match action, adapter, path:
        case "list", None, None:
            for known, folder in execute(name, ListAdapters(model)).adapters.items():
                print(f"{known}\t{folder}")
            return
        case "add", str(), Path():
            command = AddAdapter(adapter, str(path.expanduser().absolute()), timeout, model=model)
        case "remove", str(), None:
            command = RemoveAdapter(adapter, timeout, model)
        case _:
            raise ConfigError(
                f"expected gserve adapters {name} add ADAPTER PATH, gserve adapters {name} remove ADAPTER, or"
                f" gserve adapters {name} list"
            )
    _command(name, command)


def update(
    name: Annotated[str, typer.Argument(metavar="NAME", help="A launched service.")],
    path: Annotated[Path, typer.Argument(metavar="PATH", help="The folder with the new weights, as safetensors.")],
    version: Annotated[str, typer.Option("--version", metavar="V", help="Their name: outputs have it.")],
    in_flight: Annotated[
        str, typer.Option(metavar="MODE", help="What happens to items in flight: finish, redo, keep or abort.")
    ] = "finish",
    timeout: Annotated[float, typer.Option(help="Maximum time for all of it, in seconds.", min=0)] = 600.0,
    model: Model = None,
) -> None:
    """Replace the weights of a launched service, while it works: on all servers, or on none.

    The files are checked before anything changes. Only --in-flight keep can mix two versions in one output.
    """
    from gserve_core.commands import VERSION, UpdateWeights
    from gserve_core.pauses import check_in_flight

    if not re.fullmatch(VERSION, version):
        raise ConfigError(f"expected a version of 1 to 64 letters, digits, '.', '_' and '-', got {version!r:.100}")
    how = check_in_flight(in_flight)
    _command(name, UpdateWeights(str(path.expanduser().absolute()), version, how, timeout, model=model))


def _command(name: str, command: "Command") -> None:
    """Have a launched service execute a command, wait until it is done, and show what was done."""
    print_stderr(f"'{name}': {execute(name, command).text}")


def execute(name: str, command: "Command") -> "Done":
    """Have a launched service execute a command, and return its answer.

    Raises ConfigError: there is no such service, or the command is wrong.
    Raises ChangeInProgress: another change is in progress.
    Raises TransportError: no answer has come. The command may go on.
    Raises GserveError: it has failed, or the service takes no commands.
    """
    from gserve_core.service import records
    from gserve_transports.http_client import GatewayClient

    gateway = records.find_service(name).gateway
    if gateway is None:
        raise GserveError(f"the service '{name}' has no gateway, which takes commands: start it with gserve launch")
    client = GatewayClient(gateway.base_url, gateway.control, gateway.certificate)
    try:
        return client.command(command)
    except RemoteError as error:
        raise ERRORS.get(error.status, GserveError)(str(error)) from error


def stop(
    name: Annotated[str, typer.Argument(metavar="NAME", help="A launched service.")],
    timeout: Drain = 60.0,
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
