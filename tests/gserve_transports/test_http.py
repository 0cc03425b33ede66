"""The HTTP transport on real sockets: the server started by hand, who may do what, and bodies of every wrong kind."""

import json
import os
import re
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import closing, contextmanager
from dataclasses import dataclass
from http.client import HTTPConnection
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import msgspec
import pytest

from gserve import BatchError, LLMConfig, TransportError, VLLMClient, VLLMServer
from gserve_core.engines.echo import EchoEngine
from gserve_core.messages import Group, RunRequest
from gserve_core.testing import our_processes
from gserve_transports import HttpTransport

PROGRAM = Path(__file__).parents[2] / "gserve" / "vllm_server.py"
METHODS = ("GET", "HEAD", "POST", "PUT", "PATCH", "DELETE", "OPTIONS", "TRACE", "CONNECT")
LONG: dict[str, Any] = {"prompts": ["a " * 100], "params": {"max_tokens": 100}}
ROUTES = ("/health", "/chat", "/generate", "/run", "/cancel", "/shutdown", "/", "/docs", "/openapi.json", "/nothing")


@dataclass
class Reply:
    status: int
    headers: dict[str, str]
    body: bytes

    @property
    def json(self) -> Any:
        return json.loads(self.body)


def ask(
    port: int,
    method: str,
    path: str,
    body: bytes | dict[str, Any] | None = None,
    *,
    token: str | None = None,
    hosts: Sequence[str] | None = None,
) -> Reply:
    """Send a request whose every byte is ours: no header that was not asked for, and any target."""
    data = json.dumps(body).encode() if isinstance(body, dict) else body
    with closing(HTTPConnection("127.0.0.1", port, timeout=60)) as connection:
        connection.putrequest(method, path, skip_host=True, skip_accept_encoding=True)
        for host in [f"127.0.0.1:{port}"] if hosts is None else hosts:
            connection.putheader("Host", host)
        if token is not None:
            connection.putheader("Authorization", f"Bearer {token}")
        if data is not None:
            connection.putheader("Content-Length", str(len(data)))
        connection.endheaders(data)
        reply = connection.getresponse()
        return Reply(reply.status, {name.lower(): value for name, value in reply.getheaders()}, reply.read())


def until[T](condition: Callable[[], T], seconds: float = 60.0) -> T:
    deadline = time.monotonic() + seconds
    while not (found := condition()):
        assert time.monotonic() < deadline, f"not so within {seconds:g} s"
        time.sleep(0.02)
    return found


# ------------------------------------------------------------------------------------------------ a server by hand


class ByHand:
    """`python …/gserve/vllm_server.py --serve …` in a folder of its own, as somebody in a terminal would run it."""

    def __init__(self, folder: Path, *arguments: str, token: str | None = None, **engine: Any) -> None:
        self.log = folder / "log"
        environ = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}
        environ["GSERVE_ID"] = "by-hand"  # so that what it might leave is found
        if token is not None:
            environ["GSERVE_TOKEN"] = token
        section = json.dumps({"type": "echo", **engine})
        command = [sys.executable, str(PROGRAM), "--serve", "--model", "m", "--engine", section, *arguments]
        if "--port" not in arguments:
            command += ["--port", "0"]
        with self.log.open("wb") as log:
            self.process = subprocess.Popen(
                command, cwd=folder, env=environ, stdin=subprocess.DEVNULL, stdout=log, stderr=log
            )

    @property
    def text(self) -> str:
        return self.log.read_text()

    @property
    def port(self) -> int:
        def found() -> re.Match[str] | None:
            assert self.process.poll() is None, self.text
            return re.search(r"listening on \S+:(\d+)", self.text)

        match = until(found)
        assert match is not None
        return int(match[1])

    def ready(self) -> int:
        """Wait until it is ready; return its port."""
        port = self.port
        until(lambda: ask(port, "GET", "/health").status == 200)
        return port


@contextmanager
def by_hand(folder: Path, *arguments: str, token: str | None = None, **engine: Any) -> Iterator[ByHand]:
    server = ByHand(folder, *arguments, token=token, **engine)
    try:
        yield server
    finally:
        server.process.kill()
        server.process.wait()


@pytest.fixture(scope="module")
def echo(tmp_path_factory: pytest.TempPathFactory) -> Iterator[int]:
    with by_hand(tmp_path_factory.mktemp("echo")) as server:
        yield server.ready()


def end_by_signal(number: int) -> Callable[[ByHand], object]:
    return lambda server: server.process.send_signal(number)


def end_by_request(server: ByHand) -> None:
    reply = ask(server.port, "POST", "/shutdown")
    assert (reply.status, reply.json) == (200, {"status": "shutting down"})


ENDS = {
    "SIGTERM": end_by_signal(signal.SIGTERM),
    "SIGINT": end_by_signal(signal.SIGINT),
    "SIGHUP": end_by_signal(signal.SIGHUP),
    "POST /shutdown": end_by_request,
}


def test_health_is_ok_once_ready(echo: int) -> None:
    reply = ask(echo, "GET", "/health")
    assert (reply.status, reply.json) == (200, {"status": "ok"})
    assert reply.headers["content-type"] == "application/json"


def test_generate_takes_and_gives_what_the_readme_says(echo: int) -> None:
    reply = ask(echo, "POST", "/generate", {"prompts": ["a b c", "d"], "params": {"max_tokens": 2, "n": 2}})
    assert reply.status == 200
    assert [[output["text"] for output in item] for item in reply.json] == [["a b", "a b"], ["d", "d"]]
    assert reply.json[0][0]["finish_reason"] == "length"
    assert "logprobs" not in reply.json[0][0]


def test_chat_takes_and_gives_what_the_readme_says(echo: int) -> None:
    conversations = [
        [{"role": "system", "content": "be brief"}, {"role": "user", "content": "hello there"}],
        [{"role": "user", "content": [{"type": "text", "text": "in parts"}]}],
    ]
    reply = ask(echo, "POST", "/chat", {"conversations": conversations})
    assert reply.status == 200
    assert [[output["text"] for output in item] for item in reply.json] == [["hello there"], ["in parts"]]


def test_chat_takes_tools_and_the_messages_of_a_call(echo: int) -> None:
    call = {"id": "1", "type": "function", "function": {"name": "f", "arguments": "{}"}}
    conversation = [
        {"role": "user", "content": "call it", "name": None, "weight": 1},
        {"role": "assistant", "content": None, "tool_calls": [call]},
        {"role": "tool", "content": "the answer", "tool_call_id": "1"},
    ]
    body = {"tools": [{"type": "function", "function": {"name": "f"}}], "chat_template_kwargs": {"big": 2**70}}
    refused = ask(echo, "POST", "/chat", {"conversations": [conversation], **body})
    assert (refused.status, "integers of at most 64 bits" in str(refused.json)) == (400, True)
    body["chat_template_kwargs"] = {"enable_thinking": False}
    reply = ask(echo, "POST", "/chat", {"conversations": [conversation], "return_prompt_token_ids": True, **body})
    ((output,),) = reply.json
    assert output["text"] == "the answer"
    assert (output["prompt_tokens"], output["prompt_token_ids"]) == (2, output["token_ids"])


def test_logprobs_come_where_they_were_asked_for(echo: int) -> None:
    reply = ask(echo, "POST", "/generate", {"prompts": ["a"], "params": {"logprobs": 1}})
    (logprobs,) = reply.json[0][0]["logprobs"]
    assert list(logprobs.values()) == [{"logprob": 0.0, "rank": 1, "decoded_token": "a"}]


def test_token_ids_are_prompts_too(echo: int) -> None:
    assert ask(echo, "POST", "/generate", {"prompts": [[1, 2, 3]]}).json[0][0]["text"] == "1 2 3"


@pytest.mark.parametrize(("path", "key"), [("/generate", "prompts"), ("/chat", "conversations")])
def test_nothing_asked_is_nothing_answered(echo: int, path: str, key: str) -> None:
    reply = ask(echo, "POST", path, {key: []})
    assert (reply.status, reply.json) == (200, [])


def test_a_server_on_loopback_without_a_token_asks_for_none(echo: int) -> None:
    assert ask(echo, "POST", "/generate", {"prompts": ["a"]}).status == 200
    with VLLMClient(port=echo) as client:
        assert client.generate(["a b"]) == [["a b"]]
        assert client.chat([[{"role": "user", "content": "c"}]]) == [["c"]]


def test_a_server_that_loads_answers_503_with_its_phase(tmp_path: Path) -> None:
    with by_hand(tmp_path, load_time=600.0) as server:
        reply = until(lambda: (it := ask(server.port, "GET", "/health")).json.get("phase") == "loading" and it)
        assert isinstance(reply, Reply)
        assert (reply.status, reply.json["status"]) == (503, "starting")
        refused = ask(server.port, "POST", "/generate", {"prompts": ["a"]})
        assert refused.status == 503
        assert refused.json["error"]["status"] == 503
        assert "starting" in refused.json["error"]["message"]


@pytest.mark.parametrize("end", ENDS)
def test_a_server_by_hand_ends_well_while_it_loads(tmp_path: Path, end: str) -> None:
    before = our_processes()
    with by_hand(tmp_path, load_time=600.0) as server:
        until(lambda: "loading" in server.text)
        ENDS[end](server)
        assert server.process.wait(60) == 0, server.text
        assert "Traceback" not in server.text
    assert our_processes().keys() <= before.keys()


@contextmanager
def asked(port: int, body: dict[str, Any]) -> Iterator[HTTPConnection]:
    """Send a request for prompts; yield its connection once the server has the request."""
    with closing(HTTPConnection("127.0.0.1", port, timeout=60)) as asking:
        asking.request("POST", "/generate", json.dumps(body))
        for _ in range(2):  # later connections, whose answers show that the earlier one was read
            assert ask(port, "GET", "/health").status == 200
        yield asking


@pytest.mark.parametrize("end", ENDS)
def test_a_server_by_hand_finishes_what_it_has_before_it_ends(tmp_path: Path, end: str) -> None:
    before = our_processes()
    with by_hand(tmp_path, latency=1.6) as server, asked(server.ready(), {"prompts": ["a"]}) as asking:
        ENDS[end](server)
        reply = asking.getresponse()
        assert (reply.status, json.loads(reply.read())[0][0]["text"]) == (200, "a")
        assert server.process.wait(60) == 0, server.text
        assert "Traceback" not in server.text
    assert our_processes().keys() <= before.keys()


def test_a_second_signal_ends_a_busy_server_at_once(tmp_path: Path) -> None:
    with by_hand(tmp_path, latency=5.0) as server, asked(server.ready(), LONG) as asking:
        server.process.send_signal(signal.SIGINT)
        until(lambda: "SIGINT: ending" in server.text)
        assert server.process.poll() is None
        server.process.send_signal(signal.SIGINT)
        assert asking.getresponse().status == 503
        assert server.process.wait(60) == 0, server.text


@pytest.mark.parametrize("arguments", [["--host", "no.such.host.invalid"], ["--host", "192.0.2.1"]], ids=str)
def test_a_place_where_nobody_can_listen_is_told_in_one_sentence(tmp_path: Path, arguments: list[str]) -> None:
    with by_hand(tmp_path, *arguments, token="t") as server:
        assert server.process.wait(60) == 1
        assert f"cannot listen on {arguments[1]}:0: " in server.text
        assert "Traceback" not in server.text


@pytest.mark.parametrize("port", ["65536", "-1", "http"])
def test_a_port_that_cannot_be_is_told_in_one_sentence(tmp_path: Path, port: str) -> None:
    with by_hand(tmp_path, "--port", port) as server:
        assert server.process.wait(60) == 2
        assert f"expected a port from 0 to 65535, got {port}" in server.text or "expected one argument" in server.text


def test_a_port_that_is_taken_is_told_in_one_sentence(tmp_path: Path) -> None:
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
        with by_hand(tmp_path, "--port", str(port)) as server:
            assert server.process.wait(60) == 1
            assert f"cannot listen on 127.0.0.1:{port}: Address already in use" in server.text
            assert "Traceback" not in server.text


def test_a_server_that_others_can_reach_wants_a_token(tmp_path: Path) -> None:
    with by_hand(tmp_path, "--host", "0.0.0.0") as server:
        assert server.process.wait(60) == 1
        assert "--host 0.0.0.0 can be reached from other machines" in server.text
        assert "Traceback" not in server.text


def test_a_server_that_others_can_reach_refuses_who_has_no_token(tmp_path: Path) -> None:
    with by_hand(tmp_path, "--host", "0.0.0.0", token="secret-token") as server:
        port = server.ready()
        assert ask(port, "POST", "/generate", {"prompts": ["a"]}).status == 401
        assert ask(port, "POST", "/generate", {"prompts": ["a"]}, token="secret-tokem").status == 401
        assert ask(port, "POST", "/generate", {"prompts": ["a"]}, token="secret-token").status == 200
        assert ask(port, "GET", "/health", hosts=[socket.gethostname()]).status == 200
        with VLLMClient(port=port, token="secret-token") as client:
            assert client.generate(["a"]) == [["a"]]
        with VLLMClient(port=port) as client, pytest.raises(BatchError, match="requires its token"):
            client.generate(["a"])
        for process in our_processes().values():
            assert "secret-token" not in process


def test_a_log_level_that_does_not_exist_is_told_in_one_sentence(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("GSERVE_LOG_LEVEL", "LOUD")
    with by_hand(tmp_path) as server:
        assert server.process.wait(60) == 1
        assert "unknown log level 'LOUD'" in server.text
        assert "Traceback" not in server.text


def test_a_client_that_goes_away_takes_its_work_with_it(tmp_path: Path) -> None:
    with by_hand(tmp_path, latency=5.0) as server:
        port = server.ready()
        body = json.dumps(LONG).encode()
        packed = msgspec.msgpack.encode(RunRequest([Group(LONG["prompts"], LONG["params"])]))
        for path, data in (("/generate", body), ("/run", packed)):
            with socket.create_connection(("127.0.0.1", port)) as line:
                head = f"POST {path} HTTP/1.1\r\nHost: localhost\r\nContent-Length: {len(data)}\r\n\r\n"
                line.sendall(head.encode() + data)
                time.sleep(0.3)
        with socket.create_connection(("127.0.0.1", port)) as line:  # this one goes in the middle of its body
            line.sendall(b"POST /generate HTTP/1.1\r\nHost: localhost\r\nContent-Length: 100\r\n\r\n{")
            time.sleep(0.1)
        end_by_request(server)  # what is at work would be waited for
        assert server.process.wait(60) == 0, server.text
        assert "Traceback" not in server.text


# ------------------------------------------------------------------------------------------- who may do what, and how


@pytest.fixture(scope="module")
def guarded() -> Iterator[VLLMServer]:
    server = VLLMServer(
        LLMConfig("the-model", max_model_len=100), engine=EchoEngine(), transport=HttpTransport(max_body_mib=1)
    )
    with server:
        yield server


@pytest.fixture(scope="module")
def token(guarded: VLLMServer) -> str:
    return guarded.record().token


def port_of(server: VLLMServer) -> int:
    assert server.port is not None
    return server.port


def test_without_the_token_no_method_on_any_route_has_an_effect(guarded: VLLMServer, token: str) -> None:
    body = b'{"prompts": ["a"]}'
    near = [None, "", "wrong", token[:-1], token + "x", token.swapcase(), f" {token}", f"{token} {token}"]
    for method in METHODS:
        for route in ROUTES:
            for wrong in near:
                reply = ask(port_of(guarded), method, route, body, token=wrong)
                where = f"{method} {route} with {wrong!r}: {reply}"
                if (method, route) == ("GET", "/health"):
                    assert reply.status == 200, where
                elif wrong == f" {token}":
                    continue  # spaces around a header's value mean nothing
                elif method == "CONNECT":
                    assert reply.status in (400, 401), where
                else:
                    assert reply.status == 401, where
    assert guarded.is_running()


def test_with_the_token_only_the_routes_and_their_methods_are_there(guarded: VLLMServer, token: str) -> None:
    for method in METHODS:
        for route in ROUTES:
            if (method, route) == ("GET", "/health") or method == "CONNECT":
                continue
            reply = ask(port_of(guarded), method, route, b"", token=token)
            if route == "/shutdown":
                status = 403
            elif route in ("/health", "/chat", "/generate", "/run", "/cancel"):
                status = 400 if method == "POST" and route != "/health" else 405
            else:
                status = 404
            assert reply.status == status, f"{method} {route}: {reply}"
            if method != "HEAD":
                assert reply.json["error"]["status"] == reply.status
    assert guarded.is_running()


def test_only_a_post_with_the_control_secret_ends_a_server(guarded: VLLMServer) -> None:
    control = guarded.record().control
    assert control is not None
    for method in METHODS:
        if method not in ("POST", "CONNECT"):
            assert ask(port_of(guarded), method, "/shutdown", b"", token=control).status == 405
    for route in ("/chat", "/generate", "/run", "/cancel"):
        assert ask(port_of(guarded), "POST", route, b"", token=control).status == 401
    assert ask(port_of(guarded), "POST", "/shutdown", b"", token=control[:-1]).status == 401
    assert guarded.is_running()


def test_health_is_open_and_says_nothing_of_the_model(guarded: VLLMServer) -> None:
    reply = ask(port_of(guarded), "GET", "/health")
    assert (reply.status, reply.body) == (200, b'{"status":"ok"}')
    assert "server" not in reply.headers


def test_tokens_in_other_places_do_not_count(guarded: VLLMServer, token: str) -> None:
    port = port_of(guarded)
    assert ask(port, "POST", f"/generate?token={token}", {"prompts": ["a"]}).status == 401
    both = f"Authorization: Bearer wrong\r\nAuthorization: Bearer {token}\r\n"
    for headers in (both, f"Authorization: {token}\r\n", f"Authorization: Basic {token}\r\n", f"Cookie: {token}\r\n"):
        with socket.create_connection(("127.0.0.1", port)) as line:
            line.sendall(f"POST /shutdown HTTP/1.1\r\nHost: localhost\r\n{headers}Connection: close\r\n\r\n".encode())
            assert line.recv(1000).startswith(b"HTTP/1.1 401"), headers
    assert guarded.is_running()


TARGETS = [
    "//shutdown",
    "/%73hutdown",
    "/shutdown/",
    "/shutdown;x",
    "/shutdown;",
    "/./shutdown",
    "/health/../shutdown",
    "/health%2f..%2fshutdown",
    "/health/shutdown",
    "/health;/shutdown",
    "/shutdown?x=/health",
    "/SHUTDOWN",
    "/shutdown%00",
    "/shutdown%0a",
    "http://evil.example/shutdown",
    "http://127.0.0.1/health/../shutdown",
]


@pytest.mark.parametrize("target", TARGETS)
def test_no_spelling_of_a_path_goes_round_the_token(guarded: VLLMServer, token: str, target: str) -> None:
    for method in ("GET", "POST"):
        assert ask(port_of(guarded), method, target, b"").status in (400, 401, 404, 405)
    exact = ("/%73hutdown", "/shutdown?x=/health", "http://evil.example/shutdown")  # these are /shutdown
    expected = (403,) if target in exact else (400, 404)
    assert ask(port_of(guarded), "POST", target, b"", token=token).status in expected
    assert guarded.is_running()


@pytest.mark.parametrize(
    "hosts",
    [
        [],
        [""],
        ["evil.example"],
        ["a/?x="],
        ["127.0.0.1/?x="],
        ["127.0.0.1:80/?x="],
        ["127.0.0.1@evil.example"],
        ["127.0.0.1.evil.example"],
        ["127.0.0.1:x"],
        ["[::1"],
        ["[::1]evil.example"],
        ["localhost,evil.example"],
        ["127.0.0.1", "127.0.0.1"],
        ["evil.example", "127.0.0.1"],
        ["127.0.0.1", "evil.example"],
    ],
    ids=str,
)
def test_a_host_header_that_names_another_server_is_refused(guarded: VLLMServer, token: str, hosts: list[str]) -> None:
    for path, method in (("/health", "GET"), ("/generate", "POST")):
        reply = ask(port_of(guarded), method, path, {"prompts": ["a"]}, token=token, hosts=hosts)
        assert reply.status == 400, reply
        assert "Host header" in reply.json["error"]["message"]


@pytest.mark.parametrize("host", ["127.0.0.1", "localhost:1234", "LOCALHOST", "[::1]:80"])
def test_a_host_header_that_names_this_server_is_taken(guarded: VLLMServer, host: str) -> None:
    assert ask(port_of(guarded), "GET", "/health", hosts=[host]).status == 200


# ------------------------------------------------------------------------------------------------------- wrong bodies

DEEP = b"[" * 100_000
BODIES: dict[str, bytes] = {
    "empty": b"",
    "not JSON": b"hello",
    "truncated": b'{"prompts": ["a',
    "trailing": b'{"prompts": []} x',
    "not UTF-8": b'{"prompts": ["\xff\xfe"]}',
    "UTF-16": '{"prompts": ["a"]}'.encode("utf-16"),
    "a high surrogate alone": rb'{"prompts": ["\ud800"]}',
    "a low surrogate alone": rb'{"prompts": ["\udc00 x"]}',
    "a surrogate in bytes": b'{"prompts": ["\xed\xa0\x80"]}',
    "NUL": b'{"prompts": ["a\0b"]}',
    "only NULs": b"\0" * 100,
    "BOM": b'\xef\xbb\xbf{"prompts": ["a"]}',
    "a key twice": b'{"prompts": ["a"], "prompts": ["b"]}',
    "a parameter twice": b'{"prompts": ["a"], "params": {"n": 1, "n": 2}}',
    "nested": DEEP,
    "nested and closed": DEEP + b"]" * 100_000,
    "nested parameters": b'{"prompts": ["a"], "params": {"stop": ' + DEEP + b"]" * 100_000 + b"}}",
    "nested prompts": b'{"prompts": ' + DEEP + b"]" * 100_000 + b"}",
    "a list": b'["a"]',
    "null": b"null",
    "a text as prompts": b'{"prompts": "a"}',
    "a number as a prompt": b'{"prompts": [1]}',
    "null as a prompt": b'{"prompts": [null]}',
    "texts as token ids": b'{"prompts": [["a"]]}',
    "fractions as token ids": b'{"prompts": [[1.5]]}',
    "no prompts": b"{}",
    "an unknown field": b'{"prompts": ["a"], "modle": "m"}',
    "a list as parameters": b'{"prompts": ["a"], "params": [1]}',
    "a huge number": b'{"prompts": ["a"], "params": {"seed": ' + b"9" * 50 + b"}}",
    "a vast number": b'{"prompts": ["a"], "params": {"seed": ' + b"9" * 5000 + b"}}",
    "a number beyond floats": b'{"prompts": ["a"], "params": {"temperature": 1e999}}',
    "NaN": b'{"prompts": ["a"], "params": {"temperature": NaN}}',
    "Infinity": b'{"prompts": ["a"], "params": {"temperature": Infinity}}',
    "too large": b'{"prompts": ["' + b"a" * (1 << 20) + b'"]}',
    "an empty prompt": b'{"prompts": ["fine", ""]}',
    "a prompt too long": b'{"prompts": ["' + b"a " * 100 + b'"]}',
    "an unknown parameter": b'{"prompts": ["a"], "params": {"max_tokenz": 1}}',
    "a parameter of another type": b'{"prompts": ["a"], "params": {"max_tokens": "many"}}',
    "a truth for a number": b'{"prompts": ["a"], "params": {"n": true}}',
    "no completions": b'{"prompts": ["a"], "params": {"n": 0}}',
    "a million completions": b'{"prompts": ["a"], "params": {"n": 1000000}}',
    "a negative temperature": b'{"prompts": ["a"], "params": {"temperature": -1}}',
    "no tokens": b'{"prompts": ["a"], "params": {"max_tokens": 0}}',
    "long stop strings": b'{"prompts": ["a"], "params": {"stop": ["' + b"a" * 1000 + b'"]}}',
    "a private parameter": b'{"prompts": ["a"], "params": {"_all_stop_token_ids": [1]}}',
}
CHATS: dict[str, bytes] = {
    "one conversation": b'{"conversations": [{"role": "user", "content": "a"}]}',
    "no role": b'{"conversations": [[{"content": "a"}]]}',
    "no content": b'{"conversations": [[{"role": "user"}]]}',
    "a misspelt content": b'{"conversations": [[{"role": "user", "contents": "a"}]]}',
    "tool calls in a text": b'{"conversations": [[{"role": "user", "content": "a", "tool_calls": "f"}]]}',
    "a template in its variables": (
        b'{"conversations": [[{"role": "user", "content": "a"}]], "chat_template_kwargs": {"chat_template": "x"}}'
    ),
    "an image at a URL": (
        b'{"conversations": [[{"role": "user", "content": [{"type": "image_url", "image_url": "http://a/b.png"}]}]]}'
    ),
    "an image in a file": (
        b'{"conversations": [[{"role": "user", "content": [{"type": "image", "image": "file:///etc/passwd"}]}]]}'
    ),
    "another medium in place of an image": (
        b'{"conversations": [[{"role": "user", "content": [{"type": "input_image", "image_url": "data:,"}]}]]}'
    ),
    "a template": b'{"conversations": [], "chat_template": "x"}',
    "an empty conversation": b'{"conversations": [[]]}',
    "prompts": b'{"prompts": ["a"]}',
}


def is_refused(reply: Reply) -> None:
    assert 400 <= reply.status < 500, reply
    assert reply.headers["content-type"] == "application/json"
    assert reply.json.keys() == {"error"}
    assert reply.json["error"].keys() == {"status", "message"}
    assert reply.json["error"]["status"] == reply.status
    message = reply.json["error"]["message"]
    assert message, "a refusal must say why"
    assert "\n" not in message
    assert len(message) < 300


@pytest.mark.parametrize("kind", BODIES)
def test_a_wrong_body_is_refused_with_a_sentence(guarded: VLLMServer, token: str, kind: str) -> None:
    is_refused(reply := ask(port_of(guarded), "POST", "/generate", BODIES[kind], token=token))
    assert (reply.status == 413) is (kind == "too large")
    is_refused(ask(port_of(guarded), "POST", "/chat", BODIES[kind], token=token))


@pytest.mark.parametrize("kind", CHATS)
def test_a_wrong_conversation_is_refused_with_a_sentence(guarded: VLLMServer, token: str, kind: str) -> None:
    is_refused(ask(port_of(guarded), "POST", "/chat", CHATS[kind], token=token))


PIECES: dict[str, bytes] = {
    **{kind: body for kind, body in BODIES.items() if len(body) < 300_000},
    "random bytes": bytes(range(256)) * 10,
    "nested msgpack": b"\x91" * 100_000,
    "truncated msgpack": msgspec.msgpack.encode(RunRequest([Group(["a"])]))[:-3],
    "msgpack of another kind": msgspec.msgpack.encode({"prompts": ["a"]}),
    "msgpack with an unknown field": msgspec.msgpack.encode({"groups": [], "deadline": 1}),
    "an image at a URL": msgspec.msgpack.encode(
        {
            "groups": [
                {"prompts": [{"messages": [{"role": "user", "content": [{"type": "image", "image": "http://a"}]}]}]}
            ]
        }
    ),
    "msgpack that is not UTF-8": msgspec.msgpack.encode(RunRequest([Group(["abc"])])).replace(b"abc", b"\xff\xfe\xfd"),
    "a beat that never comes": msgspec.msgpack.encode({"groups": [], "heartbeat": float("inf")}),
    "a beat without pause": msgspec.msgpack.encode({"groups": [], "heartbeat": 1e-300}),
    "a beat that is no number": msgspec.msgpack.encode({"groups": [], "heartbeat": float("nan")}),
    "a beat backwards": msgspec.msgpack.encode({"groups": [], "heartbeat": -1.0}),
}


@pytest.mark.parametrize("kind", PIECES)
def test_garbage_between_client_and_server_is_refused_with_a_sentence(
    guarded: VLLMServer, token: str, kind: str
) -> None:
    is_refused(ask(port_of(guarded), "POST", "/run", PIECES[kind], token=token))


def test_a_body_without_a_length_is_bounded_too(guarded: VLLMServer, token: str) -> None:
    with socket.create_connection(("127.0.0.1", port_of(guarded)), timeout=60) as line:
        head = f"POST /generate HTTP/1.1\r\nHost: localhost\r\nAuthorization: Bearer {token}\r\n"
        line.sendall(f"{head}Transfer-Encoding: chunked\r\n\r\n".encode())
        for _ in range(20):
            line.sendall(b"10000\r\n" + b"a" * 0x10000 + b"\r\n")
        assert line.recv(1000).startswith(b"HTTP/1.1 413")


def test_after_all_of_this_the_server_works(guarded: VLLMServer) -> None:
    with guarded.client() as client:
        assert client.generate(["a b c"]) == [["a b c"]]
    log = guarded.status().log
    assert log is not None
    assert "Traceback" not in log.read_text()


def test_a_piece_larger_than_the_server_takes_is_sent_in_smaller_ones(guarded: VLLMServer) -> None:
    prompts = ["x" * 20_000 + str(index) for index in range(200)]  # 4 MB, of which the server takes 1 MiB at once
    with guarded.client() as client:
        assert client.generate(prompts) == [[prompt] for prompt in prompts]
        results = client.generate(["a", "x" * (2 << 20), "b"], on_error="return")
    assert (results[0], results[2]) == (["a"], ["b"])
    assert "larger than" in str(results[1])


# ---------------------------------------------------------------------------------------------------------- strangers


@contextmanager
def decoy(body: bytes, instance: str | None = None) -> Iterator[int]:
    """Something that answers 200 to everything."""

    class Handler(BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            self.rfile.read(int(self.headers.get("Content-Length", "0")))
            self.send_response(200)
            if instance is not None:
                self.send_header("x-gserve-instance", instance)
            self.send_header("Content-Length", str(len(body)))
            self.end_headers()
            self.wfile.write(body)

        do_POST = do_GET

        def log_message(self, *_: Any) -> None:
            pass

    with ThreadingHTTPServer(("127.0.0.1", 0), Handler) as server:
        thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.01})
        thread.start()
        yield server.server_address[1]
        server.shutdown()
        thread.join()


@pytest.mark.parametrize("instance", [None, "another"])
def test_a_stranger_on_the_port_is_refused(instance: str | None) -> None:
    with decoy(b'{"status":"ok"}', instance) as port, VLLMClient(port=port, instance="expected") as client:
        with pytest.raises(TransportError, match="is not the server that was started there"):
            client.health()
        with pytest.raises(TransportError, match="is not the server that was started there"):
            client.shutdown()
        with pytest.raises(BatchError, match="is not the server that was started there"):
            client.generate(["a"])


@pytest.mark.parametrize("body", [b"", b"ok", b"<html>hello, this is a web server</html>", b"\0\0\0\1x"])
def test_what_is_no_gserve_server_is_no_answer(body: bytes) -> None:
    with decoy(body) as port, VLLMClient(port=port) as client:
        with pytest.raises(TransportError, match="is not a gserve server"):
            client.health()
        with pytest.raises(BatchError, match="1 of 1 items failed"):
            client.generate(["a"])


def test_another_gserve_server_on_the_port_is_refused(guarded: VLLMServer, token: str) -> None:
    with VLLMClient(port=port_of(guarded), token=token, instance="expected") as client:
        with pytest.raises(TransportError, match="is not the server that was started there"):
            client.health()
        with pytest.raises(BatchError):
            client.generate(["a"])
        with pytest.raises(TransportError):
            client.shutdown()
