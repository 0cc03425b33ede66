"""What a process inherits: closed descriptors, and modules that others have patched."""

import os
import subprocess
import sys
from pathlib import Path
from types import ModuleType

import pytest

import gserve
from gserve_core.engines.echo import EchoEngine
from gserve_core.host.environment import check_not_patched, open_missing_descriptors

CLOSED = """
import os, sys
from gserve_core.host.environment import open_missing_descriptors

open_missing_descriptors()
print("to nobody")
print("to nobody", file=sys.stderr)
assert sys.stdin.read() == ""
assert [os.readlink(f"/proc/self/fd/{number}") for number in range(3)] == ["/dev/null"] * 3
assert os.system("test -e /proc/self/fd/0 && test -e /proc/self/fd/1 && test -e /proc/self/fd/2") == 0
report = os.open(sys.argv[1], os.O_WRONLY | os.O_CREAT)
os.write(report, f"{report > 2}".encode())
"""


def test_descriptors_that_are_closed_are_opened_on_dev_null(tmp_path: Path) -> None:
    report = tmp_path / "report"
    command = ["sh", "-c", 'exec "$0" -c "$1" "$2" <&- >&- 2>&-', sys.executable, CLOSED, str(report)]
    assert subprocess.run(command, timeout=30).returncode == 0
    assert report.read_text() == "True"


def test_descriptors_that_are_open_stay_what_they_are() -> None:
    before = [os.fstat(number) for number in range(3)]
    streams = sys.stdin, sys.stdout, sys.stderr
    open_missing_descriptors()
    assert [os.fstat(number) for number in range(3)] == before
    assert (sys.stdin, sys.stdout, sys.stderr) == streams


def patching(name: str, function: str, *patched: str) -> ModuleType:
    """Return a module that says, as those of gevent and eventlet do, which modules it has patched."""
    module = ModuleType(name)
    setattr(module, function, lambda asked: asked in patched)
    return module


@pytest.mark.parametrize(
    ("library", "module", "function", "patched"),
    [
        ("gevent", "gevent.monkey", "is_module_patched", "threading"),
        ("gevent", "gevent.monkey", "is_module_patched", "socket"),
        ("gevent", "gevent.monkey", "is_module_patched", "queue"),
        ("eventlet", "eventlet.patcher", "is_monkey_patched", "thread"),
        ("eventlet", "eventlet.patcher", "is_monkey_patched", "socket"),
    ],
)
def test_a_process_that_gevent_or_eventlet_has_patched_is_refused(
    monkeypatch: pytest.MonkeyPatch, library: str, module: str, function: str, patched: str
) -> None:
    monkeypatch.setitem(sys.modules, module, patching(module, function, patched))
    with pytest.raises(gserve.GserveError, match=rf"{library} has monkey-patched this process \({patched}\)"):
        check_not_patched()


@pytest.mark.parametrize("kind", [gserve.VLLMService, gserve.VLLMServer])
def test_neither_a_service_nor_a_server_alone_starts_in_a_process_that_is_patched(
    monkeypatch: pytest.MonkeyPatch, kind: type[gserve.VLLMService | gserve.VLLMServer]
) -> None:
    made = kind(gserve.LLMConfig("m"), engine=EchoEngine())
    monkeypatch.setitem(sys.modules, "gevent.monkey", patching("gevent.monkey", "is_module_patched", "thread"))
    with pytest.raises(gserve.GserveError, match="gevent has monkey-patched this process"):
        made.start()
    made.shutdown()


def test_gevent_and_eventlet_that_are_imported_and_have_patched_nothing_are_no_trouble(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    check_not_patched()
    monkeypatch.setitem(sys.modules, "gevent.monkey", patching("gevent.monkey", "is_module_patched", "os"))
    monkeypatch.setitem(sys.modules, "eventlet.patcher", patching("eventlet.patcher", "is_monkey_patched"))
    check_not_patched()
