"""The settings that a search tries for a model, by its config and its engine."""

import os
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar

import pytest

from gserve_core.config import Config, LLMConfig, ServeConfig
from gserve_core.engines.echo import EchoEngine
from gserve_core.service.plan import Plan
from gserve_core.service.state import ONLY
from gserve_core.tune.settings import dimensions
from gserve_launchers.ssh.launcher import SshLauncher
from tests.gserve_core.fake_cuda import make_driver

SERVERS, BY_GPU = "serve.servers", "serve.servers_per_gpu"
SEQS, TOKENS = "llm.llm_kwargs.max_num_seqs", "llm.llm_kwargs.max_num_batched_tokens"
CACHE, EAGER = "llm.llm_kwargs.enable_prefix_caching", "llm.enforce_eager"


@dataclass(frozen=True, kw_only=True)
class OnCpu(EchoEngine):
    """An engine that takes a part of the memory, as vLLM's build without GPUs does."""

    name: ClassVar[str] = "on-cpu"
    uses_gpus: ClassVar[bool] = True

    def needs_gpus(self) -> bool:
        return False


@dataclass(frozen=True, kw_only=True)
class OnGpu(EchoEngine):
    """An engine on GPUs."""

    name: ClassVar[str] = "on-gpu"
    uses_gpus: ClassVar[bool] = True


def tried(
    engine: EchoEngine, serve: ServeConfig | None = None, rows: int = 10_000, cores: int = 8, **llm: Any
) -> dict[str, Sequence[Any]]:
    config = Config(LLMConfig("any", **llm), serve or ServeConfig())
    model = Plan.of(config, engine=engine).models[ONLY]
    return {it.key: list(it.values) for it in dimensions(model, "", 256, rows, cores, 16 << 30)}


def test_on_gpus_servers_come_first_and_graphs_last_if_they_are_on() -> None:
    found = tried(OnGpu())
    assert [*found] == [BY_GPU, SEQS, TOKENS, CACHE, EAGER]
    assert found[BY_GPU] == [None, 2, 3]
    assert found[SEQS] == [64, 128, None, 512, 1024]
    assert found[TOKENS] == [2048, None, 16384]
    assert (found[CACHE], found[EAGER]) == ([None, False], [None, True])


def test_the_number_of_servers_that_auto_chooses_is_expected(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    make_driver(tmp_path)
    monkeypatch.setenv("LD_LIBRARY_PATH", str(tmp_path))
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    monkeypatch.setattr(os, "sched_getaffinity", lambda _: range(64))
    monkeypatch.setattr(OnGpu, "weight_bytes", lambda *_: 2 << 30)
    for given, expected in ((1, 3), (2, 3), (3, None)):
        config = Config(LLMConfig("any"), ServeConfig(servers_per_gpu=given))
        model = Plan.of(config, engine=OnGpu()).models[ONLY]
        assert next(dimensions(model, "", 256, 10_000, 8, 16 << 30)).expected == expected


def test_graphs_come_second_if_they_are_off() -> None:
    found = tried(OnGpu(), enforce_eager=True)
    assert [*found][:2] == [BY_GPU, EAGER]
    assert found[EAGER] == [None, False]
    assert tried(OnGpu(), llm_kwargs={"enforce_eager": True})["llm.llm_kwargs.enforce_eager"] == [None, False]


def test_without_a_gpu_there_are_no_graphs_and_servers_are_up_to_the_cores() -> None:
    assert [*tried(EchoEngine())] == [SERVERS, SEQS, TOKENS, CACHE]
    assert tried(EchoEngine(), cores=2)[SERVERS] == [None, 2]
    assert tried(EchoEngine(), ServeConfig(servers=4))[SERVERS] == [1, 2, 3, None]


@pytest.mark.parametrize(
    ("fraction", "values"), [(0.18, [None, 2, 3]), (0.4, [None, 2]), (0.5, [None]), (None, [None, 2, 3])]
)
def test_without_a_gpu_servers_are_as_many_as_the_memory_takes(fraction: float | None, values: list[Any]) -> None:
    assert tried(OnCpu(), gpu_memory_utilization=fraction)[SERVERS] == values


def test_without_a_gpu_a_cache_that_is_not_set_takes_4_gib_beside_the_weights(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(OnCpu, "weight_bytes", lambda *_: 2 << 30)
    assert tried(OnCpu())[SERVERS] == [None, 2], "three take 18 of 16 GiB"


def test_without_a_gpu_a_cache_that_is_set_counts() -> None:
    assert tried(OnCpu(), llm_kwargs={"kv_cache_memory_bytes": 6 << 30})[SERVERS] == [None, 2], "of 16 GiB"


@pytest.mark.parametrize(
    ("serve", "llm"),
    [
        (ServeConfig(servers=2), {}),
        (ServeConfig(gpu_ids=[0, 0], share_gpu=True), {}),
        (ServeConfig(gpu_ids=[0, 1]), {"llm_kwargs": {"tensor_parallel_size": 2}}),
    ],
)
def test_a_number_of_servers_that_cannot_change_on_gpus_is_left(serve: ServeConfig, llm: dict[str, Any]) -> None:
    assert next(iter(tried(OnGpu(), serve, **llm))) == SEQS


def test_servers_elsewhere_are_left() -> None:
    launcher = SshLauncher(hosts=[{"host": "far", "gpu_ids": [0]}])
    model = Plan.of(Config(LLMConfig("any")), launcher=launcher, engine=OnGpu()).models[ONLY]
    assert next(dimensions(model, "", 256, 1000, 8, 16 << 30)).key == SEQS


def test_given_values_are_the_middle_and_rows_are_the_limit() -> None:
    kwargs = {"max_num_batched_tokens": 4096, "enable_prefix_caching": False}
    found = tried(OnGpu(), ServeConfig(servers_per_gpu=2), rows=300, llm_kwargs=kwargs)
    assert found[BY_GPU] == [1, None, 3]
    assert found[SEQS] == [64, 128, None, 512], "300 rows never fill 1,024"
    assert found[TOKENS] == [1024, None, 16384]
    assert found[CACHE] == [None, True]
    assert tried(OnGpu(), llm_kwargs={"max_num_batched_tokens": 512})[TOKENS] == [None, 2048]


def test_the_keys_of_one_of_several_models_have_its_path() -> None:
    model = Plan.of(Config(LLMConfig("any")), engine=EchoEngine()).models[ONLY]
    assert next(dimensions(model, "models.judge.", 256, 1000, 8, 16 << 30)).key == "models.judge.serve.servers"
