"""Who may do what over HTTP: each refusal is held to have had no effect, not only the right status."""

import json
import os
import subprocess

import msgspec
import pytest

from gserve_core.messages import Group, RunRequest
from tests.gserve_transports.noted import Noted, exchange, served

METHODS = ("GET", "HEAD", "POST", "PUT", "PATCH", "DELETE", "OPTIONS", "TRACE", "CONNECT")
BODIES = {
    "/chat": json.dumps({"conversations": [[{"role": "user", "content": "a"}]]}).encode(),
    "/generate": json.dumps({"prompts": ["a"]}).encode(),
    "/run": msgspec.msgpack.encode(RunRequest([Group(["a"])])),
    "/cancel": json.dumps({"id": "a-request", "items": [0]}).encode(),
    "/shutdown": b"",
}
EFFECTS = {
    "/chat": "run_whole", "/generate": "run_whole", "/run": "run", "/cancel": "cancel", "/shutdown": "shut_down",
}  # fmt: skip
UNKNOWN = ("/", "/docs", "/redoc", "/openapi.json", "/v1/models", "/drain", "/nothing", "*", "")
TOKEN, CONTROL = "a-token-of-this-server", "the-control-secret"
NEAR = {
    "none": None,
    "an empty one": b"Bearer ",
    "no scheme": TOKEN.encode(),
    "another scheme": f"Basic {TOKEN}".encode(),
    "a wrong one": b"Bearer wrong",
    "one character short": f"Bearer {TOKEN[:-1]}".encode(),
    "one character long": f"Bearer {TOKEN}x".encode(),
    "another case": f"Bearer {TOKEN.upper()}".encode(),
    "a scheme in another case": f"bearer {TOKEN}".encode(),
    "one space more": f"Bearer  {TOKEN}".encode(),
    "twice": f"Bearer {TOKEN}, Bearer {TOKEN}".encode(),
    "a NUL behind it": f"Bearer {TOKEN}\0".encode(),
    "bytes beyond ASCII": f"Bearer {TOKEN}".encode() + b"\xff\xfe",
    "the control secret's beginning": f"Bearer {CONTROL[:-1]}".encode(),
    "another service's": b"Bearer vvvvvvvvvvvvvvvvvvvvvv",
}


def request(method: str, target: str, authorization: bytes | None, body: bytes = b"", host: str = "localhost") -> bytes:
    head = (
        f"{method} {target} HTTP/1.1\r\nHost: {host}\r\nContent-Length: {len(body)}\r\nConnection: close\r\n".encode()
    )
    if authorization is not None:
        head += b"Authorization: " + authorization + b"\r\n"
    return head + b"\r\n" + body


def status(answer: bytes) -> int:
    assert answer.startswith(b"HTTP/1.1 "), answer[:200]
    return int(answer.split(b" ", 2)[1])


@pytest.mark.parametrize("path", BODIES)
def test_the_right_secret_has_its_effect(noted: Noted, path: str) -> None:
    secret = CONTROL if path == "/shutdown" else TOKEN
    assert status(exchange(noted.port, request("POST", path, f"Bearer {secret}".encode(), BODIES[path]))) == 200
    assert noted.effects == [EFFECTS[path]]


@pytest.mark.parametrize("near", NEAR)
@pytest.mark.parametrize("method", METHODS)
def test_without_the_token_nothing_acts(noted: Noted, method: str, near: str) -> None:
    for target in ("/health", *BODIES, *UNKNOWN):
        answer = exchange(noted.port, request(method, target, NEAR[near], BODIES.get(target, b"")))
        assert not noted.effects, f"{method} {target} did {noted.effects}"
        if (method, target) == ("GET", "/health") and near != "a NUL behind it":
            assert status(answer) == 200
        else:
            assert status(answer) in (400, 401), f"{method} {target}: {answer[:200]!r}"
        assert b"a-token" not in answer


def test_the_series_of_the_engine_need_the_token(noted: Noted) -> None:
    for secret in (None, b"Bearer wrong", f"Bearer {CONTROL}".encode()):
        assert status(exchange(noted.port, request("GET", "/metrics", secret))) == 401
    answer = exchange(noted.port, request("GET", "/metrics", f"Bearer {TOKEN}".encode()))
    assert status(answer) == 200
    assert b"content-type: text/plain; version=0.0.4" in answer


@pytest.mark.parametrize("method", METHODS)
def test_no_other_method_acts_with_either_secret(noted: Noted, method: str) -> None:
    for secret in (TOKEN, CONTROL):
        for path, body in BODIES.items():
            if method != "POST" or (secret == CONTROL) != (path == "/shutdown"):
                answer = exchange(noted.port, request(method, path, f"Bearer {secret}".encode(), body))
                assert status(answer) in (400, 401, 403, 405), f"{method} {path}: {answer[:200]!r}"
                assert not noted.effects, f"{method} {path} did {noted.effects}"


def test_the_token_does_not_end_a_server_that_has_a_control_secret(noted: Noted) -> None:
    answer = exchange(noted.port, request("POST", "/shutdown", f"Bearer {TOKEN}".encode()))
    assert status(answer) == 403
    assert b"requires the server's control secret" in answer
    assert not noted.effects


def test_the_token_ends_a_server_that_has_no_control_secret() -> None:
    api = Noted()
    api.control = None
    with served(api):
        assert status(exchange(api.port, request("POST", "/shutdown", b"Bearer wrong"))) == 401
        assert not api.effects
        assert status(exchange(api.port, request("POST", "/shutdown", f"Bearer {TOKEN}".encode()))) == 200
        assert api.effects == ["shut_down"]


def test_a_control_secret_holds_where_there_is_no_token() -> None:
    api = Noted()
    api.token = None
    with served(api):
        assert status(exchange(api.port, request("POST", "/generate", None, BODIES["/generate"]))) == 200
        assert api.effects == ["run_whole"]
        assert status(exchange(api.port, request("POST", "/shutdown", None))) == 401
        assert api.effects == ["run_whole"]


# ------------------------------------------------------------------------- the path, and what might pass for another

ROUND_ABOUT = [  # what some server, proxy or framework has once taken for /generate, or let pass as /health
    "//generate", "///generate", "/generate/", "/generate;", "/generate;x=1", "/generate?", "/generate?/health",
    "/health?/generate", "/%67enerate", "/%2567enerate", "/generat%65", "/GENERATE", "/.//generate", "/x/../generate",
    "/health/../generate", "/health/..%2fgenerate", "/health%2f%2e%2e%2fgenerate", "/generate%00", "/generate%0a",
    "/generate%0d%0a", "/generate%20", "\\generate", "/\\generate", "/generate\\", "/generate#/health",
    "/health#/generate", "http://localhost/generate", "http://evil.example/generate", "http://evil.example//generate",
    "http://user:pass@localhost/generate", "localhost/generate", "/generate/health", "/health/generate",
    "/health;/generate", "/\u00a0generate",
]  # fmt: skip
HOSTS = ["localhost", "a/?x=", "localhost/health?x=", "localhost/health#", "localhost:80/health/..", "/health", "*", ""]
PREFIXES = ["X-Forwarded-Prefix: /generate", "X-Original-URL: /generate", "X-Rewrite-URL: /health",
            "X-Forwarded-Host: localhost/health?", "X-HTTP-Method-Override: GET", "Forwarded: for=127.0.0.1",
            "X-Forwarded-For: 127.0.0.1"]  # fmt: skip


@pytest.mark.parametrize("target", ROUND_ABOUT)
def test_no_way_round_to_a_route_goes_round_its_guard(noted: Noted, target: str) -> None:
    for method in ("POST", "GET"):
        for host in HOSTS:
            raw = request(method, target, None, BODIES["/generate"], host=host)
            answer = exchange(noted.port, raw)
            is_health = method == "GET" and target.startswith("/health") and target[7:8] in ("?", "#")
            allowed = (200, 400, 401) if is_health else (400, 401, 404)
            assert status(answer) in allowed, f"{method} {target} with Host {host!r}: {answer[:200]!r}"
            assert not noted.effects


@pytest.mark.parametrize("header", PREFIXES)
@pytest.mark.parametrize("path", ["/health", *BODIES])
def test_no_header_makes_one_route_another(noted: Noted, path: str, header: str) -> None:
    raw = request("POST", path, None, BODIES.get(path, b"")).replace(b"\r\n", f"\r\n{header}\r\n".encode(), 1)
    assert status(exchange(noted.port, raw)) == 401
    assert not noted.effects


SMUGGLED = {
    "two lengths": b"Content-Length: 0\r\nContent-Length: 40\r\n",
    "a length and chunks": b"Content-Length: 4\r\nTransfer-Encoding: chunked\r\n",
    "chunks by another name": b"Transfer-Encoding: xchunked\r\nContent-Length: 4\r\n",
    "chunks that are not last": b"Transfer-Encoding: chunked, identity\r\n",
    "a negative length": b"Content-Length: -1\r\n",
    "a length with a sign": b"Content-Length: +4\r\n",
    "a length beyond counting": b"Content-Length: 99999999999999999999999\r\n",
    "a folded header": b"Content-Length:\r\n 4\r\n",
    "a space before the colon": b"Content-Length : 4\r\n",
    "a bare line feed": b"X: a\nContent-Length: 4\r\n",
}


@pytest.mark.parametrize("kind", SMUGGLED)
def test_no_request_is_smuggled_within_another(noted: Noted, kind: str) -> None:
    inner = request("POST", "/shutdown", f"Bearer {CONTROL}".encode())
    chunk = b"%x\r\n%s\r\n0\r\n\r\n" % (len(inner), inner)
    head = b"GET /health HTTP/1.1\r\nHost: localhost\r\n" + SMUGGLED[kind]
    answer = exchange(noted.port, head + b"Connection: close\r\n\r\n" + chunk)
    assert answer.count(b"HTTP/1.1 ") <= 1, answer
    assert not noted.effects


# ---------------------------------------------------------------------------------------------------- other people


@pytest.mark.skipif(os.getuid() != 0, reason="only root may become somebody else")
def test_another_user_of_the_machine_cannot_end_a_server(
    noted: Noted, tmp_path_factory: pytest.TempPathFactory
) -> None:
    for secret in (None, "", "wrong"):
        raw = request("POST", "/shutdown", None if secret is None else f"Bearer {secret}".encode())
        ran = subprocess.run(
            ["bash", "-c", f"exec 3<>/dev/tcp/127.0.0.1/{noted.port}; id -u; cat >&3; cat <&3"],
            input=raw, capture_output=True, check=True, user=65534, group=65534, extra_groups=[], cwd="/", timeout=60,
        )  # fmt: skip
        uid, _, answer = ran.stdout.partition(b"\n")
        assert (uid, status(answer)) == (b"65534", 401)
    assert not noted.effects
