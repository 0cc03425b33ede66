"""A place to run the command line in, as its users do: processes of their own, a folder, a terminal."""

import fcntl
import json
import os
import pty
import struct
import subprocess
import sys
import termios
import time
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import Any

import psutil


class Place:
    """A folder to run `gserve` in, and a user's environment that nobody else has."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.runtime = folder / "runtime"
        self.runtime.mkdir(mode=0o700)
        self.started: list[subprocess.Popen[str]] = []
        self.environ = os.environ | {
            "XDG_RUNTIME_DIR": str(self.runtime),
            "XDG_STATE_HOME": str(folder / "state"),
            "TERM": "xterm",
            "PYTHONDONTWRITEBYTECODE": "",  # compiling takes a third of the time of these tests
        }

    def config(self, name: str = "demo", servers: int = 1, **engine: Any) -> str:
        text = {"llm": {"model_name": "demo-model"}, "serve": {"servers": servers}, "engine": {"type": "echo"} | engine}
        (self.folder / f"{name}.yaml").write_text(json.dumps(text))
        return f"{name}.yaml"

    def write(self, name: str, *lines: Any) -> Path:
        path = self.folder / name
        dump = json.dumps if path.suffix == ".jsonl" else str
        path.write_text("".join(f"{dump(line)}\n" for line in lines))
        return path

    def start(self, *arguments: str, **options: Any) -> "subprocess.Popen[str]":
        command = [sys.executable, "-m", "gserve.cli", *arguments]
        path = Path(os.devnull) if "stderr" in options else self.folder / "stderr"
        # an older process may still write into the file: each appends
        appending = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_TRUNC | os.O_APPEND, 0o644)
        with os.fdopen(appending, "w") as stderr:
            usual: dict[str, Any] = {
                "cwd": self.folder, "env": self.environ, "text": True,
                "stdin": subprocess.DEVNULL, "stdout": subprocess.PIPE, "stderr": stderr,
            }  # fmt: skip
            process: subprocess.Popen[str] = subprocess.Popen(command, **(usual | options))
        self.started.append(process)
        return process

    def run(
        self, *arguments: str, stdin: str = "", code: int = 0, **environ: str
    ) -> "subprocess.CompletedProcess[str]":
        done = subprocess.run(
            [sys.executable, "-m", "gserve.cli", *arguments],
            cwd=self.folder, env=self.environ | environ, input=stdin, text=True, capture_output=True, timeout=240,
        )  # fmt: skip
        assert done.returncode == code, done.stderr
        assert "Traceback" not in done.stderr
        assert "Exception ignored" not in done.stderr
        return done

    @property
    def stderr(self) -> str:
        return (self.folder / "stderr").read_text()

    def processes(self) -> list[psutil.Process]:
        """Return the living processes that have this place's environment, the parent before its child."""
        found = []
        for process in psutil.process_iter():
            try:
                ours = process.environ().get("XDG_STATE_HOME") == self.environ["XDG_STATE_HOME"]
                if ours and process.status() != psutil.STATUS_ZOMBIE:
                    found.append((process.create_time(), process.pid, process))
            except psutil.Error:
                continue
        return [process for _, _, process in sorted(found)]

    def servers(self) -> list[psutil.Process]:
        found = []
        for process in self.processes():
            with suppress(psutil.Error):  # it has ended meanwhile
                if "--lease" in process.cmdline():
                    found.append(process)
        return found

    def assert_nothing_is_left(self) -> None:
        for process in self.started:
            process.kill()
            process.wait()
            if process.stdout is not None:
                process.stdout.close()
        eventually(lambda: not self.processes())
        state = self.runtime / "gserve"
        assert not state.exists() or list(state.iterdir()) == []


def eventually(condition: Callable[[], Any], seconds: float = 60.0) -> Any:
    """Wait until `condition` holds, and return what it gave."""
    deadline = time.monotonic() + seconds
    while not (found := condition()):
        assert time.monotonic() < deadline, "it did not come to that"
        time.sleep(0.02)
    return found


class Terminal:
    """A terminal, with `gserve` as its foreground process."""

    def __init__(self, place: Place, *arguments: str, columns: int = 80, **options: Any) -> None:
        self.master, slave = pty.openpty()
        fcntl.ioctl(slave, termios.TIOCSWINSZ, struct.pack("HHHH", 40, columns, 0, 0))
        environ = {name: value for name, value in place.environ.items() if name not in ("COLUMNS", "LINES")}
        ends = {"stdin": slave, "stdout": slave, "stderr": slave, "env": environ} | options
        self.process = place.start(
            *arguments, start_new_session=True, preexec_fn=lambda: fcntl.ioctl(slave, termios.TIOCSCTTY), **ends
        )
        os.close(slave)
        self.seen = ""

    def expect(self, text: str) -> None:
        """Read until `text` has come, and forget what came before it."""
        os.set_blocking(self.master, False)

        def has_come() -> bool:
            self._read()
            return text in self.seen

        eventually(has_come)
        self.seen = self.seen.partition(text)[2]

    def _read(self) -> None:
        try:
            self.seen += os.read(self.master, 65536).decode()
        except OSError:  # nothing there yet, or the other end is closed
            return

    def type(self, text: str) -> None:
        os.write(self.master, text.encode())

    def end(self) -> int:
        code = self.process.wait(30)
        self._read()
        os.close(self.master)
        return code
