"""The scratch folders of servers: short enough for sockets, and those without an owner are found."""

import os
import shutil
import socket
import subprocess
import sys
import uuid
from collections.abc import Iterator
from pathlib import Path

import pytest

from gserve_core.errors import GserveError
from gserve_core.host import scratch


@pytest.fixture
def long_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    path = tmp_path / ("long" * 20)
    path.mkdir()
    monkeypatch.setenv("TMPDIR", str(path))
    return path


LONG = """
import os, sys, tempfile
from gserve_core.host import scratch
path = scratch.make(sys.argv[1])
short = scratch.short_path(path)
print(path)
print(short, flush=True)
input()
scratch.remove(path)
"""


@pytest.fixture
def long_server(long_folder: Path) -> Iterator[tuple["subprocess.Popen[str]", Path, Path]]:
    with subprocess.Popen(
        [sys.executable, "-c", LONG, uuid.uuid4().hex], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    ) as server:
        assert server.stdout is not None
        yield server, Path(server.stdout.readline().strip()), Path(server.stdout.readline().strip())
        server.kill()


def test_sockets_fit_below_a_long_path_whose_files_stay_where_the_user_wants_them(
    long_server: tuple["subprocess.Popen[str]", Path, Path], long_folder: Path
) -> None:
    server, path, short = long_server
    assert path.parent == long_folder
    assert path.stat().st_mode & 0o777 == 0o700
    name = short / str(uuid.uuid4())
    assert len(os.fsencode(name)) <= 107
    with socket.socket(socket.AF_UNIX) as listening:
        listening.bind(str(name))
    assert (path / name.name).is_socket()
    server.communicate("\n", timeout=30)
    assert not path.exists()
    assert not os.path.lexists(short)


UNUSED = "from gserve_core.host import scratch; print(*scratch.unused(()), sep='\\n')"


def test_the_folder_and_the_link_of_a_server_that_was_killed_are_found(
    long_server: tuple["subprocess.Popen[str]", Path, Path],
) -> None:
    server, path, short = long_server

    def found() -> list[str]:
        done = subprocess.run([sys.executable, "-c", UNUSED], capture_output=True, text=True, check=True)
        return done.stdout.split()

    assert found() == []
    server.kill()
    server.wait()
    assert found() == [str(path)]
    shutil.rmtree(path)
    assert found() == [str(short)], "a link that leads nowhere is of no use"
    path.mkdir()
    scratch.remove(path)
    assert not os.path.lexists(short)
    assert found() == []


def test_a_short_path_is_left_as_it_is() -> None:
    assert scratch.short_path(Path("/tmp/gserve-0123456789ab")) == Path("/tmp/gserve-0123456789ab")


def test_a_folder_that_only_has_such_a_name_is_no_server_s(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path))
    (tmp_path / "gserve-202611260138").mkdir()
    (tmp_path / "gserve-202611260139").mkdir()
    (tmp_path / "gserve-202611260139" / ".gserve").write_bytes(b"\xff{")
    (tmp_path / "gserve-202611260140").mkdir()
    (tmp_path / "gserve-202611260140" / ".gserve").mkdir()
    mine = uuid.uuid4().hex
    program = f"from gserve_core.host import scratch; scratch.make({mine!r})"
    subprocess.run([sys.executable, "-c", program], env=os.environ | {"TMPDIR": str(tmp_path)}, check=True)
    assert scratch.unused(()) == [tmp_path / f"gserve-{mine[:12]}"]
    assert scratch.unused({mine}) == []
    (tmp_path / f"gserve-{mine[:12]}").rename(tmp_path / "gserve-202611260141")
    assert scratch.unused(()) == []


def test_a_temporary_folder_of_somebody_else_is_not_used(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path))
    mine = uuid.uuid4().hex
    (tmp_path / "target").mkdir()
    scratch.path_of(mine).symlink_to(tmp_path / "target")
    with pytest.raises(GserveError, match="must be a folder of yours alone"):
        scratch.make(mine)
