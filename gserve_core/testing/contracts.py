"""The contracts of launchers, transports and engines, as checks that raise AssertionError."""

import asyncio
import os
import socket
import sys
import tempfile
import time
from collections.abc import AsyncGenerator, Callable, Sequence
from contextlib import aclosing, suppress
from pathlib import Path

from ..config import LLMConfig
from ..errors import ItemError, LaunchError, RemoteError, TransportError
from ..host import processes
from ..interfaces import (
    Access,
    Address,
    ASGIMessage,
    ASGIReceive,
    ASGISend,
    Engine,
    Job,
    Launcher,
    Process,
    RunningEngine,
    Transport,
)
from ..messages import (
    Conversation,
    Event,
    Failure,
    FlatLogprobs,
    FlatOutput,
    FlatResult,
    Group,
    Health,
    Heartbeat,
    Logprob,
    Message,
    ResponseOutput,
    Result,
    RunRequest,
)

PATIENCE = 20.0
"""Maximum wait of a check for an immediate event, in seconds."""
FLAT = FlatLogprobs([1, 0], [1], [float("-inf")], [None], ["é"])

_CHILD = """
import os, sys, subprocess
below = subprocess.Popen([sys.executable, "-c", "import time; time.sleep(600)"])
print(os.environ["GSERVE_CHECK"], below.pid, flush=True)
sys.stderr.write("to the log\\n")
sys.stderr.flush()
for line in sys.stdin:
    print("read", line, end="", flush=True)
    if line.startswith("exit"):
        below.kill()
        sys.exit(int(line.split()[1]))
"""


def check_launcher(launcher: Launcher) -> None:
    """Check `launcher` against the contracts of `Launcher` and `Process`: start small programs with it.

    Raises AssertionError: a contract is broken.
    """
    with tempfile.TemporaryDirectory() as scratch:
        log = Path(scratch) / "log"

        def job(*command: str) -> Job:
            return Job(name="check", command=command, env={"GSERVE_CHECK": "$HOME a;b"}, log=log)

        process = launcher.launch(job(sys.executable, "-c", _CHILD))
        try:
            value, _, below = _line(process).rpartition(" ")
            assert value == "$HOME a;b", f"the environment of the job must reach it unchanged; got {value!r}"
            assert process.poll() is None, "poll() must return None while the process runs"
            process.stdin.write(b"hello\n")
            process.stdin.flush()
            assert _line(process) == "read hello", "stdin and stdout must reach the process, line by line"
            process.stdin.write(b"exit 7\n")
            process.stdin.flush()
            _until(lambda: process.poll() is not None, "poll() must report that the process has ended")
            assert process.poll() == 7, f"poll() must return the exit code 7; got {process.poll()}"
            assert process.stop(5.0) == 7, "stop() of an ended process must return its exit code"
        finally:
            process.stop(1.0)
        assert "to the log" in log.read_text(), "stderr of the job must be appended to its log"

        process = launcher.launch(job(sys.executable, "-c", _CHILD))
        below = _line(process).rpartition(" ")[2]
        process.stop(5.0)
        assert process.poll() is not None, "after stop() the process must have ended"
        _until(lambda: processes.process_start(int(below)) is None, "stop() must end the processes below the process")
        assert process.stop(5.0) == process.poll(), "stop() must be idempotent"

        try:
            process = launcher.launch(job("/nonexistent/program"))
        except LaunchError:
            pass
        else:  # the command prefix starts, but does not find the program
            _until(lambda: process.poll() not in (None, 0), "a program that does not exist must not count as started")
            process.stop(1.0)


def _line(process: Process) -> str:
    """Return the next line of a process's stdout."""
    text = b""
    deadline = time.monotonic() + PATIENCE
    while not text.endswith(b"\n"):
        assert time.monotonic() < deadline, f"no line on stdout within {PATIENCE:g} s; got {text!r}"
        byte = os.read(process.stdout.fileno(), 1)
        assert byte, f"stdout ended after {text!r}"
        text += byte
    return text.decode().strip()


def _until(condition: Callable[[], bool], otherwise: str) -> None:
    deadline = time.monotonic() + PATIENCE
    while not condition():
        assert time.monotonic() < deadline, otherwise
        time.sleep(0.02)


class _Api:
    """A server for checks of transports: outputs are the prompts; "bad" fails, "slow" waits.

    busy: retry delay in seconds, with which it refuses every request; None: it accepts requests.
    """

    def __init__(self) -> None:
        self.instance = "check-instance"
        self.token: str | None = "check-token"
        self.control: str | None = None
        self.weight_version: str | None = "0"
        self.ready = False
        self.busy: float | None = None
        self.was_shut_down = False
        self.was_cancelled: list[tuple[str, list[int]]] = []
        self.cancelled = asyncio.Event()

    def health(self) -> Health:
        return Health("ok") if self.ready else Health("starting", "checking")

    def _admit(self) -> None:
        if not self.ready:
            raise RemoteError("not ready", status=503)
        if self.busy is not None:
            raise RemoteError("busy, as requested", status=429, retry_after=self.busy)

    async def run(self, request: RunRequest) -> AsyncGenerator[list[Event]]:
        self._admit()
        index = 0
        for group in request.groups:
            for prompt in group.prompts:
                if prompt == "bad":
                    yield [Failure(index, "bad, as requested")]
                elif prompt == "slow":
                    try:
                        for _ in range(1000):
                            await asyncio.sleep(request.heartbeat)
                            yield [Heartbeat(1)]
                    finally:
                        self.cancelled.set()
                elif prompt == "flat":
                    yield [FlatResult(index, [FlatOutput("flat", flat_logprobs=FLAT)])]
                else:
                    yield [Result(index, [ResponseOutput(str(prompt), logprobs=[{1: Logprob(float("-inf"))}])])]
                index += 1

    async def run_whole(self, request: RunRequest) -> list[list[ResponseOutput]]:
        self._admit()
        return [[ResponseOutput(str(prompt))] for group in request.groups for prompt in group.prompts]

    def cancel(self, request_id: str, items: Sequence[int]) -> None:
        self.was_cancelled.append((request_id, list(items)))

    async def answer_openai(self, scope: ASGIMessage, receive: ASGIReceive, send: ASGISend, *, max_body: int) -> None:
        raise AssertionError("only a transport that speaks HTTP calls this, and no request of these checks asks for it")

    def metrics(self) -> bytes:
        return b""

    def shut_down(self) -> None:
        self.was_shut_down = True


def check_transport(transport: Transport) -> None:
    """Check `transport` against the contract of `Transport`: use both halves in this process.

    Raises AssertionError: the contract is broken.
    """
    asyncio.run(asyncio.wait_for(_check_transport(transport), 3 * PATIENCE))


async def _check_transport(transport: Transport) -> None:
    api = _Api()
    async with transport.serve(api, "127.0.0.1", 0) as address:
        assert address.port > 0, "serve() must return the port that it uses"
        connection = transport.connect(address, Access(token=api.token, instance=api.instance, timeout=5.0))
        assert await connection.health() == Health("starting", "checking"), "health() must return state and phase"
        await _check_refused(transport, address, Access(token=api.token, timeout=5.0), "while it is not ready", 503)
        api.ready = True
        assert (await connection.health()).status == "ok"

        prompts: list[str | list[int] | Conversation] = ["a", [1, 2], Conversation([Message("user", "é\x00")]), "bad"]
        events: list[Event] = []
        async with aclosing(connection.run(RunRequest([Group(prompts, {"n": 1}), Group(["b", "flat"])]))) as stream:
            async for batch in stream:
                events += batch
        done = {event.index: event for event in events if not isinstance(event, Heartbeat)}
        assert sorted(done) == [0, 1, 2, 3, 4, 5], f"every item must end once, by its index; got {sorted(done)}"
        assert isinstance(done[3], Failure)
        assert isinstance(done[4], Result)
        assert done[4].outputs[0].text == "b"
        logprob = done[4].outputs[0].logprobs[0][1].logprob  # type: ignore[index]
        assert logprob == float("-inf"), f"minus infinity must arrive unchanged; got {logprob}"
        assert isinstance(done[5], FlatResult), "a result with flat log probabilities must stay one"
        assert done[5].outputs == [FlatOutput("flat", flat_logprobs=FLAT)]

        async with aclosing(connection.run(RunRequest([Group(["first", "slow"])], heartbeat=0.05))) as stream:
            first = await anext(stream)
            assert isinstance(first[0], Result), "results must arrive as soon as they are ready"
            assert isinstance((await anext(stream))[0], Heartbeat), "heartbeats must arrive while work is in progress"
        await asyncio.wait_for(api.cancelled.wait(), PATIENCE)  # closing the iterator cancels the work

        await connection.cancel("a-request", [1, 2])
        assert api.was_cancelled in ([], [("a-request", [1, 2])]), "cancel() must reach the server as it was called"

        empty = [batch async for batch in connection.run(RunRequest([]))]
        assert not empty, f"a request without items has no events; got {empty}"

        api.busy = 1.5
        access = Access(token=api.token, timeout=5.0)
        error = await _check_refused(transport, address, access, "while it is busy", 429)
        assert isinstance(error, RemoteError)
        assert error.retry_after is not None, "retry_after must reach the client"
        assert 1.5 <= error.retry_after < 2.5, f"retry_after must arrive unchanged, 1.5 s; got {error.retry_after}"
        api.busy = None

        await _check_refused(transport, address, Access(token=None, timeout=5.0), "without the token", 401)
        await _check_refused(transport, address, Access(token="check-toke", timeout=5.0), "with a wrong token", 401)
        await _check_refused(
            transport, address, Access(token=api.token, instance="other", timeout=5.0), "with a wrong instance"
        )

        nowhere = transport.connect(Address(["192.0.2.1.invalid", *address.hosts], address.port), access)
        assert (await nowhere.health()).status == "ok", "a server must be found by any of its hosts"
        await nowhere.close()

        await _check_shutdown_refused(transport, address, api, None, None)
        api.control = "check-control"
        await _check_shutdown_refused(transport, address, api, None, None)
        await _check_shutdown_refused(transport, address, api, api.token, None)
        await _check_shutdown_refused(transport, address, api, api.token, api.token)
        await _check_shutdown_refused(transport, address, api, api.token, "check-contro")
        controller = transport.connect(address, Access(token=api.token, control=api.control, timeout=5.0))
        await controller.shut_down()
        assert api.was_shut_down, "shut_down() with the control secret must reach the server"
        await controller.close()
        api.control, api.was_shut_down = None, False
        await connection.shut_down()
        assert api.was_shut_down, "shut_down() with the token must reach a server without a control secret"
        await connection.close()
        await connection.close()
    with socket.socket() as probe:
        assert probe.connect_ex((address.hosts[0], address.port)) != 0, "the port must be closed when serve() ends"
    gone = transport.connect(address, Access(token=api.token, timeout=5.0))
    try:
        await gone.health()
    except TransportError:
        pass
    else:
        raise AssertionError("health() of a server that is gone must raise TransportError")
    await gone.close()


async def _check_refused(
    transport: Transport, address: Address, access: Access, when: str, status: int | None = None
) -> TransportError:
    """Check that `run` is refused; return the error."""
    connection = transport.connect(address, access)
    try:
        async with aclosing(connection.run(RunRequest([Group(["a"])]))) as stream:
            async for _ in stream:
                raise AssertionError(f"run() {when} must be refused")
    except TransportError as error:
        found = error.status if isinstance(error, RemoteError) else None
        if status not in (None, found):
            raise AssertionError(f"run() {when} must raise RemoteError with status {status}, not {error!r}") from error
        return error
    else:
        raise AssertionError(f"run() {when} must raise TransportError")
    finally:
        await connection.close()


async def _check_shutdown_refused(
    transport: Transport, address: Address, api: _Api, token: str | None, control: str | None
) -> None:
    """Check that `shut_down` without the right secret is refused and has no effect."""
    connection = transport.connect(address, Access(token=token, control=control, timeout=5.0))
    try:
        await connection.shut_down()
    except TransportError:
        pass
    else:
        raise AssertionError("shut_down() without the right secret must raise TransportError")
    finally:
        await connection.close()
    assert not api.was_shut_down, "shut_down() without the right secret must do nothing"


def check_engine(engine: Engine, llm: LLMConfig) -> None:
    """Check `engine` against the contracts of `Engine` and `RunningEngine`: start it with `llm` and use it.

    Raises AssertionError: a contract is broken.
    """
    asyncio.run(_check_engine(engine, llm))


async def _check_engine(engine: Engine, llm: LLMConfig) -> None:
    phases: list[str] = []
    turns = 0

    async def count_turns() -> None:
        nonlocal turns
        while True:
            await asyncio.sleep(0.05)
            turns += 1

    counting = asyncio.create_task(count_turns())
    began = time.monotonic()
    running = await engine.start(llm, phases.append)
    took = time.monotonic() - began
    counting.cancel()
    assert turns >= int(took / 0.05 / 20), f"start() must not block the event loop: {turns} turns in {took:.1f} s"
    assert all(isinstance(phase, str) for phase in phases)
    try:
        await _check_running(running)
    finally:
        await running.stop()
        await running.stop()


async def _check_running(running: RunningEngine) -> None:
    assert running.info.capacity >= 1, "a ready engine must report its capacity"
    await running.check()
    params = {"max_tokens": 4, "temperature": 0.0}
    conversation = Conversation([Message("user", "say something")])
    prepared = await running.prepare(["one two three", [1, 2, 3], conversation, ""], params)
    assert len(prepared) == 4, "prepare() must return one entry per prompt"
    assert isinstance(prepared[3], ItemError), "an empty prompt must be an ItemError in its place"
    outputs = await asyncio.gather(*(running.run(item) for item in prepared[:3]))
    for item in outputs:
        assert len(item) == 1
        assert item[0].finish_reason in ("stop", "length", "repetition")
        assert 1 <= len(item[0].token_ids) <= 4, "max_tokens must be respected"
    (again,) = await running.prepare(["one two three"], params)
    assert await running.run(again) == outputs[0], "with temperature 0 the same prompt must give the same output"
    (several,) = await running.prepare(["one two three"], {"max_tokens": 2, "n": 3})
    assert len(await running.run(several)) == 3, "n=3 must give three completions"
    (seeded,) = await running.prepare(["one two three"], params, [11])
    assert await running.run(seeded) == outputs[0], "a seed must have no effect without sampling"
    sampled = await running.prepare(["one two three"] * 2, {"max_tokens": 4, "temperature": 1.0}, [7, 7])
    assert await running.run(sampled[0]) == await running.run(sampled[1]), (
        "items with the same seed must give the same output"
    )

    for wrong in ({"max_tokenz": 4}, {"max_tokens": "many"}, {"temperature": -1.0}, {"temperature": float("nan")}):
        try:
            await running.prepare(["one"], wrong)
        except ItemError as error:
            if not str(error):
                raise AssertionError("an ItemError must have a message") from error
        else:
            raise AssertionError(f"prepare() with {wrong} must raise ItemError")

    (long,) = await running.prepare(["one two three"], {"max_tokens": 512, "ignore_eos": True})
    cancelled = asyncio.create_task(running.run(long))
    await asyncio.sleep(0.05)
    assert isinstance(running.progress(), int), "progress() must be a number"
    await running.check()  # also while another item is in flight
    cancelled.cancel()
    with suppress(asyncio.CancelledError):
        await cancelled
    await running.check()
    died = asyncio.create_task(running.died())
    await asyncio.sleep(0.1)
    assert not died.done(), "died() must not return while the engine is alive"
    died.cancel()
