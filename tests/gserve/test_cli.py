"""The command line, run as its users run it: as a process of its own."""

import json
import os
import re
import shlex
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from tests.gserve.place import Place, Terminal, eventually

SIGNALS = [signal.SIGINT, signal.SIGTERM, signal.SIGHUP]
SLOW = {"max_tokens": 3000, "ignore_eos": True}
"""Parameters of an item that the shared service works on for 30 seconds."""


def records(text: str) -> dict[Any, Any]:
    """Return the results in JSON lines by the place of the row: a text, several ones, or an error."""
    rows = [json.loads(row) for row in text.splitlines()]
    found = {row["_row"]: row.get("error") or row["response"] for row in rows}
    assert len(found) == len(rows)
    return found


@pytest.fixture(scope="module")
def shared(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Place]:
    """Return a place where a service named "shared" runs, 10 ms a token, which fails at prompts with "POISON"."""
    place = Place(tmp_path_factory.mktemp("shared"))
    process = place.start("launch", place.config("shared", latency=0.01, error_on="POISON"), "--name", "shared")
    assert process.stdout is not None
    assert process.stdout.readline().startswith("name")
    yield place
    process.terminate()
    process.communicate(timeout=30)
    assert process.returncode == 0
    place.assert_nothing_is_left()


@pytest.fixture
def attached(shared: Place, tmp_path: Path) -> Iterator[Place]:
    """Return a place from which the shared service is seen."""
    place = Place(tmp_path)
    place.environ["XDG_RUNTIME_DIR"] = shared.environ["XDG_RUNTIME_DIR"]
    yield place
    place.assert_nothing_is_left()


# ------------------------------------------------------------------------------------- version, help, check, plugins


def test_the_version_is_printed(place: Place) -> None:
    assert place.run("--version").stdout.startswith("gserve 0.")


def test_help_names_every_command_and_loads_neither_rich_nor_the_core_behind_them(place: Place) -> None:
    shown = place.run("--help").stdout
    for command in (
        "launch",
        "generate",
        "chat",
        "run",
        "sbatch",
        "check",
        "doctor",
        "plugins",
        "ps",
        "logs",
        "top",
        "stop",
        "reap",
    ):
        assert f"\n  {command} " in shown
    loaded = subprocess.run(
        [sys.executable, "-c", "import sys, gserve.cli; print(*sys.modules)"],
        text=True,
        capture_output=True,
        check=True,
    ).stdout.split()
    assert not {"rich", "yaml", "pluggy", "httpx", "fastapi", "gserve_core.service.service"} & set(loaded)


def test_a_command_runs_with_the_garbage_collector_on(place: Place) -> None:
    program = (
        "import atexit, gc; from gserve.cli import app;"
        " atexit.register(lambda: print(gc.isenabled(), gc.get_freeze_count() > 0)); app.main()"
    )
    command = [sys.executable, "-c", program, "plugins"]
    done = subprocess.run(command, cwd=place.folder, env=place.environ, text=True, capture_output=True, check=True)
    assert done.stdout.splitlines()[-1] == "True True"


def test_check_hides_secrets(place: Place) -> None:
    config = place.config()
    canary = "canary-0123456789"
    secret = (
        "--set",
        f"serve.env={{API_KEY: {canary}, PLAIN: shown}}",
        "--set",
        f"llm.llm_kwargs={{hf_token: {canary}}}",
    )
    shown = place.run("check", config, *secret, HF_TOKEN=canary)
    assert canary not in shown.stdout + shown.stderr
    assert "API_KEY='***'" in shown.stdout
    assert "PLAIN=shown" in shown.stdout


def test_check_prints_commands_for_the_shell_and_starts_nothing(place: Place) -> None:
    config = place.config(fail_start="it's a trap; echo no")
    lines = place.run("check", config, "--set", "serve={gpu_ids: [2, 3]}").stdout.splitlines()
    assert lines[::2] == ["# server-0 on GPU 2", "# server-1 on GPU 3"]
    for line, gpu in zip(lines[1::2], "23", strict=True):
        words = shlex.split(line)
        command = words.index(sys.executable)
        assert f"CUDA_VISIBLE_DEVICES={gpu}" in words[:command]
        assert words[command + 1].endswith("gserve/vllm_server.py")
        assert json.loads(words[words.index("--engine") + 1])["fail_start"] == "it's a trap; echo no"


def test_check_says_how_many_servers_auto_chooses_and_why(place: Place) -> None:
    lines = place.run("check", place.config(), "--set", "serve={servers: 2, servers_per_gpu: auto}").stdout.splitlines()
    assert lines[0].startswith(
        "# 1 server on each GPU, chosen by auto: the engine here uses no GPU; without one, 'serv"
    )
    assert [line for line in lines if line.startswith("# server")] == ["# server-0", "# server-1"]


def test_a_model_that_is_not_there_is_told_by_the_check_and_before_a_server_starts(place: Place) -> None:
    (place.folder / "bad.yaml").write_text("llm:\n  model_name: demo:foo\n")
    said = "there is no demo model 'demo:foo'; expected demo:smollm2-135m - at $.llm.model_name\n"
    assert place.run("check", "bad.yaml", code=2).stderr == f"error: bad.yaml:2: {said}"
    assert place.run("launch", "bad.yaml", code=2).stderr.endswith(f"error: bad.yaml:2: {said}")
    assert "starting" not in place.run("generate", "bad.yaml", "x", code=2).stderr


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("llm: {model_name: demo}\nserve: {prot: 1}\n", "bad.yaml:2: unknown key 'prot'; did you mean 'port'?"),
        ("llm: {model_name: demo}\nengine: {type: ehco}\n", "bad.yaml:2: unknown engine 'ehco'; did you mean 'echo'?"),
        ("llm: {model_name: demo}\nserve:\n  host: my host\n", "bad.yaml:3: 'my host' is not a host: "),
        ("llm: {model_name: demo}\nplugins: [no_such]\n", "no module named 'no_such'"),
    ],
)
def test_a_wrong_config_is_one_line_and_exit_code_2(place: Place, text: str, said: str) -> None:
    (place.folder / "bad.yaml").write_text(text)
    done = place.run("check", "bad.yaml", code=2)
    assert done.stdout == ""
    assert done.stderr.startswith("error: ")
    assert said in done.stderr
    assert done.stderr.count("\n") == 1
    assert place.run("launch", "bad.yaml", code=2).stderr == done.stderr


def test_a_traceback_comes_only_with_the_log_level_debug(place: Place) -> None:
    done = subprocess.run(
        [sys.executable, "-m", "gserve.cli", "check", "no.yaml"],
        cwd=place.folder, env=place.environ | {"GSERVE_LOG_LEVEL": "DEBUG"}, text=True, capture_output=True,
    )  # fmt: skip
    assert done.returncode == 2
    assert "Traceback" in done.stderr
    assert place.run("ps", GSERVE_LOG_LEVEL="LOUD", code=2).stderr.startswith("error: unknown log level 'LOUD'")


def test_plugins_lists_what_is_built_in_what_a_config_names_and_what_is_broken(place: Place) -> None:
    (place.folder / "mine.py").write_text(
        "from gserve import CommandLauncher, hookimpl\nfrom dataclasses import dataclass\n"
        "@dataclass(frozen=True, kw_only=True)\nclass Nice(CommandLauncher):\n    name = 'nice'\n"
        "    def command(self, job):\n        return ['nice', *job.command]\n"
        "@hookimpl\ndef gserve_register_launchers():\n    return [Nice]\n"
    )
    (place.folder / "mine.yaml").write_text("llm: {model_name: demo}\nplugins: [mine]\n")
    broken = place.folder / "site" / "broken-1.dist-info"
    broken.mkdir(parents=True)
    (broken / "METADATA").write_text("Metadata-Version: 2.1\nName: broken\nVersion: 1\n")
    (broken / "entry_points.txt").write_text("[gserve]\nbroken = no_such_module\n")
    site = str(broken.parent)
    without = [row.split() for row in place.run("plugins").stdout.splitlines()]
    assert without[0] == ["kind", "name", "class", "from"]
    assert ["engine", "echo", "gserve_core.engines.echo.EchoEngine", "gserve_core.engines.echo"] in without
    shown = place.run("plugins", "mine.yaml", PYTHONPATH=site).stdout
    assert ["launcher", "nice", "mine.Nice", "mine"] in [row.split() for row in shown.splitlines()]
    assert "No module named 'no_such_module'" in shown


# ---------------------------------------------------------------------------------------------------- launch, ps, stop


def test_a_launched_service_is_listed_and_ends_by_stop(place: Place) -> None:
    none = place.run("ps")
    assert (none.stdout, none.stderr) == ("", "no service is running\n")
    process = place.start("launch", place.config("two", servers=2), "--set", "llm.model_name=other")
    assert process.stdout is not None
    table = [process.stdout.readline().split() for _ in range(3)]
    assert table[0] == ["name", "address", "GPUs", "model", "state"]
    assert [[row[0], *row[2:]] for row in table[1:]] == [[f"server-{i}", "-", "other", "ready"] for i in (0, 1)]
    for ready in ("server-0: ready", "server-1: ready"):  # what comes before it may be too short to be seen
        assert ready in place.stderr
    listed = [row.split()[:4] for row in place.run("ps").stdout.splitlines()[1:]]
    assert listed == [["two", str(process.pid), row[0], "ready"] for row in table[1:]]
    taken = place.run("launch", place.config("again"), "--name", "two", code=2)
    assert f"a service named 'two' is already running (process {process.pid})" in taken.stderr
    assert "did you mean 'two'?" in place.run("stop", "tow", code=2).stderr
    assert place.run("stop", "two").stderr == "stopped 'two'\n"
    assert process.wait(30) == 0
    assert process.stdout.read() == ""


def test_a_launched_service_has_an_address_that_a_shell_can_use(place: Place) -> None:
    waiting = place.start("wait", "demo", stdout=subprocess.DEVNULL)
    process = place.start("launch", place.config(load_time=0.5))
    assert waiting.wait(60) == 0
    (line,) = eventually(lambda: re.findall(r"^OpenAI's API: (http://127.0.0.1:\d+/v1)$", place.stderr, re.MULTILINE))
    assert f"status page: {line.removesuffix('v1')}\n" in place.stderr
    assert 'its key: eval "$(gserve env demo)"\n' in place.stderr
    assert place.run("wait", "demo").stderr == "", "it is ready"
    exports = place.run("env", "demo").stdout
    assert exports.startswith(f"export OPENAI_BASE_URL={line}\nexport OPENAI_API_KEY=gserve-")
    ask = 'eval "$1"; curl --silent "$OPENAI_BASE_URL/models" --header "Authorization: Bearer $OPENAI_API_KEY"'
    asked = subprocess.run(["sh", "-c", ask, "sh", exports], capture_output=True, text=True, check=True)
    assert json.loads(asked.stdout)["data"][0]["id"] == "demo-model"
    key = exports.split("OPENAI_API_KEY=")[1].strip()
    assert key not in place.stderr
    assert key not in place.run("ps").stdout
    assert all(key not in str([it.cmdline(), it.environ()]) for it in place.processes())
    logs = list((place.folder / "state").rglob("*.log"))
    assert logs
    assert all(key not in log.read_text() for log in logs)
    (server,) = place.servers()
    server.kill()
    eventually(lambda: "server-0 is ready again\n" in place.stderr)
    process.send_signal(signal.SIGINT)
    assert process.wait(30) == 0
    again = place.start("launch", place.config(), "--set", "gateway.host=localhost")
    place.run("wait", "demo")
    assert place.run("env", "demo").stdout.split("OPENAI_API_KEY=")[1].strip() == key, "the key is kept for the name"
    again.send_signal(signal.SIGINT)
    assert again.wait(30) == 0


def test_wait_and_env_say_what_is_wrong(place: Place) -> None:
    none = place.run("wait", "demo", "--timeout", "0.2", code=1).stderr
    assert none.startswith("error: no service 'demo' was launched within 0.2 s: no service named 'demo' is running")
    told, _ = place.run("wait", "demo", "--timeout", "4", code=1).stderr.splitlines()
    assert told.startswith("no service named 'demo' is running here")
    assert told.endswith("; waiting for its launch, 4 s in all")
    assert "expected a name of at most 64 letters" in place.run("wait", "a/b", code=2).stderr
    assert "demo" in place.run("env", "demo", code=2).stderr
    failing = place.start("launch", place.config(load_time=1.0, fail_start="no luck"))
    assert re.search("is failed: .*no luck|ended while it started", place.run("wait", "demo", code=1).stderr)
    assert failing.wait(30) == 1
    said = place.run("logs", "demo", code=2).stderr
    folder = re.search(r"its last run left its logs in (\S+)$", said.strip())
    assert folder is not None, said
    assert "no luck" in (Path(folder[1]) / "server-0.log").read_text()


def launched_with_items(place: Place, *items: Any) -> tuple["subprocess.Popen[str]", "subprocess.Popen[bytes]"]:
    """Launch a service, and send it items from another process; return both once the first item has finished."""
    launched = place.start("launch", place.config(capacity=3000, latency=1.0))
    assert launched.stdout is not None
    assert launched.stdout.readline()
    place.write("in.jsonl", *items)
    cli = (
        "from gserve.cli import app; from gserve_core.service import attached;"
        " attached.RETURN_SECONDS = 5.0; app.main()"
    )
    command = [sys.executable, "-c", cli, "generate", "--attach", "demo", "-i", "in.jsonl", "-o", "out.jsonl"]
    generating = subprocess.Popen(command, cwd=place.folder, env=place.environ, stderr=subprocess.DEVNULL)
    output = place.folder / "out.jsonl"
    eventually(lambda: output.exists() and output.read_bytes().count(b"\n"))
    return launched, generating


def test_a_failed_start_ends_with_its_cause_and_shows_the_log_only_where_it_explains_more(place: Place) -> None:
    known = place.config(fail_start="out of words")
    lines = place.run("launch", known, code=1).stderr.splitlines()
    assert "last lines of the log:" not in lines
    assert lines[-1] == "what to try: remove fail_start under engine"
    assert "server-0 failed while loading: the engine ran out of words (log: " in lines[-3]
    verbose = place.run("launch", known, "--verbose", code=1).stderr.splitlines()
    assert any(line.startswith("[server-0] ") for line in verbose)
    assert verbose[-1] == lines[-1]
    unknown = place.run("launch", place.config(fail_start="never seen"), code=1).stderr.splitlines()
    assert "last lines of the log:" in unknown
    assert unknown[-1].startswith("server-0 failed while loading: never seen (log: ")


def test_stop_lets_the_servers_finish_3000_running_items(place: Place) -> None:
    prompts = ["first", *(f"{number} takes seven seconds, one a word" for number in range(1, 3000))]
    launched, generating = launched_with_items(place, *prompts)
    assert place.run("stop", "demo").stderr == "stopped 'demo'\n"
    assert generating.wait(30) == 0
    assert launched.wait(30) == 0
    assert records((place.folder / "out.jsonl").read_text()) == dict(enumerate(prompts))


@pytest.mark.parametrize("options", [("--now",), ("--timeout", "0.5")])
def test_stop_ends_a_service_when_the_time_for_its_items_is_over(place: Place, options: tuple[str, ...]) -> None:
    launched, generating = launched_with_items(place, "first", {"prompt": "slow", "params": SLOW})
    began = time.monotonic()
    assert place.run("stop", "demo", *options).stderr == "stopped 'demo'\n"
    assert time.monotonic() - began < 25
    assert launched.wait(30) == 0
    assert generating.wait(60) == 1  # its items wait for a while for a service of the same name


def test_a_second_signal_ends_a_launched_service_that_finishes_its_items(place: Place) -> None:
    launched, generating = launched_with_items(place, "first", {"prompt": "slow", "params": SLOW})
    launched.terminate()
    eventually(lambda: "finishing the items in flight, for at most 30 s" in place.stderr)
    launched.terminate()
    assert launched.wait(20) == 0
    assert generating.wait(60) == 1  # its items wait for a while for a service of the same name


@pytest.mark.parametrize("number", SIGNALS)
def test_a_signal_ends_a_launched_service_with_exit_code_0(place: Place, number: int) -> None:
    process = place.start("launch", place.config())
    assert process.stdout is not None
    assert process.stdout.readline()
    process.send_signal(number)
    process.communicate(timeout=30)
    assert process.returncode == 0
    assert "error" not in place.stderr


@pytest.mark.parametrize("number", SIGNALS)
def test_a_signal_while_servers_load_cancels_the_start(place: Place, number: int) -> None:
    process = place.start("launch", place.config(servers=2, load_time=30))
    eventually(lambda: "server-0: loading" in place.stderr and "server-1: loading" in place.stderr)
    process.send_signal(number)
    assert process.communicate(timeout=30)[0] == ""
    assert process.returncode == 128 + number


def test_a_signal_that_nohup_ignores_is_ignored(place: Place) -> None:
    config = place.config(load_time=30)
    process = place.start("launch", config, preexec_fn=lambda: signal.signal(signal.SIGHUP, signal.SIG_IGN))
    eventually(lambda: "server-0: loading" in place.stderr)
    process.send_signal(signal.SIGHUP)
    with pytest.raises(subprocess.TimeoutExpired):
        process.wait(0.5)
    process.terminate()
    process.communicate(timeout=30)
    assert process.returncode == 128 + signal.SIGTERM


def test_a_start_that_fails_is_exit_code_1_and_its_cause(place: Place) -> None:
    done = place.run("launch", place.config(servers=2, fail_start="the weights are torn"), code=1)
    assert done.stdout == ""
    assert "error: server-" in done.stderr
    assert "the weights are torn" in done.stderr


def test_launch_goes_on_without_a_server_that_died_and_says_so_in_the_end(place: Place) -> None:
    process = place.start("launch", place.config(servers=2), "--set", "serve.max_restarts=0")
    assert process.stdout is not None
    assert process.stdout.readline()
    place.servers()[0].kill()
    eventually(lambda: "was killed by SIGKILL" in place.stderr)
    assert place.run("generate", "--attach", "demo", "still here").stdout == "still here\n"
    process.terminate()
    process.communicate(timeout=30)
    assert process.returncode == 1
    assert place.stderr.count("last lines of the log:") == 1, "it is told once"
    assert "error: these servers failed: server-" in place.stderr


def test_launch_ends_with_exit_code_1_when_no_server_is_left(place: Place) -> None:
    process = place.start("launch", place.config(), "--set", "serve.max_restarts=0")
    assert process.stdout is not None
    assert process.stdout.readline()
    place.servers()[0].kill()
    process.communicate(timeout=30)
    assert process.returncode == 1
    assert "error: no server is running any more" in place.stderr


ALONE = ("unshare", "--pid", "--fork", "--mount-proc", "--kill-child")
"""Runs a command where it sees no processes but its own: other tests have theirs, and so may the user."""
REAP = """
set -e
gserve() { "$PYTHON" -m gserve.cli "$@"; }
"$PYTHON" -m gserve.cli launch killed.yaml >/dev/null & killed=$!
"$PYTHON" -m gserve.cli launch alive.yaml >/dev/null & alive=$!
gserve wait killed
gserve wait alive
nursery=$(cat /proc/$killed/task/*/children | tr -d ' ')
server=$(cat /proc/$nursery/task/*/children)
kill -STOP $server # so that it cannot end itself
kill -KILL $killed
echo "server" $server
gserve reap --dry-run
echo really
gserve reap
echo again
gserve reap 2>&1
test ! -e /proc/$server
gserve generate --attach alive "still here"
kill $alive
wait $alive
"""


def test_reap_ends_what_a_killed_service_has_left_and_nothing_else(place: Place) -> None:
    if subprocess.run([*ALONE, "true"], capture_output=True).returncode:
        pytest.skip("needs the right to a process namespace")
    (place.folder / "tmp").mkdir()
    place.config("killed")
    place.config("alive")
    environ = place.environ | {"TMPDIR": str(place.folder / "tmp"), "PYTHON": sys.executable}
    done = subprocess.run(
        [*ALONE, "bash", "-c", REAP], cwd=place.folder, env=environ, capture_output=True, text=True, timeout=120
    )
    assert done.returncode == 0, done.stderr
    server, rest = done.stdout.removeprefix("server ").split("\n", 1)
    shown, rest = rest.split("really\n")
    done_to, rest = rest.split("again\n")
    assert rest == "nothing to do\nstill here\n"
    state = place.runtime / "gserve"
    assert f"found: process {server} ({sys.executable} " in shown
    assert f"found: {state / 'service-killed'}\n" in shown
    ended = done_to.splitlines()
    assert sum(f"ended: process {server} ({sys.executable} " in line for line in ended) == 1
    assert f"removed: {state / 'service-killed'}" in ended
    assert sum(line.startswith(f"removed: {state / 'token-127.0.0.1-'}") for line in ended) == 1
    assert sum(line.startswith(f"removed: {place.folder / 'tmp' / 'gserve-'}") for line in ended) == 1
    assert len(ended) == 5, "the server, the process of its engine, its folder, its token, and the service"
    assert list((place.folder / "tmp").glob("gserve-*")) == []


def test_reap_says_that_there_is_nothing_to_do(place: Place) -> None:
    if subprocess.run([*ALONE, "true"], capture_output=True).returncode:
        pytest.skip("needs the right to a process namespace")
    (place.folder / "tmp").mkdir()
    environ = place.environ | {"TMPDIR": str(place.folder / "tmp")}
    command = [*ALONE, sys.executable, "-m", "gserve.cli", "reap"]
    done = subprocess.run(command, cwd=place.folder, env=environ, capture_output=True, text=True)
    assert (done.returncode, done.stdout, done.stderr) == (0, "", "nothing to do\n")


# ------------------------------------------------------------------------------------------------------------ generate


def test_generate_starts_servers_prints_texts_in_order_and_ends_the_servers(place: Place) -> None:
    done = place.run("generate", place.config(servers=2, latency=0.01), "a b c d e", "f g", "--set", "llm.seed=1")
    assert done.stdout == "a b c d e\nf g\n"
    assert "error" not in done.stderr


def test_a_command_whose_descriptors_are_closed_does_its_work(place: Place) -> None:
    command = f"exec {sys.executable} -m gserve.cli generate {place.config()} hello -o out.jsonl <&- >&- 2>&-"
    assert subprocess.run(["sh", "-c", command], cwd=place.folder, env=place.environ, timeout=60).returncode == 0
    assert records((place.folder / "out.jsonl").read_text()) == {0: "hello"}


@pytest.mark.parametrize("number", SIGNALS[:2])
def test_a_signal_during_generate_keeps_what_is_finished_and_ends_the_servers(place: Place, number: int) -> None:
    config = place.config(latency=0.01)
    place.write("in.jsonl", "fast", {"prompt": "slow", "params": SLOW})
    process = place.start("generate", config, "-i", "in.jsonl", "-o", "out.jsonl")
    output = place.folder / "out.jsonl"
    eventually(lambda: output.exists() and output.read_text())
    process.send_signal(number)
    process.communicate(timeout=30)
    assert process.returncode == 128 + number
    assert records(output.read_text()) == {0: "fast"}


def test_generate_with_attach_takes_all_arguments_as_prompts(attached: Place) -> None:
    done = attached.run("generate", "--attach", "shared", "one two three", "four", "--params", '{"n": 2}')
    assert done.stdout == "one two three\none two three\nfour\nfour\n"
    assert done.stderr == ""


def test_a_job_of_a_launched_service_loads_no_part_that_runs_servers(attached: Place) -> None:
    attached.write("in.jsonl", {"prompt": "one"})
    command = [sys.executable, "-X", "importtime", "-m", "gserve.cli", "generate", "--attach", "shared"]
    done = subprocess.run(
        [*command, "-i", "in.jsonl", "-o", "out.jsonl"],
        cwd=attached.folder, env=attached.environ, text=True, capture_output=True, timeout=60, check=True,
    )  # fmt: skip
    loaded = {line.rpartition("|")[2].strip() for line in done.stderr.splitlines()}
    assert {"gserve_core.rows.job", "gserve_core.service.attached", "gserve_launchers.slurm.query"} <= loaded
    assert not loaded & {
        "fastapi", "gserve_core.document", "gserve_core.engines.echo", "gserve_core.service.pool", "pygments",
        "gserve_launchers.local", "gserve_launchers.slurm.launcher", "jinja2", "prometheus_client", "pyarrow", "rich",
        "uvicorn", "yaml",
    }  # fmt: skip


def test_generate_takes_all_arguments_as_prompts_where_the_environment_names_a_service(attached: Place) -> None:
    done = attached.run("generate", "hello", "a prompt of config.yaml", GSERVE_ATTACH="shared")
    assert (done.stdout, done.stderr) == ("hello\na prompt of config.yaml\n", "")
    assert attached.run("generate", "long " * 1000, GSERVE_ATTACH="shared").stdout == "long " * 15 + "long\n"
    assert attached.run("chat", "hello", GSERVE_ATTACH="shared").stdout == "hello\n"


def test_a_config_goes_before_the_service_that_the_environment_names(place: Place) -> None:
    done = place.run("generate", place.config(), "hello", GSERVE_ATTACH="nobody")
    assert done.stdout == "hello\n"
    assert "cannot read the config" in place.run("generate", "no.yaml", "x", code=2, GSERVE_ATTACH="nobody").stderr


@pytest.mark.parametrize("command", ["generate", "chat"])
def test_a_prompt_without_a_config_is_told_what_to_write(place: Place, command: str) -> None:
    assert place.run(command, "a prompt", code=2).stderr == (
        f"error: expected a CONFIG (a YAML file), but 'a prompt' is not a file: write gserve {command} CONFIG"
        f" 'a prompt', or gserve {command} --attach NAME 'a prompt' (see: gserve ps)\n"
    )
    assert len(place.run(command, "long " * 1000, code=2).stderr) < 500


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("one two\n\nthree\r\n", {0: "one two", 1: "three"}),
        ('"one\\ntwo"\n{"prompt": "three", "id": "x", "params": {"n": 2}}\n', {0: "one two", 1: ["three"] * 2}),
    ],
)  # fmt: skip
def test_generate_reads_texts_and_json_lines_from_a_file_and_from_stdin(
    attached: Place, text: str, expected: dict[Any, Any]
) -> None:
    name = "in.jsonl" if text.startswith('"') else "in.txt"
    (attached.folder / name).write_text(text)
    for source, stdin in (([name], ""), (["-", "--format", name.removeprefix("in.")], text)):
        assert records(attached.run("generate", "--attach", "shared", "-i", *source, stdin=stdin).stdout) == expected


def test_a_job_without_a_terminal_writes_its_progress_in_lines(attached: Place) -> None:
    attached.write("in.jsonl", *({"prompt": f"row {number}"} for number in range(3)))
    command = ["generate", "--attach", "shared", "-i", "in.jsonl", "-o", "out.jsonl"]
    assert "of 3 rows" not in attached.run(*command).stderr, "it ends before the first line"
    cli = "from gserve.cli import app, job_progress; job_progress.LINE_SECONDS = 0.0; app.main()"
    done = subprocess.run(
        [sys.executable, "-c", cli, *command, "--overwrite"],
        cwd=attached.folder, env=attached.environ, text=True, capture_output=True, timeout=60, check=True,
    )  # fmt: skip
    *lines, _ = done.stderr.splitlines()  # the last one is the summary
    form = r"(\d) of 3 rows, [\d.,]+ rows/s, \d+ tokens/s in, \d+ out(, \d+:\d\d left), 1 server ready"
    counts = [int(found[1]) for line in lines if (found := re.fullmatch(form, line))]
    assert len(counts) == len(lines), done.stderr
    assert counts == sorted({*counts})
    assert counts[-1] == 3


def test_results_are_written_the_moment_they_are_ready_and_survive_a_kill(attached: Place) -> None:
    command = ("generate", "--attach", "shared", "-i", "in.jsonl", "-o", "out.jsonl")
    output = attached.folder / "out.jsonl"
    slow = {"prompt": "slow", "params": {"max_tokens": 60, "ignore_eos": True}}
    attached.write("in.jsonl", slow, "fast", "quick")
    process = attached.start(*command)
    eventually(lambda: output.exists() and output.read_text().count("\n") == 2)
    process.kill()
    process.communicate(timeout=30)
    with output.open("a") as stream:
        stream.write('{"prompt":"slow","_ro')
    done = attached.run(*command)
    assert done.stderr.startswith("2 of 3 rows are answered already\nrows: 1 answered, 2 answered before; ")
    answers = records(output.read_text())
    assert (answers[1], answers[2], answers[0].split()) == ("fast", "quick", ["slow"] * 60)
    assert attached.run(*command).stderr == "all 3 rows are answered already: out.jsonl\n"


def test_a_second_run_with_the_same_output_is_refused_at_once_and_the_first_has_all_results(attached: Place) -> None:
    attached.write("in.jsonl", "fast", {"prompt": "slow", "params": {"max_tokens": 100, "ignore_eos": True}})
    command = ("generate", "--attach", "shared", "-i", "in.jsonl", "-o", "out.jsonl")
    first = attached.start(*command)
    output = attached.folder / "out.jsonl"
    eventually(lambda: output.exists() and output.read_text())
    first.send_signal(signal.SIGSTOP)  # it is at its output for as long as the others take
    second = attached.run(*command, code=2)
    assert f"error: out.jsonl: already being written by process {first.pid} on " in second.stderr
    assert "choose another --output" in second.stderr
    chat = attached.run("chat", "--attach", "shared", "hello", "-o", "out.jsonl", code=2)
    assert "already being written" in chat.stderr
    first.send_signal(signal.SIGCONT)
    first.communicate(timeout=30)
    assert first.returncode == 0
    assert sorted(records(output.read_text())) == [0, 1]
    assert attached.run(*command).stderr == "all 2 rows are answered already: out.jsonl\n"
    assert sorted(path.name for path in attached.folder.glob("*out*")) == [".out.jsonl.gserve.json", "out.jsonl"]


def test_rows_that_fail_are_counted_kept_and_tried_again_by_the_next_run(attached: Place) -> None:
    command = ("generate", "--attach", "shared", "-i", "in.jsonl", "-o", "out.jsonl")
    output, failed = attached.folder / "out.jsonl", attached.folder / "out.failed.jsonl"
    attached.write("in.jsonl", {"prompt": "a", "id": 7}, {"prompt": "POISON", "id": 8})
    said = attached.run(*command, code=1).stderr
    assert "error: rows: 1 answered, 1 failed (1 x an error, as requested)" in said
    assert f"the failed rows: {failed}" in said
    assert records(output.read_text()) == {0: "a"}
    row = {"prompt": "POISON", "id": 8, "error": "an error, as requested", "_row": 1, "_line": 2}
    assert json.loads(failed.read_text()) == row
    output.chmod(0o640)
    said = attached.run(*command, code=1).stderr
    assert "1 of 2 rows are answered already" in said
    assert json.loads(failed.read_text()) == row
    assert output.stat().st_mode & 0o777 == 0o640
    attached.write("in.jsonl", {"prompt": "a", "id": 7}, {"prompt": "b", "id": 8})
    assert "out.jsonl was made with input.in.jsonl" in attached.run(*command, code=2).stderr


def test_an_item_that_fails_among_arguments_is_named_on_stderr(attached: Place) -> None:
    done = attached.run("generate", "--attach", "shared", "fine", "POISON", code=1)
    assert done.stdout == "fine\n"
    assert done.stderr == "error: item 1: an error, as requested\nerror: 1 of 2 items failed\n"


@pytest.mark.parametrize("held", ['{"id": 0, "prompt": "mine"}\n', "my notes", '{"id":0,"prompt":"b","outputs":[]}\n'])
def test_an_output_file_that_holds_something_else_is_left_alone(attached: Place, held: str) -> None:
    output = attached.folder / "out.jsonl"
    output.write_text(held)
    done = attached.run("generate", "--attach", "shared", "a", "-o", "out.jsonl", code=2)
    assert "out.jsonl exists and gserve does not know what made it" in done.stderr
    assert "choose another --output" in done.stderr
    assert output.read_text() == held


@pytest.mark.parametrize(
    ("arguments", "code", "said"),
    [
        ((), 2, "expected a CONFIG"),
        (("demo.yaml",), 2, "expected prompts"),
        (("demo.yaml", "a", "-i", "in.jsonl"), 2, "expected prompts"),
        (("demo.yaml", "a", "--params", "[1]"), 2, "expected --params as a JSON object"),
        (("demo.yaml", "a", "--set", "serve.prot=1"), 2, "error: --set serve.prot=1: unknown key 'prot'"),
        (("demo.yaml", "-i", "none.txt"), 2, "error: none.txt: no such file or folder"),
        (
            ("demo.yaml", "-i", "in.jsonl"),
            2,
            "error: in.jsonl:1: no prompt can be made of the first rows: expected one",
        ),
        (("demo.yaml", "-i", "in.jsonl", "--column", "x", "--template", "y"), 2, "expected a template or a column"),
        (("demo.yaml", "-i", "in.jsonl", "--template", "{% if %}"), 2, "error: the template is wrong in line 1"),
        (("demo.yaml", "-i", "in.jsonl", "--tools", "tools.json"), 2, "error: tools.json: cannot read a list of tools"),
        (("demo.yaml", "-i", "in.xlsx"), 2, "error: in.xlsx: "),
        (("demo.yaml", "a", "--column", "x"), 2, "error: --column requires --input"),
        (("demo.yaml", "a", "-o", "no/out.jsonl"), 2, "error: no/out.jsonl: cannot write the results"),
        (("demo.yaml", "a", "-o", "out.doc"), 2, "error: out.doc: cannot tell the format from the name"),
        (("--attach", "nobody", "a"), 2, "no service named 'nobody'"),
        (("--attach", "nobody", "a", "--set", "llm.seed=1"), 2, "--set and --verbose change a config"),
    ],
)
def test_wrong_arguments_are_told_before_a_server_starts(
    place: Place, arguments: tuple[str, ...], code: int, said: str
) -> None:
    place.config()
    place.write("in.jsonl", {"promt": "b"})
    (place.folder / "in.xlsx").write_bytes(b"PK\x03\x04 binary")
    done = place.run("generate", *arguments, code=code)
    assert said in done.stderr
    assert "server-0" not in done.stderr


def test_a_reader_that_leaves_early_and_a_full_disk_end_generate_without_a_traceback(attached: Place) -> None:
    attached.write("in.jsonl", "first", *[{"prompt": "later", "params": {"max_tokens": 100, "ignore_eos": True}}] * 300)
    process = attached.start("generate", "--attach", "shared", "-i", "in.jsonl")
    assert process.stdout is not None
    assert process.stdout.readline()
    process.stdout.close()
    assert process.wait(30) == 1
    assert attached.stderr == ""
    full = attached.run("generate", "--attach", "shared", "a", "-o", "/dev/full", code=1)
    assert full.stderr.startswith("error: /dev/full: cannot write the results: No space left on device")


# ---------------------------------------------------------------------------------------------------------------- chat


def test_chat_answers_one_message(attached: Place) -> None:
    done = attached.run(
        "chat", "--attach", "shared", "hello you", "--system", "Be brief.", "--params", '{"max_tokens": 1}'
    )
    notice = "1 answer was cut at max_tokens=1: use --params '{\"max_tokens\":256}'\n"
    assert (done.stdout, done.stderr) == ("hello\n", notice)


def test_chat_continues_conversations_from_a_file(attached: Place) -> None:
    own = [{"role": "system", "content": "Be long."}, {"role": "user", "content": "b"}]
    attached.write("in.jsonl", [{"role": "user", "content": "a"}], {"id": "x", "messages": own}, {"messages": []})
    command = ("chat", "--attach", "shared", "-i", "in.jsonl", "-o", "out.jsonl")
    assert "rows: 2 answered, 1 failed (1 x the conversation is empty)" in attached.run(*command, code=1).stderr
    assert records((attached.folder / "out.jsonl").read_text()) == {0: "a", 1: "b"}
    assert "2 of 3 rows are answered already" in attached.run(*command, code=1).stderr
    other = attached.run(*command, "--system", "Be brief.", code=2)
    assert 'out.jsonl was made without system, not with "Be brief."' in other.stderr
    shown = attached.run("chat", "-i", "in.jsonl", "--system", "Be brief.", "--dry-run", GSERVE_ATTACH="nobody").stdout
    assert "system> Be brief.\nuser> a\n" in shown
    assert "system> Be long.\nuser> b\n" in shown
    assert "error: the conversation is empty" in shown


def test_chat_reads_messages_from_a_pipe_without_prompting(attached: Place) -> None:
    done = attached.run("chat", "--attach", "shared", stdin="one\n\ntwo\n/exit\nthree\n")
    assert (done.stdout, done.stderr) == ("one\ntwo\n", "")


def test_a_conversation_at_the_terminal_outlives_a_cancelled_and_a_failed_answer(attached: Place) -> None:
    terminal = Terminal(attached, "chat", "--attach", "shared", "--params", json.dumps(SLOW))
    terminal.expect("you> ")
    terminal.type("slow\n")
    terminal.expect("slow\r\n")
    terminal.expect("slow slow ")  # the answer has begun
    terminal.type("\x03")
    terminal.expect("cancelled")
    terminal.expect("you> ")
    terminal.type("POISON\n")
    terminal.expect("error: an error, as requested")
    terminal.expect("you> ")
    terminal.type("\x04")
    assert terminal.end() == 0


def test_ctrl_c_at_the_prompt_of_a_conversation_ends_it_and_its_servers(place: Place) -> None:
    terminal = Terminal(place, "chat", place.config(load_time=1.5))
    terminal.expect("server-0: loading")
    terminal.expect("you> ")
    terminal.type("hello\n")
    terminal.expect("hello\r\nhello\r\n")
    terminal.expect("you> ")
    terminal.type("\x03")
    assert terminal.end() == 128 + signal.SIGINT


def test_a_terminal_that_closes_ends_what_was_launched_in_it(place: Place) -> None:
    terminal = Terminal(place, "launch", place.config())
    terminal.expect("127.0.0.1:")
    os.close(terminal.master)
    assert terminal.process.wait(30) == 0


def test_a_terminal_gets_a_summary_and_stdout_only_the_results(attached: Place) -> None:
    attached.write("in.txt", "a", "b", "c")
    terminal = Terminal(attached, "generate", "--attach", "shared", "-i", "in.txt", stdout=subprocess.PIPE)
    assert terminal.process.stdout is not None
    assert records(terminal.process.stdout.read()) == {0: "a", 1: "b", 2: "c"}
    terminal.expect("rows: 3 answered")
    assert terminal.end() == 0
