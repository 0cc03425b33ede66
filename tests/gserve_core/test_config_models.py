"""A config with several models: what fits beside each other, and where an error is."""

from pathlib import Path

import pytest

from gserve import ConfigError, GatewayConfig, LLMConfig, ModelConfig, ServeConfig, VLLMService
from gserve_core.config import Config, check_places, gpu_memory, load
from gserve_core.engines.echo import EchoEngine
from gserve_core.service.plan import Source

TWO = """models:
  writer:
    llm: {model_name: w}
    serve: {SERVE_W}
  judge:
    llm: {model_name: j}
    serve: {SERVE_J}
REST
"""


def write(folder: Path, writer: str = "servers: 2", judge: str = "servers: 1", rest: str = "") -> Path:
    path = folder / "c.yaml"
    path.write_text(TWO.replace("SERVE_W", writer).replace("SERVE_J", judge).replace("REST", rest))
    return path


def refused(path: Path) -> str:
    with pytest.raises(ConfigError) as caught:
        Source(path).read()
    return str(caught.value).replace(str(path), "c.yaml")


def test_each_model_has_its_own_sections_and_the_launcher_and_the_engine_of_the_service(tmp_path: Path) -> None:
    path = write(tmp_path, rest="engine: {type: echo}\nlauncher: {type: subprocess, nice: 3}\n")
    config, _ = load(path)
    assert config.llm is None
    assert list(config.pools) == ["writer", "judge"]
    writer = config.pools["writer"]
    assert (writer.llm.model_name, writer.serve.servers, writer.engine) == ("w", 2, {"type": "echo"})
    path.write_text(path.read_text().replace("{model_name: j}", "{model_name: j}\n    engine: {type: vllm}"))
    assert load(path)[0].pools["judge"].engine == {"type": "vllm"}
    assert load(path)[0].pools["judge"].launcher == {"type": "subprocess", "nice": 3}


def test_a_shared_section_serve_holds_what_a_model_leaves_out(tmp_path: Path) -> None:
    path = write(tmp_path, judge="startup_timeout: 5", rest="serve: {startup_timeout: 9, verbose: true}")
    pools = load(path)[0].pools
    assert [(it.serve.startup_timeout, it.serve.verbose) for it in pools.values()] == [(9.0, True), (5.0, True)]
    assert "did you mean 'port'? - at $.serve.prot" in refused(write(tmp_path, rest="serve: {prot: 1}"))


@pytest.mark.parametrize(
    ("writer", "judge", "rest", "expected"),
    [
        ("gpu_ids: [0, 1]", "gpu_ids: [1]", "", "c.yaml:7: GPU 1 is that of 'writer' and 'judge'"),
        ("port: 8000, servers: 2", "port: 8001", "", "c.yaml:7: port 8001 of judge-0 is that of writer-1 too"),
        ("port: 8000, servers: 2", "", "gateway: {port: 8001}", "port 8001 is that of writer-1 too (models.writer"),
        ("", "min_ready: 2", "", "c.yaml:7: expected min_ready from 0 to 1"),
        ("", "prot: 1", "", "c.yaml:7: unknown key 'prot'; did you mean 'port'? - at $.models.judge.serve"),
        ("", "", "llm: {model_name: m}", "'llm' and 'models' are both given"),
        ("", "", "gpu_ids: [0]", "did you mean 'serve.gpu_ids'?"),
    ],
)  # fmt: skip
def test_models_that_do_not_fit_are_refused_with_their_place(
    tmp_path: Path, writer: str, judge: str, rest: str, expected: str
) -> None:
    assert expected in refused(write(tmp_path, writer, judge, rest))


@pytest.mark.parametrize(("first", "fits"), [(0.5, True), (0.7, False)])
def test_the_memory_of_a_shared_gpu_is_divided(first: float, fits: bool) -> None:
    serve = ServeConfig([0], share_gpu=True)
    models = {
        name: ModelConfig(LLMConfig(name, gpu_memory_utilization=part), serve)
        for name, part in (("writer", first), ("judge", 0.4))
    }
    if fits:
        assert check_places(Config(models=models)) == {"writer": [(0,)], "judge": [(0,)]}
    else:
        with pytest.raises(ConfigError, match=r"would take 1.1 of the memory of GPU 0.*models.judge.llm.gpu_mem"):
            check_places(Config(models=models))


def test_models_that_set_no_memory_divide_what_the_others_leave() -> None:
    share = ServeConfig([0], share_gpu=True)
    models = {
        "a": ModelConfig(LLMConfig("a"), share),
        "b": ModelConfig(LLMConfig("b", gpu_memory_utilization=0.32), share),
        "c": ModelConfig(LLMConfig("c"), ServeConfig([1, 0], servers_per_gpu=2)),
    }
    config = Config(models=models)
    assert gpu_memory(config, check_places(config)) == {
        "a": {(0,): pytest.approx(0.255)},
        "b": {(0,): 0.32},
        "c": {(1,): 0.445, (0,): pytest.approx(0.1275)},
    }
    full = Config(models=models | {"b": ModelConfig(LLMConfig("b", gpu_memory_utilization=0.9), share)})
    with pytest.raises(ConfigError) as refused:
        check_places(full)
    assert str(refused.value) == (
        "GPU 0 is that of 'a' and 'b' and 'c', and those with a gpu_memory_utilization take 0.9 of its memory. That"
        " leaves too little for 'a' and 'c': lower it, or set it for all - at $.models.c.llm"
    )


def test_the_servers_of_one_model_on_a_gpu_divide_its_memory() -> None:
    for serve, expected in (
        (ServeConfig([0, 0, 1], share_gpu=True), {(0,): 0.445}),
        (ServeConfig(servers=2, share_gpu=True), {None: 0.445}),
        (ServeConfig(servers=62, share_gpu=True), {None: 0.01}),
        (ServeConfig(servers=2), {}),
        (ServeConfig([0], share_gpu=True), {}),
    ):
        config = Config(LLMConfig("m"), serve)
        assert gpu_memory(config, check_places(config)) == {"m": pytest.approx(expected)}
    with pytest.raises(ConfigError, match=r"would take 1.2 of the memory of GPU 0: .* - at \$.llm.gpu_memory_util"):
        check_places(Config(LLMConfig("m", gpu_memory_utilization=0.6), ServeConfig([0, 0], share_gpu=True)))


def test_a_wrong_name_or_kind_of_a_model_is_refused() -> None:
    with pytest.raises(ConfigError, match="expected a name of at most 64 letters"):
        VLLMService(models={"a b": ModelConfig(LLMConfig("m"))})
    with pytest.raises(ConfigError, match=r"write gserve.ModelConfig\(…\) - at \$.models.a"):
        VLLMService(models={"a": LLMConfig("m")})  # type: ignore[dict-item]
    with pytest.raises(ConfigError, match="missing key 'llm', or 'models' for several"):
        VLLMService()


def test_errors_of_parts_name_the_model_if_the_section_is_its_own(tmp_path: Path) -> None:
    own = write(tmp_path)
    own.write_text(own.read_text().replace("  judge:\n", "  judge:\n    engine: {type: nothing}\n"))
    with pytest.raises(ConfigError, match=r"c.yaml:6: unknown engine 'nothing'.*at \$.models.judge.engine.type"):
        VLLMService.from_yaml(own)
    with pytest.raises(ConfigError, match=r"c.yaml:8: unknown engine 'nothing'.*at \$.engine.type"):
        VLLMService.from_yaml(write(tmp_path, rest="engine: {type: nothing}"))


def test_servers_are_named_by_their_models_and_divide_the_cores() -> None:
    models = {"writer": ModelConfig(LLMConfig("w"), ServeConfig(servers=2)), "judge": ModelConfig(LLMConfig("j"))}
    service = VLLMService(models=models, engine=EchoEngine(), gateway=GatewayConfig())
    assert [(job.name, job.index, job.servers) for job, _ in service.jobs()] == [
        ("writer-0", 0, 3), ("writer-1", 1, 3), ("judge-0", 2, 3)
    ]  # fmt: skip
    assert service.models == ["writer", "judge"]
    assert len({id(server.program.nursery) for server in service.servers}) == 1, "they share a nursery"
    assert VLLMService(LLMConfig("m"), engine=EchoEngine()).servers[0].name == "server-0"


def test_models_without_a_model_are_refused(tmp_path: Path) -> None:
    (tmp_path / "c.yaml").write_text("models: {}\n")
    with pytest.raises(ConfigError, match=r"c\.yaml:1: expected at least one model under 'models'"):
        load(tmp_path / "c.yaml")
