"""Calls over connections that are made up: no server, no socket, all else real."""

import asyncio
import gc
import itertools
import multiprocessing
import os
import random
import signal
import subprocess
import sys
import threading
import time
import warnings
from collections.abc import AsyncGenerator, Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import AbstractAsyncContextManager, contextmanager, suppress
from dataclasses import dataclass, field
from typing import Any, ClassVar

import anyio
import pytest

from gserve import BatchError, BatchInterrupted, ConfigError, ItemError, VLLMClient
from gserve_core.batch import batch, item_queue
from gserve_core.batch import dispatcher as dispatcher_module
from gserve_core.batch.dispatcher import Dispatcher
from gserve_core.batch.items import Items, Seeds, read_prompt
from gserve_core.batch.pieces import Call, Item
from gserve_core.errors import DeadlineExceeded, ItemLost, TransportError
from gserve_core.host.logs import flush
from gserve_core.interfaces import Access, Address, Connection, ServerApi, Transport
from gserve_core.messages import Event, Failure, Group, Health, ResponseOutput, Result, RunRequest
from gserve_transports import HttpTransport


@dataclass
class Notes:
    """What connections were asked to do, and what they are to do. `dies_at`: the prompt at which the server dies."""

    seconds: float = 0.0
    answer: str | None = None
    breaks: int = 0
    requests: list[RunRequest] = field(default_factory=list)
    cancelled: list[tuple[str, list[int]]] = field(default_factory=list)
    healths: int = 0
    is_dead: bool = False
    is_gone: bool = False
    dies_at: str | None = None


class MadeUp(Connection):
    """Answers each prompt with itself, after `seconds`; as often as `breaks` says the connection breaks before."""

    def __init__(self, notes: Notes) -> None:
        self.notes = notes

    async def health(self) -> Health:
        self.notes.healths += 1
        if self.notes.is_dead:
            raise TransportError("connection refused", is_gone=self.notes.is_gone)
        return Health("ok")

    async def run(self, request: RunRequest) -> AsyncGenerator[list[Event]]:
        self.notes.requests.append(request)
        prompts = [prompt for group in request.groups for prompt in group.prompts]
        for index, prompt in enumerate(prompts):
            if prompt == "slow":
                await asyncio.sleep(60.0)
            await asyncio.sleep(self.notes.seconds)
            if prompt == self.notes.dies_at:
                self.notes.is_dead, self.notes.dies_at = True, None
            if self.notes.is_dead:
                raise TransportError("connection reset")
            if self.notes.breaks:
                self.notes.breaks -= 1
                raise TransportError("connection reset")
            if prompt == "bad":
                yield [Failure(index, "it is bad")]
            else:
                yield [Result(index, [ResponseOutput(self.notes.answer or str(prompt))])]

    async def cancel(self, request_id: str, items: list[int]) -> None:
        self.notes.cancelled.append((request_id, items))

    async def shut_down(self) -> None:
        raise AssertionError

    async def close(self) -> None:
        pass


@dataclass(frozen=True, kw_only=True)
class MadeUpTransport(Transport):
    name: ClassVar[str] = "made up"
    notes: Notes = field(default_factory=Notes)

    def serve(self, api: ServerApi, host: str, port: int) -> AbstractAsyncContextManager[Address]:
        raise AssertionError

    def connect(self, address: Address, access: Access) -> Connection:
        return MadeUp(self.notes)


@contextmanager
def client_of(notes: Notes | None = None, capacity: int = 64) -> Iterator[VLLMClient]:
    transport = MadeUpTransport(notes=notes or Notes())
    with VLLMClient("127.0.0.1", 1, token="t", transport=transport, capacity=capacity) as client:
        yield client


@contextmanager
def bounded(seconds: float) -> Iterator[None]:
    began = time.monotonic()
    yield
    assert time.monotonic() - began < seconds


def collected(dispatcher: Dispatcher, prompts: list[str]) -> list[Any]:
    return batch.collect(
        dispatcher, Items(prompts, None, read_prompt, Seeds().of_next_call()), None, batch.texts_of, "return"
    )


# --------------------------------------------------------------------------------------------------- nothing gets lost


def test_calls_that_run_while_all_is_closed_return() -> None:
    def call() -> object:
        try:
            while True:
                client.generate(["a"] * 50)
        except (TransportError, BatchError) as error:
            return error

    for _ in range(10):
        with client_of(Notes(seconds=0.001)) as client, ThreadPoolExecutor(16) as pool:
            calls = [pool.submit(call) for _ in range(16)]
            time.sleep(random.uniform(0.0, 0.05))
            client.close()
            assert all("closed" in str(it.result(20)) for it in calls)


def test_what_a_server_was_given_and_had_not_begun_goes_to_the_next_one() -> None:
    """The task of a request may be cancelled before its first step."""
    dispatcher = Dispatcher()
    try:
        dispatcher.expect("one")
        with ThreadPoolExecutor() as pool:
            calls = [pool.submit(collected, dispatcher, [f"p{number}"]) for number in range(20)]
            for turn in range(200):
                dispatcher.add("one", lambda: MadeUp(Notes(seconds=0.01)), 4, None, is_watched=True)
                dispatcher.remove("one", "it ended", returns=True, died=False)
                if turn == 199:
                    dispatcher.add("one", lambda: MadeUp(Notes()), 4, None, is_watched=True)
            assert [it.result(20) for it in calls] == [[[f"p{number}"]] for number in range(20)]
    finally:
        dispatcher.close()


@pytest.mark.parametrize("turns", range(10))
def test_a_server_that_dies_leaves_no_socket_open(turns: int) -> None:
    """A request that ends closes the idle connections too, and it is luck in which turn of the loop it is cancelled."""
    dispatcher = Dispatcher()
    writers: list[asyncio.StreamWriter] = []

    async def answer(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        writers.append(writer)
        with suppress(asyncio.IncompleteReadError, ConnectionError):
            while head := await reader.readuntil(b"\r\n\r\n"):
                await asyncio.sleep(0.05)  # so that each health question takes a connection of its own
                is_run = head.startswith(b"POST /run")
                length = b"transfer-encoding: chunked" if is_run else b"content-length: 15"
                writer.write(b"HTTP/1.1 200 OK\r\n" + length + b"\r\n\r\n" + (b"" if is_run else b'{"status":"ok"}'))
                is_running.set() if is_run else None

    async def serve() -> asyncio.Server:
        return await asyncio.start_server(answer, "127.0.0.1", 0)

    async def ask_often() -> None:
        await asyncio.gather(*(connection.health() for _ in range(5)))

    async def die() -> None:
        server.close()
        for writer in writers:
            writer.transport.abort()
        for _ in range(turns):
            await asyncio.sleep(0)
        dispatcher.remove("it", "it died")

    is_running = threading.Event()
    with warnings.catch_warnings(record=True) as found, ThreadPoolExecutor() as pool:
        warnings.simplefilter("always")
        server = dispatcher.ask(serve(), 10.0)
        address = Address(["127.0.0.1"], server.sockets[0].getsockname()[1])
        connection = HttpTransport().connect(address, Access(token="t"))
        dispatcher.add("it", lambda: connection, 4, None, is_watched=True)
        dispatcher.ask(ask_often(), 10.0)
        call = pool.submit(collected, dispatcher, ["a"])
        assert is_running.wait(10.0)
        dispatcher.ask(die(), 10.0)
        assert "it died" in str(call.result(10.0))
        dispatcher.close()
        writers.clear()
        gc.collect()
    assert not [str(it.message) for it in found]


def test_a_connection_that_is_reset_three_times_loses_nothing() -> None:
    notes = Notes(breaks=3)
    with client_of(notes) as client:
        assert client.generate(["a", "b"]) == [["a"], ["b"]]
    assert notes.healths >= 3


def test_a_death_that_the_owner_is_about_to_tell_loses_nothing_where_it_ends_none_that_hangs() -> None:
    """As with `stall_timeout: null`: the connection breaks before the owner has told the death."""
    dispatcher = Dispatcher()
    try:
        dead, alive = Notes(is_dead=True), Notes()
        dispatcher.add("one", lambda: MadeUp(dead), 4, None, is_watched=True, stall_timeout=None)
        with ThreadPoolExecutor() as pool:
            call = pool.submit(collected, dispatcher, ["a"] * 20)
            time.sleep(0.3)
            dispatcher.remove("one", "it was killed", returns=True)
            dispatcher.add("one", lambda: MadeUp(alive), 4, None, is_watched=True, stall_timeout=None)
            assert call.result(20.0) == [["a"]] * 20
    finally:
        dispatcher.close()


def test_a_server_that_nobody_ends_is_given_up_after_a_while(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(dispatcher_module, "UNRESPONSIVE_SECONDS", 0.5)
    monkeypatch.setattr(dispatcher_module, "DEFAULT_STALL_TIMEOUT", 0.5)
    dispatcher = Dispatcher()
    try:
        dispatcher.add("one", lambda: MadeUp(Notes(is_dead=True)), 4, None, is_watched=True, stall_timeout=None)
        with bounded(20.0):
            assert [type(it) for it in collected(dispatcher, ["a"] * 20)] == [ItemLost] * 20
    finally:
        dispatcher.close()


def test_an_outage_is_no_loss_for_a_client_of_one_server_either() -> None:
    notes = Notes(seconds=0.01)
    with client_of(notes) as client, ThreadPoolExecutor() as pool:
        assert client.generate(["a"]) == [["a"]]
        notes.dies_at = "50"
        call = pool.submit(client.generate, [f"{number}" for number in range(100)])
        until(lambda: notes.healths >= 3)
        notes.is_dead = False
        assert call.result(20.0) == [[f"{number}"] for number in range(100)]


@pytest.mark.parametrize("is_known", [False, True])
def test_a_client_of_one_server_does_not_wait_for_one_that_is_gone_or_was_never_there(is_known: bool) -> None:
    notes = Notes()
    with client_of(notes) as client:
        if is_known:
            assert client.generate(["a"]) == [["a"]]
        notes.is_dead, notes.is_gone = True, is_known
        with bounded(5.0):
            found: list[Any] = client.generate(["a"] * 20, on_error="return")
            assert [type(it) for it in found] == [ItemLost] * 20


def test_a_server_that_lives_and_cannot_be_reached_is_given_up_after_a_while(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """As behind a firewall: its owner hears from it, and so never says that it has died."""
    monkeypatch.setattr(dispatcher_module, "UNRESPONSIVE_SECONDS", 0.5)
    monkeypatch.setattr(dispatcher_module, "PROBE_SECONDS", 0.25)
    monkeypatch.setattr(dispatcher_module, "MAX_SILENCE", 0.5)  # the warning comes first, however slow this is
    dispatcher = Dispatcher()
    try:
        dispatcher.add("one", lambda: MadeUp(Notes(is_dead=True)), 4, None, is_watched=True, stall_timeout=1.0)
        began = time.monotonic()
        with bounded(20.0):
            (lost,) = collected(dispatcher, ["a"])
        assert time.monotonic() - began > 2.0, "it may have hung: its owner had not ended it yet"
        assert isinstance(lost, ItemLost)
        assert "connection refused" in str(lost)
        flush()
        assert "one does not answer, and its owner has not reported its end: connection refused" in caplog.text
    finally:
        dispatcher.close()


def test_forked_processes_with_threads_lose_no_call() -> None:
    calls = 500 if os.environ.get("LONG") else 100

    def child(queue: Any) -> None:
        def call(thread: int) -> int:
            prompts = [f"{os.getpid()} {thread} {number}" for number in range(calls)]
            return sum(client.generate([prompt]) == [[prompt]] for prompt in prompts)

        with ThreadPoolExecutor(8) as pool:
            queue.put(sum(pool.map(call, range(8))))

    with client_of() as client:
        assert client.generate(["parent"]) == [["parent"]]
        fork = multiprocessing.get_context("fork")
        queue = fork.SimpleQueue()
        children = [fork.Process(target=child, args=(queue,)) for _ in range(4)]
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", DeprecationWarning)
            for it in children:
                it.start()
        for it in children:
            it.join(60)
        assert [queue.get() for _ in children] == [8 * calls] * 4
        assert client.generate(["parent"]) == [["parent"]]


def test_signal_handlers_may_call() -> None:
    answers = []
    is_over = False

    def handler(number: int, frame: object) -> None:
        answers.append(client.generate(["from the handler"]))
        if not is_over:
            signal.setitimer(signal.ITIMER_REAL, 0.002)  # only now: else handlers pile up where a call takes longer

    with client_of() as client:
        before = signal.signal(signal.SIGALRM, handler)
        try:
            signal.setitimer(signal.ITIMER_REAL, 0.002)
            for number in range(300):
                assert client.generate([f"p{number}"]) == [[f"p{number}"]]
        finally:
            is_over = True  # first: a handler that still comes must not set the timer again
            signal.setitimer(signal.ITIMER_REAL, 0)
            signal.signal(signal.SIGALRM, before)
    assert answers
    assert all(answer == [["from the handler"]] for answer in answers)


@contextmanager
def interrupted(callee: Any, caller: Any, act: Callable[[], object]) -> Iterator[None]:
    """Have `act` happen once in this thread, as a signal handler would, where `caller` has called `callee`."""
    is_over = False

    def trace(frame: Any, event: str, argument: object) -> None:
        nonlocal is_over
        if not is_over and frame.f_code is callee.__code__ and frame.f_back.f_code is caller.__code__:
            is_over = True
            act()

    before = sys.gettrace()
    sys.settrace(trace)
    try:
        yield
    finally:
        sys.settrace(before)
    assert is_over


def interrupt() -> None:
    raise KeyboardInterrupt


def test_an_interrupt_while_items_are_handed_over_holds_up_no_later_call() -> None:
    with client_of() as client:
        with interrupted(Dispatcher._schedule, Dispatcher.submit, interrupt), pytest.raises(BatchInterrupted):
            client.generate(["a"])
        assert client.generate(["b"], deadline=10.0) == [["b"]]


def test_a_handler_may_call_while_items_are_handed_over() -> None:
    with client_of() as client:
        answers: list[Any] = []

        def handler() -> None:
            answers.append(client.generate(["b"], deadline=10.0))

        with interrupted(Dispatcher._schedule, Dispatcher.submit, handler):
            assert client.generate(["a"], deadline=20.0) == [["a"]]
        assert answers == [[["b"]]]


def test_an_interrupt_while_all_is_closed_leaves_no_call_open() -> None:
    notes = Notes(seconds=60.0)
    with client_of(notes) as client, ThreadPoolExecutor() as pool:
        call = pool.submit(client.generate, ["a"])
        until(lambda: notes.requests)
        with interrupted(Dispatcher._schedule, Dispatcher.ask_to_close, interrupt), pytest.raises(KeyboardInterrupt):
            client.close()
        client.close()
        with pytest.raises(BatchError, match="closed"):
            call.result(20.0)


def test_a_client_that_is_collected_leaves_no_thread() -> None:
    before = threading.active_count()
    for _ in range(5):
        client = VLLMClient("127.0.0.1", 1, token="t", transport=MadeUpTransport())
        each = client.generate_iter(["a", "b"])
        del client
        assert len([*each]) == 2
        del each
    gc.collect()
    until(lambda: threading.active_count() <= before)


def test_a_handler_may_close_what_a_call_uses() -> None:
    notes = Notes(seconds=60.0)
    caller = threading.get_ident()

    def alarm() -> None:
        until(lambda: notes.requests)
        signal.pthread_kill(caller, signal.SIGALRM)

    with client_of(notes) as client, ThreadPoolExecutor() as pool:
        before = signal.signal(signal.SIGALRM, lambda number, frame: client.close())
        try:
            alarming = pool.submit(alarm)
            with pytest.raises(BatchError, match="the service was closed"):
                client.generate(["a"])  # one item: a longer list may be read in several steps
            alarming.result(20.0)
        finally:
            signal.signal(signal.SIGALRM, before)


# ------------------------------------------------------------------------------------------------------------- sources


def test_a_source_that_blocks_does_not_hold_back_the_deadline() -> None:
    going_on = threading.Event()

    def blocking() -> Iterator[str]:
        yield "first"
        going_on.wait(60.0)
        yield "late"

    with client_of() as client, ThreadPoolExecutor() as pool, bounded(20.0):
        call = pool.submit(client.generate, blocking(), deadline=2.0)
        found = [(index, type(it)) for index, it in client.generate_iter(blocking(), deadline=2.0)]
        assert found == [(0, list), (1, DeadlineExceeded)], "silence would say that all had been read"
        with pytest.raises(BatchError, match="came before all items had been read") as caught:
            call.result()
        assert caught.value.results[0] == ["first"]
        assert isinstance(caught.value.results[1], DeadlineExceeded)
        going_on.set()


def test_a_deadline_ends_the_call_though_outcomes_keep_coming(monkeypatch: pytest.MonkeyPatch) -> None:
    """The caller is slower than the servers, so that there is always another outcome to take."""
    monkeypatch.setattr(batch, "MAX_READ_AHEAD", 1 << 13)  # what has come by the deadline is the caller's, all of it
    with client_of() as client:
        for given in (["a"] * 50_000, itertools.repeat("a")):
            with bounded(60.0):
                taken = 0
                for _, outcome in client.generate_iter(given, deadline=1.5):
                    if isinstance(outcome, DeadlineExceeded):
                        break
                    taken += 1
                    time.sleep(0.0002)
            assert 0 < taken < 30_000


def test_a_deadline_that_is_over_at_once_does_not_read_an_endless_source() -> None:
    with client_of() as client, bounded(10.0):
        ((index, error),) = client.generate_iter(itertools.repeat("a"), deadline=1e-9)
        assert index == 0
        assert "came before all items had been read" in str(error)
        with pytest.raises(BatchError):
            client.generate(itertools.repeat("a"), deadline=1e-9)
        found: list[Any] = client.generate(["a"] * 3, deadline=1e-9, on_error="return")
        assert [type(it) for it in found] == [DeadlineExceeded] * 3


def test_an_item_is_sent_as_soon_as_it_is_read() -> None:
    """The source may wait for an earlier answer of the same call."""
    answers: list[str] = []
    answered = threading.Semaphore(0)

    def dependent() -> Iterator[str]:
        yield "a"
        for _ in range(5):
            assert answered.acquire(timeout=10.0)
            yield answers[-1] + "a"

    with client_of() as client:
        for _, outcome in client.generate_iter(dependent()):
            assert isinstance(outcome, list)
            answers.append(outcome[0].text)
            answered.release()
    assert answers == ["a" * length for length in range(1, 7)]


def test_an_error_of_the_source_is_raised_to_the_caller() -> None:
    def broken() -> Iterator[str]:
        yield "a"
        raise RuntimeError("the file is torn")

    with client_of() as client:
        with pytest.raises(RuntimeError, match="the file is torn"):
            list(client.generate_iter(broken()))
        with pytest.raises(RuntimeError, match="the file is torn"):
            asyncio.run(client.generate_async(broken()))
        assert client.generate(["on"]) == [["on"]]


def test_what_was_read_before_an_error_of_the_source_ends_before_it_is_raised() -> None:
    def broken() -> Iterator[str]:
        for number in range(50):
            yield f"{number}"
        raise RuntimeError("the file is torn")

    with client_of(Notes(seconds=0.05)) as client:
        for deadline in (None, 30.0):
            found: list[tuple[int, Any]] = []
            with pytest.raises(RuntimeError, match="the file is torn"):
                found.extend(client.generate_iter(broken(), deadline=deadline))
            assert sorted((index, outcome[0].text) for index, outcome in found) == [(it, f"{it}") for it in range(50)]


def test_an_error_of_the_source_is_raised_at_the_deadline_too() -> None:
    def broken() -> Iterator[str]:
        yield "a"
        raise RuntimeError("the file is torn")

    found: list[tuple[int, Any]] = []
    with client_of(Notes(seconds=60.0)) as client, bounded(30.0), pytest.raises(RuntimeError, match="the file is torn"):
        found.extend(client.generate_iter(broken(), deadline=1.3))
    assert [type(outcome) for _, outcome in found] == [DeadlineExceeded]


def endless() -> Iterator[str]:
    return itertools.repeat("a")


def silent() -> Iterator[str]:
    yield "a"
    threading.Event().wait()


def long() -> list[str]:
    return ["a"] * 10**6


@pytest.mark.parametrize("source", [endless, silent, long])
@pytest.mark.parametrize("deadline", [None, 60.0])
def test_a_call_that_is_not_read_to_its_end_returns_when_all_is_closed(
    source: Callable[[], Any], deadline: float | None
) -> None:
    found: list[int] = []

    def call() -> None:
        for index, _ in client.generate_iter(source(), deadline=deadline):
            found.append(index)
            began.set()

    began = threading.Event()
    with ThreadPoolExecutor() as pool:
        with client_of(Notes(seconds=0.001)) as client:
            called = pool.submit(call)
            assert began.wait(10.0)
        with pytest.raises(TransportError, match="closed"):
            called.result(timeout=10.0)
    assert sorted(found) == [*range(len(found))], "an outcome is missing, or comes twice"


@pytest.mark.parametrize("count", [1000, 100_000])
def test_a_list_of_any_length_has_its_results_when_all_is_closed_in_the_middle_of_it(count: int) -> None:
    """The longer one has not been sent whole by then."""
    notes = Notes(seconds=0.0005)
    with client_of(notes) as client, ThreadPoolExecutor() as pool:
        call = pool.submit(client.generate, [f"{number}" for number in range(count)])
        until(lambda: len(notes.requests) > 5)
        client.close()
        with pytest.raises(BatchError, match="closed") as caught:
            call.result(60.0)
    results = caught.value.results
    assert len(results) == count
    finished = {number: it for number, it in enumerate(results) if not isinstance(it, ItemError)}
    assert 0 < len(finished) < count
    assert all(it == [f"{number}"] for number, it in finished.items())
    assert all(isinstance(it, ItemLost) and not it.invalid for it in results if isinstance(it, ItemError))


def test_a_list_that_is_closed_and_late_has_its_results() -> None:
    notes = Notes(seconds=0.0005)
    with client_of(notes) as client, ThreadPoolExecutor() as pool:
        call = pool.submit(client.generate, [f"{number}" for number in range(200_000)], deadline=1.0, on_error="return")
        until(lambda: len(notes.requests) > 5)
        client.close()
        results: list[Any] = call.result(60.0)
    assert results[0] == ["0"]
    assert {type(it) for it in results} <= {list, ItemLost, DeadlineExceeded}
    assert len(results) == 200_000


class Lazy(Sequence[str]):
    """Three prompts, of which the second takes long to come."""

    def __init__(self) -> None:
        self.going_on = threading.Event()

    def __len__(self) -> int:
        return 3

    def __getitem__(self, index: Any) -> Any:
        if index >= 3:
            raise IndexError
        if index == 1:
            self.going_on.wait(30.0)
        return f"{index}"


def test_a_sequence_that_is_slow_to_give_its_items_holds_up_neither_the_deadline_nor_an_event_loop() -> None:
    async def beside(given: Lazy) -> list[Any]:
        call = asyncio.create_task(client.generate_async(given, on_error="return"))
        await asyncio.sleep(0.2)
        given.going_on.set()
        return await call

    with client_of() as client:
        given = Lazy()
        with bounded(5.0):
            found = client.generate(given, on_error="return", deadline=2.0)
        assert [type(it) for it in found] == [list, DeadlineExceeded, DeadlineExceeded]
        given.going_on.set()
        with bounded(10.0):
            assert asyncio.run(beside(Lazy())) == [["0"], ["1"], ["2"]]


def test_an_iterator_is_read_as_it_is_worked_off_also_where_each_item_has_parameters() -> None:
    read = itertools.count()
    answered = threading.Event()

    def dependent() -> Iterator[str]:
        yield f"p{next(read)}"
        assert answered.wait(10.0)
        yield f"p{next(read)}"

    with client_of() as client:
        for _, outcome in client.generate_iter(dependent(), [{"max_tokens": 1}, None]):
            assert isinstance(outcome, list)
            answered.set()
        for given, params, message in [
            (2, 3, r"expected one sampling_params for all items, or one per item \(2\); got 3"),
            (3, 2, r"expected one sampling_params for all items, or one per item \(more than 2\); got 2"),
        ]:
            found = client.generate_iter(iter(["a"] * given), [None] * params)
            assert [next(found)[0] for _ in range(2)] == [0, 1]
            with pytest.raises(ConfigError, match=message):
                next(found)


def test_a_sequence_that_says_more_than_it_has_ends() -> None:
    class Torn(list[str]):
        def __len__(self) -> int:
            return 10

    with client_of() as client:
        assert [index for index, _ in client.generate_iter(Torn(["a", "b"]))] == [0, 1]


def test_large_items_are_not_read_far_ahead() -> None:
    read = itertools.count()

    def documents() -> Iterator[str]:
        for _ in range(1000):
            next(read)
            yield "x" * (1 << 20)

    with client_of(Notes(seconds=0.02), capacity=4) as client:
        each = client.generate_iter(documents())
        for _ in range(10):
            next(each)
        assert next(read) < 130
        each.close()


def test_a_caller_that_is_slow_holds_back_the_reading() -> None:
    read = itertools.count()
    with client_of() as client:
        each = client.generate_iter(f"p{next(read)}" for _ in range(10**6))
        next(each)
        time.sleep(1.0)
        assert next(read) <= batch.MAX_READ_AHEAD + 2 * batch.MAX_STEP_ITEMS
        each.close()


@pytest.mark.parametrize("kind", [list, iter])
def test_large_results_are_not_made_far_ahead_of_a_caller_that_is_slow(kind: Callable[[Any], Any]) -> None:
    large = "x" * (1 << 20)
    notes = Notes(answer=large)
    with client_of(notes, capacity=4) as client:
        each = client.generate_iter(kind(["a"] * 20_000))
        for _ in range(20):
            next(each)
            time.sleep(0.05)
        most = item_queue.RESULTS_SIZE / (2 << 20) + 1 + 8  # of results that wait, and in flight

        def made() -> int:
            return sum(len(group.prompts) for request in notes.requests for group in request.groups)

        for taken in (20, 120, 220):
            until(lambda: made() > taken)  # noqa: B023
            assert made() <= taken + most
            for _ in range(100):
                next(each)
            time.sleep(0.2)
        assert client.generate(["a"]) == [[large]], "a call that is not read holds up others"
        each.close()


def test_failures_among_large_results_do_not_hold_up_a_caller_that_was_slow() -> None:
    with client_of(Notes(answer="x" * (1 << 20)), capacity=4) as client:
        each = client.generate_iter(["a", "bad"] * 100)
        found = []
        for _ in range(8):
            found.append(next(each)[0])
            time.sleep(0.1)  # so that results are held back
        found += [index for index, _ in each]
        assert sorted(found) == list(range(200))


# -------------------------------------------------------------------------------------------------------- cancellation


def until(condition: Callable[[], Any], seconds: float = 10.0) -> None:
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline, f"not so within {seconds:g} s"
        time.sleep(0.01)


def test_cancelled_items_leave_the_server_where_they_travel_with_others() -> None:
    notes, dispatcher = Notes(), Dispatcher()
    try:
        dispatcher.expect("one")
        calls = [
            batch.Batch(dispatcher, Items(["slow"] * 2, None, read_prompt, Seeds().of_next_call()), None, print)
            for _ in range(2)
        ]
        for call in calls:
            assert call.feed()
        dispatcher.add("one", lambda: MadeUp(notes), 64, None, is_watched=True)
        until(lambda: notes.requests)
        calls[0].cancel()
        until(lambda: notes.cancelled)
        (request,) = notes.requests
        assert sum(len(group.prompts) for group in request.groups) == 4
        assert notes.cancelled == [(request.id, [0, 1])]
    finally:
        dispatcher.close()


# --------------------------------------------------------------------------------------------------------------- seeds


def seeds_of(notes: Notes) -> list[int]:
    return [seed for request in notes.requests for group in request.groups for seed in group.seeds or []]


def test_items_have_seeds_only_if_the_model_has_one() -> None:
    notes = Notes()
    with client_of(notes) as client:
        client.generate(["a"] * 3)
        client.generate(["a"], {"seed": 5})
    assert [len(group.prompts) for request in notes.requests for group in request.groups] == [3, 1]
    assert not seeds_of(notes)
    assert Seeds(0).of_next_call() is None


def test_seeds_follow_from_the_seed_of_the_model() -> None:
    def sample(seed: int) -> list[int]:
        seeds = Seeds(seed)
        calls = seeds.of_next_call(), seeds.of_next_call()
        return [of(index) for of in calls if of is not None for index in range(5)]

    assert sample(7) == sample(7)
    assert len(set(sample(7))) == 10
    assert sample(7) != sample(8)
    assert all(0 <= seed < 1 << 31 for seed in sample(7))


def test_items_that_are_sampled_have_the_seeds_of_their_call() -> None:
    items = Items(["a", "b", "c"], [{}, {"temperature": 0}, {"seed": 1}], read_prompt, Seeds(7).of_next_call())
    of = Seeds(7).of_next_call()
    assert of is not None
    assert [isinstance(item, Item) and item.seed for item in items.read(Call(print))] == [of(0), None, None]


# --------------------------------------------------------------------------------------------------- ends of a program

AT_EXIT = """
import asyncio, sys
sys.path.insert(0, {folder!r})
from test_dispatcher import MadeUpTransport
from gserve import VLLMClient

class Late:
    def __init__(self):
        self.client = VLLMClient("127.0.0.1", 1, token="t", transport=MadeUpTransport())
        print(self.client.generate(["now"]))

    def __del__(self):
        try:
            print(self.client.generate(["late"]))
        finally:
            self.client.close()

late = Late()
sys.modules["kept"] = late
"""


def test_a_call_at_the_end_of_the_interpreter_ends() -> None:
    program = AT_EXIT.format(folder=os.path.dirname(__file__))  # noqa: PTH120
    ended = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, timeout=60, check=False)
    assert ended.returncode == 0
    assert ended.stdout.startswith("[['now']]")
    assert "event loop" not in ended.stderr
    assert "late" in ended.stdout or "the interpreter is exiting" in ended.stderr


def test_what_the_items_of_a_call_share_is_sent_once() -> None:
    notes = Notes()
    with client_of(notes) as client:
        client.generate(["a", "b"], {"temperature": 0})
        client.generate(["a", "b"], [{"temperature": 0}, {"temperature": 0}])
        client.generate(["a", ""], on_error="return")
    assert [request.groups for request in notes.requests[:2]] == [[Group(["a", "b"], {"temperature": 0})]] * 2
    assert len({request.id for request in notes.requests}) == len(notes.requests)
    assert isinstance(ItemError("x"), Exception)


def test_a_request_that_is_dropped_may_close_its_socket_first() -> None:
    """Closing takes steps of the event loop; where the transport shields them, no cancellation may interrupt them."""
    cleaned = []
    begun = threading.Semaphore(0)

    class Cleaning(MadeUp):
        async def run(self, request: RunRequest) -> AsyncGenerator[list[Event]]:
            try:
                begun.release()
                await asyncio.sleep(60.0)
                yield []
            finally:
                with anyio.CancelScope(shield=True):
                    await asyncio.sleep(0.05)
                cleaned.append(request.id)

    ends: list[Callable[[Dispatcher], None]] = [lambda it: it.close(), lambda it: it.remove("one", "it ended")]
    for end in ends:
        dispatcher = Dispatcher()
        dispatcher.add("one", lambda: Cleaning(Notes()), 4, None, is_watched=True)
        with ThreadPoolExecutor() as pool:
            call = pool.submit(collected, dispatcher, ["a"])
            assert begun.acquire(timeout=20.0)
            end(dispatcher)
            assert isinstance(call.result(20.0)[0], ItemError)
        dispatcher.close()
    assert len(cleaned) == 2
