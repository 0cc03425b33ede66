"""The series of a service, from states and measurements that the tests make, without a server or a socket."""

import asyncio
import logging
from collections.abc import Mapping
from dataclasses import replace

import pytest
from prometheus_client import Metric
from prometheus_client.parser import text_string_to_metric_families

from gserve_core.interfaces import Address, Backend
from gserve_core.overview import Counters
from gserve_core.service.metrics import Metrics, Waiting
from gserve_core.service.routing import Routing
from gserve_core.service.state import BEGINNING, Counted, Ready, ServerState, Start, State

NEW = ServerState(name="server-0", pool="small")
A, B = "server-0", "server-1"
AT_A = Backend(A, f"{A}-1", Address(["127.0.0.1"], 8000), "a-token", "small")
CHAT = "/v1/chat/completions"
ENGINE = """\
# HELP vllm:tokens_total Tokens.
# TYPE vllm:tokens_total counter
vllm:tokens_total{engine="0",model_name="a \\"name\\""} %d
# HELP vllm:running Requests.
# TYPE vllm:running gauge
vllm:running 2
"""


class Clock:
    """A clock that shows what the test sets."""

    now = 0.0

    def __call__(self) -> float:
        return self.now


def ready(name: str, generation: int = 1, **counters: int) -> ServerState:
    return ServerState(
        name=name, pool="small", state=State.READY, generation=generation, instance=f"{name}-{generation}",
        address=Address(["127.0.0.1"], 8000), token="a-token", control="a-control-secret",
        counters=Counters(**counters),
    )  # fmt: skip


def metrics(*states: ServerState, clock: Clock | None = None, waiting: Mapping[str, Waiting] | None = None) -> Metrics:
    made = Metrics(Routing(None), lambda: waiting or {}, clock or Clock())
    for state in states:
        made.update(state)
    return made


def families(made: Metrics, engines: Mapping[str, str] | None = None) -> dict[str, Metric]:
    """Return the families of the text by name. Each must occur once, and have a help text and a type."""
    given = {name: text.encode() for name, text in (engines or {}).items()}
    text = asyncio.run(made.text(given)).decode()
    found = list(text_string_to_metric_families(text))
    assert len({family.name for family in found}) == len(found)
    assert all(family.documentation and family.type != "unknown" for family in found), text
    assert text.count("# TYPE ") == text.count("# HELP ") == len(found)
    samples = [line.rpartition(" ")[0] for line in text.splitlines() if not line.startswith("#")]
    assert len(samples) == len(set(samples))
    return {family.name: family for family in found}


def values(family: Metric, label: str = "server") -> dict[str, float]:
    """Return the values of a family by one label."""
    return {sample.labels[label]: sample.value for sample in family.samples}


# ------------------------------------------------------------------------------------------------------------- servers


def test_the_counters_of_each_server_are_shown_with_its_labels() -> None:
    made = metrics(ready(A, items=3, failed=1, running=2, waiting=4, prompt_tokens=30, completion_tokens=7), ready(B))
    found = families(made)
    assert values(found["gserve_server_items"]) == {A: 3, B: 0}
    assert values(found["gserve_server_items_failed"])[A] == 1
    assert values(found["gserve_server_items_running"])[A] == 2
    assert values(found["gserve_server_items_waiting"])[A] == 4
    assert values(found["gserve_server_prompt_tokens"])[A] == 30
    assert values(found["gserve_server_completion_tokens"])[A] == 7
    assert found["gserve_server_items"].samples[0].labels == {"pool": "small", "server": A}


def test_a_total_does_not_fall_when_a_server_restarts() -> None:
    state = ready(A, items=10, running=3, completion_tokens=100)
    made = metrics(state)
    state = state.draining("cleaning up: it died", returns=True, died=True).queued("waiting to restart")
    made.update(state)
    assert values(families(made)["gserve_server_items"]) == {A: 10}
    assert values(families(made)["gserve_server_items_running"]) == {A: 0}
    state = state.begun(Start("next", "token", "control"), NEW)
    made.update(state)
    state = replace(state, address=Address(["127.0.0.1"], 8001), state=State.READY)
    made.update(state)
    made.update(state.after(Counted(Counters(items=4, running=1, completion_tokens=5))))
    found = families(made)
    assert values(found["gserve_server_items"]) == {A: 14}
    assert values(found["gserve_server_completion_tokens"]) == {A: 105}
    assert values(found["gserve_server_items_running"]) == {A: 1}
    assert values(found["gserve_server_restarts"]) == {A: 1}


def test_the_totals_and_the_requests_of_a_removed_server_remain_with_its_model() -> None:
    made = metrics(ready(A, items=3, running=2, completion_tokens=7))
    with made.measured(CHAT) as request:
        request.begin_answer(200, AT_A)
        request.end_answer()
    before = families(made)
    made.forget(A)
    after = families(made)
    for name in ("gserve_server_items", "gserve_server_completion_tokens", "gserve_server_restarts", "gserve_requests"):
        assert after[name].samples == before[name].samples
    assert "gserve_server_state" not in after
    assert "gserve_server_items_running" not in after
    made.update(ready(A, items=1))  # another server gets the name
    assert values(families(made)["gserve_server_items"]) == {A: 4}
    assert values(families(made)["gserve_server_restarts"]) == {A: 0}


@pytest.mark.parametrize("is_in_place", [False, True])
def test_another_model_that_takes_over_a_name_does_not_get_the_totals_of_the_older_one(is_in_place: bool) -> None:
    made = metrics(ready(A, items=3))
    with made.measured(CHAT) as request:
        request.begin_answer(200, AT_A)
        request.end_answer()
    if not is_in_place:
        made.forget(A)
    made.update(replace(ready(A, generation=2 if is_in_place else 1, items=5), pool="large"))
    with made.measured(CHAT) as request:
        request.begin_answer(200, replace(AT_A, pool="large"))
        request.end_answer()
    found = families(made)
    assert values(found["gserve_server_items"], "pool") == {"small": 3, "large": 5}
    assert values(found["gserve_requests"], "pool") == {"small": 1, "large": 1}
    assert values(found["gserve_server_items_running"], "pool") == {"large": 0}
    assert values(found["gserve_server_restarts"], "pool") == {"small": 0, "large": int(is_in_place)}


def test_the_first_start_is_no_restart() -> None:
    before = NEW.queued(BEGINNING)
    made = metrics(before)
    made.update(before.begun(Start("first"), NEW))
    assert values(families(made)["gserve_server_restarts"]) == {A: 0}


def test_the_state_of_a_server_is_the_one_that_is_1() -> None:
    made = metrics(ready(A), ready(B).draining("ending"))
    shown = [sample.labels for sample in families(made)["gserve_server_state"].samples if sample.value == 1]
    assert [(it["server"], it["state"]) for it in shown] == [(A, "ready"), (B, "draining")]


def test_no_secret_is_shown() -> None:
    text = asyncio.run(metrics(ready(A)).text({}))
    assert b"a-token" not in text
    assert b"a-control-secret" not in text


# ------------------------------------------------------------------------------------------------------------ requests


def test_a_request_is_counted_by_its_route_status_and_server() -> None:
    made = metrics(ready(A))
    with made.measured(CHAT) as one:
        one.begin_answer(200, AT_A)
        one.end_answer()
    with made.measured("other") as refused:
        refused.begin_answer(404)
        refused.end_answer()
    found = {tuple(sorted(it.labels.items())): it.value for it in families(made)["gserve_requests"].samples}
    assert found == {
        (("pool", "small"), ("route", CHAT), ("server", A), ("status", "200")): 1,
        (("pool", ""), ("route", "other"), ("server", ""), ("status", "404")): 1,
    }


def test_a_client_that_leaves_and_an_answer_that_is_cut_have_statuses_of_their_own() -> None:
    made = metrics(ready(A))
    with made.measured(CHAT):
        pass
    with made.measured(CHAT) as left:
        left.begin_answer(200, AT_A, is_stream=True)
    with made.measured(CHAT) as cut:
        cut.begin_answer(200, AT_A, is_stream=True)
        cut.cut()
    found = families(made)
    shown = [(it.labels["status"], it.labels["server"], it.value) for it in found["gserve_requests"].samples]
    assert sorted(shown) == [("499", "", 1), ("499", A, 1), ("cut", A, 1)]
    assert "gserve_request_seconds" not in found


def test_a_client_that_leaves_before_the_answer_is_counted_at_the_server_that_worked_for_it() -> None:
    made = metrics(ready(A))
    with made.measured(CHAT) as left:
        left.ask(AT_A)
    with made.measured(CHAT) as waited:
        waited.ask(AT_A)
        waited.ask(None)  # that one died, and there is no other
    with made.measured(CHAT) as refused:
        refused.ask(AT_A)
        refused.begin_answer(503)  # the gateway gives up
        refused.end_answer()
    shown = [
        (it.labels["status"], it.labels["pool"], it.labels["server"])
        for it in families(made)["gserve_requests"].samples
    ]
    assert sorted(shown) == [("499", "", ""), ("499", "small", A), ("503", "", "")]


def test_the_times_of_answers_are_in_their_buckets() -> None:
    clock = Clock()
    made = metrics(ready(A), clock=clock)
    for first, last in ((0.02, 3.0), (0.2, 3.0), (5000.0, 5000.0)):
        clock.now = 0.0
        with made.measured(CHAT) as request:
            clock.now = first
            request.begin_answer(200, AT_A, is_stream=True)
            clock.now = last
            request.end_answer()
    with made.measured(CHAT) as failed:
        failed.begin_answer(500, AT_A)
        failed.end_answer()
    found = families(made)
    begun = {it.labels.get("le", it.name): it.value for it in found["gserve_first_event_seconds"].samples}
    assert (begun["0.01"], begun["0.025"], begun["0.25"], begun["600.0"], begun["+Inf"]) == (0, 1, 2, 2, 3)
    whole = {it.labels.get("le", it.name): it.value for it in found["gserve_request_seconds"].samples}
    assert (whole["2.5"], whole["5.0"], whole["+Inf"]) == (0, 2, 3)
    assert whole["gserve_request_seconds_count"] == 3
    assert whole["gserve_request_seconds_sum"] == 5006.0


def test_what_waits_is_shown_by_model() -> None:
    found = families(metrics(ready(A), waiting={"small": Waiting(17, 0), "large": Waiting(1, 3)}))
    assert values(found["gserve_queue_items"], "pool") == {"small": 17, "large": 1}
    assert values(found["gserve_requests_waiting"], "pool") == {"small": 0, "large": 3}


def test_a_batch_is_timed_though_it_has_no_server_and_an_answer_of_the_gateway_itself_is_not() -> None:
    clock = Clock()
    made = metrics(ready(A), clock=clock)
    for route, is_batch in (("/run", True), ("/status", False)):
        clock.now = 0.0
        with made.measured(route) as request:
            request.begin_answer(200, is_batch=is_batch)
            clock.now = 3.0
            request.end_answer()
    found = families(made)
    labels = {"route": "/run", "pool": "", "server": ""}
    assert all(labels.items() <= it.labels.items() for it in found["gserve_request_seconds"].samples)
    assert {it.value for it in found["gserve_request_seconds"].samples if it.name.endswith("_sum")} == {3.0}
    assert "gserve_first_event_seconds" not in found


# ------------------------------------------------------------------------------------------------------------- engines


def test_the_series_of_engines_get_the_label_of_their_server() -> None:
    made = metrics(ready(A), ready(B))
    found = families(made, {A: ENGINE % 5, B: ENGINE % 6})
    assert values(found["vllm:tokens"]) == {A: 5, B: 6}
    assert found["vllm:tokens"].samples[0].labels == {
        "engine": "0", "model_name": 'a "name"', "pool": "small", "server": A
    }  # fmt: skip
    assert values(found["vllm:running"]) == {A: 2, B: 2}


@pytest.mark.parametrize("wrong", ["{", "vllm:running one\n", "\udcff"])
def test_a_text_that_cannot_be_read_is_left_out(wrong: str, caplog: pytest.LogCaptureFixture) -> None:
    made = metrics(ready(A), ready(B))
    with caplog.at_level(logging.WARNING):
        text = asyncio.run(made.text({A: wrong.encode(errors="surrogateescape"), B: (ENGINE % 1).encode()}))
    found = {family.name: family for family in text_string_to_metric_families(text.decode())}
    assert values(found["vllm:running"]) == {B: 2}
    (record,) = caplog.records
    assert record.getMessage().startswith("cannot read the engine's own series of server-0: ")


def test_an_engine_cannot_change_the_series_of_gserve_or_those_of_another_engine() -> None:
    made = metrics(ready(A, items=3), ready(B))
    other = "# HELP vllm:running_total x\n# TYPE vllm:running_total counter\nvllm:running_total 9\n"
    forged = "# HELP gserve_server_items_total x\n# TYPE gserve_server_items_total counter\n"
    forged += 'gserve_server_items_total{server="server-1"} 9\n'
    found = families(made, {A: ENGINE % 5, B: other + forged})
    assert values(found["gserve_server_items"]) == {A: 3, B: 0}
    assert values(found["vllm:running"]) == {A: 2}


def test_the_registry_of_the_process_is_neither_read_nor_written() -> None:
    found = families(metrics(ready(A)))
    assert {name.partition("_")[0] for name in found} == {"gserve"}


def test_a_server_that_is_ready_keeps_no_count_of_its_last_generation() -> None:
    state = ready(A, items=5).queued(BEGINNING).begun(Start("next"), NEW)
    state = replace(state, address=Address(["127.0.0.1"], 1))
    assert state.counters == Counters()
    made = state.after(Ready(None))  # type: ignore[arg-type]
    assert made.counters == Counters()
