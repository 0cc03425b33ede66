"""Several servers of a model on one GPU: their number, and their parts of its memory."""

import logging
import os
import signal
from pathlib import Path
from typing import Any, ClassVar

import pytest

from gserve import ConfigError, LLMConfig, ModelConfig, ServeConfig, VLLMService
from gserve_core.config import Config
from gserve_core.engines.echo import EchoEngine
from gserve_core.host.gpus import GPU
from gserve_core.interfaces import Launcher
from gserve_core.service.deployment import Deployment
from gserve_core.service.gpu_sharing import choose
from gserve_core.service.plan import Plan
from gserve_core.service.state import ONLY
from gserve_launchers.slurm.launcher import SlurmLauncher
from tests.gserve_core.fake_cuda import make_driver
from tests.gserve_core.fake_servers import until
from tests.listeners import server_pid

GIB = 1 << 30
H100 = GPU("H100", 80 * GIB, 132)
SMALL = GPU("Small", 48 * GIB, 58)


class Sized(EchoEngine):
    """An engine on GPUs, whose models have the sizes in bytes that `llm_kwargs` say."""

    uses_gpus: ClassVar[bool] = True

    def weight_bytes(self, llm: LLMConfig) -> int | None:
        return llm.llm_kwargs.get("bytes")

    def sequence_bytes(self, llm: LLMConfig) -> int | None:
        return llm.llm_kwargs.get("sequence")


def plan(llm: dict[str, Any] | None = None, launcher: Launcher | None = None, **serve: Any) -> Plan:
    return Plan.of(Config(LLMConfig("m", **llm or {}), ServeConfig(**serve)), engine=Sized(), launcher=launcher)


def memory(made: Plan) -> list[Any]:
    """Return the GPUs and the part of the memory of each server."""
    return [(it.gpu_ids, it.llm.engine_kwargs.get("gpu_memory_utilization")) for it in made.programs()]


# ---------------------------------------------------------------------------------------------------------- the number


@pytest.mark.parametrize(
    ("weights", "gpus", "fraction", "cores", "servers", "why"),
    [
        (2.4, [H100], 0.92, 16, 3, "the weights take 2.4 GiB, 19 MiB for each of the 132 multiprocessors of H100"),
        (5, [H100], 0.92, 16, 2, "39 MiB for each"),
        (15, [H100], 0.92, 16, 1, "116 MiB for each"),
        (2.4, [H100, SMALL], 0.92, 64, 2, "42 MiB for each of the 58 multiprocessors of Small"),
        (2.4, [H100], 0.3, 16, 2, "; 24.0 GiB of GPU memory have room for no more"),
        (2.4, [H100], 0.1, 16, 1, "; 8.0 GiB of GPU memory have room for no more"),
        (2.4, [H100] * 8, 0.92, 64, 2, "; 64 cores for 8 GPUs are too few for more"),
        (2.4, [H100], 0.92, 2, 1, "; 2 cores for 1 GPU are too few for more"),
    ],
)
def test_a_small_model_has_more_servers_on_a_large_gpu(
    weights: float, gpus: list[GPU], fraction: float, cores: int, servers: int, why: str
) -> None:
    chosen = choose(int(weights * GIB), gpus, fraction, cores)
    assert chosen.servers == servers
    assert why in str(chosen)
    assert (";" in chosen.why) == why.startswith(";"), "only the limits that decide are named"


L40S = GPU("L40S", 45 * GIB, 142)


@pytest.mark.parametrize(
    ("sequence", "cache", "servers", "why"),
    [
        (0.5, None, 3, ""),
        (9, None, 2, "; 41.4 GiB of GPU memory have room for no more, each with 9.0 GiB of KV cache for a sequence of"),
        (15, None, 1, "have room for no more, each with 15.0 GiB"),
        (0.5, 1, 2, "; each needs 0.5 GiB of KV cache for a sequence of the maximum length"),
        (0.5, 12, 3, ""),
        (0.5, 27, 2, "; 41.4 GiB of GPU memory have room for no more"),
        (0, 60, 1, "; 41.4 GiB of GPU memory have room for no more"),
    ],
)
def test_each_server_has_room_for_a_sequence_of_the_maximum_length(
    sequence: float, cache: float | None, servers: int, why: str
) -> None:
    size = None if cache is None else int(cache * GIB)
    chosen = choose(2 * GIB, [L40S], 0.92, 16, sequence=int(sequence * GIB), cache=size, reserve=0.03)
    assert chosen.servers == servers
    assert why in str(chosen)
    assert (";" in chosen.why) == bool(why)


@pytest.fixture
def driver(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Make a machine of 64 cores with CUDA's driver and two GPUs: see `make_driver`."""
    make_driver(tmp_path)
    monkeypatch.setenv("LD_LIBRARY_PATH", str(tmp_path))
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    monkeypatch.setattr(os, "sched_getaffinity", lambda _: range(64))


@pytest.mark.usefixtures("driver")
@pytest.mark.parametrize(
    ("size", "more", "serve", "expected"),
    [
        (2, {}, {}, [(None, 0.86 / 3)] * 3),
        (2, {}, {"gpu_ids": [0]}, [((0,), 0.86 / 3)] * 3),
        (2, {}, {"gpu_ids": [1]}, [((1,), 0.445)] * 2),
        (2, {}, {"gpu_ids": [0, 1]}, [((0,), 0.445)] * 2 + [((1,), 0.445)] * 2),
        (9, {}, {"gpu_ids": [0]}, [((0,), None)]),
        (2, {"sequence": 20 * GIB}, {"gpu_ids": [0]}, [((0,), 0.445)] * 2),
        (2, {"kv_cache_memory_bytes": 60 * GIB}, {"gpu_ids": [0]}, [((0,), None)]),
    ],
)
def test_auto_asks_the_gpus_of_the_model(
    size: int, more: dict[str, Any], serve: dict[str, Any], expected: list[Any]
) -> None:
    made = plan({"llm_kwargs": {"bytes": size * GIB} | more}, servers_per_gpu="auto", **serve)
    assert memory(made) == expected
    assert made.models[ONLY].serve.shares_gpus == (len(expected) > 1)


@pytest.mark.usefixtures("driver")
@pytest.mark.parametrize(("size", "least"), [(None, 1), (5 * GIB, 2), (2 * GIB, 3)])
def test_min_ready_is_at_most_the_number_that_auto_chooses(size: int | None, least: int) -> None:
    made = plan({"llm_kwargs": {"bytes": size}}, servers_per_gpu="auto", gpu_ids=[0], min_ready=3)
    assert made.models[ONLY].serve.min_ready == least == len([*made.programs()])
    with pytest.raises(ConfigError, match="the number of servers, got 4"):
        plan({"llm_kwargs": {"bytes": size}}, servers_per_gpu="auto", gpu_ids=[0], min_ready=4)


@pytest.mark.usefixtures("driver")
def test_a_size_that_is_no_number_is_refused() -> None:
    with pytest.raises(
        ConfigError, match=r"a number of bytes, got '8e9' - at \$\.llm\.llm_kwargs\.kv_cache_memory_bytes"
    ):
        plan({"llm_kwargs": {"bytes": GIB, "kv_cache_memory_bytes": "8e9"}}, servers_per_gpu="auto")


@pytest.mark.usefixtures("driver")
def test_auto_counts_the_memory_that_other_models_leave() -> None:
    llm = {"bytes": 2 * GIB}
    models = {
        "small": ModelConfig(LLMConfig("s", llm_kwargs=llm), ServeConfig([0], share_gpu=True, servers_per_gpu="auto")),
        "large": ModelConfig(LLMConfig("l", gpu_memory_utilization=0.6), ServeConfig([0], share_gpu=True)),
    }
    made = Plan.of(Config(models=models), engine=Sized())
    assert [(it.name, it.llm.engine_kwargs["gpu_memory_utilization"]) for it in made.programs()] == [
        ("small-0", pytest.approx(0.13)), ("small-1", pytest.approx(0.13)), ("large-0", 0.6)
    ]  # fmt: skip
    assert "23.2 GiB of GPU memory have room for no more" in str(made.models["small"].choice)


@pytest.mark.parametrize(
    ("engine", "serve", "why"),
    [
        (Sized(), {}, "CUDA finds no GPU here"),
        (EchoEngine(), {"servers": 2}, "the engine here uses no GPU; without one, 'servers' is their number"),
        (Sized(), {"servers": 2}, "'servers' sets their number"),
    ],
)
def test_without_a_gpu_auto_is_one(engine: EchoEngine, serve: dict[str, Any], why: str) -> None:
    config = Config(LLMConfig("m"), ServeConfig(servers_per_gpu="auto", **serve))
    made = Plan.of(config, engine=engine)
    assert str(made.models[ONLY].choice) == f"1 server on each GPU, chosen by auto: {why}"
    assert made.servers == serve.get("servers", 1)
    assert not made.models[ONLY].serve.shares_gpus


@pytest.mark.usefixtures("driver")
def test_auto_is_one_where_it_cannot_know_better() -> None:
    several = {"bytes": GIB, "tensor_parallel_size": 2}
    for llm, why in (
        ({}, "the size of the model is not known from files of this machine"),
        ({"llm_kwargs": several}, "each server has 2 GPUs"),
    ):
        assert why in str(plan(llm, servers_per_gpu="auto", gpu_ids=[0, 1]).models[ONLY].choice)
    elsewhere = plan({}, SlurmLauncher(), servers_per_gpu="auto")
    assert "the launcher 'slurm' starts servers on other machines" in str(elsewhere.models[ONLY].choice)
    with pytest.raises(ConfigError, match=r"servers_per_gpu is for servers on this machine, .*'slurm'.*servers_per_g"):
        plan({}, SlurmLauncher(), servers_per_gpu=2)


@pytest.mark.usefixtures("driver")
def test_a_driver_that_does_not_answer_counts_as_none(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("CUDA_IS_BROKEN", "1")
    chosen = plan({"llm_kwargs": {"bytes": GIB}}, servers_per_gpu="auto").models[ONLY].choice
    assert "CUDA finds no GPU here" in str(chosen)


@pytest.mark.usefixtures("driver")
def test_the_log_of_a_start_has_the_choice(caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.INFO, "gserve.service")
    Deployment(plan({"llm_kwargs": {"bytes": 2 * GIB}}, servers_per_gpu="auto", gpu_ids=[0]), None).prepare()
    (line,) = [it for it in caplog.messages if "auto" in it]
    assert line.startswith(
        "3 servers on each GPU, chosen by auto: the weights take 2.0 GiB, 16 MiB for each of the 132"
    )


# ---------------------------------------------------------------------------------------------------------- the memory


def test_the_memory_of_the_model_is_divided_by_its_servers() -> None:
    serve: dict[str, Any] = {"gpu_ids": [0, 1], "servers_per_gpu": 2}
    assert memory(plan({}, **serve)) == [((0,), 0.445), ((0,), 0.445), ((1,), 0.445), ((1,), 0.445)]
    assert [part for _, part in memory(plan({"gpu_memory_utilization": 0.6}, **serve))] == [0.3] * 4
    given = {"gpu_memory_utilization": 0.6, "kv_cache_memory_bytes": 1000}
    for program in plan({"llm_kwargs": given}, **serve).programs():
        own = program.llm.engine_kwargs
        assert (own["gpu_memory_utilization"], own["kv_cache_memory_bytes"]) == (0.3, 500)
    assert plan({"llm_kwargs": given}, **serve).models[ONLY].llm.llm_kwargs == given, "the user's words stay"


def test_servers_without_gpus_are_given_no_part_of_a_gpu() -> None:
    config = Config(LLMConfig("m"), ServeConfig(servers_per_gpu=2))
    programs = list(Plan.of(config, engine=EchoEngine()).programs())
    assert [it.llm for it in programs] == [LLMConfig("m")] * 2


def test_a_server_alone_on_its_gpu_has_what_the_user_gives_it() -> None:
    assert memory(plan({}, gpu_ids=[0, 1], share_gpu=True)) == [((0,), None), ((1,), None)]
    (program,) = plan({"gpu_memory_utilization": 0.5}, gpu_ids=[0]).programs()
    assert program.llm == LLMConfig("m", gpu_memory_utilization=0.5)


def test_models_on_one_gpu_divide_what_the_others_leave() -> None:
    share = ServeConfig([0], share_gpu=True)
    models = {
        "a": ModelConfig(LLMConfig("a"), ServeConfig([0, 1], share_gpu=True)),
        "b": ModelConfig(LLMConfig("b", gpu_memory_utilization=0.32), share),
        "c": ModelConfig(LLMConfig("c"), ServeConfig([0], servers_per_gpu=2)),
    }
    parts = {
        (it.name, it.gpu_ids): it.llm.engine_kwargs.get("gpu_memory_utilization")
        for it in Plan.of(Config(models=models), engine=Sized()).programs()
    }
    assert parts == {
        ("a-0", (0,)): pytest.approx(0.255), ("a-1", (1,)): None, ("b-0", (0,)): 0.32,
        ("c-0", (0,)): pytest.approx(0.1275), ("c-1", (0,)): pytest.approx(0.1275),
    }  # fmt: skip


# ------------------------------------------------------------------------------------------------------------- changes


def test_a_gpu_has_all_of_its_servers_or_none() -> None:
    deployment = Deployment(plan({}, gpu_ids=[0, 1], servers_per_gpu=2), None)
    for wrong in (0, 3, 6):
        with pytest.raises(
            ConfigError, match=f"expected a multiple of 2, which is servers_per_gpu, up to 4, got {wrong}"
        ):
            deployment.scale(wrong)


def test_a_new_server_needs_the_place_of_one_that_shares_its_gpu() -> None:
    old, new = plan({}, gpu_ids=[0, 1], servers_per_gpu=2), plan({}, gpu_ids=[0, 1], servers_per_gpu=3)
    first, *_, last = old.programs()
    assert new.models[ONLY].competes(first, (0,)), "they would not find enough memory"
    assert not new.models[ONLY].competes(last, (0,))


def test_scaling_keeps_the_number_of_servers_on_each_gpu() -> None:
    serve = ServeConfig(gpu_ids=[0, 1], servers_per_gpu=2)
    with VLLMService(LLMConfig("m"), serve, engine=EchoEngine()) as service:
        service.scale(2)
        assert [it.gpu_ids for it in service.status()] == [(0,), (0,)]
        service.scale(4)
        assert [it.gpu_ids for it in service.status()] == [(0,), (0,), (1,), (1,)]
        assert service.generate([str(it) for it in range(100)]) == [[str(it)] for it in range(100)]


def test_scaling_down_frees_a_whole_gpu_also_while_a_server_is_restarting() -> None:
    serve = ServeConfig(gpu_ids=[0, 1], servers_per_gpu=2)
    with VLLMService(LLMConfig("m"), serve, engine=EchoEngine(load_time=1.5)) as service:
        os.kill(server_pid(service.servers[0]), signal.SIGKILL)
        until(lambda: not service.status()[0].usable)
        service.scale(2)
        assert [it.gpu_ids for it in service.status()] == [(1,), (1,)]
        service.scale(4)
        assert sorted(it.gpu_ids or () for it in service.status()) == [(0,), (0,), (1,), (1,)]
