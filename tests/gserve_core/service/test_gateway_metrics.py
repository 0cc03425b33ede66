"""`GET /metrics` of the gateway, and the counters of servers, over real servers and sockets."""

import os
import signal
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor

import httpx
import pytest
from prometheus_client.parser import text_string_to_metric_families

from gserve import GatewayConfig, LLMConfig, ServeConfig, VLLMService
from gserve_core.engines.echo import EchoEngine
from gserve_core.host import run_files
from gserve_core.overview import Counters
from gserve_core.service import records
from tests.gserve_core.fake_servers import until
from tests.gserve_core.service.test_gateway import CHAT, chat, client, launched, status, stream, text_of
from tests.listeners import server_pid

SECONDS = 30.0
"""Maximum time until counters arrive, in seconds. They come every two seconds."""


def series(asking: httpx.Client, name: str, **labels: str) -> float:
    """Return the sum of the samples of a name that have these labels."""
    reply = asking.get("/metrics")
    assert reply.status_code == 200
    assert reply.headers["content-type"] == "text/plain; version=0.0.4; charset=utf-8"
    samples = [sample for family in text_string_to_metric_families(reply.text) for sample in family.samples]
    found = [it.value for it in samples if it.name == name and labels.items() <= it.labels.items()]
    return sum(found)


def wait(what: Callable[[], bool]) -> None:
    end = time.monotonic() + SECONDS
    while not what():
        assert time.monotonic() < end
        time.sleep(0.1)


def totals(service: VLLMService) -> Counters:
    """Return the sums of the counters of all servers."""
    counters = [state.counters for state in service.status()]
    return Counters(*(sum(getattr(it, name) for it in counters) for name in Counters.__struct_fields__))


@pytest.fixture(scope="module")
def counting() -> Iterator[VLLMService]:
    engine = EchoEngine(error_on="fails")
    config = GatewayConfig()
    with VLLMService(LLMConfig("m"), ServeConfig(servers=2), engine=engine, gateway=config, name="counting") as service:
        yield service


# ------------------------------------------------------------------------------------------------------------ counters


def test_items_and_tokens_of_batches_and_of_openai_requests_are_counted(counting: VLLMService) -> None:
    before = totals(counting)
    counting.generate(["one two three"] * 50 + ["it fails", ""], on_error="return")
    with client(counting) as asking:
        asking.post(CHAT, json=chat("four words are here", n=2))
        with stream(asking, chat("two words")) as events:
            list(events)
        assert asking.post(CHAT, json=chat("")).status_code == 400
        assert asking.post(CHAT, json=chat("a", model="unknown")).status_code == 404
    expected = Counters(
        items=before.items + 50 + 2 + 1, failed=before.failed + 2 + 2,
        prompt_tokens=before.prompt_tokens + 150 + 2 + 4 + 2,
        completion_tokens=before.completion_tokens + 150 + 8 + 2,
    )  # fmt: skip
    wait(lambda: totals(counting) == expected)
    with client(counting) as asking:
        assert series(asking, "gserve_server_items_total") == expected.items
        assert series(asking, "gserve_server_items_failed_total") == expected.failed
        assert series(asking, "gserve_server_completion_tokens_total") == expected.completion_tokens
        assert series(asking, "gserve_server_prompt_tokens_total") == expected.prompt_tokens


def test_counters_and_rates_write_no_record(counting: VLLMService) -> None:
    file = run_files.folder() / "service-counting"
    assert records.find_service("counting").servers
    before = file.stat()
    counting.generate(["one two three"] * 100)
    wait(lambda: any(state.completion_rate > 0 for state in counting.status()))
    assert file.stat() == before


def test_items_in_the_engine_and_those_that_wait_for_it_are_shown() -> None:
    with (
        ThreadPoolExecutor(1) as pool,
        launched(1, latency=1.0, capacity=2) as service,
        client(service) as asking,
        client(service) as other,
    ):
        asked = pool.submit(other.post, "/generate", json={"prompts": ["a " * 16] * 7})
        wait(lambda: (totals(service).running, totals(service).waiting) == (4, 3))
        assert series(asking, "gserve_server_items_running", server="server-0") == 4
        assert series(asking, "gserve_server_items_waiting", server="server-0") == 3
        assert series(asking, "gserve_requests_in_flight", server="server-0") == 1
        assert not asked.done()


# ------------------------------------------------------------------------------------------------------------ requests


def test_the_metrics_need_the_key(counting: VLLMService) -> None:
    for headers in ({"Authorization": "Bearer wrong"}, {"x-nothing": "x"}):
        with client(counting, **headers) as asking:
            assert asking.get("/metrics").status_code == 401
    with client(counting) as asking:
        assert asking.post("/metrics").status_code == 405


def test_an_unknown_route_makes_no_new_series(counting: VLLMService) -> None:
    with client(counting) as asking:
        before = series(asking, "gserve_requests_total", route="other", status="404")
        for number in range(20):
            assert asking.get(f"/nothing-{number}").status_code == 404
            assert asking.patch(f"/v1/models/{number}").status_code == 404
        assert series(asking, "gserve_requests_total", route="other", status="404") == before + 40
        text = asking.get("/metrics").text
        assert "nothing-" not in text
        assert "models/" not in text


@pytest.mark.parametrize(
    ("method", "path", "route", "allowed"),
    [
        ("PATCH", "/control", "/control", "POST"),
        ("PATCH", "/weights", "/weights", "GET, POST"),
        ("PATCH", "/adapters", "/adapters", "GET"),
        ("PUT", "/adapters/", "/adapters", "GET"),
        ("PATCH", "/adapters/one", "/adapters/NAME", "DELETE, GET, PUT"),
        *[("GET", path, path, "POST") for path in ("/pause", "/resume", "/sleep", "/wake", "/reset_cache")],
    ],
)
def test_routes_that_need_the_control_secret_are_counted_by_their_paths_and_name_their_methods(
    counting: VLLMService, method: str, path: str, route: str, allowed: str
) -> None:
    record = records.find_service("counting").gateway
    assert record is not None
    with client(counting) as asking, client(counting, Authorization=f"Bearer {record.control}") as controlling:
        before = [series(asking, "gserve_requests_total", route=route, status=status) for status in ("401", "405")]
        assert asking.request(method, path, headers={"Authorization": "Bearer wrong"}).status_code == 401
        refused = controlling.request(method, path)
        assert (refused.status_code, refused.headers["allow"]) == (405, allowed)
        after = [series(asking, "gserve_requests_total", route=route, status=status) for status in ("401", "405")]
        assert after == [number + 1 for number in before]
        assert "adapters/one" not in asking.get("/metrics").text


def test_no_secret_is_in_the_metrics(counting: VLLMService) -> None:
    with client(counting) as asking:
        text = asking.get("/metrics").text
    assert counting.api_key is not None
    for state in counting.status():
        for secret in (counting.api_key, state.token, state.control):
            assert secret
            assert secret not in text


def test_the_metrics_of_a_server_need_its_token(counting: VLLMService) -> None:
    state = counting.status()[0]
    url = f"http://{state.address}/metrics"
    for headers in ({}, {"Authorization": f"Bearer {state.control}"}, {"Authorization": f"Bearer {counting.api_key}"}):
        assert httpx.get(url, headers=headers).status_code == 401
    reply = httpx.get(url, headers={"Authorization": f"Bearer {state.token}"})
    assert (reply.status_code, reply.content) == (200, b"")


# ------------------------------------------------------------------------------------------------------------- trouble


def test_a_killed_server_leaves_its_totals_and_its_requests_count_as_sent_again() -> None:
    with launched(2, latency=0.3) as service, client(service) as asking:
        service.generate(["one two"] * 40)
        wait(lambda: totals(service).items == 40)
        with httpx.Client(base_url=asking.base_url, headers=asking.headers, timeout=60) as other:
            before = series(asking, "gserve_server_items_total")
            assert before == 40
            victim = server_pid(service.servers[0])
            with ThreadPoolExecutor(4) as pool:
                replies = [pool.submit(other.post, CHAT, json=chat(f"a b c d e f {number}")) for number in range(4)]
                until(lambda: status(asking).servers[0].requests == 2)
                os.kill(victim, signal.SIGKILL)
                assert [text_of(reply.result()) for reply in replies] == [
                    f"a b c d e f {number}" for number in range(4)
                ]
        assert series(asking, "gserve_resends_total", server="server-0", reason="died") == 2
        wait(lambda: series(asking, "gserve_server_state", server="server-0", state="ready") == 1)
        wait(lambda: series(asking, "gserve_server_restarts_total", server="server-0") == 1)
        wait(lambda: series(asking, "gserve_server_items_total") == 44)
        assert series(asking, "gserve_requests_total", route=CHAT, status="200") == 4
        service.generate(["one two"] * 10)
        service.servers[0].shutdown()  # what it has finished by now is in its last message
        assert series(asking, "gserve_server_state", server="server-0", state="stopped") == 1
        wait(lambda: series(asking, "gserve_server_items_total") == 54)


def test_a_stream_that_is_cut_and_a_client_that_leaves_are_counted_and_a_frozen_server_is_left_out() -> None:
    with launched(1, latency=0.05) as service, client(service) as asking:
        with stream(asking, chat("w " * 500)) as events:
            next(events)
        wait(lambda: series(asking, "gserve_requests_total", route=CHAT, status="499") == 1)
        with pytest.raises(httpx.ReadTimeout):
            asking.post(CHAT, json=chat("w " * 500), timeout=1.5)
        wait(lambda: series(asking, "gserve_requests_total", route=CHAT, status="499", server="server-0") == 2)
        with stream(asking, chat("w " * 500)) as events:
            next(events)
            pid = server_pid(service.servers[0])
            os.kill(pid, signal.SIGSTOP)
            began = time.monotonic()
            assert series(asking, "gserve_server_state", server="server-0", state="ready") == 1
            assert time.monotonic() - began < 10
            os.kill(pid, signal.SIGKILL)
            with pytest.raises(httpx.RemoteProtocolError):
                list(events)
        wait(lambda: series(asking, "gserve_requests_total", route=CHAT, status="cut") == 1)
