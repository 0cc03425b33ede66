"""What processes of one user know of each other, in files that only this user can read."""

import json
import os
import shutil
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from gserve_core.errors import ConfigError, GserveError
from gserve_core.host import processes, run_files, tokens
from gserve_core.interfaces import Access, Address
from gserve_core.service import records

ADDRESS = Address(["127.0.0.1", "node/7"], 4711)


@pytest.fixture(autouse=True)
def emptied() -> Iterator[None]:
    yield
    for path in (path for place in run_files.places() for path in place.iterdir()):
        shutil.rmtree(path) if path.is_dir() else path.unlink()


@pytest.fixture
def second(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Return the second place for records, which this test has."""
    monkeypatch.setenv(run_files.PLACE_VARIABLE, str(tmp_path / "second"))
    return tmp_path / "second"


def record(name: str = "mine", **fields: Any) -> records.ServiceRecord:
    """Return the record of a service of this process."""
    started = processes.process_start(os.getpid())
    assert started is not None
    usual: dict[str, Any] = {"pid": os.getpid(), "started": started, "servers": [], "transport": {"type": "http"}}
    return records.ServiceRecord(name, **usual | fields)


SERVER = records.ServerRecord("server-0", ADDRESS, "id", "token", 8, "model", control="control")
OTHER = """
import sys, time
from gserve_core.host import processes
from gserve_core.service import records
import os
while time.time() < float(sys.argv[2]):
    pass
me = records.ServiceRecord(
    "wanted", os.getpid(), processes.process_start(os.getpid()), [], {"type": "http"}, status="starting", id=sys.argv[1]
)
try:
    records.reserve_service(me)
except Exception as error:
    print(type(error).__name__, error, flush=True)
    records.remove_service("wanted")
else:
    print("got it", flush=True)
sys.stdin.read()
"""


class Other:
    """A process that reserves the name "wanted"."""

    def __init__(self, at: float = 0.0, **environ: str) -> None:
        self.process = subprocess.Popen(
            [sys.executable, "-c", OTHER, "run", str(at)],
            env=os.environ | environ, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True,
        )  # fmt: skip

    def hear(self) -> str:
        assert self.process.stdout is not None
        return self.process.stdout.readline().strip()

    def close(self) -> None:
        self.process.kill()
        self.process.communicate()


@pytest.fixture
def other() -> Iterator[Callable[..., Other]]:
    made: list[Other] = []

    def make(at: float = 0.0, **environ: str) -> Other:
        made.append(Other(at, **environ))
        return made[-1]

    yield make
    for one in made:
        one.close()


def test_the_token_and_the_control_secret_of_a_server_are_found_by_each_of_its_hosts() -> None:
    tokens.write_token(ADDRESS, "token", "control")
    for host in ("127.0.0.1", "localhost", "node/7"):
        assert tokens.find_access(host, 4711) == Access(token="token", control="control")
        assert tokens.find_access(host, 4711).token == "token"
    assert tokens.find_access("127.0.0.1", 4712) == Access()
    assert tokens.find_access("127.0.0.1", 4712).token is None


def test_a_server_may_have_no_control_secret() -> None:
    tokens.write_token(ADDRESS, "token")
    assert tokens.find_access("127.0.0.1", 4711) == Access(token="token")


def test_the_files_are_for_their_user_alone() -> None:
    tokens.write_token(ADDRESS, "token", "control")
    files = list(run_files.folder().iterdir())
    assert len(files) == 2
    assert all(path.stat().st_mode & 0o777 == 0o600 for path in files)
    assert run_files.folder().stat().st_mode & 0o777 == 0o700


def test_only_the_token_that_was_written_is_removed() -> None:
    tokens.write_token(ADDRESS, "newer")
    tokens.remove_token(ADDRESS, "older")
    assert tokens.find_access("127.0.0.1", 4711).token == "newer"
    tokens.remove_token(ADDRESS, "newer")
    assert tokens.find_access("127.0.0.1", 4711) == Access()


def test_a_file_that_holds_something_else_is_no_token() -> None:
    tokens.write_token(ADDRESS, "token")
    for content in (b"", b'"token"', b"\xff", b'{"token": 1}'):
        for path in run_files.folder().iterdir():
            path.write_bytes(content)
        assert tokens.find_access("127.0.0.1", 4711) == Access()


def test_a_folder_that_is_open_to_others_or_a_link_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("XDG_RUNTIME_DIR", str(tmp_path))
    run_files.folder().chmod(0o750)
    with pytest.raises(GserveError, match="must be a folder of yours alone"):
        run_files.folder()
    (tmp_path / "gserve").rename(tmp_path / "elsewhere")
    (tmp_path / "gserve").symlink_to("elsewhere")
    with pytest.raises(GserveError, match="must be a folder of yours alone"):
        run_files.folder()
    (tmp_path / "gserve").unlink()
    if os.getuid() == 0:
        run_files.folder().rmdir()
        (tmp_path / "gserve").mkdir(mode=0o700)
        os.chown(tmp_path / "gserve", 65534, 65534)
        with pytest.raises(GserveError, match="must be a folder of yours alone"):
            run_files.folder()
        (tmp_path / "gserve").rmdir()


def test_records_know_the_control_secret() -> None:
    server = records.ServerRecord("server-0", ADDRESS, "id", "token", 8, "model", control="control")
    started = processes.process_start(os.getpid())
    assert started is not None
    records.write_service(records.ServiceRecord("mine", os.getpid(), started, [server], {"type": "http"}))
    assert records.find_service("mine").servers == [server]


def test_an_owner_is_told_from_all_other_processes() -> None:
    mark = processes.owner_mark()
    assert not processes.is_orphan(mark)
    pid, started, boot = mark.split(":")
    assert processes.is_orphan(f"{pid}:{int(started) + 1}:{boot}")
    assert processes.is_orphan(f"{pid}:{int(started) + 1}")
    assert not processes.is_orphan(f"{pid}:{int(started) + 1}:another-machine")


# ---------------------------------------------------------------------------------------- from every session of a user


def test_a_service_and_its_tokens_are_found_whatever_the_runtime_folder_is(
    second: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    tokens.write_token(ADDRESS, "token", "control")
    records.write_service(record(servers=[SERVER]))
    for elsewhere in (str(tmp_path), "", str(tmp_path / "missing"), "relative"):
        monkeypatch.setenv("XDG_RUNTIME_DIR", elsewhere)
        assert records.find_service("mine").servers == [SERVER]
        assert [it.name for it in records.services()] == ["mine"]
        assert tokens.find_access("localhost", 4711) == Access(token="token", control="control")
    monkeypatch.delenv("XDG_RUNTIME_DIR")
    assert records.find_service("mine").servers == [SERVER]
    assert run_files.places() == [second]
    records.remove_service("mine")
    tokens.remove_token(ADDRESS, "token")
    assert list(second.iterdir()) == []


def test_what_is_removed_is_removed_in_all_places(second: Path) -> None:
    tokens.write_token(ADDRESS, "token", "control")
    records.write_service(record(servers=[SERVER]))
    assert [len(list(place.iterdir())) for place in run_files.places()] == [3, 3]
    records.remove_service("mine")
    tokens.remove_token(ADDRESS, "token")
    assert [list(place.iterdir()) for place in run_files.places()] == [[], []]


def test_records_and_tokens_that_were_removed_are_written_again(second: Path) -> None:
    mine = record(servers=[SERVER], id="run")
    records.write_service(mine)
    for emptied in ([run_files.folder()], [second], [run_files.folder(), second]):
        for place in emptied:
            shutil.rmtree(place)
        assert records.keep_service(mine)
        for place in (run_files.folder(), second):
            names = sorted(path.name for path in place.iterdir())
            assert names == ["service-mine", "token-127.0.0.1-4711", "token-node_7-4711"]
    before = (second / "service-mine").stat().st_mtime_ns
    assert records.keep_service(mine)
    assert (second / "service-mine").stat().st_mtime_ns == before, "what is there is not written again"


def test_a_name_that_another_service_has_now_is_not_taken_back(second: Path, other: Callable[..., Other]) -> None:
    mine = record("wanted", id="mine")
    records.write_service(mine)
    for place in run_files.places():
        (place / "service-wanted").unlink()
    its = other()
    assert its.hear() == "got it"
    assert not records.keep_service(mine)
    records.remove_service("wanted")
    assert records.find_service("wanted").pid == its.process.pid


def test_the_newest_token_of_an_address_counts(second: Path) -> None:
    tokens.write_token(ADDRESS, "old")
    first, last = (place / "token-127.0.0.1-4711" for place in run_files.places())
    for newer in (first, last):
        newer.write_text('{"token": "new"}')
        os.utime(newer, ns=(time.time_ns(), time.time_ns() + 10**9))
        assert tokens.find_access("127.0.0.1", 4711).token == "new"
        newer.write_text('{"token": "old"}')


def test_a_second_place_of_somebody_else_is_not_used_nor_an_error_beside_a_first(
    second: Path, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    second.mkdir(mode=0o755)
    records.write_service(record())
    assert list(second.iterdir()) == []
    assert records.find_service("mine").pid == os.getpid()
    assert second not in run_files.places()
    with monkeypatch.context() as patch:
        patch.delenv("XDG_RUNTIME_DIR")
        with pytest.raises(GserveError, match="must be a folder of yours alone"):
            run_files.places()


def test_a_runtime_folder_of_another_user_is_left_alone(
    second: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    if os.getuid():
        pytest.skip("needs root, who may write into it: after su")
    (tmp_path / "theirs").mkdir(mode=0o700)
    os.chown(tmp_path / "theirs", 65534, 65534)
    monkeypatch.setenv("XDG_RUNTIME_DIR", str(tmp_path / "theirs"))
    assert run_files.places() == [second]
    assert list((tmp_path / "theirs").iterdir()) == []


def test_services_of_a_container_that_shares_the_folder_are_neither_used_nor_forgotten(second: Path) -> None:
    boot = processes.machine().partition(" ")[0]
    records.write_service(record("contained", machine=f"{boot} pid:[1]", pid=1, started=1))
    records.write_service(record("before-the-boot", machine="another-boot pid:[1]"))
    assert records.services() == []
    assert {path.name for path in second.iterdir()} == {"service-contained"}
    records.reserve_service(record("contained"))


# ------------------------------------------------------------------------------------------------------------ one name


def test_of_many_that_want_a_name_at_once_one_gets_it_and_the_others_leave_it_alone(
    second: Path, tmp_path: Path, other: Callable[..., Other]
) -> None:
    (tmp_path / "session").mkdir()
    at = time.time() + 1.5
    several = [
        other(at, **({"XDG_RUNTIME_DIR": str(tmp_path / "session")} if number % 2 else {})) for number in range(4)
    ]
    said = [one.hear() for one in several]
    assert said.count("got it") == 1
    winner = several[said.index("got it")]
    expected = f"ConfigError a service named 'wanted' is starting (process {winner.process.pid}): choose another --name"
    assert sum(text.startswith(expected) for text in said) == 3
    assert records.find_service("wanted").pid == winner.process.pid
    winner.close()
    with pytest.raises(ConfigError, match="no service named 'wanted' is running here"):
        records.find_service("wanted")
    assert other().hear() == "got it"


def test_two_services_of_one_process_do_not_get_one_name() -> None:
    records.reserve_service(record(id="first", status="starting"))
    with pytest.raises(ConfigError, match="a service named 'mine' is starting"):
        records.reserve_service(record(id="second", status="starting"))
    records.remove_service("mine", "second")
    records.write_service(record(id="first"))
    with pytest.raises(ConfigError, match="a service named 'mine' is already running"):
        records.reserve_service(record(id="second"))
    records.write_service(record(id="first", status="draining"))
    with pytest.raises(ConfigError, match="a service named 'mine' is ending"):
        records.check_name("mine")
    records.remove_service("mine", "first")
    records.check_name("mine")


def test_a_service_that_is_starting_is_waited_for() -> None:
    records.reserve_service(record(status="starting"))
    assert [it.status for it in records.services()] == ["starting"]
    with pytest.raises(GserveError, match=r"the service 'mine' \(process \d+\) is still starting after 0.1"):
        records.wait_service("mine", 0.1)
    later = threading.Timer(0.3, lambda: records.write_service(record(servers=[SERVER])))
    later.start()
    assert records.wait_service("mine", 20).servers == [SERVER]
    later.join()
    with pytest.raises(ConfigError, match="did you mean 'mine'"):
        records.wait_service("mime", 20)


def test_a_service_that_ends_while_it_starts_is_not_waited_for(other: Callable[..., Other]) -> None:
    its = other()
    assert its.hear() == "got it"
    later = threading.Timer(0.3, its.close)
    later.start()
    with pytest.raises(GserveError, match="ended while it started"):
        records.wait_service("wanted", 20)
    later.join()


def test_a_process_that_is_forked_while_records_are_changed_keeps_nobody_from_it() -> None:
    with run_files.locked([run_files.folder()], 1.0):
        child = os.fork()
        if not child:
            time.sleep(60.0)
            os._exit(0)
    try:
        with run_files.locked([run_files.folder()], 0.2):
            pass
    finally:
        os.kill(child, signal.SIGKILL)
        os.waitpid(child, 0)


def test_a_process_that_was_stopped_while_it_reserves_a_name_does_not_stop_the_others_for_ever(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(records, "LOCK_SECONDS", 0.2)
    program = "import fcntl, os, sys; fcntl.flock(os.open(sys.argv[1], os.O_RDONLY), 2); print(flush=True); input()"
    with subprocess.Popen(
        [sys.executable, "-c", program, run_files.folder()], stdin=subprocess.PIPE, stdout=subprocess.PIPE
    ) as stopped:
        assert stopped.stdout is not None
        stopped.stdout.readline()
        stopped.send_signal(signal.SIGSTOP)
        with pytest.raises(GserveError, match="cannot write the record of the service 'mine': another process has"):
            records.reserve_service(record())
        monkeypatch.setattr(records, "LOCK_SECONDS", 60.0)
        began = time.monotonic()
        with pytest.raises(GserveError, match="cannot write the record of the service 'mine': another process has"):
            records.write_service(record())
        assert time.monotonic() - began < 20.0, "the supervisor of an owner waits as long as one that reserves a name"
        stopped.kill()
    records.reserve_service(record())


# --------------------------------------------------------------------------------------------------------- other files


def alter(path: Path, **fields: Any) -> None:
    path.write_text(json.dumps(json.loads(path.read_text()) | fields))


def test_a_record_of_a_newer_version_is_read_and_kept() -> None:
    records.write_service(record(servers=[SERVER]))
    file = run_files.folder() / "service-mine"
    servers = json.loads(file.read_text())["servers"]
    alter(file, novelty={"a": [1]}, servers=[servers[0] | {"novelty": 1}])
    before = file.read_bytes()
    assert records.find_service("mine").servers == [SERVER]
    assert [it.name for it in records.services()] == ["mine"]
    assert records.stale_files() == []
    assert file.read_bytes() == before


def test_a_record_of_an_older_version_is_read() -> None:
    records.write_service(record(servers=[SERVER]))
    file = run_files.folder() / "service-mine"
    old = json.loads(file.read_text())
    for field in ("status", "id", "machine"):
        del old[field]
    file.write_text(json.dumps(old))
    assert records.find_service("mine").status == "ready"


BAD = {
    "bad-utf8": b'{"name": "\xff\xfe"}',
    "empty": b"",
    "truncated": b'{"name": "trunc',
    "other-name": b'{"name": "x", "pid": 1, "started": 1, "servers": [], "transport": {}}',
    "changed-fields": b'{"name": "changed-fields", "pid": "one"}',
    "folder": None,
}


@pytest.fixture
def bad() -> list[Path]:
    """Return files in the place of records that cannot be read."""
    paths = [run_files.folder() / f"service-{name}" for name in BAD]
    for path, content in zip(paths, BAD.values(), strict=True):
        path.mkdir() if content is None else path.write_bytes(content)
    os.mkfifo(run_files.folder() / "service-pipe")
    (run_files.folder() / "service-link").symlink_to("/etc/passwd")
    return [*paths, run_files.folder() / "service-pipe", run_files.folder() / "service-link"]


def test_what_cannot_be_read_is_named_and_left_alone_and_the_others_are_listed(bad: list[Path]) -> None:
    records.write_service(record())
    assert [it.name for it in records.services()] == ["mine"]
    assert {it.path for it in records.unreadable()} == set(bad)
    for it in records.unreadable():
        assert str(it).startswith(f"cannot read the record of a service {it.path}: ")
        assert "\n" not in str(it)
    assert records.stale_files() == []
    for path in bad:
        assert os.path.lexists(path)
        for use in (records.find_service, records.check_name, records.read_service):
            with pytest.raises(GserveError, match=f"cannot read the record of a service {path}: "):
                use(path.name.removeprefix("service-"))
        with pytest.raises(GserveError, match="cannot read the record of a service"):
            records.reserve_service(record(path.name.removeprefix("service-")))


def test_a_full_disk_is_told_with_the_file(second: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(**_: Any) -> Any:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("tempfile.mkstemp", full)
    with pytest.raises(GserveError, match=f"cannot write {second}/service-mine: No space left on device"):
        records.write_service(record())
