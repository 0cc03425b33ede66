"""The gateway over real servers and sockets: one address, its key, and what clients see when servers die."""

import json
import os
import signal
import socket
import subprocess
import threading
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import httpx
import msgspec
import psutil
import pytest

import gserve
from gserve import ConfigError, GatewayConfig, GserveError, LaunchError, LLMConfig, ServeConfig, VLLMService
from gserve_core.doctor.examination import check_config
from gserve_core.engines.echo import EchoEngine
from gserve_core.messages import Group, RunRequest
from gserve_core.overview import ServiceOverview
from gserve_core.process import openai_face
from gserve_core.testing import our_processes
from tests.gserve_core.fake_servers import until
from tests.listeners import server_pid

LLM = LLMConfig("m", max_model_len=200_000)
CHAT = "/v1/chat/completions"


def chat(content: str, **more: Any) -> dict[str, Any]:
    return {"model": "m", "messages": [{"role": "user", "content": content}], "max_tokens": 10_000} | more


@contextmanager
def launched(servers: int = 2, *, gateway: GatewayConfig | None = None, **engine: Any) -> Iterator[VLLMService]:
    serve = ServeConfig(servers=servers, max_restarts=1000)
    with VLLMService(LLM, serve, engine=EchoEngine(**engine), gateway=gateway or GatewayConfig()) as service:
        yield service


def client(service: VLLMService, **headers: str) -> httpx.Client:
    """Return a client of the gateway, which sends its key unless other headers are given."""
    assert service.base_url is not None
    root = service.base_url.removesuffix("/v1")
    given = headers or {"Authorization": f"Bearer {service.api_key}"}
    return httpx.Client(base_url=root, headers=given, timeout=60, verify=False)


@contextmanager
def stream(asking: httpx.Client, body: dict[str, Any]) -> Iterator[Iterator[Any]]:
    """Ask for an answer in events; yield them as they come. The iterator raises RemoteProtocolError after a cut."""
    with asking.stream("POST", CHAT, json=body | {"stream": True}) as reply:
        assert reply.status_code == 200
        lines = (line.removeprefix("data: ") for line in reply.iter_lines() if line)
        yield (line if line == "[DONE]" else json.loads(line) for line in lines)


def text_of(reply: httpx.Response) -> Any:
    return reply.json()["choices"][0]["message"]["content"]


def error_of(reply: httpx.Response) -> tuple[int, str]:
    return reply.status_code, reply.json()["error"]["message"]


@pytest.fixture(scope="module")
def fast() -> Iterator[VLLMService]:
    with launched() as service:
        yield service


# ------------------------------------------------------------------------------------------------------- in good times


def test_all_servers_answer_at_one_address(fast: VLLMService) -> None:
    assert fast.base_url is not None
    assert fast.base_url.endswith("/v1")
    with client(fast) as asking:
        assert asking.get("/health").json() == {"status": "ok"}
        assert [model["id"] for model in asking.get("/v1/models").json()["data"]] == ["m"]
        assert text_of(asking.post(CHAT, json=chat("one two"))) == "one two"
        assert asking.post("/generate", json={"prompts": ["a b"]}).json()[0][0]["text"] == "a b"
        conversation = [{"role": "user", "content": "hello"}]
        assert asking.post("/chat", json={"conversations": [conversation]}).json()[0][0]["text"] == "hello"
        with stream(asking, chat("one two three")) as events:
            *words, _, done = events
        assert [event["choices"][0]["delta"]["content"] for event in words] == ["one", " two", " three"]
        assert done == "[DONE]"


def test_an_error_of_a_server_reaches_the_client_as_it_is(fast: VLLMService) -> None:
    with client(fast) as asking:
        assert "expected 1 to 128, got 1000" in error_of(asking.post(CHAT, json=chat("a", n=1000)))[1]
        assert error_of(asking.post(CHAT, json=chat("a", model="x"))) == (404, "The model `x` does not exist.")
        assert error_of(asking.post("/generate", json={"prompt": "a"}))[0] == 422
        assert error_of(asking.post("/v1/embeddings", json={"input": "a"}))[0] == 404


def test_a_connection_serves_many_requests(fast: VLLMService) -> None:
    with client(fast) as asking, ThreadPoolExecutor(16) as pool:
        replies = pool.map(lambda number: asking.post(CHAT, json=chat(f"number {number}")), range(400))
        assert [text_of(reply) for reply in replies] == [f"number {number}" for number in range(400)]


def test_a_large_body_and_a_large_answer_come_through_whole(fast: VLLMService) -> None:
    words = " ".join(f"word{number}" for number in range(90_000))
    with client(fast) as asking:
        assert text_of(asking.post(CHAT, json=chat(words, max_tokens=90_000))) == words


def test_a_wrong_batch_is_refused_as_a_server_refuses_it(fast: VLLMService) -> None:
    encode = msgspec.msgpack.encode
    with client(fast) as asking:
        assert "the body cannot be read" in error_of(asking.post("/run", content=b"{}"))[1]
        for heartbeat in (0.0, 1e9):
            body = encode(RunRequest([Group(["a"])], heartbeat))
            assert error_of(asking.post("/run", content=body)) == (400, "expected a heartbeat from 0.01 to 3600.0 s")
        body = encode(RunRequest([Group(["a", "b"], None, [1])]))
        assert error_of(asking.post("/run", content=body)) == (400, "expected a seed for each prompt")
        assert asking.get("/run").headers["allow"] == "POST"
        for content, status in ((b'{"id": "x", "items": [0]}', 200), (b'{"id": "x"}', 422), (b"x", 400)):
            assert asking.post("/cancel", content=content).status_code == status
        assert "end the service with gserve stop" in error_of(asking.post("/shutdown"))[1]


# -------------------------------------------------------------------------------------------------------------- status


def status(asking: httpx.Client) -> ServiceOverview:
    reply = asking.get("/status")
    assert reply.status_code == 200
    return msgspec.json.decode(reply.content, type=ServiceOverview)


def test_the_status_shows_the_service_and_its_servers(fast: VLLMService) -> None:
    with client(fast) as asking:
        shown = status(asking)
        assert (shown.name, shown.status, shown.seed, shown.waiting) == ("", "ok", LLM.item_seed, 0)
        assert shown.version == gserve.__version__
        assert [(server.name, server.state, server.generation) for server in shown.servers] == [
            (server.name, "ready", 1) for server in fast.servers
        ]
        for server, state in zip(shown.servers, fast.status(), strict=True):
            assert (server.address, server.model, server.log) == (str(state.address), "m", str(state.log))
            assert 0 <= server.seconds <= shown.seconds < 600
        assert asking.post("/status").status_code == 405
    with client(fast, Authorization="Bearer wrong") as stranger:
        assert stranger.get("/status").status_code == 401


def test_the_status_counts_what_runs_and_what_waits() -> None:
    with launched(1, latency=0.3) as service, client(service) as asking, ThreadPoolExecutor(3) as pool:
        asked = [pool.submit(asking.post, CHAT, json=chat("word " * 400)) for _ in range(2)]
        until(lambda: status(asking).servers[0].requests == 2)
        assert status(asking).waiting == 0
        batch = pool.submit(service.generate, ["word " * 400] * 2000)
        until(lambda: status(asking).waiting > 1000)
        service.servers[0].shutdown()
        assert [reply.result().status_code for reply in asked] == [503, 503]
        assert isinstance(batch.exception(), GserveError)
        until(lambda: status(asking).servers[0].state == "stopped")  # a request may pass the news of the end
        (server,) = status(asking).servers
        assert (server.requests, server.address) == (0, None)


def test_the_status_shows_a_death_and_its_cause_after_the_restart_too() -> None:
    with launched(2) as service, client(service) as asking:
        os.kill(server_pid(service.servers[1]), signal.SIGKILL)
        until(lambda: [server.generation for server in status(asking).servers if server.state == "ready"] == [1, 2], 60)
        shown = status(asking)
        assert [server.restarts for server in shown.servers] == [0, 1]
        (ending,) = shown.endings
        assert (ending.server, ending.generation) == ("server-1", 1)
        assert "SIGKILL" in ending.cause
        assert shown.servers[1].seconds < shown.servers[0].seconds
        with client(service) as asking:
            token = service.servers[1].record().token
            assert token not in asking.get("/status").text


def test_the_log_of_a_server_is_followed_in_parts(fast: VLLMService) -> None:
    with client(fast) as asking:
        parts = [asking.get("/logs", params={"server": server.name}).json() for server in fast.servers]
        assert len({part["file"] for part in parts}) == 2
        for part, state in zip(parts, fast.status(), strict=True):
            assert state.log is not None
            text = state.log.read_text()
            assert (part["text"], part["end"]) == (text, len(text.encode()))
            with state.log.open("a") as log:
                log.write("<script>one more</script>\n")
            params = {"server": state.name, "after": part["end"], "file": part["file"]}
            assert asking.get("/logs", params=params).json()["text"] == "<script>one more</script>\n"


@pytest.mark.parametrize(
    ("query", "expected"),
    [
        ("", (400, "expected a server: GET /logs?server=NAME")),
        ("server=server-7", (404, "there is no server 'server-7' here; the servers: server-0, server-1")),
        ("server=../server-0", (404, "there is no server '../server-0' here; the servers: server-0, server-1")),
        ("server=server-0&after=-1", (400, "expected a position in bytes in 'after', got '-1'")),
        ("server=server-0&after=", (400, "expected a position in bytes in 'after', got ''")),
        ("server=server-0&after=" + "9" * 40, (400, f"expected a position in bytes in 'after', got '{'9' * 40}'")),
        ("server=server-0&server=server-1", (400, "expected each parameter once")),
        ("server=server-0&key=x", (400, "unknown parameter 'key'; there are: server, after, file")),
    ],
)
def test_a_wrong_question_for_a_log_is_told(fast: VLLMService, query: str, expected: tuple[int, str]) -> None:
    with client(fast) as asking:
        assert error_of(asking.get(f"/logs?{query}")) == expected
    with client(fast, Authorization="Bearer wrong") as stranger:
        assert stranger.get(f"/logs?{query}").status_code == 401


# ---------------------------------------------------------------------------------------------------------------- keys


def test_the_gateway_has_a_key_of_its_own(fast: VLLMService) -> None:
    key, token = fast.api_key, fast.servers[0].record().token
    assert key is not None
    assert len(key) > 40
    wrong = ["x", key[:-1], key + "x", key.swapcase(), token, fast.servers[0].record().control or ""]
    for given in wrong:
        with client(fast, Authorization=f"Bearer {given}") as asking:
            for path in ("/v1/models", CHAT, "/generate", "/run", "/shutdown", "/nothing", "/metrics"):
                assert asking.post(path, json={}).status_code == 401, path
            assert asking.get("/health").status_code == 200
    for headers in ({"x-api-key": key}, {"Authorization": f"Bearer {key}"}):
        with client(fast, **headers) as asking:
            assert asking.get("/v1/models").status_code == 200
    with client(fast, **{"x-api-key": key, "Authorization": f"Bearer {key}x"}) as asking:
        assert asking.get("/v1/models").status_code == 401


@pytest.mark.parametrize("path", ["/health", "/"])
def test_an_open_route_answers_head_as_get_without_a_body_and_has_no_other_method(fast: VLLMService, path: str) -> None:
    for headers in ({"x-nothing": "x"}, {}, {"Authorization": "Bearer wrong"}):
        with client(fast, **headers) as asking:
            whole, head = asking.get(path), asking.head(path)
            assert (whole.status_code, head.status_code, head.content) == (200, 200, b"")
            assert head.headers == whole.headers
            for method in ("POST", "PUT", "DELETE", "OPTIONS", "PATCH", "TRACE"):
                reply = asking.request(method, path)
                assert (reply.status_code, reply.headers["allow"]) == (405, "GET, HEAD"), method
                assert error_of(reply)[1] == f"Method Not Allowed: {method} {path}"


@pytest.mark.parametrize("path", ["/shutdown", "/metrics", "/docs", "/v1", "/v1/load_lora_adapter", "/health"])
def test_no_other_route_is_passed_on(fast: VLLMService, path: str) -> None:
    with client(fast) as asking:
        assert asking.post(path, json={}).status_code == (405 if path in ("/health", "/metrics") else 404)
        assert asking.delete(path).status_code in (404, 405)


def test_a_foreign_host_header_is_refused(fast: VLLMService) -> None:
    with client(fast) as asking:
        assert "allowed_hosts" in error_of(asking.get("/v1/models", headers={"Host": "evil.example"}))[1]
    with launched(1, gateway=GatewayConfig(allowed_hosts=["Llm.Example"])) as service, client(service) as asking:
        assert asking.get("/v1/models", headers={"Host": "llm.example:443"}).status_code == 200


def test_a_key_is_kept_for_a_name_and_no_server_sees_it(monkeypatch: pytest.MonkeyPatch) -> None:
    keys = []
    for _ in range(2):
        with VLLMService(LLM, engine=EchoEngine(), gateway=GatewayConfig(), name="kept") as service:
            keys.append(service.api_key)
            attached = VLLMService.attach("kept")
            assert (attached.base_url, attached.api_key) == (service.base_url, service.api_key)
            attached.shutdown()
    assert keys[0] == keys[1]
    file = Path(os.environ["XDG_STATE_HOME"]) / "gserve" / "keys" / "kept"
    assert file.stat().st_mode & 0o777 == 0o600
    monkeypatch.setenv("GSERVE_API_KEY", "a-key-of-the-environment")
    with VLLMService(LLM, engine=EchoEngine(), gateway=GatewayConfig(), name="kept") as service:
        assert service.api_key == "a-key-of-the-environment"
        found = our_processes()
        assert found
        for process in map(psutil.Process, found):
            assert "a-key-of-the-environment" not in str([process.cmdline(), process.environ()])
    monkeypatch.setenv("GSERVE_API_KEY", "short")
    with pytest.raises(ConfigError, match="GSERVE_API_KEY is not allowed: expected at least 16 characters, got 5"):
        VLLMService(LLM, engine=EchoEngine(), gateway=GatewayConfig()).start()


def test_the_key_of_the_config_is_shown_nowhere() -> None:
    config = GatewayConfig(api_key="a-key-of-the-config")
    assert "a-key-of" not in repr(config)
    with launched(1, gateway=config) as service, client(service) as asking:
        assert service.api_key == "a-key-of-the-config"
        assert asking.get("/v1/models").status_code == 200


def test_https(tmp_path: Path) -> None:
    cert, key = tmp_path / "cert.pem", tmp_path / "key.pem"
    command = ["openssl", "req", "-x509", "-newkey", "rsa:2048", "-nodes", "-subj", "/CN=localhost", "-days", "2"]
    subprocess.run([*command, "-keyout", key, "-out", cert], check=True, capture_output=True)
    config = GatewayConfig(certfile=str(cert), keyfile=str(key))
    with launched(1, gateway=config) as service, client(service) as asking:
        assert service.base_url is not None
        assert service.base_url.startswith("https://")
        assert text_of(asking.post(CHAT, json=chat("one"))) == "one"


def test_a_wrong_certificate_is_told_with_its_file_and_key_before_a_server_starts(tmp_path: Path) -> None:
    made = {}
    for name, how in (("one", "-nodes"), ("two", "-nodes"), ("locked", "-passout pass:secret")):
        cert, key = made[name] = tmp_path / f"{name}-cert.pem", tmp_path / f"{name}-key.pem"
        command = ["openssl", "req", "-x509", "-newkey", "rsa:2048", *how.split(), "-subj", "/CN=localhost"]
        subprocess.run([*command, "-keyout", key, "-out", cert], check=True, capture_output=True)
    cert, key = made["one"]
    nowhere, other, locked = tmp_path / "nowhere.pem", made["two"][1], made["locked"]
    for certfile, keyfile, at, expected in (
        (nowhere, key, "certfile", f"cannot read the certificate '{nowhere}': No such file or directory"),
        (cert, nowhere, "keyfile", f"cannot read the private key '{nowhere}': No such file or directory"),
        (tmp_path, key, "certfile", f"cannot read the certificate '{tmp_path}': Is a directory"),
        (key, key, "certfile", f"'{key}' has no certificate in PEM format"),
        (cert, cert, "keyfile", f"'{cert}' has no private key in PEM format"),
        (cert, other, "keyfile", f"'{other}' is not the key of the certificate in '{cert}'"),
        (*locked, "keyfile", f"'{locked[1]}' needs a password"),
    ):
        config = GatewayConfig(certfile=str(certfile), keyfile=str(keyfile))
        service = VLLMService(LLM, engine=EchoEngine(), gateway=config)
        with pytest.raises(ConfigError) as caught:
            service.start()
        assert str(caught.value).startswith(expected)
        assert caught.value.at == f"$.gateway.{at}"
        assert all(state.generation == 0 for state in service.status())


def test_a_wrong_certificate_in_a_file_is_found_by_a_check_with_its_line(tmp_path: Path) -> None:
    file = tmp_path / "service.yaml"
    file.write_text("llm: {model_name: m}\nengine: {type: echo}\ngateway:\n  certfile: nope.pem\n  keyfile: nope.key\n")
    with pytest.raises(ConfigError) as caught:
        check_config(file)
    assert str(caught.value).startswith(f"{file}:4: cannot read the certificate 'nope.pem': No such file or directory")
    assert str(caught.value).endswith(" - at $.gateway.certfile")


def test_a_port_that_is_taken_is_told(fast: VLLMService) -> None:
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        port = taken.getsockname()[1]
        with (
            pytest.raises(LaunchError, match=f"the gateway cannot start: cannot listen on 127.0.0.1:{port}"),
            launched(1, gateway=GatewayConfig(port=port)),
        ):
            pass
    with pytest.raises(ConfigError, match=r"port 9001 is that of server-1 too \(serve.port: 9000\)"):
        VLLMService(LLM, ServeConfig(servers=2, port=9000), engine=EchoEngine(), gateway=GatewayConfig(port=9001))


def test_a_service_without_a_gateway_has_no_address() -> None:
    with VLLMService(LLM, engine=EchoEngine()) as service:
        assert service.base_url is None
        assert service.api_key is None


# ------------------------------------------------------------------------------------------------------------- trouble


def test_what_a_killed_server_had_not_begun_to_answer_is_answered_by_another() -> None:
    with launched(2, latency=0.3) as service, client(service) as asking, ThreadPoolExecutor(8) as pool:
        replies = [pool.submit(asking.post, CHAT, json=chat(f"a b c {number}")) for number in range(8)]
        time.sleep(0.4)
        os.kill(server_pid(service.servers[0]), signal.SIGKILL)
        assert [text_of(reply.result()) for reply in replies] == [f"a b c {number}" for number in range(8)]


def test_the_engine_of_a_server_may_die_too() -> None:
    with launched(2, latency=0.3) as service, client(service) as asking, ThreadPoolExecutor(8) as pool:
        replies = [pool.submit(asking.post, CHAT, json=chat(f"a b c {number}")) for number in range(8)]
        time.sleep(0.4)
        (engine,) = psutil.Process(server_pid(service.servers[0])).children()
        engine.kill()
        assert [text_of(reply.result()) for reply in replies] == [f"a b c {number}" for number in range(8)]


def test_a_stream_that_has_begun_ends_with_an_error_and_a_cut() -> None:
    with launched(1, latency=0.05) as service, client(service) as asking, stream(asking, chat("w " * 500)) as events:
        seen = [next(events)]
        os.kill(server_pid(service.servers[0]), signal.SIGKILL)
        with pytest.raises(httpx.RemoteProtocolError):
            seen.extend(events)
        assert seen[-1]["error"]["message"] == "the server died before the answer was complete"
        assert "[DONE]" not in seen


def test_a_request_that_kills_servers_is_not_sent_for_ever() -> None:
    with launched(2, die_on="poison") as service, client(service) as asking:
        status, message = error_of(asking.post(CHAT, json=chat("poison")))
        assert (status, message) == (503, "3 servers died while they worked on this request: it is not sent again")
        assert text_of(asking.post(CHAT, json=chat("one"))) == "one"


def test_a_request_waits_for_a_server_that_restarts() -> None:
    with launched(1, load_time=1.0) as service, client(service) as asking:
        os.kill(server_pid(service.servers[0]), signal.SIGKILL)
        assert text_of(asking.post(CHAT, json=chat("one"))) == "one"


def test_a_request_waits_no_longer_than_it_may() -> None:
    config = GatewayConfig(queue_timeout=0.5)
    with launched(1, load_time=3.0, gateway=config) as service, client(service) as asking:
        os.kill(server_pid(service.servers[0]), signal.SIGKILL)
        reply = asking.post(CHAT, json=chat("one"))
        if reply.json()["error"]["message"].startswith("the server"):  # it was asked before its death was known
            reply = asking.post(CHAT, json=chat("one"))
        assert error_of(reply) == (503, "no server became ready in time")
        assert reply.headers["retry-after"] == "1"
        assert asking.get("/health").status_code == 503


def test_a_server_that_is_full_sends_requests_to_the_others_and_then_away() -> None:
    with (
        launched(2, latency=0.05, capacity=2) as service,
        client(service) as asking,
        stream(asking, chat("w " * 2000, n=32)) as one,
    ):
        next(one)
        with stream(asking, chat("w " * 2000, n=32)) as two:
            next(two)
            reply = asking.post(CHAT, json=chat("one", n=3))
            assert reply.status_code == 429
            assert "retry later" in error_of(reply)[1]
            assert reply.headers["retry-after"] == "1"


def test_a_client_that_leaves_takes_its_work_with_it() -> None:
    with launched(1, latency=0.05, capacity=1) as service, client(service) as asking:
        with stream(asking, chat("w " * 2000)) as events:
            next(events)
        with pytest.raises(httpx.ReadTimeout):
            asking.post(CHAT, json=chat("w " * 2000), timeout=0.5)
        began = time.monotonic()
        assert text_of(asking.post(CHAT, json=chat("one"))) == "one"
        assert time.monotonic() - began < 20


def test_a_client_with_a_large_body_that_leaves_takes_its_work_with_it() -> None:
    body = json.dumps(chat("w " * 36_000, max_tokens=100)).encode()
    with launched(1, latency=1.0, capacity=1) as service, client(service) as asking:
        url = asking.base_url
        with socket.create_connection((url.host, url.port)) as leaving:
            head = f"POST {CHAT} HTTP/1.1\r\nHost: {url.host}\r\nAuthorization: Bearer {service.api_key}\r\n"
            leaving.sendall(f"{head}Content-Type: application/json\r\nContent-Length: {len(body)}\r\n\r\n".encode())
            time.sleep(0.3)
            leaving.sendall(body)
            time.sleep(0.5)
        assert text_of(asking.post(CHAT, json=chat("one"), timeout=30)) == "one"


def test_a_service_that_drains_takes_no_more_requests() -> None:
    with launched(1) as service, client(service) as asking:
        assert text_of(asking.post(CHAT, json=chat("one"))) == "one"
        service.drain()
        while (reply := asking.post(CHAT, json=chat("one"))).status_code == 200:
            time.sleep(0.05)
        assert error_of(reply) == (503, "the service is ending")
        assert reply.headers["x-should-retry"] == "false"
        assert asking.get("/health").json() == {"status": "draining"}


def test_a_drain_lets_requests_end_and_takes_no_more() -> None:
    with launched(1, latency=0.05) as service, client(service) as asking:
        with stream(asking, chat("w " * 60)) as events:
            next(events)
            ending = threading.Thread(target=service.shutdown, kwargs={"drain": 30})
            ending.start()
            while asking.get("/health").status_code == 200:
                time.sleep(0.05)
            assert error_of(asking.post(CHAT, json=chat("one")))[0] == 503
            assert list(events)[-1] == "[DONE]"
        ending.join()


def test_a_stream_that_is_ended_by_a_stop_at_once_is_told_so() -> None:
    with launched(2, latency=0.05) as service, client(service) as asking, stream(asking, chat("w " * 2000)) as first:
        next(first)
        with client(service) as other, stream(other, chat("w " * 2000)) as second:
            next(second)
            service.servers[0].shutdown()  # of one of the two streams
            ending = threading.Thread(target=service.shutdown)
            ending.start()
            errors = set()
            for events in (first, second):
                seen: list[Any] = []
                with pytest.raises(httpx.RemoteProtocolError):
                    seen.extend(events)
                errors.add(seen[-1]["error"]["message"])
            ending.join()
    of_server, of_service = (f"the {what} was stopped before the answer was complete" for what in ("server", "service"))
    assert errors <= {of_server, of_service, openai_face.ENDED}, "a server that is slow to end tells it first"
    assert errors != {of_server}


def test_a_client_that_reads_nothing_fills_no_memory() -> None:
    with launched(1) as service, client(service) as asking:
        with stream(asking, chat("w " * 90_000, max_tokens=90_000)) as events:
            next(events)
            time.sleep(1.0)
            before = psutil.Process().memory_info().rss
            time.sleep(2.0)
            assert psutil.Process().memory_info().rss - before < 8 << 20
        assert text_of(asking.post(CHAT, json=chat("one"))) == "one"


def test_a_service_that_is_started_again_has_a_gateway_again() -> None:
    service = VLLMService(LLM, engine=EchoEngine(), gateway=GatewayConfig())
    for _ in range(2):
        with service, client(service) as asking:
            assert text_of(asking.post(CHAT, json=chat("one"))) == "one"
        assert service.base_url is None
