"""What processes of one user on one machine know of each other: how to use a server, and the launched services.

Files of mode 0600, written by the owner of a server or service and removed with it. They lie in two places: in
`$XDG_RUNTIME_DIR/gserve`, and in one that every session of the user knows, whatever its environment is.
"""

import contextlib
import fcntl
import ipaddress
import logging
import os
import socket
import stat
import tempfile
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import msgspec
from msgspec import Struct, structs

from ..errors import ConfigError, GserveError, LaunchError, did_you_mean
from ..interfaces import Access, Address
from . import folders, processes
from .folders import cache_environment as cache_environment
from .folders import keep_logs as keep_logs
from .folders import log_folder as log_folder
from .folders import make_scratch_folder as make_scratch_folder
from .folders import release_logs as release_logs
from .folders import remove_scratch as remove_scratch
from .folders import scratch_folder as scratch_folder
from .folders import short_path as short_path
from .folders import unused_scratch_folders as unused_scratch_folders
from .processes import GONE_SECONDS as GONE_SECONDS
from .processes import ID_VARIABLE as ID_VARIABLE
from .processes import OWNER_VARIABLE as OWNER_VARIABLE
from .processes import SERVER_VARIABLE as SERVER_VARIABLE
from .processes import end_processes_of as end_processes_of
from .processes import has_ended as has_ended
from .processes import is_orphan as is_orphan
from .processes import owner_mark as owner_mark
from .processes import process_start as process_start
from .processes import processes_of as processes_of
from .processes import stat_fields as stat_fields

PLACE_VARIABLE = "_GSERVE_PLACE"
"""For tests: the second place for records and tokens; empty for none. By default it is `PLACE`/gserve-UID."""
PLACE = Path("/tmp")  # noqa: S108 - whatever TMPDIR says: all sessions of a user must meet
LOCK_SECONDS = 10.0
"""Maximum wait for another process that reserves a name, in seconds."""
UPDATE_SECONDS = 1.0
"""The same of an owner that writes what has become of its service: it has other things to do, and tries it again."""
LOOK_SECONDS = 0.05
"""Interval between two looks at a lock or a record, in seconds."""
DEATHS = 256
"""Number of deaths that a record tells of."""
LARGEST = 16 << 20
"""Maximum size of a record, in bytes."""

logger = logging.getLogger("gserve.runtime")


class ServerRecord(Struct, frozen=True):
    """A ready server of a launched service."""

    name: str
    address: Address
    instance: str
    token: str
    capacity: int
    model: str
    gpu_ids: list[int] | None = None
    control: str | None = None

    def __repr__(self) -> str:
        """Show no secret."""
        return f"ServerRecord(name={self.name!r}, address={self.address!r}, instance={self.instance!r})"


class ServiceRecord(Struct, frozen=True):
    """A launched service: its owner's process id and that process's start time in clock ticks, and its servers.

    Another version of gserve may write more fields. status: "starting", "ready", "draining", or "failed" if all servers
    are given up. id: tells services of one process apart. machine: where the process id counts; None in records of
    older versions. stall_timeout: after how many seconds the owner ends a server that hangs; None: never. deaths: the
    instances of servers that have died while they worked, the last `DEATHS` of them. seed: see `LLMConfig.item_seed`.
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

    @property
    def is_alive(self) -> bool:
        """Say whether the owner is alive: the same process, not another one with its id."""
        return self.machine in (None, machine()) and process_start(self.pid) == self.started

    @property
    def is_dead(self) -> bool:
        """Say whether the owner is known to be dead; not so if it is in another container of this machine."""
        here, there = machine(), self.machine or machine()
        is_elsewhere = there != here and there.partition(" ")[0] == here.partition(" ")[0]
        return not is_elsewhere and not self.is_alive

    @property
    def is_ours(self) -> bool:
        """Say whether this process is the owner."""
        return self.pid == os.getpid() and self.is_alive

    def is_same(self, other: "ServiceRecord") -> bool:
        """Say whether two records are of one run of a service."""
        return (self.pid, self.started, self.id) == (other.pid, other.started, other.id)


def machine() -> str:
    """Return where process ids of ours count: the machine since its last start, and the namespace of this process."""
    try:
        return f"{processes.boot()} {processes.namespace()}"
    except OSError:
        return processes.boot()


def is_loopback(host: str) -> bool:
    """Say whether an address can be reached from this machine only."""
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return host == "localhost"


def own_address(variable: str) -> str:
    """Return the address of this machine by which that one reaches it which an environment variable names.

    Raises LaunchError: it names none, or there is no way to it.
    """
    peer = os.environ.get(variable, "").partition(" ")[0]
    try:
        if not peer:
            raise OSError("it is empty")
        family, kind, _, _, place = socket.getaddrinfo(peer, 9, type=socket.SOCK_DGRAM)[0]
        with socket.socket(family, kind) as probe:
            probe.connect(place)  # sends nothing, but chooses the way
            return str(probe.getsockname()[0])
    except (OSError, UnicodeError) as error:
        raise LaunchError(
            f"cannot find the way to the owner's machine, {variable}='{peer}': {error};"
            " set serve.host to the address to listen on"
        ) from error


# --------------------------------------------------------------------------------------------------------------- places


def folder() -> Path:
    """Return the user's own folder for these files, made if it is missing: the first of `places`.

    Raises GserveError: the folder is somebody else's, or open to others, or cannot be made.
    """
    return places()[0]


def places() -> list[Path]:
    """Return the folders in which these files are kept: all have the same content, unless somebody has emptied one.

    `$XDG_RUNTIME_DIR/gserve`, and `/tmp/gserve-UID`. If neither can be used: `gserve-UID` in the folder for temporary
    files. Raises GserveError: one is somebody else's or open to others, or none can be made.
    """
    found = []
    base = Path(os.environ.get("XDG_RUNTIME_DIR") or "/nowhere")
    if base.is_absolute() and _is_usable(base):
        with contextlib.suppress(OSError):
            found.append(folders.private(base / "gserve"))
    second = os.environ.get(PLACE_VARIABLE, str(PLACE / f"gserve-{os.getuid()}"))
    if second:
        try:
            found.append(folders.private(Path(second)))
        except (OSError, GserveError) as error:
            if not found and isinstance(error, GserveError):
                raise
            folders.note(f"other sessions do not find the services of this one: {error}")
    return found or [folders.temporary()]


def _is_usable(base: Path) -> bool:
    """Say whether a folder of ours may be made there: not where only another user may, though root could."""
    try:
        found = base.stat()
    except OSError:
        return False
    return stat.S_ISDIR(found.st_mode) and (found.st_uid == os.getuid() or bool(found.st_mode & stat.S_IWOTH))


def _write(name: str, value: object) -> None:
    """Write a file of mode 0600 in all places; it appears whole. Raises GserveError: in none it can be written."""
    failed: OSError | None = None
    written, text = 0, ""
    content = msgspec.json.encode(value)
    for place in places():
        try:
            _replace(place / name, content)
            written += 1
        except OSError as error:
            failed, text = error, f"cannot write {place / name}: {error.strerror}"
    if failed is not None:
        if not written:
            raise GserveError(text) from failed
        folders.note(text)


def _replace(path: Path, content: bytes) -> None:
    descriptor, scratch = tempfile.mkstemp(dir=path.parent, prefix=".")
    try:
        with os.fdopen(descriptor, "wb") as stream:
            stream.write(content)
        Path(scratch).rename(path)
    except BaseException:
        Path(scratch).unlink(missing_ok=True)
        raise


def _read(path: Path) -> bytes:
    """Return the content of a file; a folder, a link or a pipe in its place is an OSError."""
    descriptor = os.open(path, os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK)
    with os.fdopen(descriptor, "rb") as stream:
        if not stat.S_ISREG(os.fstat(descriptor).st_mode):
            raise OSError("it is not a file")
        return stream.read(LARGEST)


@contextlib.contextmanager
def _locked(places: Sequence[Path], seconds: float) -> Iterator[None]:
    """Change records alone, against all processes of this user. Raises TimeoutError."""
    deadline = time.monotonic() + seconds
    with contextlib.ExitStack() as stack:
        for place in sorted(places):  # one order for all: else two could wait for each other
            descriptor = os.open(place, os.O_RDONLY | os.O_DIRECTORY)
            stack.callback(os.close, descriptor)
            while True:
                try:
                    fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
                    stack.callback(fcntl.flock, descriptor, fcntl.LOCK_UN)  # a fork may have the file too
                    break
                except BlockingIOError as error:
                    if time.monotonic() >= deadline:
                        raise TimeoutError(f"another process has locked {place} for {seconds:g} s") from error
                    time.sleep(LOOK_SECONDS)
        yield


# --------------------------------------------------------------------------------------------------------------- tokens


def _token_name(host: str, port: int) -> str:
    return f"token-{host.replace('/', '_')}-{port}"


def write_token(address: Address, token: str, control: str | None = None) -> None:
    """Let clients of this user on this machine find the token, and the control secret, of the server at `address`.

    Raises GserveError.
    """
    for host in address.hosts:
        _write(_token_name(host, address.port), Access(token=token, control=control))


def keep_token(address: Address, token: str, control: str | None = None) -> None:
    """Write the token of a living server again if somebody has removed it. Raises GserveError."""
    names = [_token_name(host, address.port) for host in address.hosts]
    if not all(os.path.lexists(place / name) for place in places() for name in names):
        write_token(address, token, control)


def remove_token(address: Address, token: str) -> None:
    """Remove what `write_token` wrote, unless another server has the address now."""
    for place in places():
        for host in address.hosts:
            path = place / _token_name(host, address.port)
            if (access := _read_access(path)) is not None and access.token == token:
                path.unlink(missing_ok=True)


def find_access(host: str, port: int) -> Access:
    """Return the token and the control secret of the server at an address; each None where its owner left none here."""
    aliases = [host, "127.0.0.1"] if host == "localhost" else [host]
    for alias in aliases:
        paths = [place / _token_name(alias, port) for place in places()]
        for path in sorted(paths, key=_changed, reverse=True):  # what is older may be left of another server
            access = _read_access(path)
            if access is not None:
                return access
    return Access()


def _read_access(path: Path) -> Access | None:
    try:
        return msgspec.json.decode(_read(path), type=Access)
    except (OSError, msgspec.MsgspecError, ValueError):
        return None


def _changed(path: Path) -> int:
    try:
        return path.lstat().st_mtime_ns
    except OSError:
        return 0


def find_token(host: str, port: int) -> str | None:
    """Return the token of the server at an address, where its owner has left it here."""
    return find_access(host, port).token


# ------------------------------------------------------------------------------------------------------------- services


@dataclass(frozen=True)
class Unreadable:
    """A file that stands in the place of a service's record, and why it cannot be read."""

    path: Path
    why: str

    def __str__(self) -> str:
        return f"cannot read the record of a service {self.path}: {self.why}; if no service needs it, remove it"


def reserve_service(record: ServiceRecord) -> None:
    """Make a service known by its name before it starts: of several that try at once, one gets the name.

    Raises ConfigError: the name is taken, or cannot be one. Raises GserveError: its record cannot be read or written.
    """
    _check_text(record.name)
    _update(record, may_be_same=False)


def write_service(record: ServiceRecord) -> None:
    """Make known what has become of a service; its name needs not be reserved. Raises as `reserve_service`."""
    _check_text(record.name)
    _update(record, may_be_same=True)


def keep_service(record: ServiceRecord) -> bool:
    """Write a service's record and its servers' tokens again if somebody has removed them.

    Cheap enough for every second. Return False if another service has the name now. Raises GserveError.
    """
    for server in record.servers:
        keep_token(server.address, server.token, server.control)
    try:
        found = _named(record.name)
    except GserveError:
        found = []
    if any(not other.is_same(record) and other.is_alive for other in found):
        return False
    if len(found) < len(places()):
        try:
            _update(record, may_be_same=True)
        except ConfigError:
            return False
    return True


def check_name(name: str) -> None:
    """Raise ConfigError where a service cannot have this name, or a living one has it."""
    _check_text(name)
    other = read_service(name)
    if other is not None and other.is_alive:
        raise _taken(other)


def _check_text(name: str) -> None:
    if not name.replace("-", "").replace("_", "").replace(".", "").isalnum() or not name.isascii() or len(name) > 64:
        raise ConfigError(f"expected a name of at most 64 letters, digits and '-_.', got '{name}'")


def _taken(other: ServiceRecord) -> ConfigError:
    doing = {"starting": "is starting", "draining": "is ending"}.get(other.status, "runs already")
    return ConfigError(
        f"a service named '{other.name}' {doing} (process {other.pid}): choose another --name,"
        f" or end it with: gserve stop {other.name}"
    )


def _update(record: ServiceRecord, *, may_be_same: bool) -> None:
    """Write a record unless a living service has the name."""
    if record.machine is None:
        record = structs.replace(record, machine=machine())
    try:
        with _locked(places(), UPDATE_SECONDS if may_be_same else LOCK_SECONDS):
            for other in _named(record.name):
                if other.is_alive and not (may_be_same and other.is_same(record)):
                    raise _taken(other)
            _write(_service_name(record.name), record)
    except OSError as error:
        raise GserveError(f"cannot make the service '{record.name}' known: {error}") from error


def remove_service(name: str, run: str | None = None) -> None:
    """Remove the record of a service of this process: if `run` is given, only if it has this id. Idempotent."""
    for place in places():
        path = place / _service_name(name)
        record = _read_service(path)
        if isinstance(record, ServiceRecord) and record.is_ours and run in (None, record.id):
            path.unlink(missing_ok=True)


def services() -> list[ServiceRecord]:
    """Return the launched services that are alive, by name; forget those that are dead."""
    alive: dict[str, ServiceRecord] = {}
    for path, record in _service_files():
        if not isinstance(record, ServiceRecord):
            continue
        if record.is_alive:
            alive.setdefault(record.name, record)
        elif record.is_dead:
            _forget(path, record)
    return [alive[name] for name in sorted(alive)]


def unreadable() -> list[Unreadable]:
    """Return the files in place of records that cannot be read. They are left alone: a service may need them."""
    return [record for _, record in _service_files() if isinstance(record, Unreadable)]


def _service_files() -> list[tuple[Path, ServiceRecord | Unreadable]]:
    """Return all records, the newest first."""
    paths = [path for place in places() for path in place.glob("service-*")]
    read = [(path, _read_service(path)) for path in sorted(paths, key=_changed, reverse=True)]
    return [(path, record) for path, record in read if record is not None]


def _forget(path: Path, record: ServiceRecord) -> None:
    """Remove what a dead service has left, unless its name is taken again just now."""
    with contextlib.suppress(OSError), _locked([path.parent], 0):
        if _read_service(path) == record:
            path.unlink(missing_ok=True)
            for server in record.servers:
                remove_token(server.address, server.token)


def find_service(name: str) -> ServiceRecord:
    """Return a launched service, which may be starting still. Raises ConfigError: none has this name.

    Raises GserveError: its record cannot be read.
    """
    found = {record.name: record for record in services()}
    if name not in found:
        read_service(name)  # an unreadable one is an error of its own
        hint = did_you_mean(name, list(found)) or "; none is running: start one with: gserve launch CONFIG"
        raise ConfigError(f"no service named '{name}' is running here{hint}")
    return found[name]


def wait_service(name: str, seconds: float) -> ServiceRecord:
    """Return a launched service once it is no longer starting. Raises as `find_service`.

    Raises GserveError: it has ended meanwhile, or is starting even after `seconds`.
    """
    record = first = find_service(name)
    deadline = time.monotonic() + seconds
    while record.status == "starting":
        if time.monotonic() >= deadline:
            raise GserveError(
                f"the service '{name}' (process {record.pid}) is starting, and was not ready within {seconds:g} s:"
                " try again later"
            )
        time.sleep(LOOK_SECONDS)
        with contextlib.suppress(GserveError):  # unreadable for now: its owner writes it again
            record = read_service(name) or record
        if not first.is_alive or not record.is_same(first):
            raise GserveError(f"the service '{name}' (process {first.pid}) ended while it started")
    return record


class _Stop(Struct, frozen=True):
    """What `gserve stop` asks of an owner: see `ServiceRecord.started`."""

    started: int
    seconds: float


def write_stop(record: ServiceRecord, seconds: float) -> None:
    """Tell the owner of a service how long its servers may finish what they have, once a SIGTERM ends it."""
    _write(f"stop-{record.pid}", _Stop(record.started, seconds))


def take_stop() -> float | None:
    """Return what `write_stop` wrote for this process, and remove it; None: nothing."""
    found = None
    for place in places():
        with contextlib.suppress(OSError, msgspec.MsgspecError):
            content = (place / f"stop-{os.getpid()}").read_bytes()
            stop = msgspec.json.decode(content, type=_Stop)
            if stop.started == process_start(os.getpid()):
                found = stop.seconds
    remove_stop(os.getpid())
    return found


def remove_stop(pid: int) -> None:
    """Remove what `write_stop` wrote for a process."""
    for place in places():
        with contextlib.suppress(OSError):
            (place / f"stop-{pid}").unlink(missing_ok=True)


def stale_files() -> list[Path]:
    """Return the files of services whose owner is dead, and of servers at whose address nobody listens."""
    found = []
    for path in sorted(path for place in places() for path in place.iterdir()):
        kind, _, of = path.name.partition("-")
        if kind == "service":
            record = _read_service(path)
            is_stale = isinstance(record, ServiceRecord) and record.is_dead
        else:
            is_stale = kind == "token" and path.is_file() and not _may_listen(of)
        if is_stale:
            found.append(path)
    return found


def _may_listen(address: str) -> bool:
    """Say whether somebody listens at "host-port"; it counts as yes where we cannot know."""
    host, _, port = address.rpartition("-")
    try:
        socket.create_connection((host, int(port)), timeout=1.0).close()
    except ConnectionRefusedError:
        return False
    except (OSError, ValueError, OverflowError):
        return True
    return True


def _service_name(name: str) -> str:
    return f"service-{name}"


def read_service(name: str) -> ServiceRecord | None:
    """Return what a service's owner has written; None where there is no such service. It may be dead.

    Raises GserveError: it cannot be read, for now or for ever.
    """
    found = _named(name)
    return next((record for record in found if record.is_alive), found[0] if found else None)


def _named(name: str) -> list[ServiceRecord]:
    """Return the records of one name, the newest first. Raises GserveError: one cannot be read, and none is alive."""
    paths = [place / _service_name(name) for place in places()]
    found = [_read_service(path) for path in sorted(paths, key=_changed, reverse=True)]
    records = [record for record in found if isinstance(record, ServiceRecord)]
    for record in found:
        if isinstance(record, Unreadable) and not any(other.is_alive for other in records):
            raise GserveError(str(record))
    return records


def _read_service(path: Path) -> ServiceRecord | Unreadable | None:
    """Return what a file holds; None if there is none."""
    try:
        record = msgspec.json.decode(_read(path), type=ServiceRecord)
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
