"""A service used through its gateway, by URL: batches keep their promises, and wrong access is told."""

import json
import os
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import httpx
import msgspec
import psutil
import pytest

from gserve import (
    BatchError,
    ConfigError,
    DeadlineExceeded,
    GatewayConfig,
    GserveError,
    ItemError,
    ItemLost,
    LLMConfig,
    RemoteError,
    ServeConfig,
    TransportError,
    VLLMClient,
    VLLMService,
)
from gserve_core.batch import item_queue
from gserve_core.engines.echo import EchoEngine
from gserve_core.interfaces import Connection
from gserve_core.messages import Group, Health, RunRequest
from gserve_core.overview import ServerOverview, ServiceOverview
from gserve_core.service import remote
from gserve_core.service.records import GatewayRecord
from gserve_core.service.remote import Remote, Url
from gserve_transports.frames import CONTENT_TYPE
from tests.gserve_core.fake_servers import until
from tests.listeners import listener, server_pid

LLM = LLMConfig("m", max_model_len=200_000)
KEY = "a-key-of-the-tests-of-gateways"
GREEDY = {"temperature": 0, "max_tokens": 10_000}


@contextmanager
def launched(
    servers: int = 1,
    *,
    port: int | None = None,
    name: str | None = None,
    gateway: GatewayConfig | None = None,
    **engine: Any,
) -> Iterator[VLLMService]:
    """Run a service with a gateway."""
    serve = ServeConfig(servers=servers, max_restarts=1000)
    at = gateway or GatewayConfig(port=port, api_key=KEY)
    with VLLMService(LLM, serve, engine=EchoEngine(**engine), gateway=at, name=name) as service:
        yield service


@contextmanager
def attached(service: VLLMService | str) -> Iterator[VLLMService]:
    """Attach by the URL of a gateway."""
    url = service if isinstance(service, str) else service.base_url
    with VLLMService.attach(url, api_key=KEY) as found:
        yield found


@pytest.fixture(scope="module")
def fast() -> Iterator[VLLMService]:
    with launched(2, name="remote", sample=True, error_on="wrong") as service:
        yield service


@pytest.fixture(scope="module")
def slow() -> Iterator[VLLMService]:
    """A service that works on one item at a time, 100 words a second."""
    with launched(latency=0.01, capacity=1) as service:
        yield service


@pytest.fixture
def mortal() -> Iterator[VLLMService]:
    """A service whose servers die of an item "poison"."""
    with launched(2, die_on="poison", latency=0.02, capacity=8) as service:
        yield service


def free_port() -> int:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        return int(free.getsockname()[1])


def is_free(service: VLLMService) -> bool:
    """Return whether a service that works on one item at a time has nothing else to do for many seconds."""
    began = time.monotonic()
    service.generate(["one"])
    return time.monotonic() - began < 8


# ------------------------------------------------------------------------------------------------------------ all well


def test_a_batch_over_the_gateway_gives_what_a_local_one_gives(fast: VLLMService) -> None:
    prompts: list[Any] = [f"prompt number {number}" for number in range(50)] + [[1, 2, 3]]
    talks = [[{"role": "system", "content": "be brief"}, {"role": "user", "content": text}] for text in ("a b", "c")]
    each = [{"temperature": 0.5, "seed": number, "n": 2, "logprobs": 1} for number in range(len(prompts))]
    with attached(fast) as there:
        for given in (each, {"temperature": 0, "max_tokens": 2}, {"n": 3, "seed": 7}):
            here = fast.generate(prompts, given, return_extra=True)
            assert there.generate(prompts, given, return_extra=True) == here
        assert here[0][0].text.endswith("seed-7")
        assert there.chat(talks, GREEDY, return_extra=True) == fast.chat(talks, GREEDY, return_extra=True)
        assert dict(there.generate_iter(prompts, GREEDY)) == dict(fast.generate_iter(prompts, GREEDY))
        wrong = there.generate(["a", "", "b"], GREEDY, on_error="return")
        assert [wrong[0], wrong[2]] == [["a"], ["b"]]
        assert (str(wrong[1]), wrong[1].invalid, wrong[1].index) == ("the prompt is empty", True, 1)
        with pytest.raises(BatchError, match="unknown sampling parameter 'top_x'"):
            there.generate(["a"], {"top_x": 1})


def test_ten_thousand_items_in_one_call(fast: VLLMService) -> None:
    with attached(fast) as there:
        assert there.generate((f"item {n}" for n in range(10_000)), GREEDY) == [[f"item {n}"] for n in range(10_000)]


def test_the_url_may_end_in_v1_and_everything_may_come_from_the_environment(
    fast: VLLMService, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert fast.base_url is not None
    for url in (
        fast.base_url,
        fast.base_url.removesuffix("/v1"),
        fast.base_url + "/",
        fast.base_url.replace("127.0.0.1", "localhost"),
    ):
        with attached(url) as there:
            assert there.generate(["a"], GREEDY) == [["a"]]
            assert there.api_key == KEY
            assert there.base_url in (fast.base_url, fast.base_url.replace("127.0.0.1", "localhost"))
    monkeypatch.setenv("GSERVE_ATTACH", fast.base_url)
    monkeypatch.setenv("GSERVE_API_KEY", KEY)
    with VLLMService.attach() as there:
        assert there.generate(["a"], GREEDY) == [["a"]]
        there.shutdown()
        with pytest.raises(GserveError, match="not running"):
            there.generate(["a"])
        there.start()
        assert there.generate(["a"], GREEDY) == [["a"]]


def test_a_client_of_one_server_may_have_a_gateway_for_it(fast: VLLMService) -> None:
    port = Url(fast.base_url or "").address.port
    with VLLMClient("127.0.0.1", port, token=KEY) as client:
        assert client.health() == Health("ok")
        assert client.generate(["a", "b"], GREEDY) == [["a"], ["b"]]
        with pytest.raises(RemoteError, match="end the service with gserve stop"):
            client.shutdown()
        assert client.generate(["c"], GREEDY) == [["c"]]


def test_the_commands_take_a_url_too(fast: VLLMService) -> None:
    environ = os.environ | {"GSERVE_API_KEY": KEY, "GSERVE_ATTACH": fast.base_url or ""}

    def gserve(*words: str, text: str = "") -> str:
        command = [sys.executable, "-m", "gserve.cli", *words]
        ran = subprocess.run(command, input=text, env=environ, capture_output=True, text=True, timeout=60, check=False)
        return ran.stdout if ran.returncode == 0 else ran.stderr

    params = ("--params", json.dumps(GREEDY))
    assert gserve("generate", "--attach", fast.base_url or "", "one two", *params) == "one two\n"
    assert gserve("generate", "three four", *params) == "three four\n"
    assert "five six" in gserve("chat", "--attach", fast.base_url or "", *params, text="five six\n")
    environ["GSERVE_API_KEY"] = "x" * 30
    assert "refuses the API key" in gserve("generate", "--attach", fast.base_url or "", "one two")


def test_a_forked_process_may_use_the_gateway_too(fast: VLLMService) -> None:
    with attached(fast) as there:
        reading, writing = os.pipe()
        if (pid := os.fork()) == 0:
            try:
                os.write(writing, json.dumps(there.generate(["a", "b"], GREEDY)).encode())
                there.shutdown()
            finally:
                os._exit(0)
        os.close(writing)
        os.waitpid(pid, 0)
        assert json.loads(os.read(reading, 1000)) == [["a"], ["b"]]
        os.close(reading)
        assert there.generate(["c"], GREEDY) == [["c"]]


# --------------------------------------------------------------------------------------------------------------- faults

CLIENT = """
import json, sys
from gserve import VLLMService
url, key, count, words = sys.argv[1:]
prompts = [f"item number {n}" + " w" * int(words) for n in range(int(count))]
with VLLMService.attach(url, api_key=key) as service:
    print("attached", flush=True)
    outcomes = list(service.generate_iter(prompts, {"temperature": 0, "max_tokens": 10_000}))
print(json.dumps([[index, [it.text for it in outputs]] for index, outputs in outcomes]))
"""


@contextmanager
def client_process(service: VLLMService, *numbers: int) -> Iterator["subprocess.Popen[str]"]:
    """Run a process that sends a batch. `numbers`: its number of items, and how much longer than 3 words each is."""
    command = [sys.executable, "-c", CLIENT, service.base_url or "", KEY, *map(str, numbers)]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as client:
        try:
            assert client.stdout is not None
            assert client.stdout.readline() == "attached\n"
            yield client
        finally:
            client.kill()


def test_a_server_that_is_killed_costs_no_item_of_another_process(mortal: VLLMService) -> None:
    with client_process(mortal, 300, 2) as client:
        for _ in range(2):
            time.sleep(0.7)
            until(lambda: listener(mortal.servers[0].port), 60)
            os.kill(server_pid(mortal.servers[0]), signal.SIGKILL)
        outcomes = json.loads(client.communicate(timeout=60)[0])
    assert sorted(outcomes) == [[n, [f"item number {n} w w"]] for n in range(300)]


def test_the_work_of_a_client_that_is_killed_ends(slow: VLLMService) -> None:
    with client_process(slow, 100, 2000) as client:
        time.sleep(0.5)
        client.kill()
        client.wait()
    assert is_free(slow)


def test_only_the_item_that_kills_servers_is_lost(mortal: VLLMService) -> None:
    prompts = [f"item {n}" for n in range(30)]
    prompts[13] = "poison"
    with attached(mortal) as there:
        outcomes = there.generate(prompts, GREEDY, on_error="return")
    lost = outcomes.pop(13)
    assert outcomes == [[prompt] for prompt in prompts if prompt != "poison"]
    assert type(lost) is ItemLost
    assert "a server died" in str(lost)
    assert (lost.index, lost.invalid) == (13, False)


def test_an_item_that_fails_is_not_lost(fast: VLLMService) -> None:
    with attached(fast) as there:
        (failed,) = there.generate(["wrong"], on_error="return")
        assert type(failed) is ItemError
        assert not failed.invalid


def test_items_wait_for_a_gateway_that_is_stopped_and_launched_again() -> None:
    port, found = free_port(), {}
    with ThreadPoolExecutor() as pool:
        with launched(port=port, name="returning", latency=0.02, capacity=8):
            there = VLLMService.attach(f"http://127.0.0.1:{port}", api_key=KEY)
            outcomes = there.generate_iter([f"item {n} of many words" for n in range(400)], GREEDY)
            for _ in range(50):
                index, outputs = next(outcomes)
                found[index] = outputs
        rest = pool.submit(list, outcomes)
        time.sleep(1.0)
        assert not rest.done()
        with launched(port=port, name="returning"):
            for index, outputs in rest.result(60):
                assert index not in found, "an item came twice"
                found[index] = outputs
            there.shutdown()
    assert {index: outputs[0].text for index, outputs in found.items() if isinstance(outputs, list)} == {
        n: f"item {n} of many words" for n in range(400)
    }


def test_items_wait_only_so_long_and_a_later_call_works_again(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(remote, "RETURN_SECONDS", 1.5)
    monkeypatch.setattr(remote, "FOLLOW_SECONDS", 0.1)
    port = free_port()
    with launched(port=port):
        there = VLLMService.attach(f"http://127.0.0.1:{port}", api_key=KEY)
    (lost,) = there.generate(["a"], on_error="return")
    assert type(lost) is ItemLost
    assert "its gateway has not answered for 1.5 s: " in str(lost)
    with launched(port=port):
        assert there.generate(["a"], GREEDY) == [["a"]]
        there.shutdown()


def test_a_service_that_drains_loses_items_of_remote_calls_too() -> None:
    with launched(gateway=GatewayConfig(host="0.0.0.0", api_key=KEY)) as service:
        url = f"http://127.0.0.1:{Url(service.base_url or '').address.port}"
        with pytest.raises(TransportError, match=r"Host header does not name this gateway: see gateway\.allowed_hosts"):
            VLLMService.attach(url.replace("127.0.0.1", "127.0.0.2"), api_key=KEY)
        with attached(url) as there:
            service.drain("the end of the day")
            (lost,) = there.generate(["a"], on_error="return")
        assert type(lost) is ItemLost
        assert "the service is ending: the end of the day" in str(lost)
        with pytest.raises(GserveError, match=f"the service at {url}/v1 is ending"):
            VLLMService.attach(url, api_key=KEY)


def test_a_call_that_is_left_or_is_late_ends_on_the_servers(slow: VLLMService) -> None:
    with attached(slow) as there:
        outcomes = there.generate(["w " * 2000] * 5, GREEDY, deadline=0.5, on_error="return")
        assert {type(outcome) for outcome in outcomes} == {DeadlineExceeded}
        assert is_free(slow)
        leaving = there.generate_iter(["one", *["w " * 2000] * 5], GREEDY)
        next(leaving)
        leaving.close()
        assert is_free(slow)


def test_two_remote_clients_and_a_local_call_share_the_servers(slow: VLLMService) -> None:
    done = {"first": 0, "second": 0, "here": 0}

    def call(name: str, there: VLLMService) -> None:
        for _ in there.generate_iter([name] * 500, GREEDY):
            done[name] += 1
            if max(done.values()) >= 150:
                return

    with attached(slow) as first, attached(slow) as second, ThreadPoolExecutor(8) as pool:
        calls = [*[("first", first)] * 6, ("second", second), ("here", slow)]
        for each in [pool.submit(call, *of) for of in calls]:
            each.result(60)
    assert min(done.values()) > 50, done


def test_a_client_that_reads_nothing_fills_no_memory(slow: VLLMService, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(item_queue, "RESULTS_SIZE", 1 << 20)
    body = RunRequest([Group([f"{n}{'x' * 100_000}" for n in range(100)], {"n": 10})], id="lazy-1")
    root = (slow.base_url or "").removesuffix("/v1")
    headers = {"Authorization": f"Bearer {KEY}", "Content-Type": CONTENT_TYPE}
    content = msgspec.msgpack.encode(body)
    with httpx.stream("POST", f"{root}/run", content=content, headers=headers, timeout=60) as reply:
        assert reply.status_code == 200
        before = psutil.Process().memory_info().rss
        time.sleep(2.0)
        assert psutil.Process().memory_info().rss - before < 40 << 20, "of 100 MB"
        assert slow.generate(["one"], GREEDY) == [["one"]]
        assert sum(map(len, reply.iter_bytes())) > 100_000_000


# --------------------------------------------------------------------------------------------------------------- access


@pytest.mark.parametrize(
    ("url", "why"),
    [
        ("ftp://host:1", "expected the URL of a gateway, such as http://host:8000"),
        ("http://", "expected the URL of a gateway"),
        ("host:8000", "expected the URL of a gateway, such as http://host:8000"),
        ("http://host:99999", "expected the URL of a gateway"),
        ("http://host/llm/v1", "expected the URL of a gateway"),
        ("http://host/v1?key=1", "expected the URL of a gateway"),
        ("http://user:secret@host", "no user name and no password"),
    ],
)
def test_a_wrong_url_is_told(url: str, why: str) -> None:
    with pytest.raises(ConfigError, match=why) as wrong:
        VLLMService.attach(url, api_key=KEY)
    assert "secret" not in str(wrong.value)


def test_the_address_of_a_url() -> None:
    assert (Url("http://Host").address.port, Url("https://host/v1/").address.port) == (80, 443)
    assert Url("https://[::1]:8000").base_url == "https://[::1]:8000/v1"
    assert Url("http://host:8000/").base_url == "http://host:8000/v1"


def test_a_wrong_or_missing_key_is_told(fast: VLLMService, monkeypatch: pytest.MonkeyPatch) -> None:
    url = fast.base_url
    with pytest.raises(RemoteError, match=f"the gateway at {url} refuses the API key") as refused:
        VLLMService.attach(url, api_key=KEY + "x")
    assert refused.value.status == 401
    with pytest.raises(GserveError, match="no API key for http://host:1/v1: pass api_key, or set GSERVE_API_KEY"):
        VLLMService.attach("http://host:1")
    monkeypatch.setenv("GSERVE_API_KEY", "not the right one")
    with pytest.raises(ConfigError, match="without blanks"):
        VLLMService.attach(url)
    with pytest.raises(ConfigError, match="'demo' is the name of a service"):
        VLLMService.attach("demo", api_key=KEY)


def test_the_key_of_a_service_of_this_user_is_found(fast: VLLMService) -> None:
    url = fast.base_url or ""
    for one in (url, url.removesuffix("/v1")):
        with VLLMService.attach(one) as there:
            assert there.api_key == KEY
    for other in (url.replace("http:", "https:"), url.replace("127.0.0.1", "localhost")):
        assert Url(other).find_key() is None, "another program may be there"


def test_what_is_no_gateway_is_told(fast: VLLMService) -> None:
    with pytest.raises(TransportError, match=r"no gateway answers at http://127.0.0.1:\d+/v1: .* broke") as nobody:
        VLLMService.attach(f"http://127.0.0.1:{free_port()}", api_key=KEY)
    assert nobody.value.is_gone
    with pytest.raises(TransportError, match="is one server of gserve, not a gateway: use VLLMClient"):
        VLLMService.attach(f"http://127.0.0.1:{fast.servers[0].port}", api_key=KEY)
    with ThreadingHTTPServer(("127.0.0.1", 0), BaseHTTPRequestHandler) as other:
        threading.Thread(target=other.serve_forever, daemon=True).start()
        with pytest.raises(TransportError, match="is not a gserve server"):
            VLLMService.attach(f"http://127.0.0.1:{other.server_port}", api_key=KEY)
        other.shutdown()


def test_https(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    cert, key = tmp_path / "cert.pem", tmp_path / "key.pem"
    command = ["openssl", "req", "-x509", "-newkey", "rsa:2048", "-nodes", "-subj", "/CN=localhost", "-days", "2"]
    command += ["-addext", "subjectAltName=DNS:localhost,IP:127.0.0.1", "-keyout", str(key), "-out", str(cert)]
    subprocess.run(command, check=True, capture_output=True)
    with launched(gateway=GatewayConfig(certfile=str(cert), keyfile=str(key), api_key=KEY)) as service:
        url = service.base_url or ""
        assert url.startswith("https://")
        with pytest.raises(TransportError, match=r"certificate of 127.0.0.1:\d+ is not trusted: .*set SSL_CERT_FILE"):
            VLLMService.attach(url, api_key=KEY)
        with pytest.raises(TransportError, match="no gateway answers"):
            VLLMService.attach(url.replace("https:", "http:"), api_key=KEY)
        monkeypatch.setenv("SSL_CERT_FILE", str(cert))
        with attached(url) as there:
            assert there.generate(["a"] * 100, GREEDY) == [["a"]] * 100


# --------------------------------------------------------------------------------------------- the state of the service


class Seen(Connection):
    """A gateway whose state the test sets."""

    def __init__(self) -> None:
        self.status = "ok"
        self.servers: list[ServerOverview] = []
        self.error: Exception | None = None
        self.asked = 0

    async def health(self) -> Health:
        self.asked += 1
        if self.error is not None:
            raise self.error
        return Health(self.status)

    async def overview(self) -> ServiceOverview:
        if self.error is not None:
            raise self.error
        return ServiceOverview(name="s", status=self.status, version="1", seconds=1.0, servers=self.servers, seed=7)

    def run(self, request: RunRequest) -> Any:
        raise AssertionError

    async def shut_down(self) -> None:
        raise AssertionError

    async def close(self) -> None:
        pass


def server(state: str, **more: Any) -> ServerOverview:
    return ServerOverview(name="server-0", state=state, seconds=1.0, generation=2, **more)


@pytest.fixture
def seen(monkeypatch: pytest.MonkeyPatch) -> Iterator[tuple[Remote, Seen]]:
    monkeypatch.setattr(remote, "FOLLOW_SECONDS", 0.02)
    monkeypatch.setattr(remote, "START_CHECK_SECONDS", 0.02)
    gateway = Seen()
    there = Remote(GatewayRecord("http://host:1/v1", KEY), lambda: gateway, 1.0, 1.0)
    yield there, gateway
    there.close()


def test_it_shows_the_servers_as_their_owner_reports_them(seen: tuple[Remote, Seen]) -> None:
    there, gateway = seen
    gateway.servers = [server("ready", model="m", capacity=16, address="[::1]:8000", gpu_ids=[1])]
    there.start()
    there.start()
    (state,) = there.states.values()
    assert (state.usable, state.host, state.port, state.gpu_ids, state.generation) == (True, "::1", 8000, (1,), 2)
    assert [it.seed for it in there.models.values()] == [7]
    assert there.dispatcher is not None
    assert there.dispatcher.room == 32
    gateway.servers = [server("ready", model="m", capacity=64)]
    until(lambda: there.dispatcher is not None and there.dispatcher.room == 128)
    gateway.servers = [server("starting", phase="loading", error="it died"), server("a state of the future")]
    until(lambda: there.states["server-0"].state == "queued")
    gateway.servers = [server("starting", phase="loading", error="it died")]
    until(lambda: there.states["server-0"].state == "starting")
    state = there.states["server-0"]
    assert (state.returns, state.phase, state.error) == (True, "loading", "it died")
    gateway.error = TransportError("nobody is there")
    until(lambda: "does not answer: nobody is there" in str(there.states["server-0"].phase))
    there.close()
    assert there.states["server-0"].state == "stopped"
    assert there.gateway is None


def test_it_waits_for_a_service_that_starts(seen: tuple[Remote, Seen]) -> None:
    _, gateway = seen

    async def health() -> Health:
        gateway.asked += 1
        return Health("ok" if gateway.asked > 3 else "starting")

    gateway.health = health  # type: ignore[method-assign]
    there = Remote(GatewayRecord("http://host:1/v1", KEY), lambda: gateway, 1.0, 20.0)
    there.start()
    assert gateway.asked > 3
    there.close()


@pytest.mark.parametrize(
    ("status", "why"),
    [
        ("starting", "is still starting after 1 s"),
        ("draining", "is ending, and accepts no more items"),
        ("stopped", "has no server any more"),
    ],
)
def test_a_service_that_is_not_ready_in_time_or_ends_is_told(seen: tuple[Remote, Seen], status: str, why: str) -> None:
    there, gateway = seen
    gateway.status = status
    with pytest.raises(GserveError, match=f"the service at http://host:1/v1 {why}"):
        there.start()
    assert there.dispatcher is None


def test_a_gateway_without_an_overview_has_the_seed_0(seen: tuple[Remote, Seen]) -> None:
    there, gateway = seen

    async def none() -> ServiceOverview:
        raise RemoteError("Not Found", status=404)

    gateway.overview = none  # type: ignore[method-assign]
    there.start()
    assert (there.models, there.states) == ({}, {})
