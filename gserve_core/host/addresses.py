"""The addresses of this machine."""

import ipaddress
import os
import socket

from ..errors import LaunchError


def is_loopback(host: str) -> bool:
    """Return whether an address can be reached only from this machine."""
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return host == "localhost"


def own_address(variable: str) -> str:
    """Return our address on the route to the host named in `$variable`.

    Raises LaunchError: the variable names no host, or there is no route to it.
    """
    peer = os.environ.get(variable, "").partition(" ")[0]
    try:
        if not peer:
            raise OSError("it is empty")
        family, kind, _, _, place = socket.getaddrinfo(peer, 9, type=socket.SOCK_DGRAM)[0]
        with socket.socket(family, kind) as probe:
            probe.connect(place)  # sends nothing, but selects the route
            return str(probe.getsockname()[0])
    except (OSError, UnicodeError) as error:
        raise LaunchError(
            f"cannot find the way to the owner's machine, {variable}='{peer}': {error};"
            " set serve.host to the address to listen on"
        ) from error
