"""Files that would harm whoever reads them: refused at once, in little memory, with nothing done."""

import logging
import subprocess
import sys
from pathlib import Path

import pytest

from gserve_core.document import Document, dump

logger = logging.getLogger(__name__)
LLM = "llm: {model_name: m}\n"
HARMFUL = {
    "a call": "llm: !!python/object/apply:os.system ['touch owned']\n",
    "a new object": "llm: !!python/object/new:subprocess.Popen [['touch', 'owned']]\n",
    "a name": "llm: !!python/name:os.system\n",
    "a module": "llm: !!python/module:os\n",
    "a target of hydra's": LLM + "launcher: {_target_: os.system, command: touch owned}\n",
    "a target in the model": "llm: {model_name: m, _target_: os.system}\n",
    "a billion aliases": "a: &a [x]\n" + "".join(
        f"{b}: &{b} [{', '.join([f'*{a}'] * 10)}]\n" for a, b in zip("abcdefghi", "bcdefghij", strict=True)
    ),
    "an alias in itself": "llm: &a [*a]\n",
    "a merge": "base: &base {model_name: m}\nllm: {<<: *base}\n",
    "a key twice": LLM + "llm: {model_name: n}\n",
    "much text": "llm: {model_name: '" + "a" * (100 << 20) + "'}\n",
    "many keys": "".join(f"k{number}: 1\n" for number in range(100_000)),
    "deep lists": "llm: " + "[" * 100_000,
    "deep mappings": "llm: " + "{a: " * 50_000,
    "deep indents": "".join(" " * depth + "a:\n" for depth in range(1000)),
    "a huge number": "llm: {seed: " + "9" * 900_000 + "}\n",
    "many documents": "---\na: 1\n" * 50_000,
}  # fmt: skip
READ = """
import re, sys, time
from gserve import ConfigError
from gserve_core import plugins
from gserve_core.config import load

def peak():
    return int(re.search(r"VmHWM:\\s+(\\d+) kB", open("/proc/self/status").read())[1]) >> 10

registry = plugins.load(())
before, began = peak(), time.process_time()
try:
    config, _ = load(sys.argv[1])
    registry.build("launcher", config.launcher)
except ConfigError as error:
    assert len(str(error)) < 2000, str(error)[:3000]
    sys.exit(f"{time.process_time() - began} {peak() - before}")
"""


@pytest.mark.parametrize("kind", HARMFUL)
def test_a_harmful_file_is_refused_at_once(tmp_path: Path, kind: str) -> None:
    file = tmp_path / "config.yaml"
    file.write_text(HARMFUL[kind])
    ran = subprocess.run([sys.executable, "-c", READ, file], cwd=tmp_path, capture_output=True, text=True, check=False)
    assert ran.returncode == 1, "it was taken"
    assert "Traceback" not in ran.stderr, ran.stderr[-2000:]
    seconds, mebibytes = map(float, ran.stderr.split())
    assert mebibytes < 100
    assert seconds < 10
    assert [path.name for path in tmp_path.iterdir()] == ["config.yaml"]
    logger.info("%s: %.2f s, %d MiB", kind, seconds, mebibytes)


def test_an_override_changes_what_it_names_and_no_alias_of_it(tmp_path: Path) -> None:
    path = tmp_path / "models.yaml"
    path.write_text("models: {a: {serve: &s {servers: 1}}, b: {serve: *s}}\n")
    data = Document(path, ["models.a.serve.servers=2"]).data
    assert data == {"models": {"a": {"serve": {"servers": 2}}, "b": {"serve": {"servers": 1}}}}
    assert "&" not in dump(Document(path).data)


def test_what_is_written_is_read_as_the_same_data(tmp_path: Path) -> None:
    texts = ["on", "no", "true", "1e5", "0o17", "012", "12:30:00", "2024-01-01", "~", "", "a: b", "# c", "<<", "é\n\tf"]
    data = {
        "llm": {"texts": [*texts, "word " * 100], "numbers": [1, -2, 0.5, 1e-5, 1e300], "others": [True, None, [], {}]},
        "on": {"no": "yes"},
    }
    (tmp_path / "config.yaml").write_text(dump(data))
    assert Document(tmp_path / "config.yaml").data == data
    assert list(Document(tmp_path / "config.yaml").data) == ["llm", "on"]
