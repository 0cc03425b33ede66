"""A process that is attached follows a service by its name: through restarts, unreadable records, and its end."""

import errno
import os
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import pytest

from gserve_core.errors import ConfigError, GserveError, TransportError
from gserve_core.host import processes
from gserve_core.interfaces import Address
from gserve_core.service import attached as module
from gserve_core.service import records
from gserve_core.service.attached import Attached
from gserve_core.service.records import ServerRecord, ServiceRecord
from gserve_core.service.state import State
from tests.gserve_core.fake_servers import until


class Told:
    """A dispatcher that notes which servers it has, and what its items wait for."""

    def __init__(self) -> None:
        self.servers: dict[str, Any] = {}
        self.awaited: set[str] = set()
        self.why = ""
        self.died: list[bool] = []
        self.is_drained = self.is_closed = False
        self.prefix_affinity = True

    def set_prefix_affinity(self, is_on: bool) -> None:
        self._check()
        self.prefix_affinity = is_on

    def expect(self, key: str, comes: bool = True) -> None:
        self._check()
        (self.awaited.add if comes else self.awaited.discard)(key)

    def add(self, key: str, connect: Any, capacity: int, timeout: float | None, **more: Any) -> None:
        self._check()
        self.stall_timeout = more["stall_timeout"]
        self.servers[key] = connect()

    def remove(self, key: str, why: str, *, returns: bool = False, died: bool = True) -> None:
        self._check()
        if self.servers.pop(key, None):
            self.died.append(died)
        (self.awaited.add if returns else self.awaited.discard)(key)
        self.why = why

    def drain(self, why: str) -> None:
        self._check()
        self.is_drained, self.why = True, why

    def close(self) -> None:
        self.is_closed = True

    def _check(self) -> None:
        if self.is_closed:
            raise TransportError("closed")


@pytest.fixture(autouse=True)
def _short(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "FOLLOW_SECONDS", 0.02)
    monkeypatch.setattr(module, "MISSING_SECONDS", 0.2)
    monkeypatch.setattr(module, "RETURN_SECONDS", 60.0)
    monkeypatch.setattr(module, "Dispatcher", Told)


@pytest.fixture
def owners() -> Iterator[Callable[[], int]]:
    """Return a function that starts a process which owns a service, and returns its id."""
    started: list[subprocess.Popen[bytes]] = []

    def start() -> int:
        started.append(subprocess.Popen([sys.executable, "-c", "import time; time.sleep(600)"]))
        return started[-1].pid

    yield start
    for process in started:
        process.kill()
        process.wait()
    records.services()  # forgets those whose owner is dead


def kill(pid: int) -> None:
    subprocess.run(["kill", "-9", str(pid)], check=True)
    until(lambda: processes.process_start(pid) is None)


def write(
    pid: int,
    *instances: str,
    status: str = "ready",
    stall_timeout: float | None = 60.0,
    deaths: Sequence[str] = (),
) -> None:
    """Write the record of a service whose servers have these instances."""
    servers = [
        ServerRecord(f"server-{index}", Address(["127.0.0.1"], 4000 + index), instance, "token", 4, "m")
        for index, instance in enumerate(instances)
        if instance
    ]
    records.write_service(
        ServiceRecord(
            name="followed", pid=pid, started=processes.process_start(pid) or 0, servers=servers, transport={},
            status=status, stall_timeout=stall_timeout, deaths=list(deaths),
        )
    )  # fmt: skip


@pytest.fixture
def service(owners: Callable[[], int]) -> Iterator[tuple[Attached, int]]:
    """Yield what is attached to a service with two servers, and the owner of that."""
    owner = owners()
    write(owner, "a", "b")
    found = Attached("followed", lambda server: server.instance, 1.0)  # type: ignore[arg-type,return-value]
    found.start()
    yield found, owner
    found.close()
    assert found.dispatcher is None


def told(service: Attached) -> Told:
    assert isinstance(service.dispatcher, Told)
    return service.dispatcher


def states(service: Attached) -> list[str]:
    return [str(state.state) for state in service.states.values()]


def test_it_has_the_servers_of_the_record(service: tuple[Attached, int]) -> None:
    following, _ = service
    following.start()
    assert told(following).servers == {"server-0": "a", "server-1": "b"}
    assert states(following) == ["ready", "ready"]
    assert not told(following).awaited, "a call waits for more than the servers that there are"


def test_it_knows_whether_the_owner_ends_servers_that_hang(owners: Callable[[], int]) -> None:
    owner = owners()
    for stall_timeout in (30.0, None):
        write(owner, "a", stall_timeout=stall_timeout)
        following = Attached("followed", lambda server: server.instance, 1.0)  # type: ignore[arg-type,return-value]
        following.start()
        assert told(following).stall_timeout == stall_timeout
        following.close()


def test_a_server_that_is_restarted_is_found_again(service: tuple[Attached, int]) -> None:
    following, owner = service
    write(owner, "", "b")
    until(lambda: told(following).servers == {"server-1": "b"})
    assert told(following).died == [False]
    assert told(following).awaited == {"the service"}
    assert states(following) == ["queued", "ready"]
    write(owner, "c", "b")
    until(lambda: told(following).servers == {"server-0": "c", "server-1": "b"})
    until(lambda: states(following) == ["ready", "ready"])
    until(lambda: not told(following).awaited)


def test_it_is_a_loss_only_where_the_owner_says_that_a_server_has_died(service: tuple[Attached, int]) -> None:
    following, owner = service
    write(owner, "", "c", deaths=["b"])
    until(lambda: told(following).servers == {"server-1": "c"})
    assert told(following).died == [False, True]


def test_a_server_to_which_there_can_be_no_connection_yet_is_tried_again(owners: Callable[[], int]) -> None:
    def connect(server: ServerRecord) -> Any:
        if server.instance == "b" and is_short:
            raise OSError(errno.EMFILE, "Too many open files")
        return server.instance

    owner, is_short = owners(), True
    write(owner, "a")
    following = Attached("followed", connect, 1.0)
    following.start()
    write(owner, "c", "b")
    until(lambda: told(following).servers == {"server-0": "c"})
    threading.Event().wait(0.1)
    is_short = False
    until(lambda: told(following).servers == {"server-0": "c", "server-1": "b"})
    assert told(following).died == [False], "what was there already was taken away"
    following.close()


def test_where_all_servers_are_given_up_the_items_end(service: tuple[Attached, int]) -> None:
    following, owner = service
    write(owner, status="starting")
    until(lambda: not told(following).servers)
    assert told(following).awaited == {"the service"}
    write(owner, status="failed")
    until(lambda: not told(following).awaited)
    assert told(following).why == "all servers of the service 'followed' have failed"
    until(lambda: states(following) == ["failed", "failed"])


@pytest.mark.parametrize("error", [OSError(errno.EMFILE, "Too many open files"), GserveError("unreadable")])
def test_a_record_that_cannot_be_read_for_a_moment_is_read_again(
    service: tuple[Attached, int], error: Exception, monkeypatch: pytest.MonkeyPatch
) -> None:
    following, _ = service
    read = 0

    def fail(name: str) -> None:
        nonlocal read
        read += 1
        raise error

    with monkeypatch.context() as patch:
        patch.setattr(module, "MISSING_SECONDS", 60.0)
        patch.setattr(records, "read_service", fail)
        until(lambda: read > 2)
        assert told(following).servers == {"server-0": "a", "server-1": "b"}
    with monkeypatch.context() as patch:
        patch.setattr(records, "read_service", lambda name: None)  # it is not there
        until(lambda: states(following) == ["queued", "queued"])
        assert told(following).awaited >= {"the service"}
        assert told(following).died == [False, False]
    until(lambda: told(following).servers == {"server-0": "a", "server-1": "b"})


def test_a_service_that_is_started_again_under_its_name_is_found(
    service: tuple[Attached, int], owners: Callable[[], int]
) -> None:
    following, owner = service
    kill(owner)
    until(lambda: not told(following).servers)
    assert told(following).awaited >= {"the service"}
    write(owners(), "c")
    until(lambda: told(following).servers == {"server-0": "c"})


def test_servers_of_an_owner_that_is_replaced_have_not_died(
    service: tuple[Attached, int], owners: Callable[[], int]
) -> None:
    following, owner = service
    successor = owners()
    kill(owner)
    write(successor, "c", "d")
    until(lambda: told(following).servers == {"server-0": "c", "server-1": "d"})
    assert told(following).died == [False, False]


def test_what_stays_away_for_too_long_is_lost_and_found_all_the_same(
    service: tuple[Attached, int], owners: Callable[[], int], monkeypatch: pytest.MonkeyPatch
) -> None:
    following, owner = service
    monkeypatch.setattr(module, "RETURN_SECONDS", 0.6)
    kill(owner)
    until(lambda: told(following).why == "the service 'followed' has ended")
    until(lambda: not told(following).awaited)
    until(lambda: states(following) == ["failed", "failed"])
    write(owners(), "c")
    until(lambda: told(following).servers == {"server-0": "c"})
    assert told(following).awaited == {"the service"}


def test_one_that_drains_takes_nothing_and_its_successor_does(
    service: tuple[Attached, int], owners: Callable[[], int]
) -> None:
    following, owner = service
    write(owner, status="draining")
    first = told(following)
    until(lambda: first.is_drained)
    assert first.servers == {"server-0": "a", "server-1": "b"}, "they finish what they have"
    until(lambda: states(following) == ["draining", "draining"])
    kill(owner)
    write(owners(), "c")
    until(lambda: told(following) is not first and told(following).servers == {"server-0": "c"})
    assert first.is_closed
    assert not told(following).is_drained


def test_one_that_has_ended_in_order_may_come_back(service: tuple[Attached, int], owners: Callable[[], int]) -> None:
    following, owner = service
    write(owner, status="draining")
    first = told(following)
    until(lambda: first.is_drained)
    kill(owner)
    until(lambda: told(following).awaited == {"the service"})
    assert not told(following).is_drained, "what waits for it would be refused"
    assert first.is_closed
    write(owners(), "c")
    until(lambda: told(following).servers == {"server-0": "c"})


def test_states_can_be_read_while_servers_come_and_go(service: tuple[Attached, int]) -> None:
    following, owner = service
    over = threading.Event()
    failed: list[BaseException] = []

    def read() -> None:
        while not over.is_set():
            try:
                assert len(list(following.states.values())) == 2
            except BaseException as error:
                failed.append(error)
                return

    readers = [threading.Thread(target=read) for _ in range(4)]
    for reader in readers:
        reader.start()
    for number in range(20):
        write(owner, f"a{number}", *([f"b{number}"] if number % 2 else []))
        until(lambda: told(following).servers.get("server-0") == f"a{number}")  # noqa: B023
    over.set()
    for reader in readers:
        reader.join(10)
    assert not failed


def test_a_service_that_is_not_there_is_refused() -> None:
    with pytest.raises(ConfigError, match="no service named 'followed' is running here"):
        Attached("followed", lambda server: server.instance, 1.0).start()  # type: ignore[arg-type,return-value]


def test_it_ends_without_a_wait_and_the_states_stay() -> None:
    write(os.getpid(), "a")
    following = Attached("followed", lambda server: server.instance, 1.0)  # type: ignore[arg-type,return-value]
    following.start()
    dispatcher = told(following)
    following.ask_to_close()
    until(lambda: dispatcher.is_closed)
    following.close()
    following.close()
    assert [state.state for state in following.states.values()] == [State.STOPPED]
    records.remove_service("followed")
