"""The tokens of servers: clients of the same user on the same machine find them automatically."""

import os
import socket
from pathlib import Path

import msgspec

from ..interfaces import Access, Address
from . import run_files


def _token_name(host: str, port: int) -> str:
    return f"token-{host.replace('/', '_')}-{port}"


def write_token(address: Address, token: str, control: str | None = None) -> None:
    """Write the token and the control secret of the server at `address`, for clients of this user on this machine.

    Raises GserveError: they cannot be written.
    """
    for host in address.hosts:
        run_files.write(_token_name(host, address.port), Access(token=token, control=control))


def keep_token(address: Address, token: str, control: str | None = None) -> None:
    """Write the token of a live server again if it was removed. Raises GserveError: it cannot be written."""
    names = [_token_name(host, address.port) for host in address.hosts]
    if not all(os.path.lexists(place / name) for place in run_files.places() for name in names):
        write_token(address, token, control)


def remove_token(address: Address, token: str) -> None:
    """Remove the files of `write_token`, unless another server has the address now."""
    for place in run_files.places():
        for host in address.hosts:
            path = place / _token_name(host, address.port)
            if (access := _read_access(path)) is not None and access.token == token:
                path.unlink(missing_ok=True)


def find_access(host: str, port: int) -> Access:
    """Return the token and the control secret of the server at an address.

    Each is None if its owner wrote none here.
    """
    aliases = [host, "127.0.0.1"] if host == "localhost" else [host]
    for alias in aliases:
        paths = [place / _token_name(alias, port) for place in run_files.places()]
        for path in sorted(paths, key=run_files.changed, reverse=True):  # an older file may belong to another server
            access = _read_access(path)
            if access is not None:
                return access
    return Access()


def _read_access(path: Path) -> Access | None:
    try:
        return msgspec.json.decode(run_files.read(path), type=Access)
    except (OSError, msgspec.MsgspecError, ValueError):
        return None


def may_listen(address: str) -> bool:
    """Return whether a process listens at "host-port"; True if that is unknown."""
    host, _, port = address.rpartition("-")
    try:
        socket.create_connection((host, int(port)), timeout=1.0).close()
    except ConnectionRefusedError:
        return False
    except (OSError, ValueError, OverflowError):
        return True
    return True
