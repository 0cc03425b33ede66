"""The queue: who gets what, in which order it comes back, and what happens to the work of servers that die."""

import asyncio
import os
import pickle
import random
import signal
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from itertools import count
from pathlib import Path
from typing import Any

import datasets
import numpy as np
import pandas as pd
import pyarrow as pa
import pytest
import torch

from gserve import (
    BatchError,
    ConfigError,
    ItemError,
    LLMConfig,
    ResponseOutput,
    Results,
    ServeConfig,
    Usage,
    VLLMClient,
    VLLMServer,
    VLLMService,
)
from gserve_core.batch.items import Seeds
from gserve_core.engines.echo import EchoEngine
from gserve_core.errors import BatchInterrupted, DeadlineExceeded, ItemLost
from gserve_core.testing import our_processes

LLM = LLMConfig("m", max_model_len=1000)


def service_of(servers: int, **engine: Any) -> VLLMService:
    return VLLMService(LLM, ServeConfig(servers=servers), engine=EchoEngine(**engine))


def until(condition: Callable[[], Any], seconds: float = 60.0) -> None:
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline, f"not so within {seconds:g} s"
        time.sleep(0.02)


@pytest.fixture(scope="module")
def service() -> Iterator[VLLMService]:
    with service_of(2, error_on="MARKED") as started:
        yield started


@pytest.fixture(scope="module")
def slow() -> Iterator[VLLMService]:
    """A tenth of a second a token, four items at once a server."""
    with service_of(2, latency=0.1, capacity=4) as started:
        yield started


def say(text: str) -> list[dict[str, str]]:
    return [{"role": "user", "content": text}]


# ------------------------------------------------------------------------------------------------------------- results


def test_results_come_in_the_order_of_the_call(slow: VLLMService) -> None:
    prompts = [f"p{index} " * (1 + index * 7 % 3) for index in range(30)]
    assert slow.generate(prompts) == [[prompt.strip()] for prompt in prompts]
    assert slow.chat([say(prompt) for prompt in prompts[:6]]) == [[prompt.strip()] for prompt in prompts[:6]]


def test_return_extra_gives_whole_outputs(service: VLLMService) -> None:
    (item,) = service.generate(["a b"], {"logprobs": 1}, return_extra=True)
    (output,) = item
    assert isinstance(output, ResponseOutput)
    assert (output.text, output.finish_reason, len(output.token_ids)) == ("a b", "stop", 2)
    assert output.logprobs is not None
    assert [next(iter(entry.values())).decoded_token for entry in output.logprobs if entry] == ["a", "b"]


def test_several_completions_come_together(service: VLLMService) -> None:
    assert service.generate(["a", "b"], {"n": 3}) == [["a"] * 3, ["b"] * 3]


def test_every_item_may_have_its_own_parameters(service: VLLMService) -> None:
    params = [{"max_tokens": 1}, None, {"n": 2}, {"max_tokens": 2}]
    assert service.generate(["a b c"] * 4, params) == [["a"], ["a b c"], ["a b c"] * 2, ["a b"]]


def test_token_ids_texts_and_their_subclasses_are_prompts(service: VLLMService) -> None:
    class Text(str):
        def __str__(self) -> str:
            return "something else"

    given = [[1, 2], (3,), Text("text"), "é🎉 \x00"]
    assert service.generate(given) == [["1 2"], ["3"], ["text"], ["é🎉 \x00"]]
    assert service.chat([[{"role": Text("user"), "content": Text("hello")}]]) == [["hello"]]


def test_prompts_and_parameters_of_other_libraries_are_taken(service: VLLMService) -> None:
    given = [np.array([1, 2]), torch.tensor([3]), pa.scalar([4]), [np.int64(5)], np.str_("a"), pa.scalar("b")]
    expected = [["1 2"], ["3"], ["4"], ["5"], ["a"], ["b"]]
    assert service.generate(given) == expected
    assert service.generate(np.array([[1, 2], [3, 4]])) == [["1 2"], ["3 4"]]
    for column in (pd.Series(["a", "b"]), pa.chunked_array([["a"], ["b"]]), np.array(["a", "b"])):
        assert service.generate(column) == [["a"], ["b"]]
    params = pd.Series([{"n": np.int64(2)}, {"max_tokens": np.int32(1), "temperature": np.float64(0)}])
    assert service.generate(["a b", "c d"], params) == [["a b", "a b"], ["c"]]
    assert service.generate(["a b", "c d"], ({"max_tokens": size} for size in (1, 2))) == [["a"], ["c d"]]


def test_conversations_of_other_libraries_are_taken(service: VLLMService) -> None:
    rows = [
        {"messages": [{"role": "user", "content": "a"}, {"role": "assistant", "content": None, "name": "x"}]},
        {"messages": [{"role": "user", "content": "b"}]},
    ]
    table = pa.Table.from_pylist(rows)
    expected: list[Any] = ["the prompt is empty", ["b"]]
    for column in (table["messages"], table.to_pandas()["messages"], datasets.Dataset.from_list(rows)["messages"]):
        results = service.chat(column, on_error="return")
        assert [str(it) if isinstance(it, ItemError) else it for it in results] == expected


def test_forms_of_vllm_are_taken_where_their_meaning_is_plain(service: VLLMService) -> None:
    assert service.generate("a b") == [["a b"]]
    assert service.generate({"prompt": "a b"}) == service.generate([{"prompt": "a b", "extra": None}]) == [["a b"]]
    assert service.generate({"prompt_token_ids": [1, 2]}) == service.generate([1, 2]) == [["1 2"]]
    assert service.chat(say("a")) == service.chat({"messages": say("a")}) == [["a"]]
    assert service.generate("a b c", truncate_prompt_tokens=2) == [["a b"]]
    assert service.generate("a b c", {"truncate_prompt_tokens": 1}) == [["a"]]
    assert service.generate("w " * 2000, {"max_tokens": 2, "truncate_prompt_tokens": -1}) == [["w w"]]
    with pytest.raises(BatchError, match="expected a mapping with 'prompt' or 'prompt_token_ids', got one with 'x'"):
        service.generate([{"x": 1}])


def test_options_of_a_conversation_may_be_its_own(service: VLLMService) -> None:
    own = {"messages": say("a"), "tools": [{"type": "function"}], "chat_template_kwargs": {"x": np.int64(1)}}
    assert service.chat([own, say("b")], tools=[], chat_template_kwargs={"y": 1}) == [["a"], ["b"]]
    wrong: list[Any] = [{"messages": say("a"), "tool": 1}, own | {"chat_template_kwargs": {"tokenize": True}}]
    results = service.chat(wrong, on_error="return")
    assert "a conversation has no field 'tool'; expected messages, " in str(results[0])
    assert "'tokenize' is not allowed in chat_template_kwargs" in str(results[1])


def test_a_table_in_place_of_a_column_is_refused(service: VLLMService) -> None:
    table = pd.DataFrame({"prompt": ["a"]})
    with pytest.raises(ConfigError, match=r"got a table \(pandas.DataFrame\): pass a column, as in df\['prompt'\]"):
        service.generate(table)
    with pytest.raises(ConfigError, match=r"pass a column, as in df\['messages'\], or use service.map\(df\)"):
        service.chat_iter(pa.Table.from_pandas(table))


def test_the_tokens_of_a_call_are_counted(service: VLLMService) -> None:
    results = service.generate(["a b", "", "c d e"], {"n": 2, "max_tokens": 2}, on_error="return")
    assert (results.usage.prompt_tokens, results.usage.completion_tokens, results.usage.total_tokens) == (5, 8, 13)
    with pytest.raises(BatchError) as caught:
        service.generate(["a b", ""])
    assert isinstance(caught.value.results, Results)
    assert caught.value.results.usage == Usage(2, 2)
    assert asyncio.run(service.chat_async([say("a b")])).usage == Usage(2, 2)
    assert pickle.loads(pickle.dumps(results)).usage == Usage(5, 8)


def test_outputs_have_the_size_of_their_prompt_and_its_tokens_if_asked_for(service: VLLMService) -> None:
    ((plain,),) = service.generate(["a b c"], {"max_tokens": 1}, return_extra=True)
    assert (plain.prompt_tokens, plain.prompt_token_ids) == (3, None)
    ((full,),) = service.generate(["a b c"], {"logprobs": 1}, return_extra=True, return_prompt_token_ids=True)
    assert full.prompt_tokens == 3
    assert full.prompt_token_ids == full.token_ids
    _, outputs = next(service.generate_iter(["a b"], {"n": 2}, return_prompt_token_ids=True))
    assert isinstance(outputs, list)
    assert [len(output.prompt_token_ids or ()) for output in outputs] == [2, 2]


def test_a_progress_bar_is_shown_where_it_is_wanted(service: VLLMService, capfd: pytest.CaptureFixture[str]) -> None:
    service.generate(["a", "b"])
    assert "Processed" not in capfd.readouterr().err
    service.generate(["a", "b"], use_tqdm=True)
    assert "Processed prompts: 100%" in capfd.readouterr().err
    counted: list[int] = []

    class Bar:
        def __init__(self, **options: Any) -> None:
            counted.append(options["total"])

        def update(self, n: int) -> None:
            counted.append(n)

        def close(self) -> None:
            counted.append(-1)

    service.chat([say("a")], use_tqdm=Bar)
    assert counted == [1, 1, -1]


def test_prompts_may_come_from_any_iterable(service: VLLMService) -> None:
    assert service.generate(f"p{index}" for index in range(3)) == [["p0"], ["p1"], ["p2"]]
    assert service.generate([]) == []
    assert service.chat(()) == []
    assert list(service.generate_iter([])) == []


def test_a_bad_item_is_an_error_in_its_place(service: VLLMService) -> None:
    results = service.generate(["a", "", "b"], on_error="return")
    assert (results[0], results[2]) == (["a"], ["b"])
    error = results[1]
    assert isinstance(error, ItemError)
    assert (str(error), error.index, error.invalid) == ("the prompt is empty", 1, True)


def test_a_batch_error_carries_every_result(service: VLLMService) -> None:
    with pytest.raises(BatchError, match="1 of 3 items failed; the first is item 1: the prompt is empty") as caught:
        service.generate(["a", "", "b"])
    assert [caught.value.results[index] for index in (0, 2)] == [["a"], ["b"]]
    assert caught.value.errors == [caught.value.results[1]]


def test_a_thousand_prompts_with_seven_kinds_of_bad_ones(service: VLLMService) -> None:
    bad = ["", "w " * 1001, "\ud800", 7, None, [10**30], "MARKED"]
    prompts: list[Any] = [f"prompt {index}" for index in range(1000)]
    places = random.Random(1).sample(range(1000), len(bad))
    for place, item in zip(places, bad, strict=True):
        prompts[place] = item
    with pytest.raises(BatchError, match="7 of 1000 items failed") as caught:
        service.generate(prompts)
    for index, result in enumerate(caught.value.results):
        if index in places:
            assert isinstance(result, ItemError)
            assert result.index == index
            assert result.invalid is (prompts[index] != "MARKED")
        else:
            assert result == [f"prompt {index}"]


def test_bad_conversations_are_errors_in_their_places(service: VLLMService) -> None:
    bad: list[Any] = [
        [],
        [{"role": "user"}],
        [{"role": "user", "content": 1}],
        "text",
        None,
        [say("nested")],
        say("\ud800"),
    ]
    results: list[Any] = service.chat([say("fine"), *bad, say("fine too")], on_error="return")
    assert (results[0], results[-1]) == (["fine"], ["fine too"])
    assert [type(result) for result in results[1:-1]] == [ItemError] * len(bad)


def test_bad_parameters_of_one_item_are_its_own_error(service: VLLMService) -> None:
    params = [None, {"max_tokenz": 1}, {"n": -1}, "x", {"temperature": float("nan")}]
    results: list[Any] = service.generate(["a"] * 5, params, on_error="return")
    assert results[0] == ["a"]
    assert [type(result) for result in results[1:]] == [ItemError] * 4
    assert "did you mean 'max_tokens'?" in str(results[1])


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda it: it.generate(b"a prompt"), r"expected a list of prompts like \[\"a prompt\", …\], got bytes"),
        (lambda it: it.generate(7), "expected a list of prompts .* got int"),
        (lambda it: it.generate({"a": "b"}), "expected a list of prompts .* got dict"),
        (lambda it: it.generate({"prompts": ["a"]}), "got a dict of columns: pass a column, as in df"),
        (lambda it: it.chat("hello"), "expected a list of conversations .* got str"),
        (lambda it: it.chat({"messages": [say("a"), say("b")]}), "got a dict of columns: pass a column, as in df"),
        (lambda it: it.generate("a", lora_request="x"), "set adapters in the LLMConfig, and pass adapter=NAME"),
        (lambda it: it.chat(say("a"), tools="x"), "expected tools as a list .* got 'x'"),
        (lambda it: it.chat(say("a"), chat_template_kwargs=[]), "expected chat_template_kwargs as a mapping, got list"),
        (lambda it: it.chat(say("a"), chat_template_kwargs={"tools": []}), "'tools' is not allowed .* use 'tools'"),
        (
            lambda it: it.generate(["a", "b"], [None]),
            r"one sampling_params for all items, or one per item \(2\); got 1",
        ),
        (lambda it: it.generate(["a"], "hot"), "expected sampling_params as vllm.SamplingParams or a mapping, got str"),
        (lambda it: it.generate(["a"], on_error="x"), "expected on_error as 'raise' or 'return', got 'x'"),
        (lambda it: it.generate_iter(None), "expected a list of prompts"),
        (lambda it: it.generate(["a"], iter([None, None])), r"one per item \(1\); got more"),
        (lambda it: it.generate(["a", "b"], iter([None])), r"one per item \(more than 1\); got 1"),
    ],
)
def test_wrong_arguments_are_told(service: VLLMService, call: Callable[[VLLMService], Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        call(service)


# ----------------------------------------------------------------------------------------------------------- iterating


def test_a_slow_item_does_not_hold_back_the_others(slow: VLLMService) -> None:
    prompts = ["slow " * 20, *(f"p{index}" for index in range(20))]
    seen = [index for index, _ in slow.generate_iter(prompts, {"max_tokens": 20})]
    assert seen[-1] == 0
    assert sorted(seen) == list(range(21))


def test_the_first_result_comes_long_before_the_last(slow: VLLMService) -> None:
    began = time.monotonic()
    each = slow.generate_iter(["long " * 300, "short"], {"max_tokens": 300})
    assert next(each)[0] == 1
    assert time.monotonic() - began < 15
    each.close()


def test_an_iterator_that_is_closed_early_ends_the_work(slow: VLLMService) -> None:
    each = slow.generate_iter(["short", *["long " * 500] * 100], {"max_tokens": 500})
    next(each)
    each.close()
    began = time.monotonic()
    assert slow.generate(["next"] * 8) == [["next"]] * 8  # the servers are free for it
    assert time.monotonic() - began < 20


def test_an_iterator_that_nobody_asks_does_nothing(slow: VLLMService) -> None:
    for _ in range(20):
        slow.generate_iter(["long " * 500] * 8, {"max_tokens": 500}).close()
    began = time.monotonic()
    assert slow.generate(["next"] * 8) == [["next"]] * 8
    assert time.monotonic() - began < 20


# -------------------------------------------------------------------------------------------------------- many at once


def test_fifty_threads_call_at_once(service: VLLMService) -> None:
    def call(thread: int) -> None:
        for turn in range(5):
            prompts = [f"t{thread} c{turn} p{index}" for index in range(20)]
            assert service.generate(prompts) == [[prompt] for prompt in prompts]

    with ThreadPoolExecutor(50) as pool:
        list(pool.map(call, range(50)))


def test_a_call_works_inside_a_running_event_loop(service: VLLMService) -> None:
    async def inside() -> list[list[str]]:
        return service.generate(["a"])

    assert asyncio.run(inside()) == [["a"]]


def test_a_hundred_thousand_items_go_in_one_call(service: VLLMService) -> None:
    results = service.generate([f"p{index}" for index in range(100_000)])
    assert results == [[f"p{index}"] for index in range(100_000)]


def test_all_servers_get_work(slow: VLLMService) -> None:
    before = [state.counters.items for state in slow.status()]
    slow.generate(["a " * 5] * 16)
    until(lambda: all(it.counters.items > was for it, was in zip(slow.status(), before, strict=True)))


# ------------------------------------------------------------------------------------------------------------- deaths


def pid_of(server: VLLMServer) -> int:
    """Return the process id of a server, not of its engine: it carries its instance's id, as the engine does."""
    mark = b"GSERVE_ID=" + server.record().instance.encode()
    ours = [pid for pid, command in our_processes().items() if "vllm_server.py" in command]
    (pid,) = [pid for pid in ours if mark in environ_of(pid)]
    return pid


def environ_of(pid: int) -> bytes:
    """Return the environment of a process, and nothing if it has ended."""
    try:
        return Path(f"/proc/{pid}/environ").read_bytes()
    except (FileNotFoundError, ProcessLookupError):
        return b""


def test_a_server_that_is_slow_gets_less_of_a_batch() -> None:
    with service_of(2, latency=0.05, capacity=4) as service, ThreadPoolExecutor() as pool:
        slow = pid_of(service.servers[0])
        seen: list[int] = []
        os.kill(slow, signal.SIGSTOP)
        try:
            each = service.generate_iter(["a"] * 16)
            done = pool.submit(lambda: seen.extend(index for index, _ in each))
            until(lambda: len(seen) == 11)  # all but the five that the slow one has been given
        finally:
            os.kill(slow, signal.SIGCONT)
        done.result(60)
    assert sorted(seen) == list(range(16))


def test_a_server_that_is_killed_loses_no_item() -> None:
    with service_of(2, latency=0.03, capacity=8) as service:
        prompts = [f"prompt {index}" for index in range(150)]
        victim = pid_of(service.servers[0])
        delivered: dict[int, Any] = {}
        for number, (index, outcome) in zip(count(), service.generate_iter(prompts), strict=False):
            assert index not in delivered, "an item must come once"
            delivered[index] = outcome
            if number == 20:
                os.kill(victim, signal.SIGKILL)
        assert len(delivered) == 150
        assert all(delivered[index][0].text == prompt for index, prompt in enumerate(prompts))
        assert service.is_running()
        until(lambda: [status.restarts for status in service.status()] == [1, 0])

        def call(thread: int) -> None:  # what is dead is not in the way of later calls
            for turn in range(3):
                mine = [f"t{thread} c{turn} p{index}" for index in range(4)]
                assert service.generate(mine) == [[prompt] for prompt in mine]

        with ThreadPoolExecutor(10) as pool:
            list(pool.map(call, range(10)))


def test_an_engine_that_dies_loses_no_item_but_the_one_it_dies_of() -> None:
    with service_of(4, latency=0.01, capacity=16, die_on="POISON") as service:
        prompts = [f"prompt {index}" for index in range(200)]
        prompts[50] = "POISON"
        results = service.generate(prompts, on_error="return")
        assert [index for index, result in enumerate(results) if isinstance(result, ItemError)] == [50]
        assert all(result == [prompts[index]] for index, result in enumerate(results) if index != 50)
        assert isinstance(results[50], ItemLost)
        until(lambda: sum(status.restarts for status in service.status()) == 4)  # seen later than by the call
        until(lambda: all(status.state == "ready" for status in service.status()))
        assert service.generate(["and on"]) == [["and on"]]


def test_when_all_servers_are_killed_the_call_ends_with_what_is_finished() -> None:
    serve = ServeConfig(servers=2, max_restarts=0)
    with VLLMService(LLM, serve, engine=EchoEngine(latency=0.3, capacity=4)) as service:
        errors: list[BatchError] = []

        def call() -> None:
            try:
                service.generate([f"p{index}" for index in range(400)])
            except BatchError as error:
                errors.append(error)

        calling = threading.Thread(target=call)
        calling.start()
        until(lambda: sum(state.counters.items for state in service.status()) >= 16)
        for server in service.servers:
            os.kill(pid_of(server), signal.SIGKILL)
        began = time.monotonic()
        calling.join(60)
        assert time.monotonic() - began < 20
        (error,) = errors
        finished = [result for result in error.results if not isinstance(result, ItemError)]
        assert 8 <= len(finished) < 400
        assert all(result == [f"p{index}"] for index, result in enumerate(error.results) if result in finished)
        assert "no server is available" in str(error)
        assert all(isinstance(failure, ItemLost) and not failure.invalid for failure in error.errors)
        until(lambda: not service.is_running())
        with pytest.raises(BatchError, match="no server is available"):
            service.generate(["a"])


def test_a_server_that_shows_no_life_is_left_and_its_items_go_elsewhere() -> None:
    serve = ServeConfig(servers=2, client_timeout=2.0)
    with VLLMService(LLM, serve, engine=EchoEngine(latency=0.02, capacity=8)) as service:
        stopped = pid_of(service.servers[0])
        os.kill(stopped, signal.SIGSTOP)
        try:
            prompts = [f"p{index}" for index in range(50)]
            began = time.monotonic()
            assert service.generate(prompts) == [[prompt] for prompt in prompts]
            assert time.monotonic() - began < 30
        finally:
            os.kill(stopped, signal.SIGCONT)
        assert service.generate(prompts) == [[prompt] for prompt in prompts]


# ------------------------------------------------------------------------------------- deadlines, Ctrl-C, event loops


def is_idle(service: VLLMService) -> bool:
    """Say whether the servers are free: as many items as they take at once are answered at once."""
    began = time.monotonic()
    service.generate(["next"] * 8)
    return time.monotonic() - began < 20


def test_a_deadline_ends_what_is_not_finished_and_keeps_what_is(slow: VLLMService) -> None:
    prompts = ["short", *["long " * 500] * 100, "long " * 499 + "late"]  # a short one might overtake the long ones
    began = time.monotonic()
    with pytest.raises(BatchError) as caught:
        slow.generate(prompts, {"max_tokens": 500}, deadline=5.0)
    assert time.monotonic() - began < 20
    assert caught.value.results[0] == ["short"]
    assert all(isinstance(error, DeadlineExceeded) for error in caught.value.results[1:])
    assert [error.index for error in caught.value.errors] == list(range(1, 102))
    assert is_idle(slow)


def test_a_deadline_also_ends_what_was_never_read(slow: VLLMService) -> None:
    given = ["long " * 500] * 200_000
    results: list[Any] = slow.generate(given, {"max_tokens": 500}, deadline=1.0, on_error="return")
    assert [result.index for result in results if isinstance(result, DeadlineExceeded)] == list(range(200_000))


@pytest.mark.parametrize("deadline", [0, -1, float("nan"), float("inf"), "soon"])
def test_a_deadline_that_is_none_is_told(service: VLLMService, deadline: Any) -> None:
    with pytest.raises(ConfigError, match="expected a deadline in seconds above 0"):
        service.generate(["a"], deadline=deadline)


def test_ctrl_c_leaves_what_is_finished_and_frees_the_servers(slow: VLLMService) -> None:
    interrupt = threading.Timer(4.0, os.kill, (os.getpid(), signal.SIGINT))
    interrupt.start()
    with pytest.raises(KeyboardInterrupt) as caught:
        slow.generate(["short", *["long " * 500] * 50], {"max_tokens": 500})
    assert isinstance(caught.value, BatchInterrupted)
    assert caught.value.results == [["short"], *[None] * 50]
    assert is_idle(slow)


def test_items_are_read_as_they_are_worked_off(service: VLLMService) -> None:
    read = count()

    def endless() -> Iterator[str]:
        while True:
            yield f"p{next(read)}"

    each = service.generate_iter(endless())
    found: dict[int, Any] = {}
    for _ in range(200_000):
        index, outcome = next(each)
        found[index] = outcome
    each.close()
    assert len(found) == 200_000
    assert all(found[index][0].text == f"p{index}" for index in range(50_000))
    assert next(read) < 400_000, "no more may be read than is under way"


def test_a_slow_source_does_not_hold_its_items_back(service: VLLMService) -> None:
    read = []

    def trickle() -> Iterator[str]:
        for number in range(20):
            read.append(number)
            yield f"p{number}"
            time.sleep(0.3)

    each = service.generate_iter(trickle())
    first, _ = next(each)
    assert len(read) < 20, "the first comes long before the source has ended"
    assert sorted([first, *(index for index, _ in each)]) == list(range(20))


def test_many_async_calls_share_an_event_loop(slow: VLLMService) -> None:
    async def ask(number: int) -> list[list[str]]:
        return await slow.generate_async([f"p{number}"])

    async def ask_all() -> list[Any]:
        ticks = 0

        async def tick() -> None:
            nonlocal ticks
            while True:
                await asyncio.sleep(0.001)
                ticks += 1

        ticking = asyncio.create_task(tick())
        answers = await asyncio.gather(*(ask(number) for number in range(200)))
        ticking.cancel()
        assert ticks > 20, "the event loop must turn meanwhile: it has two seconds and more"
        talk = await slow.chat_async([say("hello")], return_extra=True)
        assert talk[0][0].text == "hello"
        with pytest.raises(BatchError):
            await slow.generate_async(["a", ""])
        return answers

    assert asyncio.run(ask_all()) == [[[f"p{number}"]] for number in range(200)]


def test_a_cancelled_async_call_frees_the_servers(slow: VLLMService) -> None:
    async def cancel() -> None:
        with pytest.raises(TimeoutError):
            async with asyncio.timeout(0.5):
                await slow.generate_async(["long " * 500] * 50, {"max_tokens": 500})
        results = await slow.generate_async(
            ["a b", "long " * 500], {"max_tokens": 500}, deadline=5.0, on_error="return"
        )
        assert results[0] == ["a b"]
        assert isinstance(results[1], DeadlineExceeded)

    asyncio.run(cancel())
    assert is_idle(slow)


def test_a_server_with_enough_to_do_is_asked_again(tmp_path: Path) -> None:
    """Four clients that know nothing of the capacity overload a server of two; it says so, and all are served."""
    with VLLMServer(LLM, engine=EchoEngine(latency=0.001, capacity=2)) as server:
        assert server.port is not None

        def call(number: int) -> list[list[str]]:
            with VLLMClient(server.host, server.port or 0) as client:
                return client.generate([f"c{number} p{index}" for index in range(200)])

        with ThreadPoolExecutor(4) as pool:
            answers = list(pool.map(call, range(4)))
        assert answers == [[[f"c{number} p{index}"] for index in range(200)] for number in range(4)]


@pytest.mark.parametrize("seed", [0, 42])
def test_an_item_that_is_sent_again_is_sampled_alike_if_it_has_a_seed(seed: int) -> None:
    llm, params = replace(LLM, seed=seed), {"temperature": 1.0, "max_tokens": 8}
    with VLLMService(llm, ServeConfig(), engine=EchoEngine(sample=True, latency=0.05, capacity=4)) as service:
        victim = pid_of(service.servers[0])
        each = service.generate_iter([f"p{index}" for index in range(40)], params)
        seen = dict(next(each) for _ in range(4))
        os.kill(victim, signal.SIGKILL)
        seen |= dict(each)
        one, other = service.generate(["x"] * 2, params)
        fixed = service.generate(["x"] * 2, {**params, "seed": 7})
    assert sorted(seen) == list(range(40))
    assert one != other
    assert fixed == [["x seed-7"]] * 2
    if (of := Seeds(seed).of_next_call()) is not None:
        texts = {index: found[0].text for index, found in seen.items() if not isinstance(found, ItemError)}
        assert texts == {index: f"p{index} seed-{of(index)}" for index in range(40)}


def test_a_deadline_ends_also_a_source_without_end(slow: VLLMService) -> None:
    def endless() -> Iterator[str]:
        while True:
            yield "a"

    began = time.monotonic()
    outcomes = list(slow.generate_iter(endless(), deadline=1.0))
    assert time.monotonic() - began < 20
    assert sorted(index for index, _ in outcomes) == list(range(len(outcomes)))
    assert isinstance(dict(outcomes)[len(outcomes) - 1], DeadlineExceeded)
    assert is_idle(slow)
