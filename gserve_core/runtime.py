"""What processes of one user on one machine know of each other: how to use a server, and the launched services.

Files of mode 0600 in the user's runtime directory, written by the owner of a server or service and removed with it.
"""

import contextlib
import fcntl
import ipaddress
import os
import signal
import socket
import stat
import tempfile
import time
from collections.abc import Collection
from pathlib import Path
from typing import Any

import msgspec
from msgspec import Struct

from .errors import ConfigError, GserveError, LaunchError, did_you_mean
from .interfaces import Access, Address

ID_VARIABLE = "GSERVE_ID"
"""The instance of a server, in the environment of all its processes: what they are found by, even renamed."""
OWNER_VARIABLE = "GSERVE_OWNER"
"""Who has started it, beside that: see `owner_mark`."""
SERVER_VARIABLE = "GSERVE_SERVER"
"""The server itself, for the processes below it: a process's id and its start in clock ticks, as "4711:98765"."""
GONE_SECONDS = 10.0
"""How long killed processes may take to be gone: they free a GPU's memory before."""


class ServerRecord(Struct, frozen=True, forbid_unknown_fields=True):
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


class ServiceRecord(Struct, frozen=True, forbid_unknown_fields=True):
    """A launched service: its owner's process id and that process's start time in clock ticks, and its servers.

    status: "starting", "ready", "draining", or "failed" if all servers are given up.
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

    @property
    def is_alive(self) -> bool:
        """Say whether the owner is alive: the same process, not another one with its id."""
        return process_start(self.pid) == self.started


def process_start(pid: int) -> int | None:
    """Return when a process started, in clock ticks since boot; None where there is none, or only a zombie."""
    try:
        fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    except OSError:
        return None
    return None if fields[0] in "ZX" else int(fields[19])


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


def owner_mark() -> str:
    """Return what the processes of a server have as OWNER_VARIABLE when this process owns it."""
    return f"{os.getpid()}:{process_start(os.getpid())}:{_boot()}"


def is_orphan(mark: str) -> bool:
    """Say whether the owner that a process has as OWNER_VARIABLE is dead; one on another machine counts as alive."""
    pid, started, *boot = mark.split(":")
    return boot in ([], [_boot()]) and process_start(int(pid)) != int(started)


def _boot() -> str:
    """Return what tells this machine, since it was started, from all others."""
    return Path("/proc/sys/kernel/random/boot_id").read_text().strip()


def processes_of(instance: str) -> list[int]:
    """Return the live processes of this machine that carry the id of a server's instance in their environment."""
    mark = f"{ID_VARIABLE}={instance}".encode()
    found = []
    for entry in Path("/proc").iterdir():
        if entry.name.isdigit():
            with contextlib.suppress(OSError):
                if mark in (entry / "environ").read_bytes().split(b"\0") and process_start(int(entry.name)):
                    found.append(int(entry.name))
    return found


def end_processes_of(instance: str) -> list[int]:
    """Kill what is left of a server on this machine; return what is still there after `GONE_SECONDS`."""
    deadline = time.monotonic() + GONE_SECONDS
    while (left := processes_of(instance)) and time.monotonic() < deadline:
        for pid in left:
            with contextlib.suppress(ProcessLookupError, PermissionError):
                os.kill(pid, signal.SIGKILL)
        time.sleep(0.02)
    return left


def folder() -> Path:
    """Return the user's own folder for these files, made where it is not there.

    `$XDG_RUNTIME_DIR/gserve`, else `gserve-UID` in the folder for temporary files. Raises GserveError: the folder is
    somebody else's, or open to others.
    """
    base = os.environ.get("XDG_RUNTIME_DIR")
    path = (
        Path(base) / "gserve" if base and Path(base).is_dir() else Path(tempfile.gettempdir()) / f"gserve-{os.getuid()}"
    )
    with contextlib.suppress(FileExistsError):
        path.mkdir(mode=0o700)
    found = path.lstat()
    if not stat.S_ISDIR(found.st_mode) or found.st_uid != os.getuid() or found.st_mode & 0o077:
        raise GserveError(f"{path} must be a folder of yours alone (mode 0700): remove it, or set XDG_RUNTIME_DIR")
    return path


def _write(path: Path, value: object) -> None:
    """Write a file of mode 0600 that appears whole."""
    descriptor, scratch = tempfile.mkstemp(dir=path.parent, prefix=".")
    with os.fdopen(descriptor, "wb") as stream:
        stream.write(msgspec.json.encode(value))
    Path(scratch).rename(path)


def _token_file(host: str, port: int) -> Path:
    return folder() / f"token-{host.replace('/', '_')}-{port}"


def write_token(address: Address, token: str, control: str | None = None) -> None:
    """Let clients of this user on this machine find the token, and the control secret, of the server at `address`."""
    for host in address.hosts:
        _write(_token_file(host, address.port), Access(token=token, control=control))


def remove_token(address: Address, token: str) -> None:
    """Remove what `write_token` wrote, unless another server has the address now."""
    for host in address.hosts:
        if find_token(host, address.port) == token:
            _token_file(host, address.port).unlink(missing_ok=True)


def find_access(host: str, port: int) -> Access:
    """Return the token and the control secret of the server at an address; each None where its owner left none here."""
    aliases = [host, "127.0.0.1"] if host == "localhost" else [host]
    for alias in aliases:
        with contextlib.suppress(OSError, msgspec.MsgspecError):
            return msgspec.json.decode(_token_file(alias, port).read_bytes(), type=Access)
    return Access()


def find_token(host: str, port: int) -> str | None:
    """Return the token of the server at an address, where its owner has left it here."""
    return find_access(host, port).token


def write_service(record: ServiceRecord) -> None:
    """Make a service, or what has become of it, known by its name. Raises ConfigError: another living one has that."""
    other = read_service(record.name)
    if other is None or other.pid != record.pid:
        check_name(record.name)
    _write(_service_file(record.name), record)


def check_name(name: str) -> None:
    """Raise ConfigError where a service cannot have this name, or a living one has it."""
    if not name.replace("-", "").replace("_", "").replace(".", "").isalnum() or not name.isascii() or len(name) > 64:
        raise ConfigError(f"expected a name of at most 64 letters, digits and '-_.', got '{name}'")
    other = read_service(name)
    if other is not None and other.is_alive:
        raise ConfigError(
            f"a service named '{name}' runs already (process {other.pid}): choose another --name,"
            f" or end it with: gserve stop {name}"
        )


def remove_service(name: str) -> None:
    """Remove what `write_service` wrote."""
    _service_file(name).unlink(missing_ok=True)


def services() -> list[ServiceRecord]:
    """Return the launched services that are alive, by name; forget those that are not."""
    found = []
    for path in sorted(folder().glob("service-*")):
        record = _read_service(path)
        if record is not None and record.is_alive:
            found.append(record)
        else:
            path.unlink(missing_ok=True)
            for server in record.servers if record else ():
                remove_token(server.address, server.token)
    return found


def find_service(name: str) -> ServiceRecord:
    """Return a launched service. Raises ConfigError: none has this name."""
    found = {record.name: record for record in services()}
    if name not in found:
        hint = did_you_mean(name, list(found)) or "; none is running: start one with: gserve launch CONFIG"
        raise ConfigError(f"no service named '{name}' is running here{hint}")
    return found[name]


def stale_files() -> list[Path]:
    """Return the files of services whose owner is dead, and of servers at whose address nobody listens."""
    found = []
    for path in sorted(folder().iterdir()):
        kind, _, of = path.name.partition("-")
        if kind == "service":
            record = _read_service(path)
            is_stale = record is None or not record.is_alive
        else:
            is_stale = kind == "token" and not _may_listen(of)
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


def _service_file(name: str) -> Path:
    return folder() / f"service-{name}"


def read_service(name: str) -> ServiceRecord | None:
    """Return what a service's owner has written; None where there is no such service. It may be dead."""
    return _read_service(_service_file(name))


def _read_service(path: Path) -> ServiceRecord | None:
    try:
        return msgspec.json.decode(path.read_bytes(), type=ServiceRecord)
    except (OSError, msgspec.MsgspecError):
        return None


def scratch_folder(instance: str) -> Path:
    """Return where a server keeps its temporary files: it makes the folder, and its owner sees to it that it goes."""
    return Path(tempfile.gettempdir()) / f"gserve-{instance[:12]}"


def make_scratch_folder(instance: str) -> Path:
    """Make that folder, which counts as used while this process lives. Raises OSError."""
    path = scratch_folder(instance)
    path.mkdir(mode=0o700, exist_ok=True)
    fcntl.flock(os.open(path, os.O_RDONLY), fcntl.LOCK_SH)  # stays open until the process ends
    return path


def unused_scratch_folders(instances: Collection[str]) -> list[Path]:
    """Return the scratch folders of this user that no living server uses; `instances` are known to live."""
    used = {scratch_folder(instance) for instance in instances}
    found = []
    for path in sorted(Path(tempfile.gettempdir()).glob("gserve-" + "[0-9a-f]" * 12)):
        with contextlib.suppress(OSError):
            if path not in used and path.lstat().st_uid == os.getuid() and _is_free(path):
                found.append(path)
    return found


def _is_free(folder: Path) -> bool:
    descriptor = os.open(folder, os.O_RDONLY | os.O_NOFOLLOW | os.O_DIRECTORY)
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    finally:
        os.close(descriptor)
    return True


def log_folder(run: str) -> Path:
    """Make and return the folder for the logs of one run; the oldest runs beyond 50 are removed.

    It lies below `$XDG_STATE_HOME/gserve/logs`, by default `~/.local/state/gserve/logs`.
    """
    base = Path(os.environ.get("XDG_STATE_HOME") or Path.home() / ".local" / "state") / "gserve" / "logs"
    base.mkdir(parents=True, exist_ok=True)
    path = Path(tempfile.mkdtemp(dir=base, prefix=f"{time.strftime('%Y%m%d-%H%M%S')}-{run}-"))
    for old in sorted(base.iterdir())[:-50]:
        for file in old.glob("*.log"):
            file.unlink(missing_ok=True)
        with contextlib.suppress(OSError):
            old.rmdir()
    return path
