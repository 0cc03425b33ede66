"""The addresses of this machine: the way to another one, the interface of it, and free ports."""

import socket
from pathlib import Path

import pytest

from gserve_core.errors import LaunchError
from gserve_core.host import addresses


def test_the_way_to_this_machine_is_by_loopback() -> None:
    assert addresses.address_towards("127.0.0.1") == "127.0.0.1"
    assert [addresses.interface_of(it) for it in ("127.0.0.1", "127.0.1.1", "::1")] == ["lo"] * 3
    assert addresses.interface_of("192.0.2.7") is None, "an address for documentation, which no machine has"


def test_a_free_port_is_none_that_connections_get_by_chance() -> None:
    port = addresses.free_port("127.0.0.1")
    with socket.create_server(("127.0.0.1", port)):
        assert addresses.free_port("127.0.0.1") != port
    first = int(Path("/proc/sys/net/ipv4/ip_local_port_range").read_text().split()[0])
    assert port < first
    with pytest.raises(LaunchError, match=r"no port of 192\.0\.2\.7 from 20000 to 31999 seems to be free"):
        addresses.free_port("192.0.2.7")


def test_a_variable_that_names_no_host_is_an_error(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("THE_OWNER", "127.0.0.1 and more")
    assert addresses.own_address("THE_OWNER") == "127.0.0.1"
    monkeypatch.setenv("THE_OWNER", "")
    with pytest.raises(LaunchError, match=r"THE_OWNER='': it is empty; set serve\.host"):
        addresses.own_address("THE_OWNER")
