"""OpenAI's API of a server: what clients see while it starts, works, is full, drains, and dies."""

import json
import os
import signal
import socket
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from http.client import HTTPConnection
from pathlib import Path
from typing import Any

import httpx
import psutil
import pytest

from gserve import LLMConfig, ServeConfig, VLLMServer
from gserve_core.engines.echo import EchoEngine
from tests.gserve_transports.test_http import ByHand, Reply, ask, by_hand, until

CHAT = "/v1/chat/completions"
LONG = "w " * 1000


def chat(content: str, **more: Any) -> dict[str, Any]:
    return {"model": "m", "messages": [{"role": "user", "content": content}], "max_tokens": 1000} | more


@contextmanager
def stream(port: int, body: dict[str, Any]) -> Iterator[Iterator[Any]]:
    """Ask for an answer in events; yield them as they come. The iterator raises RemoteProtocolError after a cut."""
    with httpx.stream("POST", f"http://127.0.0.1:{port}{CHAT}", json=body | {"stream": True}, timeout=30) as reply:
        assert reply.status_code == 200
        lines = (line.removeprefix("data: ") for line in reply.iter_lines() if line)
        yield (line if line == "[DONE]" else json.loads(line) for line in lines)


@pytest.fixture(scope="module")
def fast(tmp_path_factory: pytest.TempPathFactory) -> Iterator[int]:
    with by_hand(tmp_path_factory.mktemp("fast")) as server:
        yield server.ready()


def error_of(reply: Reply) -> tuple[int, str, str]:
    """Return status, type and message of an error in OpenAI's form."""
    error = reply.json["error"]
    assert error["code"] == reply.status
    return reply.status, error["type"], error["message"]


# ------------------------------------------------------------------------------------------------------- in good times


def test_an_answer_comes_whole_or_in_events(fast: int) -> None:
    whole = ask(fast, "POST", CHAT, chat("one two three", n=2))
    assert [choice["message"]["content"] for choice in whole.json["choices"]] == ["one two three"] * 2
    with stream(fast, chat("one two three")) as events:
        *words, last, done = events
    assert [event["choices"][0]["delta"]["content"] for event in words] == ["one", " two", " three"]
    assert last["choices"][0]["finish_reason"] == "stop"
    assert done == "[DONE]"


def test_a_stream_ends_as_the_whole_answer_does_and_tells_its_usage(fast: int) -> None:
    asked = chat("one two three four", max_tokens=2)
    whole = ask(fast, "POST", CHAT, asked).json
    with stream(fast, asked | {"stream_options": {"include_usage": True}}) as events:
        first, _, last, usage, _ = events
    assert first["choices"][0]["delta"] == {"role": "assistant", "content": "one"}
    assert last["choices"][0]["finish_reason"] == whole["choices"][0]["finish_reason"] == "length"
    assert (usage["choices"], usage["usage"]) == ([], whole["usage"])


def test_events_come_as_they_are_made(tmp_path: Path) -> None:
    with by_hand(tmp_path, latency=0.2) as server, stream(server.ready(), chat("w " * 300)) as events:
        began = time.monotonic()
        assert len([next(events) for _ in range(3)]) == 3
        assert time.monotonic() - began < 30, "the whole answer takes a minute"


def test_models_and_completions_are_there(fast: int) -> None:
    assert [model["id"] for model in ask(fast, "GET", "/v1/models").json["data"]] == ["m"]
    reply = ask(fast, "POST", "/v1/completions", {"model": "m", "prompt": ["a b", "c"], "max_tokens": 1})
    assert [choice["text"] for choice in reply.json["choices"]] == ["a", "c"]


# ---------------------------------------------------------------------------------------------------------- is refused


def test_a_wrong_request_has_an_error_in_the_form_of_openai(fast: int) -> None:
    assert error_of(ask(fast, "POST", CHAT, b"{"))[:2] == (400, "BadRequestError")
    assert "expected 1 to 128" in error_of(ask(fast, "POST", CHAT, chat("a", n=1000)))[2]
    assert error_of(ask(fast, "POST", CHAT, chat("a", model="other")))[:2] == (404, "NotFoundError")
    assert error_of(ask(fast, "POST", "/v1/embeddings", {"input": "a"}))[:2] == (404, "NotFoundError")
    reply = ask(fast, "GET", CHAT)
    assert error_of(reply)[:2] == (405, "MethodNotAllowedError")
    assert reply.headers["allow"] == "POST"


@pytest.mark.parametrize("path", ["/v1/load_lora_adapter", "/invocations", "/ping", "/v1/models/m", "/load", "/v1"])
def test_no_other_route_is_let_through(fast: int, path: str) -> None:
    assert ask(fast, "POST", path, {}).status == 404
    assert ask(fast, "GET", path).status == 404


def test_the_token_is_the_api_key(tmp_path: Path) -> None:
    with by_hand(tmp_path, token="a-token") as server:
        port = server.ready()
        assert error_of(ask(port, "GET", "/v1/models"))[:2] == (401, "UnauthorizedError")
        assert error_of(ask(port, "POST", CHAT, chat("a"), token="a-tokem"))[0] == 401
        assert ask(port, "POST", CHAT, chat("a"), token="a-token").status == 200


@pytest.mark.parametrize("is_chunked", [False, True])
def test_a_body_that_is_too_large_gets_a_readable_answer(tmp_path: Path, is_chunked: bool) -> None:
    with by_hand(tmp_path, "--transport", '{"type": "http", "max_body_mib": 2}') as server:
        connection = HTTPConnection("127.0.0.1", server.ready(), timeout=60)
        body: Any = iter([b"x" * (1 << 20)] * 10) if is_chunked else b"x" * (10 << 20)
        connection.request("POST", CHAT, body, encode_chunked=is_chunked)
        reply = connection.getresponse()
        assert reply.status == 413
        assert "larger than 2097152 bytes" in json.loads(reply.read())["error"]["message"]
        connection.close()


def test_a_server_that_starts_says_so(tmp_path: Path) -> None:
    with by_hand(tmp_path, load_time=60) as server:
        reply = ask(server.port, "POST", CHAT, chat("a"))
        status, kind, message = error_of(reply)
        assert (status, kind) == (503, "ServiceUnavailableError")
        assert message.startswith("the server is starting")
        assert reply.headers["retry-after"] == "1"


def test_a_full_server_says_so_and_counts_every_completion(tmp_path: Path) -> None:
    with by_hand(tmp_path, latency=0.05, capacity=4) as server:
        port = server.ready()
        with stream(port, chat(LONG, n=60)) as events:
            next(events)
            reply = ask(port, "POST", CHAT, chat("a", n=5))
            assert error_of(reply)[:2] == (429, "TooManyRequestsError")
            assert reply.headers["retry-after"] == "1"
            assert ask(port, "POST", CHAT, chat("a", n=2)).status == 200
            assert ask(port, "POST", "/generate", {"prompts": ["a"] * 5}).status == 429, "gserve's items count too"
        until(lambda: ask(port, "POST", CHAT, chat("a", n=5)).status == 200)


# ------------------------------------------------------------------------------------------------------------ the ends


def test_a_client_that_leaves_takes_its_work_with_it(tmp_path: Path) -> None:
    with by_hand(tmp_path, latency=0.05, capacity=1) as server:
        port = server.ready()
        with stream(port, chat(LONG)) as events:
            next(events)
        waiting = socket.create_connection(("127.0.0.1", port))
        body = json.dumps(chat(LONG)).encode()
        head = f"POST {CHAT} HTTP/1.1\r\nHost: 127.0.0.1:{port}\r\nContent-Length: {len(body)}\r\n\r\n"
        waiting.sendall(head.encode() + body)
        time.sleep(0.3)
        waiting.close()
        began = time.monotonic()
        assert ask(port, "POST", CHAT, chat("a")).status == 200
        assert time.monotonic() - began < 10


def test_a_server_that_ends_finishes_its_answers_and_takes_no_more(tmp_path: Path) -> None:
    with by_hand(tmp_path, latency=0.05) as server:
        port = server.ready()
        with stream(port, chat("w " * 60)) as events:
            next(events)
            server.process.send_signal(signal.SIGTERM)
            until(lambda: ask(port, "GET", "/health").status == 503)
            status, _, message = error_of(ask(port, "POST", CHAT, chat("a")))
            assert (status, message) == (503, "the server is draining")
            assert list(events)[-1] == "[DONE]"
        assert server.process.wait(30) == 0


def kill_the_engine(server: ByHand) -> None:
    (engine,) = psutil.Process(server.process.pid).children()
    os.kill(engine.pid, signal.SIGKILL)


def end_at_once(server: ByHand) -> None:
    server.process.send_signal(signal.SIGTERM)
    until(lambda: "SIGTERM" in server.text)
    server.process.send_signal(signal.SIGTERM)


@pytest.mark.parametrize("end", [kill_the_engine, end_at_once])
def test_an_answer_that_has_begun_ends_with_an_error_and_a_cut(tmp_path: Path, end: Callable[[ByHand], None]) -> None:
    with by_hand(tmp_path, latency=0.05) as server:
        with stream(server.ready(), chat(LONG)) as events:
            seen = [next(events)]
            end(server)
            with pytest.raises(httpx.RemoteProtocolError):
                seen.extend(events)
        assert "the server ended before this request was finished" in seen[-1]["error"]["message"]
        assert all("choices" in event for event in seen[:-1])
        server.process.wait(30)


@pytest.mark.parametrize("end", [kill_the_engine, end_at_once])
@pytest.mark.parametrize("is_stream", [False, True])
def test_an_answer_that_has_not_begun_becomes_a_503(
    tmp_path: Path, end: Callable[[ByHand], None], is_stream: bool
) -> None:
    with by_hand(tmp_path, hang_on="stop") as server:
        port = server.ready()
        threading.Timer(1.5, end, [server]).start()
        reply = ask(port, "POST", CHAT, chat("stop", stream=is_stream))
        assert error_of(reply) == (
            503, "ServiceUnavailableError", "the server ended before this request was finished: send it again",
        )  # fmt: skip
        server.process.wait(30)


def test_a_client_that_reads_slowly_does_not_make_the_engine_look_hung() -> None:
    config = ServeConfig(stall_timeout=2.0, max_restarts=0)
    llm = LLMConfig("m", max_model_len=300_000)
    with VLLMServer(llm, serve_config=config, engine=EchoEngine()) as server:
        record = server.record()
        body = json.dumps(chat("w " * 100_000, max_tokens=100_000, stream=True)).encode()
        with socket.create_connection(("127.0.0.1", record.address.port)) as reading:
            head = f"POST {CHAT} HTTP/1.1\r\nHost: 127.0.0.1\r\nAuthorization: Bearer {record.token}\r\n"
            reading.sendall(f"{head}Content-Length: {len(body)}\r\n\r\n".encode() + body)
            reading.recv(1000)
            time.sleep(5.0)
        assert ask(record.address.port, "POST", CHAT, chat("a"), token=record.token).status == 200
        assert server.record().instance == record.instance


def test_an_engine_that_hangs_is_noticed_by_such_a_request_alone() -> None:
    config = ServeConfig(stall_timeout=2.0, max_restarts=0)
    with VLLMServer(LLMConfig("m"), serve_config=config, engine=EchoEngine(latency=0.05, hang_on="stop")) as server:
        record = server.record()
        reply = ask(record.address.port, "POST", CHAT, chat("stop"), token=record.token)
        assert error_of(reply)[0] == 503
