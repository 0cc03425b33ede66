"""The folders of a user: in an odd environment too, and nothing in them is removed that somebody uses."""

import os
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path

import pytest

from gserve_core.errors import GserveError
from gserve_core.host import folders, run_files, scratch

NOBODY = 54321
"""A user id without an entry in the list of users."""


@pytest.fixture
def state(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("XDG_STATE_HOME", str(tmp_path))
    return tmp_path / "gserve" / "logs"


@pytest.fixture
def made() -> Iterator[list[Path]]:
    """Return a list for log folders, which are released in the end."""
    found: list[Path] = []
    yield found
    for path in found:
        folders.release_logs(path)


# ----------------------------------------------------------------------------------------------------------------- logs


def old_runs(state: Path, count: int) -> None:
    """Make the log folders of runs that have ended, each later than the one before."""
    for number in range(count):
        path = state / f"20990101-{number:06}-run-x"
        path.mkdir(parents=True)
        (path / "server-0.log").touch()
        (path / ".gserve").touch()


def test_the_logs_of_a_running_service_outlive_any_number_of_later_runs(state: Path, made: list[Path]) -> None:
    made.append(folders.log_folder("mine"))
    (made[0] / "server-0.log").touch()
    old_runs(state, 60)
    made.append(folders.log_folder("later"))
    assert (made[0] / "server-0.log").exists()
    assert len(list(state.iterdir())) == 52, "these two, and the 50 newest"
    folders.release_logs(made[0])
    made.append(folders.log_folder("last"))
    assert not made[0].exists()


def test_the_logs_of_another_process_are_kept_until_it_ends(state: Path, made: list[Path]) -> None:
    program = "from gserve_core.host import folders; print(folders.log_folder('other'), flush=True); input()"
    with subprocess.Popen(
        [sys.executable, "-c", program], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    ) as other:
        assert other.stdout is not None
        path = Path(other.stdout.readline().strip())
        old_runs(state, 60)
        made.append(folders.log_folder("mine"))
        assert path.is_dir()
        other.kill()
    made.append(folders.log_folder("mine"))
    assert not path.exists()


def test_files_of_others_between_the_logs_are_left_alone(state: Path, made: list[Path], tmp_path: Path) -> None:
    old_runs(state, 60)
    (state / "20000101-000000-run-x").mkdir()
    (state / "20000101-000000-run-x" / "notes.txt").touch()
    (state / "10 my own").mkdir()
    (state / "10 my own" / "precious.log").touch()
    (tmp_path / "elsewhere").mkdir()
    (tmp_path / "elsewhere" / "precious.log").touch()
    (state / "20000101-000000-link").symlink_to(tmp_path / "elsewhere")
    made.append(folders.log_folder("mine"))
    assert (state / "20000101-000000-run-x" / "notes.txt").exists()
    assert (state / "10 my own" / "precious.log").exists()
    assert (tmp_path / "elsewhere" / "precious.log").exists()


def test_a_log_folder_that_was_removed_is_made_again_and_kept_again(state: Path, made: list[Path]) -> None:
    made.append(folders.log_folder("mine"))
    (made[0] / ".gserve").unlink()
    made[0].rmdir()
    for _ in range(3):
        folders.keep_logs(made[0])
    old_runs(state, 60)
    made.append(folders.log_folder("later"))
    assert made[0].is_dir()


def test_log_folders_cost_no_descriptor_once_they_are_released(state: Path) -> None:
    before = len(list(Path("/proc/self/fd").iterdir()))
    for _ in range(3):
        path = folders.log_folder("mine")
        folders.keep_logs(path)
        folders.release_logs(path)
        folders.release_logs(path)
    assert len(list(Path("/proc/self/fd").iterdir())) == before


def test_a_log_folder_that_cannot_be_made_again_says_so(state: Path, made: list[Path]) -> None:
    made.append(folders.log_folder("mine"))
    (made[0] / ".gserve").unlink()
    made[0].rmdir()
    made[0].touch()
    with pytest.raises(GserveError, match="cannot make the folder for logs"):
        folders.keep_logs(made[0])
    made[0].unlink()


# ----------------------------------------------------------------------------------------------------- odd environments


FOLDERS = """
import logging
logging.basicConfig(format="note: %(message)s")
from gserve_core.host import folders, run_files, scratch
from gserve_core.engines.vllm import demo_model
print(folders.log_folder("run"))
print(folders.log_folder("run"))
print(demo_model.cache_folder())
print(run_files.places()[0])
"""


AS_NOBODY = (
    "setpriv", f"--reuid={NOBODY}", f"--regid={NOBODY}", "--clear-groups",
    "--inh-caps=+dac_read_search", "--ambient-caps=+dac_read_search",
)  # fmt: skip
"""Runs a command as that user, who may read all files: Python and gserve may lie in root's home."""


@pytest.fixture
def open_folder(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """Return a folder in which every user may write, on a path that every user may enter."""
    if os.getuid() or subprocess.run([*AS_NOBODY, "true"], capture_output=True).returncode:
        pytest.skip("needs the right to become another user, and setpriv")
    with tempfile.TemporaryDirectory(prefix="gserve-test-", dir="/tmp") as path:
        Path(path).chmod(0o777)
        yield Path(path)


def as_nobody(program: str, folder: Path, **environ: str) -> "subprocess.CompletedProcess[str]":
    """Run a program as a user without an entry, whose environment has almost nothing."""
    usual = {
        "PATH": os.environ["PATH"], "PYTHONPATH": str(Path(folders.__file__).parents[2]), "TMPDIR": str(folder),
        run_files.PLACE_VARIABLE: str(folder / "place"),
    }  # fmt: skip
    return subprocess.run(
        [*AS_NOBODY, sys.executable, "-c", program],
        env=usual | environ, cwd="/", capture_output=True, text=True, timeout=60,
    )  # fmt: skip


@pytest.mark.parametrize("home", [None, "", "/", "/nonexistent/home", "relative", "/proc"])
def test_a_home_that_cannot_be_used_is_replaced_by_a_private_folder_with_one_note(
    open_folder: Path, home: str | None
) -> None:
    done = as_nobody(FOLDERS, open_folder, **({} if home is None else {"HOME": home}))
    assert done.returncode == 0, done.stderr
    first, second, cache, place = map(Path, done.stdout.splitlines())
    private = open_folder / f"gserve-{NOBODY}"
    assert first.parent == second.parent == private / "state" / "gserve" / "logs"
    assert cache == private / "cache" / "gserve"
    assert place == open_folder / "place"
    assert private.stat().st_mode & 0o777 == 0o700
    notes = done.stderr.splitlines()
    assert len(notes) == 2, "one for the logs and one for the cache"
    assert all(note.startswith("note: cannot use the user's ") for note in notes)


def test_a_home_that_can_be_used_is(open_folder: Path) -> None:
    (open_folder / "home").mkdir()
    os.chown(open_folder / "home", NOBODY, NOBODY)
    done = as_nobody(FOLDERS, open_folder, HOME=str(open_folder / "home"))
    assert done.stderr == ""
    logs, _, cache, _ = map(Path, done.stdout.splitlines())
    assert logs.parent == open_folder / "home" / ".local" / "state" / "gserve" / "logs"
    assert cache == open_folder / "home" / ".cache" / "gserve"


CACHES = """
import os
from gserve_core.host import folders
print(sorted(folders.cache_environment().items()))
"""


def test_libraries_get_a_cache_where_the_user_s_cannot_be_written_and_find_the_models_in_it(open_folder: Path) -> None:
    there = f"('XDG_CACHE_HOME', '{open_folder}/gserve-{NOBODY}/cache')"
    assert as_nobody(CACHES, open_folder, HOME="/nonexistent").stdout == f"[{there}]\n"
    models = open_folder / "home" / ".cache" / "huggingface"
    models.mkdir(parents=True)
    done = as_nobody(CACHES, open_folder, HOME=str(open_folder / "home"))
    assert done.stdout == f"[('HF_HOME', '{models}'), {there}]\n", "it is root's"
    os.chown(models.parent, NOBODY, NOBODY)
    assert as_nobody(CACHES, open_folder, HOME=str(open_folder / "home")).stdout == "[]\n"


def test_a_home_that_is_not_known_is_left_in_a_path(open_folder: Path) -> None:
    program = "from gserve_core.host import folders; print(folders.expanded('~/x'), folders.expanded('/y'))"
    assert as_nobody(program, open_folder).stdout == "~/x /y\n"
    assert as_nobody(program, open_folder, HOME="/home/me").stdout == "/home/me/x /y\n"


def test_a_machine_where_nothing_can_be_written_is_a_gserve_error(monkeypatch: pytest.MonkeyPatch) -> None:
    def nowhere() -> str:
        raise FileNotFoundError(2, "No usable temporary directory found")

    monkeypatch.setattr("tempfile.gettempdir", nowhere)
    with pytest.raises(GserveError, match=r"cannot make a private temporary folder \(.*No usable temporary directory"):
        folders.temporary()
    assert scratch.path_of("0123456789ab") == Path("/tmp/gserve-0123456789ab")


def test_where_nothing_can_be_written_the_error_says_what_to_set(open_folder: Path) -> None:
    (open_folder / f"gserve-{NOBODY}").touch()
    done = as_nobody(FOLDERS, open_folder, HOME="/nonexistent")
    assert done.stderr.splitlines()[-1].startswith("gserve_core.errors.GserveError: ")
    assert "must be a folder of yours alone" in done.stderr


SERVICE = """
from gserve import LLMConfig, VLLMService
from gserve_core.engines.echo import EchoEngine
with VLLMService(LLMConfig("m"), engine=EchoEngine(), name="homeless") as service:
    print(service.generate(["hello"]))
"""


def test_a_service_runs_without_a_home_and_without_an_entry_in_the_list_of_users(open_folder: Path) -> None:
    done = as_nobody(SERVICE, open_folder, HOME="/")
    assert done.returncode == 0, done.stderr
    assert done.stdout == "[['hello']]\n"
    assert list((open_folder / "place").iterdir()) == []
    assert not list(open_folder.glob("gserve-" + "[0-9a-f]" * 12))
