"""The addresses of this machine."""

import contextlib
import ipaddress
import os
import random
import socket

import psutil

from ..errors import LaunchError

PORTS = range(20000, 32000)
"""Ports from which `free_port` chooses. Linux gives the ports from 32768 up to connections."""
PORT_TRIES = 100
"""Maximum number of ports that `free_port` tries."""


def is_loopback(host: str) -> bool:
    """Return whether an address can be reached only from this machine."""
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return host == "localhost"


def address_towards(host: str) -> str:
    """Return our address on the route to a host. Raises OSError or UnicodeError: there is no route to it."""
    family, kind, _, _, place = socket.getaddrinfo(host, 9, type=socket.SOCK_DGRAM)[0]
    with socket.socket(family, kind) as probe:
        probe.connect(place)  # sends nothing, but selects the route
        return str(probe.getsockname()[0])


def interface_of(address: str) -> str | None:
    """Return the name of the network interface with one of this machine's addresses; None if there is none."""
    found = psutil.net_if_addrs().items()
    own = (name for name, entries in found for it in entries if it.address.partition("%")[0] == address)
    return next(own, "lo" if is_loopback(address) else None)  # the interface lo has all of 127.0.0.0/8


def free_port(host: str) -> int:
    """Return a free port of an address of this machine. No connection from here takes it by chance.

    Raises LaunchError: none was found.
    """
    for port in random.sample(PORTS, PORT_TRIES):
        with contextlib.suppress(OSError), socket.create_server((host, port), family=_family(host)):
            return port
    raise LaunchError(f"no port of {host} from {PORTS.start} to {PORTS.stop - 1} seems to be free")


def _family(host: str) -> socket.AddressFamily:
    return socket.AF_INET6 if ":" in host else socket.AF_INET


def own_address(variable: str) -> str:
    """Return our address on the route to the host named in `$variable`.

    Raises LaunchError: the variable names no host, or there is no route to it.
    """
    peer = os.environ.get(variable, "").partition(" ")[0]
    try:
        if not peer:
            raise OSError("it is empty")
        return address_towards(peer)
    except (OSError, UnicodeError) as error:
        raise LaunchError(
            f"cannot find the way to the owner's machine, {variable}='{peer}': {error};"
            " set serve.host to the address to listen on"
        ) from error
