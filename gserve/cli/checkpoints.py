"""The command `watch`: it gives each new checkpoint of a trainer to a launched service, and runs a command with it."""

import shutil
import time
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from gserve_core.errors import ChangeInProgress, ConfigError, GserveError, TransportError

from .display import print_stderr
from .options import CommandOrNot, Model
from .serve import execute
from .user_command import UserCommand

if TYPE_CHECKING:
    from gserve_core.pauses import InFlight
    from gserve_core.service.checkpoints import Checkpoint, Checkpoints


def watch(
    name: Annotated[str, typer.Argument(metavar="NAME", help="A launched service.")],
    folder: Annotated[Path, typer.Argument(metavar="FOLDER", help="The folder in which checkpoints appear.")],
    command: CommandOrNot = None,
    marker: Annotated[
        str, typer.Option(metavar="FILE", help="The file that a trainer writes last into a checkpoint.")
    ] = "STABLE",
    newest: Annotated[bool, typer.Option("--newest", help="Skip checkpoints that a newer one has overtaken.")] = False,
    once: Annotated[bool, typer.Option("--once", help="End after one checkpoint.")] = False,
    fail_fast: Annotated[bool, typer.Option("--fail-fast", help="End when an update or COMMAND fails.")] = False,
    timeout: Annotated[
        float | None,
        typer.Option(metavar="SECONDS", min=0, help="End when none has come for so long [default: never]."),
    ] = None,
    interval: Annotated[float, typer.Option(metavar="SECONDS", min=0.01, help="Time between two looks.")] = 5.0,
    in_flight: Annotated[str, typer.Option(metavar="MODE", help="As for gserve update.")] = "finish",
    model: Model = None,
) -> None:
    """Replace the weights of a launched service by each new checkpoint below FOLDER, and run COMMAND with it.

    In the words of COMMAND, {path} and {version} are replaced. It has $GSERVE_ATTACH, $GSERVE_WEIGHTS and
    $GSERVE_WEIGHT_VERSION. After a failure the watch goes on.
    """
    from gserve_core.commands import ShowWeights
    from gserve_core.pauses import check_in_flight
    from gserve_core.service import records
    from gserve_core.service.checkpoints import Checkpoints

    how = check_in_flight(in_flight)
    if command and shutil.which(command[0]) is None:
        raise ConfigError(f"cannot run '{command[0]}': no such program on this machine")
    checkpoints = Checkpoints(folder.expanduser().absolute(), marker)
    weights = execute(name, ShowWeights(model)).weights
    if weights is not None and weights.path:
        checkpoints.finish_up_to(weights.path)
    taken = failed = 0
    since, why = time.monotonic(), ""
    while not (once and taken):
        if found := checkpoints.new():
            chosen = found[-1] if newest else found[0]
            try:
                code = _take(name, checkpoints, chosen, command or (), model, how)
            except (ChangeInProgress, TransportError) as error:
                if str(error) != why:
                    print_stderr(f"{chosen.path.name}: not yet: {error}")
                why = str(error)
            else:
                checkpoints.finish(*(it for it in found if it <= chosen))
                taken, failed, since, why = taken + 1, failed + bool(code), time.monotonic(), ""
                if code and (fail_fast or once):
                    raise typer.Exit(code)
                continue
        else:
            why = ""
        if timeout is not None and time.monotonic() - since >= timeout and not checkpoints.is_settling:
            break
        records.find_service(name)  # raises if it has ended
        time.sleep(interval)
    if why:
        raise GserveError(f"'{name}' has not taken a checkpoint within {timeout:g} s: {why}")
    if not taken:
        raise GserveError(f"no new checkpoint with the file {marker} has come below {folder} within {timeout:g} s")
    if failed:
        raise GserveError(f"{failed} of {taken} checkpoints failed")


def _take(
    name: str,
    checkpoints: "Checkpoints",
    new: "Checkpoint",
    command: Sequence[str],
    model: str | None,
    how: "InFlight",
) -> int:
    """Update a service to a checkpoint, and run a command with it. Return the exit code, 1 if the update fails.

    Raises ChangeInProgress: the service is busy with another change.
    Raises TransportError: it has not answered. It may go on to the new weights: the same again finds this out.
    Raises ConfigError: it has ended.
    """
    from gserve_core.commands import ShowWeights, UpdateWeights
    from gserve_core.service import records

    path = str(new.path.resolve())
    try:
        weights = execute(name, ShowWeights(model)).weights
        version = checkpoints.version_of(new, "" if weights is None else weights.version)
        text = execute(name, UpdateWeights(path, version, how, model=model)).text
    except (ChangeInProgress, TransportError):
        raise
    except GserveError as error:
        records.find_service(name)  # raises if it has ended
        print_stderr(f"error: {new.path.name}: {error}")
        return 1
    print_stderr(f"'{name}': {text}")
    if not command:
        return 0
    code = _run([word.replace("{path}", path).replace("{version}", version) for word in command], name, path, version)
    print_stderr(f"{new.path.name}: {command[0]} ended with exit code {code}")
    return code


def _run(command: Sequence[str], name: str, path: str, version: str) -> int:
    """Run a command to its end; return its exit code. If a signal ends this process, it ends the command too."""
    try:
        running = UserCommand(
            command, {"GSERVE_ATTACH": name, "GSERVE_WEIGHTS": path, "GSERVE_WEIGHT_VERSION": version}
        )
    except OSError as error:
        print_stderr(f"error: cannot run '{command[0]}': {error.strerror}")
        return 1
    try:
        return running.wait()
    except BaseException:
        running.end()
        raise
