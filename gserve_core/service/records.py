"""The records of launched services. Other processes of the user find the services through them.

A record is a copy of the owner's state, which alone is authoritative. A record is always replaced completely.
"""

import contextlib
import os
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import msgspec
from msgspec import Struct, structs

from ..errors import ConfigError, GserveError, did_you_mean
from ..host import processes, run_files, tokens
from ..interfaces import Access, Address
from ..weights import Weights

LOCK_SECONDS = 10.0
"""Maximum wait for another process that reserves a name, in seconds."""
UPDATE_SECONDS = 1.0
"""Maximum wait for such a process when an owner updates its record, in seconds. The owner retries later."""
# It is short, since the owner has other work to do.
MAX_DEATHS = 256
"""Maximum number of deaths in a record."""


class ServerRecord(Struct, frozen=True):
    """A ready server of a launched service. `pool`: the name of its model; "" in records of older versions."""

    name: str
    address: Address
    instance: str
    token: str
    capacity: int
    model: str
    gpu_ids: list[int] | None = None
    control: str | None = None
    pool: str = ""

    def __repr__(self) -> str:
        """Show no secret."""
        return f"ServerRecord(name={self.name!r}, address={self.address!r}, instance={self.instance!r})"

    def access(self, timeout: float | None) -> Access:
        """Return what a client needs to use the server. `timeout`: see `ServeConfig.client_timeout`, in seconds."""
        return Access(token=self.token, control=self.control, instance=self.instance, timeout=timeout)


class GatewayRecord(Struct, frozen=True):
    """The gateway of a launched service: its URL for clients of OpenAI's API, and its secrets.

    `control`: the secret of `POST /control`; "" if there is none.
    `certificate`: the certificate that it shows, in PEM format; "" if it speaks plain HTTP.
    `trl_url`: the secret base URL for TRL's trainers; "" without `weight_protocol`.
    """

    base_url: str
    api_key: str
    control: str = ""
    certificate: str = ""
    trl_url: str = ""

    def __repr__(self) -> str:
        """Show no secret."""
        return f"GatewayRecord(base_url={self.base_url!r})"


class ModelRecord(Struct, frozen=True):
    """A model of a launched service. For the first fields see `ServiceRecord`.

    `status`: "starting", "ready", or "failed" if all of its servers have failed.
    `is_alone`: whether the service can have no other model.
    `weights`: those of its servers; None in records of older versions.
    `prefix_affinity`: see `ServeConfig`.
    """

    seed: int = 0
    client_timeout: float | None = None
    stall_timeout: float | None = 60.0
    status: str = "ready"
    is_alone: bool = True
    weights: Weights | None = None
    prefix_affinity: bool = True


class ServiceRecord(Struct, frozen=True):
    """A launched service with its ready servers. Another version of gserve may write more fields.

    `pid`, `started`: process id of the owner, and the start time of that process, in clock ticks.
    `status`: "starting", "ready", "draining", or "failed" if all servers have failed.
    `id`: distinguishes services of one process.
    `machine`: the machine on which `pid` is valid; None in records of older versions.
    `stall_timeout`: time after which the owner kills a hung server, in seconds; None: never.
    `deaths`: instances of the servers that died while they worked, at most the last `MAX_DEATHS`.
    `seed`: see `LLMConfig.item_seed`.
    `error`: why the servers have failed, if all have.
    `names`: the names of all servers, ready or not; empty in records of older versions.
    `finishing`: instances of the servers that accept no more items, and finish those that they have.
    `logs`: the folder of the servers' logs; "" in records of older versions.
    `models`: the models by name; empty in records of older versions. `client_timeout`, `stall_timeout`, `seed` and
    `prefix_affinity` are those of the first one.
    """

    name: str
    pid: int
    started: int
    servers: list[ServerRecord]
    transport: dict[str, Any]
    plugins: list[str] = []
    folder: str | None = None
    client_timeout: float | None = None
    status: str = "ready"
    id: str = ""
    machine: str | None = None
    stall_timeout: float | None = 60.0
    deaths: list[str] = []
    seed: int = 0
    gateway: GatewayRecord | None = None
    error: str = ""
    logs: str = ""
    names: list[str] = []
    finishing: list[str] = []
    models: dict[str, ModelRecord] = {}
    prefix_affinity: bool = True

    @property
    def is_alive(self) -> bool:
        """Whether the owner is alive: the same process, not another one with its id."""
        return self.machine in (None, processes.machine()) and processes.process_start(self.pid) == self.started

    @property
    def is_dead(self) -> bool:
        """Whether the owner is known to be dead. False if it is in another container of this machine."""
        here, there = processes.machine(), self.machine or processes.machine()
        is_elsewhere = there != here and there.partition(" ")[0] == here.partition(" ")[0]
        return not is_elsewhere and not self.is_alive

    @property
    def is_ours(self) -> bool:
        """Whether this process is the owner."""
        return self.pid == os.getpid() and self.is_alive

    def is_same(self, other: "ServiceRecord") -> bool:
        """Return whether two records belong to the same run of a service."""
        return (self.pid, self.started, self.id) == (other.pid, other.started, other.id)


@dataclass(frozen=True)
class Unreadable:
    """A file in the place of a service's record, and why it cannot be read."""

    path: Path
    why: str

    def __str__(self) -> str:
        return f"cannot read the record of a service {self.path}: {self.why}; if no service uses it, remove it"


def reserve_service(record: ServiceRecord) -> None:
    """Write the record of a service before its start, to reserve its name. If several try at once, one succeeds.

    Raises ConfigError: the name is taken or invalid.
    Raises GserveError: its record cannot be read or written.
    """
    check_form(record.name)
    _update(record, may_be_same=False)


def write_service(record: ServiceRecord) -> None:
    """Write the record of a service. Its name need not be reserved. Raises the errors of `reserve_service`."""
    check_form(record.name)
    _update(record, may_be_same=True)


def keep_service(record: ServiceRecord) -> bool:
    """Write a service's record and its servers' tokens again if they were removed.

    Return False if another service has the name now. Cheap enough to be called every second. Raises GserveError.
    """
    for server in record.servers:
        tokens.keep_token(server.address, server.token, server.control)
    try:
        found = _read_named(record.name)
    except GserveError:
        found = []
    if any(not other.is_same(record) and other.is_alive for other in found):
        return False
    if len(found) < len(run_files.places()):
        try:
            _update(record, may_be_same=True)
        except ConfigError:
            return False
    return True


def check_name(name: str) -> None:
    """Raise ConfigError if the name is invalid, or if a living service has it."""
    check_form(name)
    other = read_service(name)
    if other is not None and other.is_alive:
        raise _name_taken(other)


def check_form(name: str) -> None:
    """Raise ConfigError unless a text may be the name of a service."""
    if not name.replace("-", "").replace("_", "").replace(".", "").isalnum() or not name.isascii() or len(name) > 64:
        raise ConfigError(f"expected a name of at most 64 letters, digits and '-_.', got '{name}'")


def _name_taken(other: ServiceRecord) -> ConfigError:
    doing = {"starting": "is starting", "draining": "is ending"}.get(other.status, "is already running")
    return ConfigError(
        f"a service named '{other.name}' {doing} (process {other.pid}): choose another --name,"
        f" or end it with: gserve stop {other.name}"
    )


def _update(record: ServiceRecord, *, may_be_same: bool) -> None:
    """Write a record. Raises ConfigError: a living service has the name; GserveError: it cannot be written."""
    if record.machine is None:
        record = structs.replace(record, machine=processes.machine())
    try:
        with run_files.locked(run_files.places(), UPDATE_SECONDS if may_be_same else LOCK_SECONDS):
            for other in _read_named(record.name):
                if other.is_alive and not (may_be_same and other.is_same(record)):
                    raise _name_taken(other)
            run_files.write(_service_name(record.name), record)
    except OSError as error:
        raise GserveError(f"cannot write the record of the service '{record.name}': {error}") from error


def remove_service(name: str, run: str | None = None) -> None:
    """Remove the record of a service of this process. Idempotent.

    `run`: remove only a record with this id; None: any.
    """
    for place in run_files.places():
        path = place / _service_name(name)
        record = _read_service(path)
        if isinstance(record, ServiceRecord) and record.is_ours and run in (None, record.id):
            path.unlink(missing_ok=True)


def services() -> list[ServiceRecord]:
    """Return the records of living services, sorted by name. Remove the files of dead ones."""
    alive: dict[str, ServiceRecord] = {}
    for path, record in _service_files():
        if not isinstance(record, ServiceRecord):
            continue
        if record.is_alive:
            alive.setdefault(record.name, record)
        elif record.is_dead:
            _remove_dead(path, record)
    return [alive[name] for name in sorted(alive)]


def unreadable() -> list[Unreadable]:
    """Return the unreadable files in the place of records. They are not removed, since a service may need them."""
    return [record for _, record in _service_files() if isinstance(record, Unreadable)]


def _service_files() -> list[tuple[Path, ServiceRecord | Unreadable]]:
    """Return all records with their paths, newest first."""
    paths = [path for place in run_files.places() for path in place.glob("service-*")]
    read = [(path, _read_service(path)) for path in sorted(paths, key=run_files.changed, reverse=True)]
    return [(path, record) for path, record in read if record is not None]


def _remove_dead(path: Path, record: ServiceRecord) -> None:
    """Remove the record and the tokens of a dead service, unless another service is taking its name."""
    with contextlib.suppress(OSError), run_files.locked([path.parent], 0):
        if _read_service(path) == record:
            path.unlink(missing_ok=True)
            for server in record.servers:
                tokens.remove_token(server.address, server.token)


def find_service(name: str) -> ServiceRecord:
    """Return the record of a living service. The service may still be starting.

    Raises ConfigError: no service has this name.
    Raises GserveError: its record cannot be read.
    """
    found = {record.name: record for record in services()}
    if name not in found:
        read_service(name)  # raises a clearer error if it is unreadable
        hint = did_you_mean(name, list(found)) or "; none is running: start one with: gserve launch CONFIG"
        raise ConfigError(f"no service named '{name}' is running here{hint}")
    return found[name]


def wait_service(name: str, seconds: float) -> ServiceRecord:
    """Wait until a service is no longer starting, and return its record. Raises the errors of `find_service`.

    Raises GserveError: the service ended while it started, or is still starting after `seconds`.
    """
    record = first = find_service(name)
    deadline = time.monotonic() + seconds
    while record.status == "starting":
        if time.monotonic() >= deadline:
            raise GserveError(
                f"the service '{name}' (process {record.pid}) is still starting after {seconds:g} s: try again later"
            )
        time.sleep(run_files.LOOK_SECONDS)
        with contextlib.suppress(GserveError):  # temporarily unreadable: its owner writes it again
            record = read_service(name) or record
        if not first.is_alive or not record.is_same(first):
            cause = f": {record.error}" if record.error else ""
            raise GserveError(f"the service '{name}' (process {first.pid}) ended while it started{cause}")
    return record


class _Stop(Struct, frozen=True):
    """The request of `gserve stop` to an owner.

    `started`: see `ServiceRecord`.
    `seconds`: maximum time to finish the items in flight.
    """

    started: int
    seconds: float


def write_stop(record: ServiceRecord, seconds: float) -> None:
    """Write the drain time for the owner of a service, in seconds. The owner applies it when SIGTERM ends it.

    The drain time is the maximum time for the servers to finish their items in flight.
    """
    run_files.write(f"stop-{record.pid}", _Stop(record.started, seconds))


def take_stop() -> float | None:
    """Return and remove the drain time written for this process, in seconds; None: there is none."""
    found = None
    for place in run_files.places():
        with contextlib.suppress(OSError, msgspec.MsgspecError):
            content = (place / f"stop-{os.getpid()}").read_bytes()
            stop = msgspec.json.decode(content, type=_Stop)
            if stop.started == processes.process_start(os.getpid()):
                found = stop.seconds
    remove_stop(os.getpid())
    return found


def remove_stop(pid: int) -> None:
    """Remove the drain time that `write_stop` wrote for a process."""
    for place in run_files.places():
        with contextlib.suppress(OSError):
            (place / f"stop-{pid}").unlink(missing_ok=True)


def stale_files() -> list[Path]:
    """Return the files of services with a dead owner, and the tokens of servers whose address refuses connections."""
    found = []
    for path in sorted(path for place in run_files.places() for path in place.iterdir()):
        kind, _, of = path.name.partition("-")
        if kind == "service":
            record = _read_service(path)
            is_stale = isinstance(record, ServiceRecord) and record.is_dead
        else:
            is_stale = kind == "token" and path.is_file() and not tokens.may_listen(of)
        if is_stale:
            found.append(path)
    return found


def _service_name(name: str) -> str:
    return f"service-{name}"


def read_service(name: str) -> ServiceRecord | None:
    """Return the record of a service, which may be dead. None: no service has this name.

    Raises GserveError: the record cannot be read, temporarily or permanently.
    """
    found = _read_named(name)
    return next((record for record in found if record.is_alive), found[0] if found else None)


def _read_named(name: str) -> list[ServiceRecord]:
    """Return the records with this name, newest first.

    Raises GserveError: one cannot be read, and none belongs to a living service.
    """
    paths = [place / _service_name(name) for place in run_files.places()]
    found = [_read_service(path) for path in sorted(paths, key=run_files.changed, reverse=True)]
    records = [record for record in found if isinstance(record, ServiceRecord)]
    for record in found:
        if isinstance(record, Unreadable) and not any(other.is_alive for other in records):
            raise GserveError(str(record))
    return records


def _read_service(path: Path) -> ServiceRecord | Unreadable | None:
    """Return the record in a file; None if there is no file."""
    try:
        record = msgspec.json.decode(run_files.read(path), type=ServiceRecord)
    except FileNotFoundError:
        return None
    except IsADirectoryError:
        return Unreadable(path, "it is a folder")
    except OSError as error:
        return Unreadable(path, error.strerror or str(error))
    except (msgspec.MsgspecError, ValueError) as error:
        return Unreadable(path, str(error))
    if path.name != _service_name(record.name):
        return Unreadable(path, f"it is the record of '{record.name}'")
    return record
