"""The commands that look at launched services: `ps`, `logs`, `top`."""

import signal
import sys
import time
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import msgspec
import typer
from msgspec import structs

from gserve_core.errors import ConfigError, GserveError, TransportError, did_you_mean

from .display import Page, print_page, print_stderr, print_table, printable, show_live
from .options import Model
from .signals import Signalled

if TYPE_CHECKING:
    from gserve.cli.log_tail import LogTail
    from gserve_core.overview import ServerOverview, ServiceOverview
    from gserve_core.service.records import ServiceRecord

FOLLOW_SECONDS = 0.2
"""Time between two reads of a log that is followed, in seconds."""
CHECK_SECONDS = 1.0
"""Time between two looks at a service that is followed, in seconds."""
MISSING_SECONDS = 3.0
"""Time after which a service whose record is missing counts as ended, in seconds. Its owner may write it again."""
AT_ONCE = 32
"""Maximum number of services that are asked at once."""
RECORDED = ("name", "pool", "state", "address", "gpu_ids", "model", "capacity", "log")
"""Fields of `ServerOverview` that are known without the gateway."""
ENDINGS = 8
"""Maximum number of unexpected ends of servers that `top` shows with their causes."""
UNKNOWN = "-"

Name = Annotated[str, typer.Argument(metavar="NAME", help="A launched service.")]


# ------------------------------------------------------------------------------------------------------------------ ps


def ps(
    as_json: Annotated[bool, typer.Option("--json", help="Print all that is known as one JSON document.")] = False,
    model: Model = None,
) -> None:
    """List the launched services of this user on this machine, with the state of each server."""
    from gserve_core.service import records

    services, unreadable = records.services(), records.unreadable()
    for file in unreadable:
        print_stderr(f"error: {file}")
    if services:
        _check_model(services, model)
    with ThreadPoolExecutor(AT_ONCE) as threads:
        views = [view.of(model) for view in threads.map(look_at, services)]
    if as_json:
        document = msgspec.json.encode({"services": [view.as_json() for view in views]})
        print(msgspec.json.format(document, indent=2).decode())
        return
    if not views:
        if not unreadable:
            print_stderr("no service is running")
        return
    for view in views:
        if view.problem:
            print_stderr(f"{view.record.name}: {view.problem}")
    header = (
        "name", "pid", "server", "state", "time", "running", "waiting", "tokens/s", "address", "model", "log"
    )  # fmt: skip
    rows = [row for view in views for row in _rows(view)]
    wrapped = {header.index("state"), header.index("model")}
    print_table(header, rows, numbers=range(4, 8), wrapped=wrapped, is_last_apart=True)


def _rows(view: "View") -> Iterator[tuple[str, ...]]:
    """Yield a row of `ps` for each server."""
    first = view.record.name, str(view.record.pid)
    for server in view.overview.servers:
        live = (
            _duration(server.seconds), str(server.counters.running), str(server.counters.waiting),
            f"{server.completion_rate:.0f}",
        )  # fmt: skip
        yield (
            *first, server.name, _state(server), *(live if view.is_live else (UNKNOWN,) * len(live)),
            _address(server), server.model or UNKNOWN, _path(server.log),
        )  # fmt: skip
    if not view.overview.servers:
        yield (*first, UNKNOWN, view.record.status, *(UNKNOWN,) * 7)


def _state(server: "ServerOverview") -> str:
    phase = server.phase or (server.gate if server.gate != "open" else "")
    return f"{server.state}: {phase}" if phase else server.state


def _address(server: "ServerOverview") -> str:
    address = server.address or UNKNOWN
    return f"{address} ({server.machine})" if server.machine else address


def _path(path: str | None) -> str:
    """Return a path, on a terminal in a shorter form if it lies in the home folder."""
    if path is None:
        return UNKNOWN
    if sys.stdout.isatty():
        with suppress(ValueError, RuntimeError):
            return f"~/{Path(path).relative_to(Path.home())}"
    return path


def _duration(seconds: float) -> str:
    """Return a time as "12s", "3m05s", "2h03m" or "4d02h"."""
    minutes, second = divmod(int(seconds), 60)
    hours, minute = divmod(minutes, 60)
    days, hour = divmod(hours, 24)
    if days:
        return f"{days}d{hour:02}h"
    if hours:
        return f"{hours}h{minute:02}m"
    return f"{minutes}m{second:02}s" if minutes else f"{second}s"


# ------------------------------------------------------------------------------------------------------- a service seen


@dataclass(frozen=True)
class View:
    """A launched service, as its gateway reports it, or else as its record describes it.

    `is_live`: whether the gateway has reported it. If not, only the names, addresses, models and logs are known.
    `problem`: why its gateway has not, if it has one.
    """

    record: "ServiceRecord"
    overview: "ServiceOverview"
    is_live: bool
    problem: str = ""

    def of(self, model: str | None) -> "View":
        """Return the view with the servers of one model alone. None: of all models."""
        if model is None:
            return self
        servers = [server for server in self.overview.servers if server.pool == model]
        return replace(self, overview=structs.replace(self.overview, servers=servers))

    def as_json(self) -> dict[str, Any]:
        """Return all that is known as JSON values, None for the rest. It contains no secret."""
        found: dict[str, Any] = msgspec.to_builtins(self.overview)
        gateway = self.record.gateway
        own = {
            "pid": self.record.pid,
            "status": self.record.status,
            "base_url": None if gateway is None else gateway.base_url,
        }
        if not self.is_live:
            found |= {"seconds": None, "waiting": None, "version": None}
            found["servers"] = [
                {name: value if name in RECORDED else None for name, value in server.items()}
                for server in found["servers"]
            ]
        return found | own


def look_at(record: "ServiceRecord") -> View:
    """Return what is known of a service."""
    from gserve_core.overview import ServerOverview, ServiceOverview
    from gserve_transports.http_client import GatewayClient

    gateway, problem = record.gateway, ""
    if gateway is not None:
        try:
            client = GatewayClient(gateway.base_url, gateway.api_key, gateway.certificate)
            return View(record, client.overview(), is_live=True)
        except TransportError as error:
            problem = str(error)
    logs = _logs_on_disk(record)
    servers = [
        ServerOverview(
            name=server.name, pool=server.pool, state="ready", seconds=0.0, generation=0, address=str(server.address),
            gpu_ids=server.gpu_ids, model=server.model, capacity=server.capacity,
            log=str(logs[server.name]) if server.name in logs else None,
        )
        for server in record.servers
    ]  # fmt: skip
    overview = ServiceOverview(
        name=record.name, status=record.status, version="", seconds=0.0, servers=servers, seed=record.seed
    )
    return View(record, overview, is_live=False, problem=problem)


def _check_model(services: "Sequence[ServiceRecord]", model: str | None) -> None:
    """Raise ConfigError if none of these services has a model of this name. None: no model is wanted."""
    if model is not None:
        from gserve_core.service.attached import models_of
        from gserve_core.service.model_names import find_model

        known = {it: it for record in services for it in models_of(record)}
        find_model(known, model, of_several=len(services) > 1)


def _logs_on_disk(record: "ServiceRecord") -> dict[str, Path]:
    """Return the newest log of each server of a service, by the server's name."""
    from gserve_core.host.folders import newest_logs

    return newest_logs(Path(record.logs)) if record.logs else {}


class _Watch:
    """The end of a service that is being followed."""

    def __init__(self, record: "ServiceRecord") -> None:
        self._record = record
        self._seen = time.monotonic()

    def read(self) -> "ServiceRecord | None":
        """Return the current record of the service; None if it has ended."""
        from gserve_core.service import records

        now = None
        with suppress(GserveError, OSError):  # it is being replaced, for example
            now = records.read_service(self._record.name)
        if now is not None and now.is_same(self._record):
            self._record, self._seen = now, time.monotonic()
        is_missing = time.monotonic() - self._seen > MISSING_SECONDS
        return self._record if self._record.is_alive and not is_missing else None


# ---------------------------------------------------------------------------------------------------------------- logs


def logs(
    name: Name,
    server: Annotated[str | None, typer.Argument(metavar="SERVER", help="One of its servers [default: all].")] = None,
    follow: Annotated[bool, typer.Option("--follow", "-f", help="Show new lines too, until Ctrl-C.")] = False,
    lines: Annotated[int, typer.Option("--lines", "-n", metavar="N", min=0, help="Number of last lines.")] = 50,
    model: Model = None,
) -> None:
    """Show the last lines of the servers' logs. Restarts are followed too."""
    from gserve_core.host.folders import last_logs
    from gserve_core.service import records

    try:
        record = records.find_service(name)
    except ConfigError as error:
        if (left := last_logs(name)) is None:
            raise
        raise ConfigError(f"{error}; its last run left its logs in {left}") from error
    found = _log_paths(record, model)
    if server is not None and server not in found:
        raise ConfigError(f"the service '{name}' has no server '{server}'{did_you_mean(server, list(found))}")
    tails = _Tails(server)
    for missing in tails.update(found, lines):
        print_stderr(f"{missing} has no log yet")
    if not follow:
        tails.finish()
        return
    try:
        _follow(tails, record, model)
    except Signalled as signalled:
        if signalled.number != signal.SIGINT:  # Ctrl-C is the normal way to end it
            raise
    else:
        print_stderr(f"the service '{name}' has ended")


def _follow(tails: "_Tails", record: "ServiceRecord", model: str | None) -> None:
    """Print new lines of logs until the service has ended."""
    watch, checked = _Watch(record), time.monotonic()
    now: ServiceRecord | None = record
    while now is not None:
        tails.read()
        time.sleep(FOLLOW_SECONDS)
        if time.monotonic() - checked > CHECK_SECONDS:
            now, checked = watch.read(), time.monotonic()
            if now is not None:
                tails.update(_log_paths(now, model), sys.maxsize)
    tails.finish()


def _log_paths(record: "ServiceRecord", model: str | None) -> dict[str, Path | None]:
    """Return the newest log of each server of a service, or of one model; None: it has none yet. By the server's name.

    Raises ConfigError: the service has no such model.
    """
    view, on_disk = look_at(record), _logs_on_disk(record)
    _check_model([record], model)
    if model is not None:
        view = view.of(model)
        on_disk = {name: path for name, path in on_disk.items() if name.rpartition("-")[0] == model}
    found = {it.name: on_disk.get(it.name) if it.log is None else Path(it.log) for it in view.overview.servers}
    return found if view.is_live else {**on_disk, **found}


class _Tails:
    """The logs of all servers of a service, or of `server`, which are printed line by line."""

    def __init__(self, server: str | None) -> None:
        self._server = server
        self._tails: dict[str, LogTail] = {}

    def update(self, found: Mapping[str, Path | None], lines: int) -> list[str]:
        """Take over the logs of servers, new ones from their last `lines` on. Return the servers without a log."""
        from gserve.cli.log_tail import LogTail

        wanted = {name: path for name, path in found.items() if self._server in (None, name)}
        for name, path in wanted.items():
            known = self._tails.get(name)
            if path is not None and (known is None or known.folder != path.parent):
                if known is not None:
                    self._print(name, known.finish())
                self._tails[name] = LogTail(name, path, lines)
        return [name for name in wanted if name not in self._tails]

    def read(self) -> None:
        """Print the lines that have been added."""
        for name, tail in self._tails.items():
            self._print(name, tail.read())

    def finish(self) -> None:
        """Print all lines that are left."""
        for name, tail in self._tails.items():
            self._print(name, tail.finish())

    def _print(self, name: str, lines: Iterator[str]) -> None:
        prefix = f"[{name}] " if self._server is None else ""
        for line in lines:
            print(f"{prefix}{printable(line) if sys.stdout.isatty() else line}")
        sys.stdout.flush()


# ----------------------------------------------------------------------------------------------------------------- top


def top(name: Name, model: Model = None) -> None:
    """Show a service and its servers, each second anew, until q or Ctrl-C. Into a file or a pipe, show them once."""
    from gserve_core.service import records

    record = records.find_service(name)
    _check_model([record], model)
    pages = _pages(record, model)
    if not sys.stdout.isatty():
        print_page(next(pages))
        return
    try:
        has_ended = show_live(pages)
    except Signalled as signalled:
        if signalled.number != signal.SIGINT:
            raise
        return
    if has_ended:
        print_stderr(f"the service '{name}' has ended")


def _pages(record: "ServiceRecord", model: str | None) -> Iterator[Page]:
    """Yield the current view of a service, or of one model, as a page, until the service has ended."""
    watch = _Watch(record)
    now: ServiceRecord | None = record
    while now is not None:
        yield _page(look_at(now).of(model))
        now = watch.read()


def _page(view: View) -> Page:
    """Return a view as a page of `top`."""
    header = (
        "server", "state", "time", "reqs", "run", "wait", "in/s", "out/s", "items", "failed", "restarts",
    )  # fmt: skip
    servers = view.overview.servers
    figures = [
        (
            it.requests, it.counters.running, it.counters.waiting, round(it.prompt_rate), round(it.completion_rate),
            it.counters.items, it.counters.failed, it.restarts,
        )
        for it in servers
    ]  # fmt: skip
    rows = [
        (it.name, _state(it), _duration(it.seconds), *map(str, figure))
        for it, figure in zip(servers, figures, strict=True)
    ]
    rows.append(("all", "", "", *(str(sum(column)) for column in zip(*figures, strict=True))))
    if not view.is_live:
        rows = [(*row[:2], *(UNKNOWN,) * (len(header) - 2)) for row in rows[:-1]]
    facts = [f"{view.record.name}: {view.record.status}"]
    if view.is_live:
        facts += [f"for {_duration(view.overview.seconds)}", f"{view.overview.waiting} waiting for a server"]
        if len(view.overview.models) > 1:
            facts += [f"{it.name} {it.status}" for it in view.overview.models]
    if view.record.gateway is not None:
        facts.append(view.record.gateway.base_url)
    notes = [
        f"{_duration(it.seconds)} ago: {it.server}: {it.cause.partition('\n')[0]}"
        for it in view.overview.endings[:ENDINGS]
    ]
    return Page(", ".join(facts), header, rows, [view.problem, *notes] if view.problem else notes)
