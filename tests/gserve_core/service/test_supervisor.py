"""Servers that die or hang are replaced, within a budget; late ones join; nothing that was finished is lost."""

import json
import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

import pytest

from gserve import BatchError, ItemError, LaunchError, LLMConfig, ServeConfig, VLLMServer, VLLMService
from gserve_core.engines.echo import EchoEngine
from gserve_core.errors import ItemLost
from gserve_core.host import processes
from gserve_core.host.logs import flush
from gserve_core.service.state import State

LLM = LLMConfig("m", max_model_len=1000)


def until(condition: Callable[[], Any], seconds: float = 60.0) -> None:
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline, f"not so within {seconds:g} s"
        time.sleep(0.02)


def processes_below(server: VLLMServer) -> dict[str, int]:
    """Return the process ids of a server: "server", and "engine" for what runs below it."""
    found = {}
    for pid in processes.processes_of(server.record().instance):
        command = Path(f"/proc/{pid}/cmdline").read_bytes()
        found["server" if b"vllm_server.py" in command else "engine"] = pid
    return found


@contextmanager
def stopped(pid: int) -> Iterator[None]:
    """Stop a process for as long as the context lasts, and let it go on where it is still there."""
    os.kill(pid, signal.SIGSTOP)
    try:
        yield
    finally:
        with suppress(ProcessLookupError):
            os.kill(pid, signal.SIGCONT)


def is_ready(service: VLLMService, index: int = 0) -> bool:
    return service.status()[index].state == State.READY


@pytest.mark.parametrize("victim", ["server", "engine"])
def test_the_only_server_that_is_killed_is_replaced_and_the_call_goes_on(victim: str) -> None:
    with VLLMService(LLM, ServeConfig(), engine=EchoEngine(latency=0.02, capacity=8)) as service:
        (server,) = service.servers
        before = server.record()
        prompts = [f"prompt {index}" for index in range(100)]
        pid, killed = processes_below(server)[victim], threading.Event()

        def given() -> Iterator[str]:
            yield from prompts[:50]
            killed.wait(60)  # so that the call is not over before the kill
            yield from prompts[50:]

        iterator = service.generate_iter(given())
        done = dict([next(iterator)])
        os.kill(pid, signal.SIGKILL)
        killed.set()
        done |= dict(iterator)
        texts = {index: outputs[0].text for index, outputs in done.items() if isinstance(outputs, list)}
        assert texts == dict(enumerate(prompts))
        after = server.record()
        assert after.instance != before.instance, "a new life has an identity of its own"
        assert after.token != before.token
        assert service.status()[0].restarts == 1
        assert not processes.processes_of(before.instance), "nothing of the old life is left"


def test_the_logs_of_both_lives_are_kept() -> None:
    with VLLMService(LLM, ServeConfig(), engine=EchoEngine()) as service:
        first = service.status()[0].log
        assert first is not None
        until(lambda: "ready" in first.read_text())
        os.kill(processes_below(service.servers[0])["server"], signal.SIGKILL)
        until(lambda: service.status()[0].restarts == 1 and is_ready(service))
        second = service.status()[0].log
        assert second is not None
        assert second != first
        assert "ready" in first.read_text()
        until(lambda: "ready" in second.read_text())  # a thread of the server writes its log


def test_a_server_that_dies_again_and_again_is_given_up() -> None:
    serve = ServeConfig(max_restarts=2)
    with VLLMService(LLM, serve, engine=EchoEngine(die_at=1)) as service:
        began = time.monotonic()
        why = "a server died 3 times while it worked on this item, the last time on this item alone"
        with pytest.raises(BatchError, match=why):
            service.generate(["a"])
        with pytest.raises(BatchError, match="no server is available"):
            service.generate(["a"] * 100)
        assert time.monotonic() - began < 150
        until(lambda: service.status()[0].state == State.FAILED)
        began = time.monotonic()
        results = service.generate(["a", "b"], on_error="return")
        assert time.monotonic() - began < 20
        assert all(isinstance(result, ItemLost) for result in results)
        assert "was restarted 2 times" in str(results[0])


def test_a_server_that_fails_its_first_start_is_not_started_again() -> None:
    with pytest.raises(LaunchError, match="boom"):
        VLLMService(LLM, ServeConfig(), engine=EchoEngine(fail_start="boom")).start()


SOME_FAIL = """
import asyncio
import json
import os
from dataclasses import dataclass
from typing import ClassVar
from gserve import hookimpl
from gserve_core.engines.echo import EchoEngine

@dataclass(frozen=True, kw_only=True)
class SomeFail(EchoEngine):
    '''Fails in the first `fail` servers that start; if it is `slow`, the next one loads until `go` is in `folder`.'''

    name: ClassVar[str] = "some-fail"
    folder: str
    fail: int = 0
    slow: bool = False

    async def start(self, llm, report):
        for number in range(100):
            try:
                os.close(os.open(f"{self.folder}/{number}", os.O_CREAT | os.O_EXCL))
                break
            except FileExistsError:
                pass
        if number < self.fail:
            raise RuntimeError(f"broken, number {number}")
        if number == self.fail and self.slow:
            while not os.path.exists(f"{self.folder}/go"):
                report("loading for long")
                await asyncio.sleep(0.05)
        return await super().start(llm, report)

@hookimpl
def gserve_register_engines():
    return [SomeFail]
"""


def some_fail(folder: Path, serve: str, **engine: Any) -> VLLMService:
    (folder / "marks").mkdir()
    (folder / "some_fail.py").write_text(SOME_FAIL)
    options = ", ".join(f"{name}: {json.dumps(value)}" for name, value in engine.items())
    (folder / "c.yaml").write_text(
        f"llm: {{model_name: m}}\nserve: {serve}\nplugins: [some_fail]\n"
        f"engine: {{type: some-fail, folder: {folder}/marks, {options}}}\n"
    )
    return VLLMService.from_yaml(folder / "c.yaml")


def test_a_late_server_joins_by_itself(tmp_path: Path) -> None:
    with some_fail(tmp_path, "{servers: 3, min_ready: 2}", slow=True) as service:
        assert sum(status.state == State.READY for status in service.status()) == 2
        assert service.generate(["a", "b"]) == [["a"], ["b"]]
        (tmp_path / "marks" / "go").touch()
        until(lambda: all(status.state == State.READY for status in service.status()))
        assert service.generate([f"{index}" for index in range(100)]) == [[f"{index}"] for index in range(100)]


def test_one_that_is_not_needed_may_fail(tmp_path: Path) -> None:
    with some_fail(tmp_path, "{servers: 3, min_ready: 2}", fail=1) as service:
        until(lambda: sorted(status.state for status in service.status()) == ["failed", "ready", "ready"])
        assert service.generate(["a", "b"]) == [["a"], ["b"]]


def test_where_too_many_fail_the_cause_of_each_is_told_and_the_rest_is_stopped(tmp_path: Path) -> None:
    service = some_fail(tmp_path, "{servers: 4, min_ready: 3}", fail=2)
    with pytest.raises(LaunchError) as caught:
        service.start()
    assert "broken, number 0" in str(caught.value)
    assert "broken, number 1" in str(caught.value)
    assert not service.is_running()


@pytest.mark.parametrize("victim", ["server", "engine"])
def test_a_short_stop_is_survived_without_a_kill(victim: str) -> None:
    serve = ServeConfig(stall_timeout=8.0)
    with VLLMService(LLM, serve, engine=EchoEngine(latency=0.01, capacity=4)) as service:
        before = processes_below(service.servers[0])
        prompts = [f"p{index}" for index in range(400)]
        done: list[Any] = []
        calling = threading.Thread(target=lambda: done.append(service.generate(prompts)))
        calling.start()
        time.sleep(0.2)
        with stopped(before[victim]):
            time.sleep(4.0)
        calling.join(30)
        assert done == [[[prompt] for prompt in prompts]]
        assert processes_below(service.servers[0]) == before
        assert service.status()[0].restarts == 0


@pytest.mark.parametrize("victim", ["server", "engine"])
def test_a_hang_under_work_is_found_and_healed(victim: str) -> None:
    serve = ServeConfig(servers=2, stall_timeout=2.0)
    with VLLMService(LLM, serve, engine=EchoEngine(latency=0.02, capacity=4)) as service:
        prompts = [f"p{index}" for index in range(600)]
        done: list[Any] = []
        pid, is_stopped = processes_below(service.servers[0])[victim], threading.Event()

        def given() -> Iterator[str]:
            yield from prompts[:300]
            is_stopped.wait(60)  # so that the call is not over before
            yield from prompts[300:]

        calling = threading.Thread(target=lambda: done.append(service.generate(given())))
        calling.start()
        time.sleep(0.3)
        with stopped(pid):
            is_stopped.set()
            calling.join(60)
            assert done == [[[prompt] for prompt in prompts]]
            until(lambda: service.status()[0].restarts >= 1 and is_ready(service))
        assert service.generate(["and on"]) == [["and on"]]


def test_an_idle_server_that_hangs_is_replaced() -> None:
    serve = ServeConfig(stall_timeout=2.0)
    with (
        VLLMService(LLM, serve, engine=EchoEngine()) as service,
        stopped(processes_below(service.servers[0])["server"]),
    ):
        until(lambda: service.status()[0].restarts == 1 and is_ready(service))
        assert service.generate(["and on"]) == [["and on"]]


def test_an_engine_that_takes_no_more_work_is_found_when_its_client_gives_up() -> None:
    serve = ServeConfig(stall_timeout=2.0)
    with VLLMService(LLM, serve, engine=EchoEngine(hang_on="HANG")) as service:
        assert service.generate(["a"]) == [["a"]]  # connected: the deadline is for the item alone
        (result,) = service.generate(["HANG"], deadline=1.5, on_error="return")
        assert isinstance(result, ItemError)
        until(lambda: service.status()[0].restarts == 1 and is_ready(service))
        assert service.generate(["and on"]) == [["and on"]]


def test_a_busy_server_that_moves_is_never_killed() -> None:
    serve = ServeConfig(stall_timeout=4.0)
    with VLLMService(LLM, serve, engine=EchoEngine(latency=0.4, capacity=2)) as service:
        assert service.generate([f"p{index}" for index in range(30)], {"max_tokens": 1})
        assert service.status()[0].restarts == 0


ATTACHED = """
import sys, time
from gserve import VLLMService
from gserve_core.service import attached
attached.MISSING_SECONDS = attached.RETURN_SECONDS = 1.0
with VLLMService.attach("restarting") as service:
    print(service.generate(["one"]), flush=True)
    sys.stdin.readline()
    print(service.generate(["two"]), flush=True)
    sys.stdin.readline()
    print([str(it) for it in service.generate(["three"], on_error="return")], flush=True)
"""


def test_an_attached_service_follows_restarts_and_the_end() -> None:
    service = VLLMService(LLM, ServeConfig(), engine=EchoEngine(), name="restarting")
    service.start()
    try:
        with subprocess.Popen(
            [sys.executable, "-c", ATTACHED], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
        ) as attached:
            assert attached.stdin is not None
            assert attached.stdout is not None
            assert attached.stdout.readline() == "[['one']]\n"
            os.kill(processes_below(service.servers[0])["server"], signal.SIGKILL)
            attached.stdin.write("\n")
            attached.stdin.flush()
            assert attached.stdout.readline() == "[['two']]\n"
            service.shutdown()
            attached.stdin.write("\n")
            attached.stdin.flush()
            assert "no server is available: the service 'restarting' has ended" in attached.stdout.readline()
    finally:
        service.shutdown()


FORKED = """
import os, sys
from gserve import LLMConfig, ServeConfig, VLLMService
from gserve_core.engines.echo import EchoEngine
with VLLMService(LLMConfig("m"), ServeConfig(servers=2), engine=EchoEngine()) as service:
    print(service.generate(["parent"]), flush=True)
    pid = os.fork()
    if not pid:
        print(service.generate(["child"]), flush=True)
        service.shutdown()
        os._exit(0)
    os.waitpid(pid, 0)
    print(service.generate(["parent again"]), flush=True)
"""


def test_a_forked_process_uses_the_servers_and_does_not_end_them() -> None:
    ended = subprocess.run(
        [sys.executable, "-W", "ignore::DeprecationWarning", "-c", FORKED],
        capture_output=True, text=True, timeout=60, check=False,
    )  # fmt: skip
    assert ended.stdout == "[['parent']]\n[['child']]\n[['parent again']]\n", ended.stderr


def test_a_poisoned_item_costs_few_restarts_and_no_other_item() -> None:
    prompts = [f"prompt {index}" for index in range(1000)]
    prompts[100] = prompts[700] = "POISON"
    with VLLMService(LLM, ServeConfig(servers=2), engine=EchoEngine(latency=0.002, die_on="POISON")) as service:
        results = service.generate(prompts, on_error="return")
        assert [index for index, result in enumerate(results) if isinstance(result, ItemError)] == [100, 700]
        assert sum(result == [prompt] for result, prompt in zip(results, prompts, strict=True)) == 998
        assert sum(status.restarts for status in service.status()) <= 10  # see the queue's tests


def test_a_poisoned_item_of_one_process_costs_no_item_of_another() -> None:
    """Each sees only its own items, and the innocent one of the other is alone in its eyes."""
    engine = EchoEngine(latency=0.02, capacity=64, die_on="POISON")
    config = ServeConfig(max_restarts=100)
    with VLLMService(LLM, config, engine=engine, name="shared") as service, VLLMService.attach("shared") as other:
        prompts = [*(f"prompt {index} " * 10 for index in range(40)), "POISON"]
        with ThreadPoolExecutor() as pool:
            call = pool.submit(service.generate, prompts, on_error="return")
            innocent = other.generate(["innocent " * 50], {"max_tokens": 50}, on_error="return")
            results = call.result(120)
        assert innocent == [[("innocent " * 50).strip()]], innocent
        assert [index for index, result in enumerate(results) if isinstance(result, ItemError)] == [40]


def test_poisoned_items_of_another_process_do_not_count_for_max_restarts() -> None:
    engine = EchoEngine(die_on="POISON")
    config = ServeConfig(max_restarts=2)  # as many as make the items suspects
    with VLLMService(LLM, config, engine=engine, name="poisoned") as service, VLLMService.attach("poisoned") as other:
        prompts = [*(f"prompt {index}" for index in range(40)), "POISON"]
        results = other.generate(prompts, on_error="return")
        assert [index for index, result in enumerate(results) if isinstance(result, ItemError)] == [40]
        assert other.generate(["and on"]) == [["and on"]]
        assert service.status()[0].restarts > 2


def test_deaths_between_which_another_process_had_answers_are_not_put_off(caplog: pytest.LogCaptureFixture) -> None:
    with VLLMService(LLM, engine=EchoEngine(), name="used") as service, VLLMService.attach("used") as other:
        for restarts in range(1, 4):
            assert other.generate(["a"]) == [["a"]]
            os.kill(processes_below(service.servers[0])["engine"], signal.SIGKILL)
            until(lambda: service.status()[0].restarts == restarts and is_ready(service))  # noqa: B023
        flush()
        assert [it for it in caplog.messages if " restarts" in it] == ["server-0 restarts"] * 3


def test_a_shutdown_while_it_starts_ends_the_start() -> None:
    service = VLLMService(LLM, ServeConfig(servers=2), engine=EchoEngine(load_time=30))

    def end() -> None:
        until(lambda: any(state.state == State.STARTING for state in service.status()))
        service.shutdown()

    ending = threading.Thread(target=end)
    ending.start()
    began = time.monotonic()
    with pytest.raises(LaunchError, match=r"was (shut down|stopped) while it started"):
        service.start()
    assert time.monotonic() - began < 20
    ending.join(60)
    assert [status.state for status in service.status()] == [State.STOPPED] * 2
