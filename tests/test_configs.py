"""Every file of configs/ is right, and the example of a plugin is complete, short, installable, and works."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

from gserve import VLLMService
from gserve_core import plugins, testing

CONFIGS = Path(__file__).parent.parent / "configs"
PLUGIN = CONFIGS / "plugin"


def gserve(*arguments: str | Path, path: Path | None = None) -> "subprocess.CompletedProcess[str]":
    environ = os.environ | ({"PYTHONPATH": str(path)} if path else {})
    command = [sys.executable, "-m", "gserve.cli", *map(str, arguments)]
    return subprocess.run(command, capture_output=True, text=True, env=environ, check=False)


@pytest.mark.parametrize("config", sorted(CONFIGS.rglob("*.yaml")), ids=lambda path: str(path.relative_to(CONFIGS)))
def test_every_config_passes_the_check(config: Path, tmp_path: Path) -> None:
    (tmp_path / "adapter_config.json").write_text('{"r": 8}')
    (tmp_path / "adapter_model.bin").touch()
    adapter = ["--set", f"llm.lora_path={tmp_path}"] if "lora_path" in config.read_text() else []
    adapter += ["--set", "llm.adapters={}"] if "adapters" in config.read_text() else []
    done = gserve("check", config, *adapter)
    assert done.returncode == 0, done.stderr
    assert "vllm_server.py --serve --model" in done.stdout


def test_the_config_of_pairs_makes_two_servers_of_two_gpus() -> None:
    jobs = VLLMService.from_yaml(CONFIGS / "tensor_parallel.yaml").jobs()
    assert [job.env["CUDA_VISIBLE_DEVICES"] for job, _ in jobs] == ["0,1", "2,3"]


def test_the_config_of_four_gpus_counts_the_ports() -> None:
    jobs = VLLMService.from_yaml(CONFIGS / "several_gpus.yaml").jobs()
    assert [command[command.index("--port") + 1] for _, command in jobs] == ["8000", "8001", "8002", "8003"]


def test_the_plugin_is_at_most_25_lines() -> None:
    assert len((PLUGIN / "taskset_launcher.py").read_text().splitlines()) <= 25


def test_the_plugin_keeps_the_contract() -> None:
    registry = plugins.load(["taskset_launcher"], PLUGIN)
    testing.check_launcher(registry.build("launcher", {"type": "taskset", "cores": 1}))


def test_the_plugin_starts_each_server_on_its_own_core() -> None:
    overrides = ["engine={type: echo}", "serve.servers=2"]
    with VLLMService.from_yaml(PLUGIN / "service.yaml", overrides=overrides) as service:
        assert service.generate(["a b"]) == [["a b"]]
        cores = {
            frozenset(os.sched_getaffinity(pid))
            for pid, command in testing.our_processes().items()
            if "vllm_server.py" in command
        }
    assert cores == {frozenset({0}), frozenset({1})}


def test_the_plugin_installs_and_is_found_by_its_entry_point(tmp_path: Path) -> None:
    command = [sys.executable, "-m", "pip", "install", "--quiet", "--no-deps", "--target", str(tmp_path), str(PLUGIN)]
    subprocess.run(command, check=True)
    config = tmp_path / "service.yaml"
    config.write_text((PLUGIN / "service.yaml").read_text().replace("plugins:\n  - taskset_launcher\n", ""))
    done = gserve("check", config, path=tmp_path)
    assert done.returncode == 0, done.stderr
    assert "taskset --cpu-list 1-1 " in done.stdout
    assert "taskset_launcher" in gserve("plugins", path=tmp_path).stdout
