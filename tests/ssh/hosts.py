"""Hosts for tests of the launcher `ssh`: an sshd in a network namespace for each, and a config of ssh that names them.

`with Hosts(folder, ["a", "b"]) as hosts:` needs root, Debian's `openssh-server`, and the right to make namespaces.
"""

import contextlib
import itertools
import os
import secrets
import shutil
import signal
import socket
import subprocess
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Self

from gserve_core import testing
from gserve_core.host import processes

ROOT = Path(__file__).resolve().parents[2]
SSHD = shutil.which("sshd", path="/usr/sbin:/usr/local/sbin")
_START = 20.0
"""Seconds that an sshd has to come up."""
_CONFIG = """\
Port 22
HostKey {folder}/host-{name}
AuthorizedKeysFile {folder}/key.pub
PidFile none
StrictModes no
UsePAM no
PasswordAuthentication no
KbdInteractiveAuthentication no
MaxStartups 100
SetEnv PYTHONPATH={root} {run}={mark} PATH={path}{more}
{lines}
"""


def why_not() -> str | None:
    """Return why no hosts can be started here, if so."""
    if SSHD is None:
        return "there is no sshd: as root, apt-get install openssh-server"
    if os.geteuid() != 0 or shutil.which("ip") is None:
        return "hosts for ssh need root and iproute2"
    return None


BRIDGE = "bridge"
"""The name of the bridge between joined hosts, and of the interface to it."""
FIRST = itertools.count(0, 8)
"""Numbers of networks, of which each group of hosts takes up to 8."""


class Hosts:
    """Hosts with an sshd each. All of them share the files and the processes of this machine, but not its network.

    `config`: the path of the config of ssh. `lines`: more lines for the config of each sshd.
    `joined`: the hosts reach each other over a bridge. Each has names, process ids and temporary files of its own too.
    """

    def __init__(self, folder: Path, names: Sequence[str], lines: str = "", *, joined: bool = False) -> None:
        self._folder = folder
        self._names = list(names)
        self._lines = lines
        self._joined = joined
        self._id = secrets.token_hex(2)
        worker = int(os.environ.get("PYTEST_XDIST_WORKER", "gw0").removeprefix("gw"))
        self._net, self._first = 18 + worker % 2, next(FIRST)  # 198.18.0.0/15 is for tests of networks
        self._sshds: dict[str, subprocess.Popen[bytes]] = {}
        self.config = folder / "ssh_config"

    def __enter__(self) -> Self:
        """Start the hosts."""
        Path("/run/sshd").mkdir(mode=0o755, exist_ok=True)
        _run("ssh-keygen", "-q", "-t", "ed25519", "-N", "", "-f", str(self._folder / "key"))
        known, text = "", ""
        for number, name in enumerate(self._names):
            key = self._folder / f"host-{name}"
            _run("ssh-keygen", "-q", "-t", "ed25519", "-N", "", "-f", str(key))
            known += f"{name} {key.with_suffix('.pub').read_text()}"
            text += self._entry(name, self.address(number))
        (self._folder / "known_hosts").write_text(known)
        self.config.write_text(text)
        try:
            if self._joined:
                _run("ip", "netns", "add", self.namespace(BRIDGE))
                _run("ip", "-n", self.namespace(BRIDGE), "link", "add", BRIDGE, "type", "bridge")
                _run("ip", "-n", self.namespace(BRIDGE), "link", "set", BRIDGE, "up")
            for number, name in enumerate(self._names):
                self._begin(number, name)
        except BaseException:
            self.__exit__()
            raise
        return self

    def _entry(self, name: str, address: str, known: str = "known_hosts", key: str = "key") -> str:
        return (
            f"Host {name}\n  HostName {address}\n  User root\n  HostKeyAlias {name.partition('-')[0]}\n"
            f"  IdentityFile {self._folder / key}\n  IdentitiesOnly yes\n"
            f"  UserKnownHostsFile {self._folder / known}\n  GlobalKnownHostsFile none\n"
        )

    def add(self, entry: str, host: str, *, known: str = "known_hosts", key: str = "key", address: str = "") -> None:
        """Add an entry to the config of ssh, for the same host with something else."""
        found = address or self.address(self._names.index(host))
        with self.config.open("a") as config:
            config.write(self._entry(entry, found, known, key))

    def __exit__(self, *_: object) -> None:
        """Stop the hosts and all that runs on them. Idempotent."""
        for name in self._names:
            for pid in self.processes(name):
                with contextlib.suppress(ProcessLookupError):
                    os.kill(pid, signal.SIGKILL)
            sshd = self._sshds.pop(name, None)
            if sshd is not None:
                sshd.kill()
                sshd.wait()
            subprocess.run(["ip", "netns", "del", self.namespace(name)], capture_output=True, check=False)
        if self._joined:
            subprocess.run(["ip", "netns", "del", self.namespace(BRIDGE)], capture_output=True, check=False)

    def address(self, number: int) -> str:
        """Return the address of a host, by its number."""
        return f"198.{self._net}.{(self._first + number) % 256}.2"

    def bridge_address(self, number: int) -> str:
        """Return the address of a joined host on the bridge, by its number."""
        return f"198.{self._net}.{(self._first + 7) % 256}.{number + 1}"

    def namespace(self, name: str) -> str:
        """Return the name of a host's network namespace."""
        return f"gs-{self._id}-{name}"

    def _begin(self, number: int, name: str) -> None:
        namespace, near, far = self.namespace(name), f"gs{self._id}{name}0", f"gs{self._id}{name}1"
        inside = ["ip", "-n", namespace]
        _run("ip", "netns", "add", namespace)
        _run("ip", "link", "add", near, "type", "veth", "peer", "name", far, "netns", namespace)
        _run("ip", "addr", "add", f"198.{self._net}.{(self._first + number) % 256}.1/24", "dev", near)
        _run("ip", "link", "set", near, "up")
        _run(*inside, "addr", "add", f"{self.address(number)}/24", "dev", far)
        _run(*inside, "link", "set", far, "up")
        _run(*inside, "link", "set", "lo", "up")
        if self._joined:
            self._join(number, name)
        self.start_sshd(name)

    def _join(self, number: int, name: str) -> None:
        """Give a host a way over the bridge: to the addresses there, and to those by which ssh reaches the others."""
        bridge, inside = self.namespace(BRIDGE), ["ip", "-n", self.namespace(name)]
        _run(*inside, "link", "add", BRIDGE, "type", "veth", "peer", "name", f"to-{name}", "netns", bridge)
        _run("ip", "-n", bridge, "link", "set", f"to-{name}", "master", BRIDGE, "up")
        _run(*inside, "addr", "add", f"{self.bridge_address(number)}/24", "dev", BRIDGE)
        _run(*inside, "link", "set", BRIDGE, "up")
        for other in range(len(self._names)):
            if other != number:
                _run(*inside, "route", "add", f"{self.address(other)}/32", "via", self.bridge_address(other))

    def start_sshd(self, name: str) -> None:
        """Start the sshd of a host; return when it answers."""
        number = self._names.index(name)
        file = self._folder / f"sshd-{name}.conf"
        apart, more = [], ""
        if self._joined:
            (temporary := self._folder / f"tmp-{name}").mkdir(exist_ok=True)
            more = f" TMPDIR={temporary}"
            apart = ["unshare", "--pid", "--fork", "--kill-child", "--mount-proc", "--uts"]
            apart += ["sh", "-c", 'hostname "$0" && exec "$@"', name]
        file.write_text(
            _CONFIG.format(
                folder=self._folder, name=name, root=ROOT, run=testing.RUN_VARIABLE,
                mark=os.environ.get(testing.RUN_VARIABLE, "-"), path=os.environ["PATH"], lines=self._lines,
                more=more,
            )
        )  # fmt: skip
        with (self._folder / f"sshd-{name}.log").open("ab") as log:
            command = ["ip", "netns", "exec", self.namespace(name), *apart, str(SSHD), "-D", "-e", "-f", str(file)]
            self._sshds[name] = subprocess.Popen(command, stdin=subprocess.DEVNULL, stdout=log, stderr=log)
        deadline = time.monotonic() + _START
        while True:
            with contextlib.suppress(OSError), socket.create_connection((self.address(number), 22), 1.0):
                return
            assert time.monotonic() < deadline, (self._folder / f"sshd-{name}.log").read_text()
            time.sleep(0.05)

    def stop_sshd(self, name: str) -> None:
        """Stop the sshd of a host. Its connections go on."""
        sshd = self._sshds.pop(name)
        sshd.kill()
        sshd.wait()

    def cut(self, name: str, *, is_cut: bool = True) -> None:
        """Cut the network of a host, silently, or join it again."""
        state = "down" if is_cut else "up"
        _run("ip", "link", "set", f"gs{self._id}{name}0", state)
        if self._joined:
            _run("ip", "-n", self.namespace(BRIDGE), "link", "set", f"to-{name}", state)

    def end_sessions(self, name: str) -> None:
        """End the connections of a host that was cut off. Its sshd would notice that after hours."""
        for pid in self.processes(name, "sshd: "):
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)

    def processes(self, name: str, *programs: str) -> list[int]:
        """Return the live processes in a host's namespace, but for its sshd; or those whose command has a text."""
        found = subprocess.run(
            ["ip", "netns", "pids", self.namespace(name)], capture_output=True, text=True, check=False
        )
        sshd = self._sshds.get(name)
        own = [] if sshd is None else [sshd.pid, *(children_of(sshd.pid) if self._joined else ())]
        pids = [pid for it in found.stdout.split() if (pid := int(it)) not in own]
        return [pid for pid in pids if processes.process_start(pid) and _has(pid, programs)]


def children_of(pid: int) -> list[int]:
    """Return the processes that a process has started."""
    with contextlib.suppress(OSError):
        return [int(it) for it in Path(f"/proc/{pid}/task/{pid}/children").read_text().split()]
    return []


def _has(pid: int, texts: Sequence[str]) -> bool:
    with contextlib.suppress(OSError):
        command = Path(f"/proc/{pid}/cmdline").read_bytes().replace(b"\0", b" ").decode(errors="replace")
        return not texts or any(text in command for text in texts)
    return False


def _run(*command: str) -> None:
    ran = subprocess.run(command, capture_output=True, text=True, check=False, timeout=30)
    assert ran.returncode == 0, f"{' '.join(command)}: {ran.stderr}"
