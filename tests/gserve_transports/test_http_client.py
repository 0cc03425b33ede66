"""The client's half of HTTP: which host it takes, whom it refuses, proxies, dead lines, and many threads at once."""

import asyncio
import contextlib
import os
import socket
import struct
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

import anyio
import psutil
import pytest
import uvloop

from gserve import LLMConfig, RemoteError, ServeConfig, StallTimeout, TransportError, VLLMClient, VLLMService
from gserve_core.engines.echo import EchoEngine
from gserve_core.interfaces import Access, Address, Connection
from gserve_core.messages import Event, Group, Health, RunRequest
from gserve_transports import HttpTransport
from tests.gserve_transports.noted import Noted, left_open, until

ACCESS = Access(token="a-token-of-this-server", control="the-control-secret", instance="noted", timeout=60.0)
REQUEST = RunRequest([Group(["a"])])


def talk(hosts: list[str], port: int, what: Any, access: Access = ACCESS) -> Any:
    """Return what `what` gives with a connection to the server that listens at one of `hosts`."""

    async def talk() -> Any:
        connection = HttpTransport().connect(Address(hosts, port), access)
        try:
            return await what(connection)
        finally:
            await connection.close()

    return asyncio.run(talk())


async def events(connection: Connection) -> list[Event]:
    return [event for batch in [batch async for batch in connection.run(REQUEST)] for event in batch]


# -------------------------------------------------------------------------------------------------------------- hosts

NOWHERE = ["no.such.host.invalid", "127.0.0.99"]


@pytest.mark.parametrize("hosts", [[*NOWHERE, "127.0.0.1"], ["127.0.0.1", *NOWHERE], ["::1", "localhost"]])
def test_the_first_host_that_answers_as_the_server_is_taken(noted: Noted, hosts: list[str]) -> None:
    assert talk(hosts, noted.port, lambda connection: connection.health()) == Health("ok")
    (done,) = talk(hosts, noted.port, events)
    assert done.outputs[0].text == "a"
    talk(hosts, noted.port, lambda connection: connection.shut_down())
    assert noted.effects == ["run", "shut_down"]


def test_a_host_once_found_is_remembered(noted: Noted) -> None:
    async def often(connection: Connection) -> None:
        await asyncio.gather(*(events(connection) for _ in range(20)))
        with ThreadingHTTPServer(("127.0.0.99", noted.port), BaseHTTPRequestHandler):  # never answers
            await asyncio.gather(*(events(connection) for _ in range(20)))

    talk(["127.0.0.99", "127.0.0.1"], noted.port, often)
    assert noted.effects == ["run"] * 40


def test_hosts_that_do_not_answer_are_all_named() -> None:
    with socket.socket() as closed:
        closed.bind(("127.0.0.1", 0))
        port = closed.getsockname()[1]
        for what in (events, lambda connection: connection.health(), lambda connection: connection.shut_down()):
            with pytest.raises(TransportError, match="answers at none of its addresses: ") as caught:
                talk([*NOWHERE, "127.0.0.1", "::1"], port, what)
            for place in (f"no.such.host.invalid:{port}", f"127.0.0.99:{port}", f"127.0.0.1:{port}", f"[::1]:{port}"):
                assert place in str(caught.value)


IMPORTS = """
import sys
from importlib.abc import MetaPathFinder
from gserve import LLMConfig, ServeConfig, VLLMService
from gserve_core.engines.echo import EchoEngine

sought = []
class Finder(MetaPathFinder):
    def find_spec(self, name, path, target=None):
        sought.append(name)

with VLLMService(LLMConfig("m"), ServeConfig(), engine=EchoEngine(latency=0.01)) as service:
    sys.meta_path.insert(0, Finder())
    service.generate(["a"])
    list(service.generate_iter(iter(["a", "b"])))
    service.generate(["one " * 500] * 50, {"max_tokens": 500}, deadline=0.1, on_error="return")
    print(sought)
"""


def test_calls_import_nothing_so_that_a_fork_meanwhile_is_safe() -> None:
    """A forked process waits for ever for a module that another thread of its parent was about to import."""
    found = subprocess.run([sys.executable, "-c", IMPORTS], capture_output=True, text=True, timeout=120, check=True)
    assert found.stdout == "[]\n"


# ---------------------------------------------------------------------------------------------------------- strangers


@contextlib.contextmanager
def decoy(host: str, port: int, heard: list[str], instance: str | None) -> Iterator[int]:
    """Something else that answers 200 and "ok" to everything; `heard` notes what it was told."""

    class Handler(BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            self.rfile.read(int(self.headers.get("Content-Length", "0")))
            heard.extend((self.path, self.headers.get("Authorization", "")))
            self.send_response(200)
            if instance is not None:
                self.send_header("x-gserve-instance", instance)
            self.send_header("Content-Length", "15")
            self.end_headers()
            self.wfile.write(b'{"status":"ok"}')

        do_POST = do_GET

        def log_message(self, *_: Any) -> None:
            pass

    with ThreadingHTTPServer((host, port), Handler) as server:
        thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.01})
        thread.start()
        try:
            yield server.server_address[1]
        finally:
            server.shutdown()
            thread.join()


@pytest.mark.parametrize("instance", [None, "", "another", "NOTED", "noted, noted", "note"])
def test_a_decoy_on_the_port_is_passed_over_and_told_no_secret(noted: Noted, instance: str | None) -> None:
    heard: list[str] = []
    with decoy("127.0.0.99", noted.port, heard, instance):
        (done,) = talk(["127.0.0.99", "127.0.0.1"], noted.port, events)
        assert done.outputs[0].text == "a"
    assert heard == ["/health", ""]


@pytest.mark.parametrize("instance", [None, "", "another"])
def test_a_decoy_alone_is_no_server(instance: str | None) -> None:
    heard: list[str] = []
    with decoy("127.0.0.1", 0, heard, instance) as port:
        for hosts in (["127.0.0.1"], ["127.0.0.1", "localhost"]):
            for what in (lambda connection: connection.health(), lambda connection: connection.shut_down(), events):
                with pytest.raises(TransportError, match="is not the server that was started there"):
                    talk(hosts, port, what)
    assert "/shutdown" not in heard
    assert not [said for said in heard if "control" in said]


# ------------------------------------------------------------------------------------------------------------ answers


@pytest.mark.parametrize(("seconds", "told"), [(0.1, 1.0), (1.0, 1.0), (1.5, 2.0), (600.0, 600.0)])
def test_when_to_come_again_reaches_the_client(noted: Noted, seconds: float, told: float) -> None:
    noted.busy = seconds
    with pytest.raises(RemoteError, match=r"^enough to do$") as caught:
        talk(["127.0.0.1"], noted.port, events)
    assert (caught.value.status, caught.value.retry_after) == (429, told)


@pytest.mark.parametrize("said", ["", "soon", "-1", "1.5", "Wed, 21 Oct 2015 07:28:00 GMT", "\xb2"])
def test_what_is_no_number_of_seconds_is_no_time_to_come_again(said: str) -> None:
    class Handler(BaseHTTPRequestHandler):
        def do_POST(self) -> None:
            self.rfile.read(int(self.headers["Content-Length"]))
            self.send_response(429)
            self.send_header("Retry-After", said)
            self.send_header("Content-Length", "0")
            self.end_headers()

        def log_message(self, *_: Any) -> None:
            pass

    with ThreadingHTTPServer(("127.0.0.1", 0), Handler) as server:
        thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.01})
        thread.start()
        try:
            with pytest.raises(RemoteError) as caught:
                talk(["127.0.0.1"], server.server_address[1], events, Access(timeout=5.0))
        finally:
            server.shutdown()
            thread.join()
    assert (caught.value.status, caught.value.retry_after) == (429, None)


def test_the_token_does_not_end_the_server_for_the_client_either(noted: Noted) -> None:
    for control in (None, "wrong", noted.token):
        access = Access(token=noted.token, control=control, instance="noted", timeout=5.0)
        with pytest.raises(RemoteError) as caught:
            talk(["127.0.0.1"], noted.port, lambda connection: connection.shut_down(), access)
        assert caught.value.status == (401 if control == "wrong" else 403)
    assert not noted.effects


# ---------------------------------------------------------------------------------------------------------- the line


def test_a_server_that_reads_nothing_is_a_stall() -> None:
    with socket.create_server(("127.0.0.1", 0), backlog=1) as mute:
        port = mute.getsockname()[1]
        access = Access(timeout=0.5)
        with pytest.raises(StallTimeout, match=r"no heartbeat .* for 0\.5 s"):
            talk(["127.0.0.1"], port, events, access)

        async def much(connection: Connection) -> None:
            async for _ in connection.run(RunRequest([Group(["x" * (64 << 20)])])):
                pass

        with pytest.raises(StallTimeout, match=r"no heartbeat .* for 0\.5 s"):
            talk(["127.0.0.1"], port, much, access)


def test_both_ends_look_after_a_line_on_which_nothing_is_said(noted: Noted) -> None:
    async def look(connection: Connection) -> list[tuple[int, ...]]:
        asking = asyncio.create_task(events_of_slow(connection))
        while not noted.working:
            await asyncio.sleep(0.02)
        found: list[tuple[int, ...]] = []
        for it in psutil.Process().net_connections("tcp4"):
            if it.status == psutil.CONN_ESTABLISHED and noted.port in (it.laddr[1], it.raddr[1]):
                with socket.socket(fileno=os.dup(it.fd)) as line:
                    found.append(
                        (
                            line.getsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE),
                            line.getsockopt(socket.IPPROTO_TCP, socket.TCP_KEEPIDLE),
                            line.getsockopt(socket.IPPROTO_TCP, socket.TCP_KEEPINTVL),
                            line.getsockopt(socket.IPPROTO_TCP, socket.TCP_KEEPCNT),
                        )
                    )
        asking.cancel()
        return found

    async def events_of_slow(connection: Connection) -> None:
        async for _ in connection.run(RunRequest([Group(["slow"])])):
            pass

    assert talk(["127.0.0.1"], noted.port, look) == [(1, 5, 3, 3)] * 2
    until(lambda: not noted.working, 20.0)


ASKED: dict[str, Any] = {
    "health": lambda connection: connection.health(),
    "run": events,
    "cancel": lambda connection: connection.cancel("id", [0]),
    "shut_down": lambda connection: connection.shut_down(),
    "post": lambda connection: connection.post("/v1/completions", b"{}", "id"),
}


@pytest.mark.parametrize("received", [0, 1], ids=["at once", "in the request"])
@pytest.mark.parametrize("tls", [False, True])
@pytest.mark.parametrize("what", ASKED)
def test_a_connection_that_is_reset_is_a_transport_error(what: str, tls: bool, received: int) -> None:
    """Also where the event loop, which is uvloop as in a service, sees the connection and its end together."""

    def reset_all(listening: socket.socket) -> None:
        with contextlib.suppress(OSError):
            while True:
                line, _ = listening.accept()
                with line:
                    line.recv(received)
                    line.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))

    async def be_busy() -> None:
        while True:
            await asyncio.sleep(0)
            time.sleep(0.002)  # that is the fault

    async def ask_often(port: int) -> None:
        busy = asyncio.create_task(be_busy())
        for _ in range(10):
            connection = HttpTransport().connect(Address(["127.0.0.1"], port), Access(tls=tls, timeout=60.0))
            with pytest.raises(TransportError):
                await ASKED[what](connection)
            await connection.close()
        busy.cancel()

    with socket.create_server(("127.0.0.1", 0)) as listening:
        thread = threading.Thread(target=reset_all, args=(listening,), daemon=True)
        thread.start()
        try:
            uvloop.run(ask_often(listening.getsockname()[1]))
        finally:
            listening.shutdown(socket.SHUT_RDWR)
        thread.join(60)
        assert not thread.is_alive()


# --------------------------------------------------------------------------------------------------------- proxies

DEAD = "http://127.0.0.1:9"
PROXIES = {
    "http_proxy": {"http_proxy": DEAD},
    "HTTP_PROXY": {"HTTP_PROXY": DEAD},
    "https_proxy": {"https_proxy": DEAD, "http_proxy": DEAD},
    "ALL_PROXY": {"ALL_PROXY": DEAD},
    "a socks proxy": {"ALL_PROXY": "socks5://127.0.0.1:9", "all_proxy": "socks5://127.0.0.1:9"},
    "no_proxy for another name": {"http_proxy": DEAD, "no_proxy": "localhost"},
    "no_proxy for the network": {"http_proxy": DEAD, "NO_PROXY": "127.0.0.0/8", "no_proxy": "127.0.0.0/8"},
    "not a URL": {"http_proxy": "::nonsense::", "ALL_PROXY": "::nonsense::"},
}


@pytest.mark.parametrize("kind", PROXIES)
def test_proxy_variables_do_not_matter(noted: Noted, kind: str, monkeypatch: pytest.MonkeyPatch) -> None:
    for name, value in PROXIES[kind].items():
        monkeypatch.setenv(name, value)
    with VLLMClient(port=noted.port, token=noted.token, instance="noted") as client:
        assert client.health() == Health("ok")
        assert client.generate(["a"]) == [["a"]]
    assert noted.effects == ["run"]


# --------------------------------------------------------------------------------------------------- many at once


def test_250_threads_on_one_service_are_all_answered() -> None:
    threads, calls = 250, 8
    wrong: list[object] = []
    with VLLMService(LLMConfig("m"), ServeConfig(servers=1), engine=EchoEngine()) as service:
        together = threading.Barrier(threads)

        def work(number: int) -> None:
            together.wait(60)
            for call in range(calls):
                prompts = [f"{number} {call} {item}" for item in range(3)]
                try:
                    results = service.generate(prompts)
                except Exception as error:
                    wrong.append(error)
                else:
                    if results != [[prompt] for prompt in prompts]:
                        wrong.append(results)

        working = [threading.Thread(target=work, args=(number,)) for number in range(threads)]
        for thread in working:
            thread.start()
        for thread in working:
            thread.join(120)
        assert not any(thread.is_alive() for thread in working)
    assert not wrong, wrong[:3]


def test_250_requests_on_one_connection_wait_for_no_pool(noted: Noted) -> None:
    async def many(connection: Connection) -> list[Any]:
        return await asyncio.gather(*(events(connection) for _ in range(250)))

    found = talk(["127.0.0.1"], noted.port, many)
    assert [[event.outputs[0].text for event in each] for each in found] == [["a"]] * 250
    assert len(noted.effects) == 250


@pytest.mark.parametrize("by_task", [True, False])
@pytest.mark.parametrize(
    "what",
    [
        lambda connection: connection.health(),
        lambda connection: connection.overview(),
        lambda connection: connection.post("/v1/completions", b"{}", "id"),
    ],
    ids=["health", "overview", "post"],
)
def test_a_tls_handshake_that_is_cancelled_leaves_no_connection_open(what: Any, by_task: bool) -> None:
    async def leave(silent: socket.socket) -> None:
        connection = HttpTransport().connect(Address(["127.0.0.1"], silent.getsockname()[1]), Access(tls=True))
        scope = anyio.CancelScope()

        async def ask() -> None:
            with scope:
                await what(connection)

        asking = asyncio.create_task(ask())
        line, _ = await asyncio.to_thread(silent.accept)
        with line:
            assert await asyncio.to_thread(line.recv, 1), "the handshake has not begun"
            if by_task:
                asking.cancel()
            else:
                scope.cancel()
            await asyncio.wait([asking], timeout=10)
            assert asking.done()
            await connection.close()

    with socket.create_server(("127.0.0.1", 0)) as silent:
        silent.settimeout(60)
        assert left_open(leave(silent)) == []
