"""The service that a command starts or attaches to, from start to end."""

import os
import shlex
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor, wait
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import TYPE_CHECKING

import gserve
from gserve_core.errors import ConfigError
from gserve_core.host.environment import ATTACH_VARIABLE

from .display import TICK, print_stderr, show_phases
from .signals import Signalled, ignore, on_signals, raise_signalled

if TYPE_CHECKING:
    from gserve_core.config import GatewayConfig
    from gserve_core.service.model import Model
    from gserve_core.service.service import VLLMService
    from gserve_core.service.state import ServerState


DRAIN_SECONDS = 30.0
"""Time for servers to finish items in flight after a SIGTERM that `gserve stop` did not send, in seconds."""
SHOWN = 60
"""Maximum length of a word in a message, in characters."""


def split_words(
    command: str, config: str | None, texts: Sequence[str], attach: str | None
) -> tuple[Path | None, Sequence[str]]:
    """Return the config, and the texts after it.

    With --attach or $GSERVE_ATTACH there is no config, and the first word is a text too.
    Raises ConfigError: a config is expected, and the first word is none.
    """
    if attach is None and config is not None and _is_config(config):
        return Path(config), texts
    if attach is not None or os.environ.get(ATTACH_VARIABLE):
        return None, texts if config is None else [config, *texts]
    word = "TEXT" if config is None else shlex.quote(config if len(config) <= SHOWN else f"{config[:SHOWN]}…")
    raise ConfigError(
        (
            "expected a CONFIG (a YAML file)"
            if config is None
            else f"expected a CONFIG (a YAML file), but {word} is not a file"
        )
        + f": write gserve {command} CONFIG {word}, or gserve {command} --attach NAME {word} (see: gserve ps)"
    )


def _is_config(word: str) -> bool:
    """Return whether a word is a config rather than a text: it is a file, or has the name of a YAML file."""
    with suppress(OSError):  # the text is too long for a file's name
        if Path(word).is_file():
            return True
    return word.endswith((".yaml", ".yml")) and len(word.split()) == 1


def changes(overrides: Sequence[str] | None, verbose: bool) -> list[str]:
    """Return the changes to a config that the options of a command ask for."""
    return [*(overrides or ()), *(["serve.verbose=true"] if verbose else ())]


def open_service(
    config: Path | None, attach: str | None, overrides: Sequence[str], gateway: "GatewayConfig | None" = None
) -> "VLLMService":
    """Return the service of a config, or attach to a launched one.

    `attach`: the service's name; None: the name in $GSERVE_ATTACH.
    `gateway`: see `VLLMService.from_yaml`.
    Raises ConfigError: the config is invalid, or an attached service has overrides.
    """
    if config is not None:
        return gserve.VLLMService.from_yaml(config, overrides=overrides, gateway=gateway)
    if overrides:
        raise ConfigError(
            "--set and --verbose change a config: they cannot be combined with --attach or $GSERVE_ATTACH, which use a"
            " running service"
        )
    return gserve.VLLMService.attach(attach)


def chosen(service: "VLLMService", model: str | None) -> "VLLMService | Model":
    """Return the calls to the model with a name; None: to the only one. Raises ConfigError: there are others."""
    if model is None and len(service.models) <= 1:
        return service
    from gserve_core.service.model_names import find_model

    return service[find_model({name: name for name in service.models}, model)]


@contextmanager
def serving(service: "VLLMService") -> Iterator[None]:
    """Start a service and show its phases; shut it down when the context ends, also after an error."""
    try:
        with ThreadPoolExecutor(1) as threads:
            starting = threads.submit(service.start)
            try:
                show_phases(service, starting)
            except BaseException:
                while not starting.done():  # the start is undone once one of its servers is asked to stop
                    for server in service.servers:
                        server.ask_to_stop()
                    wait([starting], TICK)
                raise
            starting.result()
        yield
    finally:
        on_signals(ignore)
        service.shutdown()


def drain_service(service: "VLLMService") -> None:
    """Shut a service down after its servers have finished the items in flight, or after a timeout."""
    from gserve_core.service import records

    asked = records.take_stop()
    seconds = DRAIN_SECONDS if asked is None else asked
    if seconds <= 0:
        return
    with suppress(Signalled):  # a second signal ends the drain at once
        on_signals(raise_signalled)
        print_stderr(f"finishing the items in flight, for at most {seconds:g} s")
        service.shutdown(drain=seconds)
        on_signals(ignore)


def is_down(server: "ServerState") -> bool:
    """Return whether a server is stopped or has failed."""
    return server.state in ("failed", "stopped")
