"""The addresses of this machine."""

import ipaddress
import os
import socket

from ..errors import LaunchError


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
