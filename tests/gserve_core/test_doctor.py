"""What is found out before the first server starts: on real folders, programs and packages."""

import json
import os
import socket
import subprocess
import sys
from collections.abc import Callable
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import msgspec
import pytest

from gserve_core.config import Config, LLMConfig
from gserve_core.doctor import examination, machine, node
from gserve_core.errors import ConfigError
from gserve_core.interfaces import Finding

LONG = "x" * 256
"""No file can have this name."""

type Examine = Callable[..., dict[str, Finding]]

LAUNCHERS = """
from dataclasses import dataclass
from typing import ClassVar
from gserve import CommandLauncher, hookimpl
from gserve_core.interfaces import Finding

@dataclass(frozen=True, kw_only=True)
class Prefix(CommandLauncher):
    name: ClassVar[str] = "prefix"
    prefix: list[str]
    finding: str = "ok"
    def command(self, job):
        return [*self.prefix, *job.command]
    def examine(self):
        yield Finding("prefix", self.finding, "was examined", "nothing")

@hookimpl
def gserve_register_launchers():
    return [Prefix]
"""


@pytest.fixture
def examine(tmp_path: Path) -> Examine:
    """Return a function that examines a config of these sections, and returns the findings by subject."""

    def run(llm: dict[str, Any] | None = None, *, on_node: bool = False, **sections: Any) -> dict[str, Finding]:
        path = tmp_path / "config.yaml"
        path.write_text(json.dumps({"llm": {"model_name": "demo:smollm2-135m"} | (llm or {})} | sections))
        findings = list(examination.examine(path, on_node=on_node))
        assert len({finding.subject for finding in findings}) == len(findings)
        return {finding.subject: finding for finding in findings}

    return run


def through(*prefix: str, folder: Path, **options: str) -> dict[str, Any]:
    """Return the sections of a config whose launcher puts a prefix before the command."""
    (folder / "prefix_launcher.py").write_text(LAUNCHERS)
    return {
        "launcher": {"type": "prefix", "prefix": prefix} | options,
        "plugins": ["prefix_launcher"],
        "engine": {"type": "echo"},
    }


def a_program(folder: Path, name: str, text: str) -> None:
    folder.mkdir(exist_ok=True)
    (folder / name).write_text(f"#!/bin/sh\n{text}\n")
    (folder / name).chmod(0o755)


@pytest.fixture
def no_programs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Give a folder that is all of PATH: neither SLURM nor nvidia-smi are found."""
    folder = tmp_path / "bin"
    folder.mkdir()
    monkeypatch.setenv("PATH", str(folder))
    return folder


def a_vllm(folder: Path, version: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Have a package vllm of this version found before any other."""
    data = folder / f"vllm-{version}.dist-info"
    data.mkdir(parents=True)
    (data / "METADATA").write_text(f"Metadata-Version: 2.1\nName: vllm\nVersion: {version}\n")
    (data / "top_level.txt").write_text("vllm\n")
    (folder / "vllm").mkdir()
    (folder / "vllm" / "__init__.py").write_text("raise AssertionError('nobody needs to import vLLM')\n")
    monkeypatch.syspath_prepend(str(folder))


# ---------------------------------------------------------------------------------------------------------- a machine


@pytest.mark.usefixtures("no_programs")
def test_without_a_config_nothing_that_is_missing_is_a_problem() -> None:
    found = {finding.subject: finding for finding in examination.examine()}
    assert found["Python"].state == found["gserve"].state == "ok"
    assert sys.executable in found["Python"].text
    assert (found["GPUs"].state, found["GPUs"].text) == ("note", "none seen: there is no nvidia-smi")
    assert found["SLURM"].state == "note"
    assert found["SLURM"].text.startswith("not found here: srun, ")
    assert "node" not in found


@pytest.mark.usefixtures("no_programs")
def test_a_config_that_wants_slurm_has_a_problem_where_there_is_none(examine: Examine) -> None:
    found = examine(launcher={"type": "slurm"})
    assert found["SLURM"].state == "problem"
    assert found["SLURM"].text.startswith("not found here: srun, ")
    assert found["node"].state == "note"
    assert found["node"].text.startswith("not tried")


@pytest.mark.parametrize(
    ("version", "engine", "state", "says"),
    [
        ("0.33.9", {}, "ok", "0.33.9"),
        ("99.1", {}, "note", "installed is 99.1"),
        ("0.31.9", {}, "note", "security holes"),
        ("0.21.0", {}, "problem", "allow_insecure_vllm"),
        ("0.21.0", {"allow_insecure_vllm": True}, "note", "security holes"),
    ],
)
def test_vllm_is_judged_by_its_version_and_not_imported(
    examine: Examine, tmp_path: Path, monkeypatch: pytest.MonkeyPatch,
    version: str, engine: dict[str, Any], state: str, says: str,
) -> None:  # fmt: skip
    a_vllm(tmp_path / "site", version, monkeypatch)
    found = examine(engine={"type": "vllm"} | engine)["vLLM"]
    assert found.state == state
    assert version in found.text
    assert says in found.text


def test_vllm_for_the_cpu_needs_libnuma(
    examine: Examine, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, missing_libraries: list[str]
) -> None:
    a_vllm(tmp_path / "site", "0.32.0+cpu", monkeypatch)
    assert examine(engine={"type": "vllm"})["vLLM"].state == "ok"
    missing_libraries.append("libnuma.so.1")
    found = examine(engine={"type": "vllm"})["vLLM"]
    assert (found.state, "libnuma.so.1" in found.text, "libnuma1" in found.hint) == ("problem", True, True)


@pytest.fixture
def missing_libraries(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Return a list of libraries that cannot be loaded; all others can."""
    missing: list[str] = []

    def load(name: str) -> None:
        if name in missing:
            raise OSError(f"{name}: cannot open shared object file: No such file or directory")

    monkeypatch.setattr("ctypes.CDLL", load)
    return missing


def test_a_missing_vllm_is_a_problem_only_where_servers_run(tmp_path: Path) -> None:
    """Shown in a process that has all of our packages but those of vLLM."""
    site = tmp_path / "site"
    site.mkdir()
    for entry in Path(msgspec.__file__).parent.parent.iterdir():
        if not entry.name.startswith("vllm"):
            (site / entry.name).symlink_to(entry)
    (tmp_path / "config.yaml").write_text("llm: {model_name: any/model}\n")
    environ = os.environ | {"PYTHONPATH": f"{site}:{machine.ROOT}"}
    command = [sys.executable, "-S", "-m", "gserve.cli", "doctor"]
    for arguments, state in ((), "note"), (("config.yaml",), "problem"):
        ran = subprocess.run(
            [*command, *arguments], cwd=tmp_path, env=environ, capture_output=True, text=True, check=False
        )
        assert ran.returncode == (state == "problem"), ran.stderr
        (line,) = [line for line in ran.stdout.splitlines() if line.split()[1:2] == ["vLLM"]]
        assert line.split() == [state, "vLLM", "not", "installed", "here"]


def test_an_engine_that_is_not_vllm_needs_none(examine: Examine) -> None:
    found = examine({"model_name": "any"}, engine={"type": "echo"})
    assert not {"vLLM", "GPUs"} & set(found)
    assert found["model"].state == "ok"


# --------------------------------------------------------------------------------------------------------------- GPUs


def test_gpus_are_counted_by_name_and_memory(
    examine: Examine, no_programs: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    a_program(no_programs, "nvidia-smi", 'for i in 1 2; do echo "Big GPU, 80000 MiB"; done; echo "Small GPU, 8000 MiB"')
    assert examine()["GPUs"] == Finding("GPUs", "ok", "2 x Big GPU, 80000 MiB; 1 x Small GPU, 8000 MiB")
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "1")
    assert examine()["GPUs"].text.endswith("(CUDA_VISIBLE_DEVICES=1)")


def test_no_gpu_is_a_problem_where_servers_run_on_the_vllm_for_gpus(
    examine: Examine, no_programs: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    a_program(no_programs, "nvidia-smi", 'echo "No devices were found"; exit 6')
    a_vllm(tmp_path / "site", "99.1", monkeypatch)
    found = examine()["GPUs"]
    assert (found.state, found.text) == ("problem", "none seen: nvidia-smi says No devices were found")
    found = examine(launcher={"type": "slurm"})["GPUs"]
    assert found.state == "note", "this may be a login node"


def test_a_gpu_id_that_is_not_there_is_a_problem(examine: Examine, no_programs: Path) -> None:
    a_program(no_programs, "nvidia-smi", 'echo "0, GPU-1234"')  # an index and a UUID, or a name and a memory
    found = examine(serve={"gpu_ids": [0, 3]})
    assert "GPU of server-0" not in found
    assert found["GPU of server-1"].state == "problem"
    assert found["GPU of server-1"].text.startswith("there is no GPU 3 here")


# ------------------------------------------------------------------------------------------------------------- models


def test_a_local_folder_is_a_model_if_it_has_a_config(examine: Examine, tmp_path: Path) -> None:
    found = examine({"model_name": str(tmp_path)})["model"]
    assert (found.state, found.text) == ("problem", f"a folder without config.json: {tmp_path}")
    (tmp_path / "config.json").write_text("{}")
    found = examine({"model_name": str(tmp_path)})["model"]
    assert (found.state, found.text) == ("ok", f"a local folder: {tmp_path}")


@pytest.mark.parametrize("name", ["/nowhere/model", "./model", "../a/b", "~/model", "a/b/c"])
def test_a_path_that_is_not_there_is_a_problem(examine: Examine, name: str) -> None:
    found = examine({"model_name": name})["model"]
    assert (found.state, found.text) == ("problem", f"there is no such folder here: {name}")
    assert found.hint


@pytest.mark.usefixtures("no_programs")
def test_what_is_missing_here_is_no_problem_yet_where_servers_run_elsewhere(examine: Examine) -> None:
    found = examine({"model_name": "/nowhere/model", "lora_path": "/nowhere/adapter"}, launcher={"type": "slurm"})
    for subject in ("model", "LoRA adapter"):
        assert found[subject].state == "note"
        assert found[subject].hint.endswith("; gserve doctor CONFIG --on-node looks where servers run")


@pytest.mark.parametrize("node_has_it", [True, False])
def test_on_a_node_it_counts_what_is_there(examine: Examine, tmp_path: Path, node_has_it: bool) -> None:
    """The node here is this machine, and its working directory another one."""
    model = tmp_path / "node" / "models" / "mine"
    (model if node_has_it else tmp_path / "node").mkdir(parents=True)
    if node_has_it:
        (model / "config.json").write_text("{}")
    sections = through("env", f"--chdir={tmp_path / 'node'}", folder=tmp_path)
    found = examine({"model_name": "./models/mine"}, on_node=True, **sections | {"engine": {"type": "vllm"}})
    assert found["model"].state == "problem"
    assert found[f"model on {socket.gethostname()}"].state == ("ok" if node_has_it else "problem")


def test_an_unknown_demo_model_is_a_problem(examine: Examine) -> None:
    assert examine({"model_name": "demo:none"})["model"].state == "problem"
    assert examine({"model_name": "demo:smollm2-135m"})["model"].state == "ok"


def test_a_model_id_is_looked_for_in_the_cache_that_servers_use(examine: Examine, tmp_path: Path) -> None:
    llm, serve = {"model_name": "some/model"}, {"env": {"HF_HOME": str(tmp_path)}}
    found = examine(llm, serve=serve)["model"]
    assert found.state == "note"
    assert f"hf download some/model --cache-dir {tmp_path}/hub" in found.hint
    offline = {"env": serve["env"] | {"HF_HUB_OFFLINE": "1"}}
    assert examine(llm, serve=offline)["model"].state == "problem"

    cached = tmp_path / "hub" / "models--some--model"
    (cached / "refs").mkdir(parents=True)
    (cached / "refs" / "main").write_text("1a2b")
    snapshot = cached / "snapshots" / "1a2b"
    snapshot.mkdir(parents=True)
    (snapshot / "config.json").write_text("{}")
    (snapshot / "model.safetensors").symlink_to(cached / "blobs" / "weights")
    assert examine(llm, serve=offline)["model"].state == "problem", "its weights were not fetched"
    (cached / "blobs").mkdir()
    (cached / "blobs" / "weights").write_text("")
    assert examine(llm, serve=offline)["model"].state == "ok"
    assert examine(llm | {"revision": "other"}, serve=offline)["model"].state == "problem"
    assert examine(llm | {"revision": "1a2b"}, serve=offline)["model"].state == "ok"
    assert examine(llm | {"download_dir": str(tmp_path / "hub")})["model"].state == "ok"


def test_an_adapter_is_a_folder_with_its_config(examine: Examine, tmp_path: Path) -> None:
    assert "LoRA adapter" not in examine()
    assert examine({"lora_path": str(tmp_path / "none")})["LoRA adapter"].state == "problem"
    assert examine({"lora_path": str(tmp_path)})["LoRA adapter"].state == "problem"
    assert examine({"lora_path": LONG})["LoRA adapter"].state == "problem"
    (tmp_path / "adapter_config.json").write_text("{}")
    assert examine({"lora_path": str(tmp_path)})["LoRA adapter"].state == "ok"


WITH_VLLM = pytest.mark.skipif(find_spec("vllm") is None, reason="reads the source of an installed vLLM")


@WITH_VLLM
def test_arguments_that_the_installed_vllm_does_not_know_are_a_problem(examine: Examine) -> None:
    found = examine({"llm_kwargs": {"max_modle_len": 3}})["llm_kwargs"]
    assert found.state == "problem"
    assert "did you mean 'max_model_len'?" in found.text
    assert examine({"llm_kwargs": {"max_num_seqs": 3}})["llm_kwargs"].state == "ok"
    assert "llm_kwargs" not in examine()


# --------------------------------------------------------------------------------------------------------- gserve check


@pytest.mark.parametrize(
    ("llm", "line", "expected"),
    [
        ("model_name: demo:foo", 3, "there is no demo model 'demo:foo'; expected demo:smollm2-135m"
         " - at $.llm.model_name"),
        ("model_name: m\n  tokenizer: demo:foo", 4, "there is no demo model 'demo:foo'; expected demo:smollm2-135m"
         " - at $.llm.tokenizer"),
        ("model_name: m\n  lora_path: /none", 4, "no LoRA adapter in /none: expected adapter_config.json there"
         " - at $.llm.lora_path"),
        ("model_name: m\n  lora_path: /", 4, "no LoRA adapter in /: expected adapter_config.json there"
         " - at $.llm.lora_path"),
        ("model_name: m\n  llm_kwargs:\n    chat_template: /none", 5, "cannot read the chat template /none: No such"
         " file or directory - at $.llm.llm_kwargs.chat_template"),
        ("model_name: m\n  llm_kwargs:\n    chat_template: 3", 5, "expected a chat template as a text or as a file"
         " - at $.llm.llm_kwargs.chat_template"),
        ("model_name: m\n  lora_path: ~nosuchuser/x", 4, "no LoRA adapter in ~nosuchuser/x: expected"
         " adapter_config.json there - at $.llm.lora_path"),
        ("model_name: m\n  adapters: {a: /a}\n  llm_kwargs: {enable_lora: false}", 5, "adapters need enable_lora:"
         " remove it, or them - at $.llm.llm_kwargs.enable_lora"),
        (f"model_name: m\n  lora_path: {LONG}", 4, f"no LoRA adapter in {LONG}: File name too long"
         " - at $.llm.lora_path"),
        ("model_name: m\n  llm_kwargs:\n    chat_template: ~nosuchuser/x", 5, "cannot read the chat template"
         " ~nosuchuser/x: No such file or directory - at $.llm.llm_kwargs.chat_template"),
        ("model_name: m\n  dtype: float17", 4, "unknown dtype 'float17'; expected one of auto, bfloat16, float16,"
         " float32, float, half - at $.llm.dtype"),
        ('model_name: "a\\nb"', 3, "'a\\nb' contains a line break or a control character - at $.llm.model_name"),
        pytest.param("model_name: m\n  llm_kwargs:\n    max_num_seqs: 3\n    max_modle_len: 3", 6, "unknown argument"
         " 'max_modle_len' of the engine; did you mean 'max_model_len'? - at $.llm.llm_kwargs.max_modle_len",
         marks=WITH_VLLM),
        pytest.param("model_name: m\n  llm_kwargs: {zzz: 3}", 4, "unknown argument 'zzz' of the engine; its keys are"
         " the keyword arguments of vllm.LLM - at $.llm.llm_kwargs.zzz", marks=WITH_VLLM),
    ],
)  # fmt: skip
def test_the_check_refuses_what_cannot_be_served_with_file_line_and_path(
    tmp_path: Path, llm: str, line: int, expected: str
) -> None:
    path = tmp_path / "config.yaml"
    path.write_text(f"# a service\nllm:\n  {llm}\n")
    with pytest.raises(ConfigError) as caught:
        examination.check_config(path)
    assert str(caught.value) == f"{path}:{line}: {expected}"


def test_the_check_reads_the_adapter_of_lora_path(tmp_path: Path) -> None:
    def told(config: str, **more: Any) -> str:
        (tmp_path / "adapter_config.json").write_text(config)
        path = tmp_path / "config.yaml"
        path.write_text(json.dumps({"llm": {"model_name": "m", "lora_path": str(tmp_path)} | more}))
        with pytest.raises(ConfigError) as caught:
            examination.check_config(path)
        return str(caught.value)

    assert "adapter_config.json: it is not JSON" in told("{")
    assert "the adapter's rank is 0; expected 1 to 512" in told('{"r": 0}')
    assert "has rank 16, and max_lora_rank is 8" in told('{"r": 16}', llm_kwargs={"max_lora_rank": 8})
    assert "expected adapter_model.safetensors there" in told('{"r": 16}')


def test_the_check_refuses_files_that_cannot_be_read(tmp_path: Path) -> None:
    (tmp_path / "latin").write_bytes(b"{{ 'caf\xe9' }}")
    (tmp_path / "adapter_config.json").symlink_to("/proc/self/mem")  # a file whose first byte cannot be read
    path = tmp_path / "config.yaml"
    for llm, expected in (
        ({"llm_kwargs": {"chat_template": str(tmp_path / "latin")}}, "cannot read the chat template .*latin: 'utf-8'"),
        ({"lora_path": str(tmp_path)}, "cannot read the rank 'r' in .*/adapter_config.json"),
    ):
        path.write_text(json.dumps({"llm": {"model_name": "m"} | llm}))
        with pytest.raises(ConfigError, match=expected):
            examination.check_config(path)


def test_the_check_looks_for_no_files_of_other_machines_nor_for_those_of_other_engines(tmp_path: Path) -> None:
    path = tmp_path / "config.yaml"
    llm = {"model_name": "m", "lora_path": "/none", "llm_kwargs": {"chat_template": "/none"}}
    path.write_text(json.dumps({"llm": llm, "launcher": {"type": "slurm"}}))
    ((_, job, command),) = examination.check_config(path)
    assert job.name == "server-0"
    assert "--model" in command
    llm |= {"model_name": "demo:foo", "llm_kwargs": {"zzz": 1}}
    path.write_text(json.dumps({"llm": llm, "engine": {"type": "echo"}}))
    assert len(examination.check_config(path, ["serve.servers=2"])) == 2


# ------------------------------------------------------------------------------------------------------------- a node


def test_a_node_is_reached_and_says_what_it_has(examine: Examine, tmp_path: Path) -> None:
    found = examine(on_node=True, **through("env", folder=tmp_path))
    node = socket.gethostname()
    assert (found["node"].state, found["node"].text) == ("ok", f"{node} runs programs, and is reached at 127.0.0.1")
    assert found[f"Python on {node}"] == Finding(f"Python on {node}", "ok", found["Python"].text)
    assert found[f"model on {node}"].state == "ok"


def test_a_launcher_of_this_machine_starts_nothing_unless_told_to(examine: Examine, tmp_path: Path) -> None:
    found = examine(**through("touch", str(tmp_path / "started"), "--", folder=tmp_path))
    assert found["prefix"] == Finding("prefix", "ok", "was examined", "nothing")
    assert "node" not in found
    assert not (tmp_path / "started").exists()


def test_a_launcher_with_a_problem_is_not_tried(examine: Examine, tmp_path: Path) -> None:
    found = examine(on_node=True, **through("false", folder=tmp_path, finding="problem"))
    assert found["node"].state == "note"
    assert found["node"].text.startswith("not tried")


def test_what_a_login_script_says_is_passed_over(examine: Examine, tmp_path: Path) -> None:
    greeting = through("sh", "-c", 'echo Welcome; echo "{}"; exec "$@"', "sh", folder=tmp_path)
    assert examine(on_node=True, **greeting)["node"].state == "ok"


def test_a_node_that_cannot_run_our_program_says_so_in_its_own_words(examine: Examine, tmp_path: Path) -> None:
    found = examine(on_node=True, **through("sh", "-c", "echo no such Python >&2; exit 127", folder=tmp_path))["node"]
    assert found.state == "problem"
    assert "exit code 127: no such Python (log: /" in found.text


def test_a_launcher_that_cannot_start_is_a_problem(examine: Examine, tmp_path: Path) -> None:
    found = examine(on_node=True, **through("/nonexistent/program", folder=tmp_path))["node"]
    assert found.state == "problem"
    assert found.text.startswith("cannot start '/nonexistent/program' for doctor")


def test_a_port_that_is_taken_there_is_a_problem(examine: Examine, tmp_path: Path) -> None:
    with socket.create_server(("127.0.0.1", 0)) as taken:
        sections = through("env", folder=tmp_path) | {"serve": {"port": taken.getsockname()[1]}}
        found = examine(on_node=True, **sections)["node"]
    assert found.state == "problem"
    assert "cannot listen: [Errno 98]" in found.text


@pytest.mark.skipif(os.geteuid() != 0, reason="only root can make a network that we are not in")
def test_a_node_that_is_not_reached_is_a_problem_and_still_says_what_it_has(examine: Examine, tmp_path: Path) -> None:
    found = examine(on_node=True, **through("unshare", "--net", "--", folder=tmp_path))
    assert found["node"].state == "problem"
    assert "is not reached from here at port " in found["node"].text
    assert "serve.port" in found["node"].hint
    assert f"Python on {socket.gethostname()}" in found


def test_no_node_without_a_config() -> None:
    with pytest.raises(ConfigError, match="--on-node goes with a CONFIG"):
        list(examination.examine(on_node=True))


def test_the_program_on_a_node_ends_with_its_owner() -> None:
    errand = node.Errand(Config(LLMConfig("any"), engine={"type": "echo"}), "/", None, "token", look=True)
    command = [sys.executable, "-c", node.PROGRAM, str(machine.ROOT)]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE) as process:
        assert process.stdin
        assert process.stdout
        process.stdin.write(msgspec.json.encode(errand) + b"\n")
        process.stdin.flush()
        arrival = msgspec.json.decode(process.stdout.readline(), type=node.Arrival)
        assert arrival.address is not None
        for _ in range(2):
            with socket.create_connection((arrival.address.hosts[0], arrival.address.port), 10) as line:
                assert line.makefile().read() == "token"
        process.stdin.close()
        assert process.wait(30) == 0
        assert process.stdout.read() == b"", "nobody told it to look"


# --------------------------------------------------------------------------------------------------- the command line


def test_the_command_prints_a_line_for_each_and_its_exit_code_tells_of_problems(tmp_path: Path) -> None:
    def run(*arguments: str, model: str) -> "subprocess.CompletedProcess[str]":
        (tmp_path / "config.yaml").write_text(json.dumps({"llm": {"model_name": model}}))
        command = [sys.executable, "-m", "gserve.cli", "doctor", *arguments]
        return subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, check=False)

    ran = run("config.yaml", model=str(tmp_path / "none"))
    assert (ran.returncode, ran.stderr) == (1, "error: 1 problem, see above\n")
    rows = [line for line in ran.stdout.splitlines() if not line.startswith(" ")]
    assert [row.split()[1] for row in rows] == ["Python", "gserve", "GPUs", "vLLM", "model"]
    assert rows[-1].split()[0] == "problem"
    assert ran.stdout.splitlines()[-1].strip() == "-> is its file system mounted here?"
    ran = run("config.yaml", "--set", "llm.model_name=demo:smollm2-135m", model="/none")
    assert (ran.returncode, ran.stderr) == (0, "")
    assert run("config.yaml", "--set", "llm.model=x", model="/none").returncode == 2
