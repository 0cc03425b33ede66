"""What processes of one user know of each other, in files that only this user can read."""

import os
from collections.abc import Iterator
from pathlib import Path

import pytest

from gserve_core import runtime
from gserve_core.errors import GserveError
from gserve_core.interfaces import Access, Address

ADDRESS = Address(["127.0.0.1", "node/7"], 4711)


@pytest.fixture(autouse=True)
def emptied() -> Iterator[None]:
    yield
    for path in runtime.folder().iterdir():
        path.unlink()


def test_the_token_and_the_control_secret_of_a_server_are_found_by_each_of_its_hosts() -> None:
    runtime.write_token(ADDRESS, "token", "control")
    for host in ("127.0.0.1", "localhost", "node/7"):
        assert runtime.find_access(host, 4711) == Access(token="token", control="control")
        assert runtime.find_token(host, 4711) == "token"
    assert runtime.find_access("127.0.0.1", 4712) == Access()
    assert runtime.find_token("127.0.0.1", 4712) is None


def test_a_server_may_have_no_control_secret() -> None:
    runtime.write_token(ADDRESS, "token")
    assert runtime.find_access("127.0.0.1", 4711) == Access(token="token")


def test_the_files_are_for_their_user_alone() -> None:
    runtime.write_token(ADDRESS, "token", "control")
    files = list(runtime.folder().iterdir())
    assert len(files) == 2
    assert all(path.stat().st_mode & 0o777 == 0o600 for path in files)
    assert runtime.folder().stat().st_mode & 0o777 == 0o700


def test_only_the_token_that_was_written_is_removed() -> None:
    runtime.write_token(ADDRESS, "newer")
    runtime.remove_token(ADDRESS, "older")
    assert runtime.find_token("127.0.0.1", 4711) == "newer"
    runtime.remove_token(ADDRESS, "newer")
    assert runtime.find_access("127.0.0.1", 4711) == Access()


def test_a_file_that_holds_something_else_is_no_token() -> None:
    runtime.write_token(ADDRESS, "token")
    for content in (b"", b'"token"', b"\xff", b'{"token": 1}'):
        for path in runtime.folder().iterdir():
            path.write_bytes(content)
        assert runtime.find_access("127.0.0.1", 4711) == Access()


def test_a_folder_that_is_open_to_others_or_a_link_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("XDG_RUNTIME_DIR", str(tmp_path))
    runtime.folder().chmod(0o750)
    with pytest.raises(GserveError, match="must be a folder of yours alone"):
        runtime.folder()
    (tmp_path / "gserve").rename(tmp_path / "elsewhere")
    (tmp_path / "gserve").symlink_to("elsewhere")
    with pytest.raises(GserveError, match="must be a folder of yours alone"):
        runtime.folder()
    (tmp_path / "gserve").unlink()
    if os.getuid() == 0:
        runtime.folder().rmdir()
        (tmp_path / "gserve").mkdir(mode=0o700)
        os.chown(tmp_path / "gserve", 65534, 65534)
        with pytest.raises(GserveError, match="must be a folder of yours alone"):
            runtime.folder()
        (tmp_path / "gserve").rmdir()


def test_records_know_the_control_secret() -> None:
    server = runtime.ServerRecord("server-0", ADDRESS, "id", "token", 8, "model", control="control")
    started = runtime.process_start(os.getpid())
    assert started is not None
    runtime.write_service(runtime.ServiceRecord("mine", os.getpid(), started, [server], {"type": "http"}))
    assert runtime.find_service("mine").servers == [server]


def test_an_owner_is_told_from_all_other_processes() -> None:
    mark = runtime.owner_mark()
    assert not runtime.is_orphan(mark)
    pid, started, boot = mark.split(":")
    assert runtime.is_orphan(f"{pid}:{int(started) + 1}:{boot}")
    assert runtime.is_orphan(f"{pid}:{int(started) + 1}")
    assert not runtime.is_orphan(f"{pid}:{int(started) + 1}:another-machine")
