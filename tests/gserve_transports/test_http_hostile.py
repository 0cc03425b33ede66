"""Requests that are too large, too slow, too many, or never read: others are served, and memory stays bounded."""

import asyncio
import contextlib
import gzip
import json
import logging
import socket
import threading
import time
from collections.abc import AsyncGenerator, Iterator
from http.client import HTTPConnection

import msgspec
import psutil
import pytest

from gserve import LLMConfig, VLLMServer
from gserve_core.engines.echo import EchoEngine
from gserve_core.messages import Event, Failure, Group, RunRequest
from gserve_transports import HttpTransport, http_front
from gserve_transports.frames import KEEPALIVE
from tests.gserve_transports.noted import Noted, exchange, served, until

MIB = 1 << 20
GROWTH = 120 * MIB
"""How much more memory a server may have at its peak, in bytes, whatever it is sent."""
FLOOD = 4096 * MIB
logger = logging.getLogger(__name__)
HEALTH = b"GET /health HTTP/1.1\r\nHost: localhost\r\n\r\n"


class Hostile:
    """A server process with the engine `echo`, which takes bodies of 1 MiB, and its memory."""

    def __init__(self, server: VLLMServer) -> None:
        assert server.port is not None
        self.port = server.port
        self.token = server.record().token
        listening = [it for it in psutil.net_connections("tcp4") if it.laddr and it.laddr[1] == self.port and it.pid]
        self.process = psutil.Process(next(it.pid for it in listening if it.status == psutil.CONN_LISTEN))

    @property
    def memory(self) -> int:
        return self.process.memory_info().rss

    def head(self, *headers: str, token: bool = True, path: str = "/generate") -> bytes:
        lines = [f"POST {path} HTTP/1.1", "Host: localhost", *headers]
        if token:
            lines.append(f"Authorization: Bearer {self.token}")
        return ("\r\n".join(lines) + "\r\n\r\n").encode()

    def works(self, within: float = 60.0) -> None:
        """Assert that others are served."""
        began = time.monotonic()
        with contextlib.closing(HTTPConnection("127.0.0.1", self.port, timeout=within)) as line:
            line.request("GET", "/health")
            assert line.getresponse().read() == b'{"status":"ok"}'
            line.request("POST", "/generate", b'{"prompts": ["a"]}', {"Authorization": f"Bearer {self.token}"})
            assert json.loads(line.getresponse().read())[0][0]["text"] == "a"
        assert time.monotonic() - began < within


@pytest.fixture(scope="module")
def hostile() -> Iterator[Hostile]:
    with VLLMServer(LLMConfig("m"), engine=EchoEngine(), transport=HttpTransport(max_body_mib=1)) as server:
        yield Hostile(server)


@contextlib.contextmanager
def bounded(server: Hostile) -> Iterator[None]:
    """Hold the server's memory, meanwhile and afterwards, and others are served in the midst of it."""
    before, peak, over = server.memory, [0], threading.Event()

    def watch() -> None:
        while not over.wait(0.02):
            peak[0] = max(peak[0], server.memory)

    watching = threading.Thread(target=watch)
    watching.start()
    try:
        yield
        server.works()
    finally:
        over.set()
        watching.join()
    assert peak[0] - before < GROWTH, f"{before >> 20} MiB became {peak[0] >> 20} MiB"


def flood(port: int, head: bytes, piece: bytes, most: int = FLOOD) -> tuple[int, bytes]:
    """Send `head`, then `piece` without end; return how many bytes went, and what the server answered meanwhile."""
    sent, answer = 0, bytearray()
    with socket.create_connection(("127.0.0.1", port), timeout=60) as line:

        def read() -> None:
            with contextlib.suppress(OSError):
                while chunk := line.recv(1 << 16):
                    answer.extend(chunk)

        reading = threading.Thread(target=read)
        reading.start()
        with contextlib.suppress(OSError):
            line.sendall(head)
            while sent < most:
                line.sendall(piece)
                sent += len(piece)
        with contextlib.suppress(OSError):
            line.shutdown(socket.SHUT_RDWR)
        reading.join(60)
    return sent, bytes(answer)


CHUNK = b"100000\r\n" + b"a" * MIB + b"\r\n"


@pytest.mark.parametrize("token", [True, False], ids=["with the token", "without the token"])
@pytest.mark.parametrize("path", ["/generate", "/chat", "/run", "/shutdown", "/nothing"])
def test_a_body_without_end_is_refused_and_cut_off(hostile: Hostile, path: str, token: bool) -> None:
    with bounded(hostile):
        sent, answer = flood(hostile.port, hostile.head("Transfer-Encoding: chunked", token=token, path=path), CHUNK)
    assert sent < 600 * MIB
    status = 401 if not token else {"/shutdown": 403, "/nothing": 404}.get(path, 413)
    assert answer.startswith(f"HTTP/1.1 {status} ".encode()), answer


@pytest.mark.parametrize("length", [MIB + 1, 4096 * MIB, 1 << 62])
def test_a_body_too_large_by_its_own_word_is_refused_before_it_is_sent(hostile: Hostile, length: int) -> None:
    with bounded(hostile), socket.create_connection(("127.0.0.1", hostile.port), timeout=60) as line:
        line.sendall(hostile.head(f"Content-Length: {length}"))
        assert line.recv(1000).startswith(b"HTTP/1.1 413 ")


def test_bodies_of_many_clients_take_no_more_memory_than_some_of_the_largest(hostile: Hostile) -> None:
    large = json.dumps({"prompts": ["a"], "params": {"stop": ["b" * 900_000]}}).encode()

    def status() -> bytes:
        with socket.create_connection(("127.0.0.1", hostile.port), timeout=60) as line:
            line.sendall(hostile.head(f"Content-Length: {len(large)}") + large)
            return line.recv(12).split()[1]

    assert status() != b"429"
    with contextlib.ExitStack() as stalled:
        for _ in range(17):  # 16 MiB may be there; all but a little of each of these is
            line = stalled.enter_context(socket.create_connection(("127.0.0.1", hostile.port), timeout=60))
            line.sendall(hostile.head(f"Content-Length: {MIB}") + b"a" * 950_000)
        until(lambda: status() == b"429")
        hostile.works()
    until(lambda: status() != b"429")


def test_a_body_that_is_to_be_continued_is_refused_before_it_is_sent(hostile: Hostile) -> None:
    with socket.create_connection(("127.0.0.1", hostile.port), timeout=60) as line:
        line.sendall(hostile.head("Expect: 100-continue", f"Content-Length: {4096 * MIB}"))
        assert line.recv(1000).startswith(b"HTTP/1.1 413 ")


ENDLESS = {  # what comes first, and what is then repeated
    "headers": (b"GET /health HTTP/1.1\r\nHost: localhost\r\n", b"a: b\r\n" * 100_000),
    "one header": (b"GET /health HTTP/1.1\r\nHost: localhost\r\nx: ", b"a" * MIB),
    "the name of a header": (b"GET /health HTTP/1.1\r\nHost: localhost\r\n", b"a" * MIB),
    "the path": (b"GET /", b"a" * MIB),
    "the query": (b"GET /health?", b"a" * MIB),
    "the method": (b"", b"A" * MIB),
    "line feeds": (b"", b"\r\n" * (MIB // 2)),
    "trailers": (
        b"POST /generate HTTP/1.1\r\nHost: localhost\r\nTransfer-Encoding: chunked\r\n\r\n0\r\n",
        b"a: b\r\n" * 100_000,
    ),
    "a chunk's extension": (
        b"POST /generate HTTP/1.1\r\nHost: localhost\r\nTransfer-Encoding: chunked\r\n\r\n1;",
        b"a" * MIB,
    ),
    "a chunk's size": (
        b"POST /generate HTTP/1.1\r\nHost: localhost\r\nTransfer-Encoding: chunked\r\n\r\n",
        b"0" * MIB,
    ),
    "zeros": (b"", b"\0" * MIB),
}


@pytest.mark.parametrize("kind", ENDLESS)
def test_no_part_of_a_request_is_without_end(hostile: Hostile, kind: str) -> None:
    first, again = ENDLESS[kind]
    with bounded(hostile):
        sent, answer = flood(hostile.port, first, again, most=256 * MIB)
    assert sent < 100 * MIB
    assert not answer or answer.startswith((b"HTTP/1.1 400 ", b"HTTP/1.1 401 ")), answer


def test_as_many_headers_as_anybody_sends_are_taken(hostile: Hostile) -> None:
    many = b"".join(b"x-header-%d: %s\r\n" % (number, b"v" * 80) for number in range(500))
    raw = b"GET /health HTTP/1.1\r\nHost: localhost\r\nConnection: close\r\n" + many + b"\r\n"
    assert exchange(hostile.port, raw).startswith(b"HTTP/1.1 200 ")


@pytest.mark.parametrize("coding", ["gzip", "deflate", "br", "zstd", "gzip, gzip"])
def test_a_packed_body_is_not_unpacked(hostile: Hostile, coding: str) -> None:
    bomb = gzip.compress(b'{"prompts": ["' + b"a" * (200 * MIB) + b'"]}', 1) if coding == "gzip" else b"\x1f\x8b" * 100
    with bounded(hostile):
        raw = hostile.head(f"Content-Encoding: {coding}", f"Content-Length: {len(bomb)}", "Connection: close") + bomb
        assert exchange(hostile.port, raw).startswith(b"HTTP/1.1 400 ")


# --------------------------------------------------------------------------------------------------- many in one line


def test_requests_in_one_go_are_answered_in_their_order(hostile: Hostile) -> None:
    bodies = [json.dumps({"prompts": [f"number-{number}"]}).encode() for number in range(10)]
    raw = b"".join(hostile.head(f"Content-Length: {len(body)}") + body for body in bodies[:-1])
    raw += hostile.head(f"Content-Length: {len(bodies[-1])}", "Connection: close") + bodies[-1]
    answer = exchange(hostile.port, raw)
    assert answer.count(b"HTTP/1.1 200 OK") == 10
    places = [answer.index(b'"text":"number-%d"' % number) for number in range(10)]
    assert places == sorted(places)


def test_requests_without_end_in_one_go_are_cut_off(hostile: Hostile) -> None:
    with bounded(hostile):
        for _ in range(20):
            sent, _ = flood(hostile.port, b"", HEALTH * 10_000, most=64 * MIB)
            assert sent < 64 * MIB


def test_whoever_does_not_read_costs_no_memory(hostile: Hostile) -> None:
    with bounded(hostile), contextlib.ExitStack() as stack:
        for _ in range(50):
            line = stack.enter_context(socket.create_connection(("127.0.0.1", hostile.port)))
            line.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
            line.settimeout(0.5)
            with contextlib.suppress(OSError):
                for _ in range(100):
                    line.sendall(HEALTH * 10)
        hostile.works()


def test_a_thousand_connections_that_say_nothing_do_not_keep_others_out(hostile: Hostile) -> None:
    with bounded(hostile), contextlib.ExitStack() as stack:
        for _ in range(1000):
            stack.enter_context(socket.create_connection(("127.0.0.1", hostile.port)))
        hostile.works()


@pytest.mark.parametrize(
    "raw",
    [
        b"GET /health HTTP/1.1\r\nHost: localhost\r\nConnection: Upgrade\r\nUpgrade: websocket\r\n"
        b"Sec-WebSocket-Key: AAAAAAAAAAAAAAAAAAAAAA==\r\nSec-WebSocket-Version: 13\r\n\r\n",
        b"POST /run HTTP/1.1\r\nHost: localhost\r\nConnection: Upgrade\r\nUpgrade: h2c\r\n\r\n",
        b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n",
        b"GET /health HTTP/3.7\r\n\r\n",
        b"GET /health\r\n\r\n",
        b"CONNECT localhost:80 HTTP/1.1\r\nHost: localhost\r\n\r\nGET / HTTP/1.1\r\n\r\n",
        b"\x16\x03\x01\x02\x00\x01\x00\x01\xfc\x03\x03",
        b"\xff" * 1000,
    ],
    ids=["websocket", "h2c", "HTTP/2", "HTTP/3.7", "HTTP/0.9", "CONNECT", "TLS", "bytes"],
)
def test_other_languages_are_not_spoken(hostile: Hostile, raw: bytes) -> None:
    with socket.create_connection(("127.0.0.1", hostile.port), timeout=60) as line:
        line.sendall(raw)
        line.shutdown(socket.SHUT_WR)
        with contextlib.suppress(OSError):
            assert not line.recv(1 << 16).startswith((b"HTTP/1.1 101", b"HTTP/1.1 5"))
    hostile.works()


# ---------------------------------------------------------------------------------------------------------- too slow

DRIP = 0.5
"""Seconds between two bytes."""
LONGEST = 90.0
"""Seconds after which every slow connection must have been cut."""


def drip(port: int, head: bytes, byte: bytes, ended: list[float]) -> None:
    """Send `head`, then `byte` now and then (none: nothing), until the server has had enough."""
    began = time.monotonic()
    with socket.create_connection(("127.0.0.1", port)) as line:
        line.settimeout(DRIP)
        try:
            line.sendall(head)
            while time.monotonic() - began < LONGEST:
                line.sendall(byte)
                with contextlib.suppress(TimeoutError):
                    while line.recv(1 << 16):
                        pass
                    break
            else:
                return
        except ConnectionError:
            pass
    ended.append(time.monotonic() - began)


def test_whoever_sends_a_byte_a_second_is_cut_off_and_holds_up_nobody(hostile: Hostile) -> None:
    begun = hostile.head("Content-Length: 1000")
    slow = {
        "nothing at all": (b"", b""),
        "a head": (b"GET /health HTTP/1.1\r\nHost: localhost\r\nx: ", b"a"),
        "headers": (b"GET /health HTTP/1.1\r\nHost: localhost\r\n", b"a:b\r\n"),
        "line feeds": (b"", b"\r\n"),
        "line feeds after an answer": (HEALTH, b"\r\n"),
        "a head after an answer": (HEALTH + b"GET /hea", b"a"),
        "half a body": (begun + b"a" * 10, b""),
        "a body": (begun, b"a"),
        "a body that has been refused": (hostile.head("Content-Length: 1000", token=False), b"a"),
        "a body that is too large": (hostile.head(f"Content-Length: {10 * MIB}"), b"a"),
        "chunks": (hostile.head("Transfer-Encoding: chunked"), b"1\r\na\r\n"),
        "trailers": (hostile.head("Transfer-Encoding: chunked") + b"0\r\n", b"a:b\r\n"),
        "an upgrade": (b"GET /health HTTP/1.1\r\nHost: localhost\r\nConnection: Upgrade\r\nUpgrade: x\r\n\r\n", b"a"),
    }
    ended: dict[str, list[float]] = {kind: [] for kind in slow}
    times = 8
    threads = [
        threading.Thread(target=drip, args=(hostile.port, *slow[kind], ended[kind]))
        for kind in slow
        for _ in range(times)
    ]

    body = b'{"prompts": ["' + b"a" * (MIB - 100) + b'"], "params": {"max_tokens": 1}}'
    answers: list[bytes] = []

    def steady() -> None:  # slower than the bound on a request without a body, and no attacker: 30 kB/s
        with socket.create_connection(("127.0.0.1", hostile.port), timeout=60) as line:
            line.sendall(hostile.head(f"Content-Length: {len(body)}"))
            for start in range(0, len(body), 15_000):
                line.sendall(body[start : start + 15_000])
                time.sleep(0.4)
            answers.append(line.recv(1000))

    threads.append(threading.Thread(target=steady))
    with bounded(hostile):
        for thread in threads:
            thread.start()
        while any(thread.is_alive() for thread in threads):
            hostile.works()
            time.sleep(0.2)
    for kind, seconds in ended.items():
        assert len(seconds) == times, f"{kind}: {times - len(seconds)} of {times} are still held after {LONGEST:g} s"
    assert answers
    assert answers[0].startswith(b"HTTP/1.1 200 ")


# -------------------------------------------------------------------------------------------- clients that go away

ASKED = {
    "/chat": json.dumps({"conversations": [[{"role": "user", "content": "slow"}]]}).encode(),
    "/generate": b'{"prompts": ["slow"]}',
    "/run": msgspec.msgpack.encode(RunRequest([Group(["slow"])], heartbeat=0.2)),
    "/run, before anything was said": msgspec.msgpack.encode(RunRequest([Group(["slow"])], heartbeat=3600.0)),
}


@pytest.mark.parametrize("how", ["closed", "reset", "closed for writing only"])
@pytest.mark.parametrize("what", ASKED)
def test_whoever_goes_away_takes_the_work_along(noted: Noted, what: str, how: str) -> None:
    path, body = what.partition(",")[0], ASKED[what]
    head = f"POST {path} HTTP/1.1\r\nHost: localhost\r\nAuthorization: Bearer {noted.token}\r\n"
    with socket.create_connection(("127.0.0.1", noted.port)) as line:
        line.sendall(f"{head}Content-Length: {len(body)}\r\n\r\n".encode() + body)
        until(lambda: noted.working == 1)
        if how == "reset":
            line.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, b"\1\0\0\0\0\0\0\0")
        if how == "closed for writing only":
            line.shutdown(socket.SHUT_WR)
            until(lambda: not noted.working, 20.0)
    until(lambda: not noted.working, 20.0)


def test_whoever_goes_away_without_having_read_takes_the_work_along() -> None:
    class Talkative(Noted):
        async def run(self, request: RunRequest) -> AsyncGenerator[list[Event]]:
            with self._at_work("run"):
                while True:
                    yield [Failure(0, "x" * 100_000)]
                    await asyncio.sleep(0)

    body = msgspec.msgpack.encode(RunRequest([Group(["a"])]))
    with served(Talkative()) as api:
        for _ in range(5):
            with socket.create_connection(("127.0.0.1", api.port)) as line:
                head = f"POST /run HTTP/1.1\r\nHost: localhost\r\nAuthorization: Bearer {api.token}\r\n"
                line.sendall(f"{head}Content-Length: {len(body)}\r\n\r\n".encode() + body)
                assert line.recv(10_000)
                until(lambda: api.working == 1)
                time.sleep(0.3)  # until nothing more fits on the line
            until(lambda: not api.working, 20.0)


# ----------------------------------------------------------------------------------------------------- enough to do


@pytest.mark.parametrize(("seconds", "said"), [(0.0, b"1"), (0.2, b"1"), (1.0, b"1"), (1.1, b"2"), (30.0, b"30")])
def test_a_server_with_enough_to_do_says_when_to_come_again(noted: Noted, seconds: float, said: bytes) -> None:
    noted.busy = seconds
    for what in ("/chat", "/generate", "/run"):
        head = (
            f"POST {what} HTTP/1.1\r\nHost: localhost\r\nAuthorization: Bearer {noted.token}\r\nConnection: close\r\n"
        )
        answer = exchange(noted.port, f"{head}Content-Length: {len(ASKED[what])}\r\n\r\n".encode() + ASKED[what])
        headers, _, body = answer.partition(b"\r\n\r\n")
        assert headers.startswith(b"HTTP/1.1 429 ")
        assert b"\r\nretry-after: %s\r\n" % said in headers + b"\r\n"
        assert json.loads(body) == {"error": {"status": 429, "message": "enough to do"}}
    assert exchange(noted.port, HEALTH.replace(b"\r\n\r\n", b"\r\nConnection: close\r\n\r\n")).startswith(
        b"HTTP/1.1 200 "
    )
    assert not noted.effects


# -------------------------------------------------------------------------------------------------- much, and honest


def test_a_hundred_thousand_prompts_in_one_body_are_answered_in_order_and_keep_nobody_out() -> None:
    body = json.dumps({"prompts": [f"number {number}" for number in range(100_000)]}).encode()
    with VLLMServer(LLMConfig("m"), engine=EchoEngine()) as server:
        roomy = Hostile(server)
        answers: list[bytes] = []
        waits: list[float] = []
        peak = 0

        def ask() -> None:
            with contextlib.closing(HTTPConnection("127.0.0.1", roomy.port, timeout=240)) as line:
                line.request("POST", "/generate", body, {"Authorization": f"Bearer {roomy.token}"})
                answers.append(line.getresponse().read())

        asking = threading.Thread(target=ask)
        asking.start()
        while asking.is_alive():
            began = time.monotonic()
            with contextlib.closing(HTTPConnection("127.0.0.1", roomy.port, timeout=60)) as line:
                line.request("GET", "/health")
                assert line.getresponse().status == 200
            waits.append(time.monotonic() - began)
            peak = max(peak, roomy.memory)
            time.sleep(0.05)
        texts = [item[0]["text"] for item in json.loads(answers[0])]
    assert texts == [f"number {number}" for number in range(100_000)]
    assert peak < 400 * MIB
    assert len(waits) > 5
    assert max(waits) < 20
    logger.info("asked %d times for its health, at most %.2f s; at most %d MiB", len(waits), max(waits), peak >> 20)


def test_a_client_that_takes_nothing_of_its_answer_is_cut_off(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(http_front, "UNREAD", (3, 0.2))
    small = (socket.SOL_SOCKET, socket.SO_SNDBUF, 4096)  # else all of it would fit in there
    monkeypatch.setattr(http_front, "KEEPALIVE", (*KEEPALIVE, small))
    api = Noted()
    with served(api), socket.socket() as client:
        client.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
        client.connect(("127.0.0.1", api.port))
        body = msgspec.msgpack.encode(RunRequest([Group([*["x" * 5000] * 180, "slow"])]))
        head = f"POST /run HTTP/1.1\r\nHost: localhost\r\nAuthorization: Bearer {api.token}\r\n"
        client.sendall(f"{head}Content-Length: {len(body)}\r\n\r\n".encode() + body)
        until(lambda: api.effects)
        until(lambda: not api.working)
