"""The places of servers on hosts, and which of them this process uses."""

import ipaddress
import re
import threading
import time
from collections.abc import Collection, Sequence
from dataclasses import dataclass, field
from typing import Annotated

from msgspec import Meta

from gserve_core.config import check
from gserve_core.errors import ConfigError

AVOID_SECONDS = 60.0
"""Time for which a place is avoided after a failure there, if there is another one, in seconds."""

LOCAL = re.compile(r"127\..*|localhost|0\.0\.0\.0|::1?")
"""Addresses that mean another machine everywhere, or all of them."""

Name = Annotated[
    str,
    Meta(
        pattern=r"\A[A-Za-z0-9_.:][A-Za-z0-9_.:%-]{0,252}\Z",
        description="the name of a host without user and port, which does not begin with '-'",
    ),
]
User = Annotated[str, Meta(pattern=r"\A[A-Za-z0-9_.][A-Za-z0-9_.@-]{0,63}\Z", description="a user's name")]
Program = Annotated[
    str,
    Meta(
        pattern=r"\A[^\x00-\x1f\x7f~-][^\x00-\x1f\x7f]{0,1023}\Z",
        description="an absolute path, or a name in the PATH of the host",
    ),
]
Port = Annotated[int, Meta(ge=1, le=65535, description="a port from 1 to 65535")]
Count = Annotated[int, Meta(ge=1, le=1024, description="a number from 1 to 1024")]
Gpu = Annotated[int, Meta(ge=0, description="the number of a GPU from 0 up")]


@dataclass(frozen=True, kw_only=True)
class SshHost:
    """A host for servers.

    `host`: its name, as for `ssh`; a `Host` of ssh's config too.
    `gpu_ids`: its GPUs. It takes one server for each, or for each group of them.
    `servers`: number of servers that it takes; None: one for each group of `gpu_ids`, else 1.
    `user`, `python`: as in `SshLauncher`, for this host.
    `port`: the port of its sshd; None: as ssh's config says.
    `address`: the address on which its servers listen, and at which they are reached directly; None: through a tunnel.
    `node_address`: its address for the other hosts of a server on several; None: `address`, or where ssh reaches it.
    """

    host: Name
    gpu_ids: list[Gpu] | None = None
    servers: Count | None = None
    user: User | None = None
    port: Port | None = None
    python: Program | None = None
    address: Name | None = None
    node_address: Name | None = None

    def __post_init__(self) -> None:
        check(self)
        for option, peer in (("address", "this machine reaches"), ("node_address", "other hosts reach")):
            if (given := getattr(self, option)) is not None and LOCAL.fullmatch(given):
                raise ConfigError(f"expected an address at which {peer} the host, got {given}", at=f"$.{option}")
        if ":" in self.host and not _is_ipv6(self.host):
            raise ConfigError(
                f"expected the name of a host or an IPv6 address, got '{self.host}': write a port as 'port' of the"
                " host",
                at="$.host",
            )
        if self.gpu_ids is not None and self.servers is not None:
            raise ConfigError("gpu_ids and servers are both set: remove servers, since the ids set the number")
        if self.gpu_ids is not None and (not self.gpu_ids or len({*self.gpu_ids}) < len(self.gpu_ids)):
            raise ConfigError(f"expected different GPU ids, at least one, got {self.gpu_ids}", at="$.gpu_ids")

    @property
    def key(self) -> tuple[object, ...]:
        """What identifies the machine among all launchers of this process."""
        return self.host, self.port

    @property
    def room(self) -> str:
        """How much it has for servers, in words."""
        number, what = (self.servers or 1, "place") if self.gpu_ids is None else (len(self.gpu_ids), "GPU")
        return f"{number} {what}{'s' * (number != 1)}"

    def seats(self, gpus: int) -> "list[Seat]":
        """Return its places for ranks with this number of GPUs. Raises ConfigError: its GPUs cannot be divided."""
        if self.gpu_ids is None:
            return [Seat(self, number) for number in range(self.servers or 1)]
        if len(self.gpu_ids) % gpus:
            raise ConfigError(
                f"the {len(self.gpu_ids)} GPUs of {self.host} cannot be divided into servers of {gpus}"
                " (tensor_parallel_size times pipeline_parallel_size, divided by nodes_per_server): add or remove ids",
                at="$.gpu_ids",
            )
        ids = iter(self.gpu_ids)
        groups = zip(*[ids] * gpus, strict=True)
        return [Seat(self, number, group) for number, group in enumerate(groups)]


@dataclass(frozen=True)
class Seat:
    """A place for one rank of a server on a host: some of its GPUs, or none. Most servers have one rank."""

    host: SshHost = field(hash=False)  # it has lists
    number: int
    gpu_ids: tuple[int, ...] | None = None

    def __str__(self) -> str:
        if self.gpu_ids is None:
            return self.host.host
        return f"{self.host.host} (GPU {', '.join(map(str, self.gpu_ids))})"

    @property
    def units(self) -> list[tuple[object, ...]]:
        """What only one server may use at a time: the GPUs, or the number of the place."""
        if self.gpu_ids is None:
            return [(self.host.key, "place", self.number)]
        return [(self.host.key, "GPU", gpu) for gpu in self.gpu_ids]


@dataclass(frozen=True)
class Place:
    """A place for one server: that of each of its ranks, in their order."""

    seats: tuple[Seat, ...]

    def __str__(self) -> str:
        return ", ".join(map(str, self.seats))

    @property
    def hosts(self) -> str:
        """The names of its hosts."""
        return ", ".join(seat.host.host for seat in self.seats)

    @property
    def units(self) -> list[tuple[object, ...]]:
        """What only one server may use at a time."""
        return [unit for seat in self.seats for unit in seat.units]


def places(hosts: Sequence[SshHost], gpus: int, nodes: int) -> list[Place]:
    """Return the places of servers with this number of GPUs, on this number of hosts each, in the order of `hosts`.

    Raises ConfigError: the hosts or their GPUs cannot be divided.
    """
    at = "$.launcher.hosts"
    if len(hosts) % nodes:
        raise ConfigError(
            f"{len(hosts)} hosts cannot be divided into servers of {nodes} hosts each (nodes_per_server): add or remove"
            " hosts",
            at=at,
        )
    found = []
    for first in range(0, len(hosts), nodes):
        group, seats = hosts[first : first + nodes], []
        if len({host.room for host in group}) > 1:
            each = ", ".join(f"{host.host}: {host.room}" for host in group)
            raise ConfigError(
                f"the hosts of a server need equal numbers of GPUs, got {each}"
                f" (nodes_per_server takes the hosts in order, {nodes} for each server)",
                at=at,
            )
        for number, host in enumerate(group, first):
            try:
                seats.append(host.seats(max(1, gpus // nodes)))
            except ConfigError as error:
                error.at = error.at.replace("$", f"{at}[{number}]", 1)
                raise
        found += [Place(ranks) for ranks in zip(*seats, strict=True)]
    return found


def _is_ipv6(host: str) -> bool:
    try:
        ipaddress.IPv6Address(host)
    except ValueError:
        return False
    return True


class Places:
    """The places that the servers of this process use. Other processes are kept away by the locks of the GPUs.

    It also knows where a server may still run, since the connection to its host was lost before it ended.
    """

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._used: set[tuple[object, ...]] = set()
        self._failed: dict[tuple[object, ...], float] = {}
        self._left: dict[tuple[object, ...], set[str]] = {}

    def take(self, places: Sequence[Place], avoided: Collection[Place] = (), last: Place | None = None) -> Place | None:
        """Take a free place, which must be freed later; None: all are in use, or avoided.

        Places that failed lately come last, and `last` comes first. Hosts are filled evenly.
        """
        with self._lock:
            free = [it for it in places if it not in avoided and self._used.isdisjoint(it.units)]
            if not free:
                return None
            load = {it: sum(unit[0] == it.seats[0].host.key for unit in self._used) for it in free}
            chosen = min(free, key=lambda it: (self._has_failed(it), it != last, load[it], it.seats[0].number))
            self._used.update(chosen.units)
            return chosen

    def _has_failed(self, place: Place) -> bool:
        now = time.monotonic()
        return any(now - self._failed.get(unit, -AVOID_SECONDS) < AVOID_SECONDS for unit in place.units)

    def free(self, place: Place, *, failed: bool, left: str = "") -> None:
        """Free a place.

        `failed`: whether to avoid it for a while.
        `left`: the instance of a server that may still run there.
        """
        with self._lock:
            for unit in place.units:
                self._used.discard(unit)
                if failed:
                    self._failed[unit] = time.monotonic()
                else:
                    self._failed.pop(unit, None)
                if left:
                    self._left.setdefault(unit, set()).add(left)

    def left(self, place: Place) -> list[str]:
        """Return the instances of servers that may still run there."""
        with self._lock:
            return sorted({instance for unit in place.units for instance in self._left.get(unit, ())})

    def ended(self, place: Place, instances: Collection[str]) -> None:
        """Take note that these servers have ended."""
        with self._lock:
            for unit in place.units:
                if unit in self._left:
                    self._left[unit] -= {*instances}


PLACES = Places()
