"""Configs from Python and from YAML: what they are, and what is said of a wrong one."""

import copy
import dataclasses
import inspect
import pickle
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import msgspec
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from gserve import ConfigError, GatewayConfig, LLMConfig, ServeConfig, VLLMServer, VLLMService
from gserve_core.config import Config, build, check_placement, check_places, load

LLM = "llm:\n  model_name: m\n"


def defaults(cls: Any) -> dict[str, Any]:
    return {
        item.name: item.default_factory() if item.default_factory is not dataclasses.MISSING else item.default
        for item in dataclasses.fields(cls)
    }


def message(call: Callable[[], object]) -> str:
    with pytest.raises(ConfigError) as caught:
        call()
    return str(caught.value)


# ---------------------------------------------------------------------------------------------------------- from Python


def test_llm_config_has_the_fields_order_and_defaults_of_the_seed() -> None:
    assert list(defaults(LLMConfig).items())[:15] == [
        ("model_name", dataclasses.MISSING),
        ("tokenizer", None),
        ("tokenizer_mode", "auto"),
        ("trust_remote_code", False),
        ("dtype", "bfloat16"),
        ("quantization", None),
        ("revision", None),
        ("tokenizer_revision", None),
        ("seed", 0),
        ("gpu_memory_utilization", None),
        ("enforce_eager", False),
        ("max_model_len", None),
        ("download_dir", None),
        ("lora_path", None),
        ("llm_kwargs", {}),
    ]


@pytest.mark.parametrize(
    ("call", "expected"),
    [
        (lambda: LLMConfig(model_name="m", max_modellen=4),  # type: ignore[call-arg]
         "LLMConfig: unknown argument 'max_modellen'; did you mean 'max_model_len'?"),
        (lambda: LLMConfig("m", None, "auto", *[None] * 20),  # type: ignore[arg-type]
         "LLMConfig: expected at most 17 arguments, got 23; name them: model_name=…"),
        (lambda: LLMConfig("m", model_name="m"),  # type: ignore[misc]
         "LLMConfig: the argument 'model_name' is given twice, once by position and once by name"),
        (lambda: LLMConfig(), "LLMConfig: missing argument 'model_name'"),  # type: ignore[call-arg]
        (lambda: LLMConfig(seed=1), "LLMConfig: missing argument 'model_name'"),  # type: ignore[call-arg]
        (lambda: dataclasses.replace(LLMConfig("m"), sead=1),  # type: ignore[call-arg]
         "LLMConfig: unknown argument 'sead'; did you mean 'seed'?"),
        (lambda: ServeConfig(gpus=[0]),  # type: ignore[call-arg]
         "ServeConfig: unknown argument 'gpus'; did you mean 'gpu_ids'?"),
        (lambda: ServeConfig([0], gpu_ids=[0]),  # type: ignore[misc]
         "ServeConfig: the argument 'gpu_ids' is given twice, once by position and once by name"),
    ],
)  # fmt: skip
def test_a_call_with_wrong_arguments_is_a_config_error(call: Callable[[], object], expected: str) -> None:
    assert message(call) == expected


def test_an_argument_of_vllm_that_has_no_field_is_told_where_it_belongs() -> None:
    told = "; other arguments of vllm.LLM go into llm_kwargs, the fields are adapters, download_dir, dtype, "
    assert told in message(lambda: LLMConfig("m", swap_space=2))  # type: ignore[call-arg]
    assert told in message(lambda: build(LLMConfig, {"model_name": "m", "swap_space": 2}))


def test_configs_are_plain_values() -> None:
    for one in (LLMConfig("m", seed=3, llm_kwargs={"a": [1]}), ServeConfig([0, 1], port=8000)):
        cls: Any = type(one)
        assert pickle.loads(pickle.dumps(one)) == one == copy.deepcopy(one) == dataclasses.replace(one)
        assert cls(**dataclasses.asdict(one)) == one
        assert msgspec.json.decode(msgspec.json.encode(one), type=cls) == one
        assert str(inspect.signature(cls)).startswith(f"({dataclasses.fields(cls)[0].name}: ")
        with pytest.raises(dataclasses.FrozenInstanceError):
            one.seed = 4  # type: ignore[misc, union-attr]
    assert dataclasses.replace(LLMConfig("m"), seed=3) == LLMConfig("m", seed=3) != LLMConfig("m")


@pytest.mark.parametrize(
    ("options", "expected"),
    [
        ({"dtype": "float17"}, "unknown dtype 'float17'; expected one of auto, bfloat16, float16, float32, float, half"
         " - at $.dtype"),
        ({"llm_kwargs": {"dtype": 16}}, "unknown dtype 16; expected one of auto, bfloat16, float16, float32, float,"
         " half - at $.llm_kwargs.dtype"),
        ({"model_name": "a\nb"}, "'a\\nb' contains a line break or a control character - at $.model_name"),
        ({"model_name": "a\x1b[31mb"}, "'a\\x1b[31mb' contains a line break or a control character - at $.model_name"),
        ({"lora_path": "/a\tb"}, "'/a\\tb' contains a line break or a control character - at $.lora_path"),
    ],
)  # fmt: skip
def test_a_model_that_cannot_be_is_refused(options: dict[str, Any], expected: str) -> None:
    assert message(lambda: LLMConfig(**{"model_name": "m"} | options)) == expected


@pytest.mark.parametrize("dtype", ["auto", "half", "float16", "bfloat16", "float", "float32"])
def test_each_dtype_of_vllm_is_taken(dtype: str) -> None:
    assert LLMConfig("m", dtype=dtype, llm_kwargs={"dtype": None}).dtype == dtype


@pytest.mark.parametrize(
    ("host", "expected"),
    [
        ("http://127.0.0.1", "write it without a scheme and a path, as in 127.0.0.1"),
        ("[::1]", "write an IPv6 address without brackets, as in ::1"),
        ("node1:8000", "write the port as 'port'"),
        ("my host", "expected an IP address or the name of a machine"),
        ("0.0.0.0\n", "expected an IP address or the name of a machine"),
        ("-x", "expected an IP address or the name of a machine"),
        ("a..b", "expected an IP address or the name of a machine"),
        ("::1::", "expected an IP address or the name of a machine"),
        ("a" * 64, "expected an IP address or the name of a machine"),
        ("127.0.0.256", "it looks like an IP address, but is not a valid one"),
    ],
)
def test_a_host_that_is_none_is_refused(host: str, expected: str) -> None:
    assert message(lambda: ServeConfig(host=host)) == f"'{host}' is not a host: {expected} - at $.host"


@pytest.mark.parametrize(
    "host",
    ["0.0.0.0", "::", "fe80::1%eth0", "localhost", "node-1", "gpu_node3.cluster.local", "node1.", "127.1", "rechner-ü"],
)
def test_addresses_and_names_of_machines_are_hosts(host: str) -> None:
    assert ServeConfig(host=host).host == host


def test_serve_config_has_the_fields_order_and_defaults_of_the_seed_and_then_servers() -> None:
    assert list(defaults(ServeConfig).items()) == [
        ("gpu_ids", None),  # the seed demands them; without a GPU there are none
        ("host", "127.0.0.1"),
        ("port", None),
        ("startup_timeout", 180.0),
        ("client_timeout", 30.0),
        ("verbose", False),
        ("servers", None),
        ("stall_timeout", 60.0),
        ("max_restarts", 10),
        ("min_ready", None),
        ("share_gpu", False),
        ("env", {}),
        ("nodes_per_server", 1),
        ("adapters_root", None),
        ("weights_root", None),
        ("prefix_affinity", True),
        ("servers_per_gpu", 1),
        ("weight_protocol", None),
        ("gpu_sharing", None),
    ]


@pytest.mark.parametrize("name", ["GSERVE_TOKEN", "GSERVE_ID", "GSERVE_OWNER", "GSERVE_SERVER", "GSERVE_ATTACH"])
def test_a_variable_of_gserve_s_own_cannot_be_set_for_servers(name: str) -> None:
    with pytest.raises(ConfigError, match=f"{name} cannot be set for servers: .*; remove it - at"):
        ServeConfig(env={name: "x"})
    assert ServeConfig(env={"GSERVE_LOG_LEVEL": "DEBUG", "GSERVE_MINE": "x"}).env


def test_configs_may_be_made_by_position() -> None:
    llm = LLMConfig("m", "t", "slow", True, "float16", "awq", "r", "tr", 1, 0.5, True, 10, "/d", "/l", {"a": 1})
    assert dataclasses.astuple(llm)[:15] == (
        "m", "t", "slow", True, "float16", "awq", "r", "tr", 1, 0.5, True, 10, "/d", "/l", {"a": 1},
    )  # fmt: skip
    serve = ServeConfig([0, 1], "0.0.0.0", 8000, 1.0, 2.0, True)
    assert dataclasses.astuple(serve)[:7] == ([0, 1], "0.0.0.0", 8000, 1.0, 2.0, True, None)


@pytest.mark.parametrize(("config", "name"), [(LLMConfig("m"), "seed"), (ServeConfig(), "port")])
def test_configs_cannot_be_changed(config: Any, name: str) -> None:
    with pytest.raises(dataclasses.FrozenInstanceError):
        setattr(config, name, 1)


def test_whole_numbers_and_tuples_are_read_as_what_they_mean() -> None:
    assert ServeConfig((0, 1)).gpu_ids == [0, 1]  # type: ignore[arg-type]
    assert ServeConfig([0], startup_timeout=300).startup_timeout == 300.0
    assert ServeConfig([0], startup_timeout=None, client_timeout=None).client_timeout is None
    assert LLMConfig("m", gpu_memory_utilization=1).gpu_memory_utilization == 1.0


def cyclic() -> dict[str, Any]:
    made: dict[str, Any] = {}
    made["a"] = made
    return made


@pytest.mark.parametrize(
    ("make", "expected"),
    [
        (lambda: LLMConfig(3), "expected str, got int - at $.model_name"),  # type: ignore[arg-type]
        (lambda: LLMConfig(Path("m")), "expected str, got PosixPath - at $.model_name"),  # type: ignore[arg-type]
        (lambda: LLMConfig("m", seed=True), "expected int, got bool - at $.seed"),
        (lambda: LLMConfig("m", seed="0"), "expected int, got str - at $.seed"),  # type: ignore[arg-type]
        (lambda: LLMConfig("m", llm_kwargs=None), "expected mapping, got null - at $.llm_kwargs"),  # type: ignore[arg-type]
        (lambda: LLMConfig("m", llm_kwargs={1: 2}), "expected str, got int in a key - at $.llm_kwargs"),  # type: ignore[dict-item]
        (lambda: LLMConfig("m", llm_kwargs={"seed": "abc"}), "expected int | null, got str - at $.llm_kwargs.seed"),
        (lambda: LLMConfig("m", llm_kwargs={"seed": [1]}), "expected int | null, got list - at $.llm_kwargs.seed"),
        (lambda: LLMConfig("m", llm_kwargs={"a": {1: 2}}), "expected a text as key, got 1 - at $.llm_kwargs.a"),
        (
            lambda: LLMConfig("m", llm_kwargs={"a": [Path("x")]}),
            "expected a text, number, list or mapping, got PosixPath - at $.llm_kwargs.a[0]",
        ),
        (
            lambda: LLMConfig("m", llm_kwargs={"a": b"x"}),
            "expected a text, number, list or mapping, got bytes - at $.llm_kwargs.a",
        ),
        (
            lambda: LLMConfig("m", llm_kwargs={"a": float("nan")}),
            "expected a finite number, got nan - at $.llm_kwargs.a",
        ),
        (
            lambda: LLMConfig("m", llm_kwargs={"a": "\ud800"}),
            "expected JSON-serialisable values: 'utf-8' codec can't encode character '\\ud800' in position 0:"
            " surrogates not allowed - at $.llm_kwargs",
        ),
        (
            lambda: LLMConfig("m", llm_kwargs=cyclic()),
            "expected JSON-serialisable values: maximum recursion depth exceeded - at $.llm_kwargs",
        ),
        (lambda: ServeConfig(0), "expected list | null, got int - at $.gpu_ids"),  # type: ignore[arg-type]
        (lambda: ServeConfig("0,1"), "expected list | null, got str - at $.gpu_ids"),  # type: ignore[arg-type]
        (lambda: ServeConfig([True]), "expected int, got bool - at $.gpu_ids[0]"),
        (lambda: ServeConfig([0], port=8000.0), "expected int | null, got float - at $.port"),  # type: ignore[arg-type]
        (lambda: ServeConfig([0], host=None), "expected str, got null - at $.host"),  # type: ignore[arg-type]
        (lambda: ServeConfig(servers=1.5), "expected int | null, got float - at $.servers"),  # type: ignore[arg-type]
    ],
)
def test_a_wrong_value_from_python_is_named_with_its_field(make: Callable[[], object], expected: str) -> None:
    assert message(make) == expected


@pytest.mark.parametrize(
    ("options", "expected"),
    [
        ({"port": 0}, "expected a port from 1 to 65535, got 0 - at $.port"),
        ({"host": "http://me"}, "'http://me' is not a host: write it without a scheme"),
        ({"host": ""}, "'' is not a host: it is empty"),
        ({"allowed_hosts": ["ok", "a/b"]}, "'a/b' is not a host"),
        ({"api_key": "short"}, "the API key is not allowed: expected at least 16 characters, got 5 - at $.api_key"),
        ({"api_key": "with blanks in it, long"}, "without blanks"),
        ({"certfile": "a.pem"}, "certfile and keyfile belong together: set keyfile too - at $.keyfile"),
        ({"queue_timeout": 0}, "expected seconds above 0"),
        ({"key": ""}, "unknown argument 'key'; did you mean 'keys'?"),
    ],
)
def test_a_wrong_gateway_is_named_with_its_field(options: dict[str, Any], expected: str) -> None:
    told = message(lambda: GatewayConfig(**options))
    assert expected in told
    assert "with blanks in it" not in told, "a key is a secret"


def test_a_gateway_in_a_file_is_none_or_a_section(tmp_path: Path) -> None:
    file = tmp_path / "c.yaml"
    for text, gateway in (
        ("", None), ("gateway: null", None), ("gateway: {}", GatewayConfig()),
        ("gateway: {port: 8000, allowed_hosts: [llm.example]}", GatewayConfig(8000, allowed_hosts=["llm.example"])),
    ):  # fmt: skip
        file.write_text(LLM + text)
        assert load(file)[0].gateway == gateway
    file.write_text(LLM)
    assert load(file, ["gateway.port=8001"])[0].gateway == GatewayConfig(port=8001)
    file.write_text(LLM + "serve: {port: 8000, servers: 2}\ngateway: {port: 8001}\n")
    assert "port 8001 is that of server-1 too (serve.port: 8000)" in message(lambda: load(file))
    file.write_text(LLM + "gateway: {prot: 8000}\n")
    assert "did you mean 'port'?" in message(lambda: load(file))
    file.write_text(LLM + "gateway: 8000\n")
    assert "expected a mapping, got" in message(lambda: load(file))


def test_engine_kwargs_are_those_of_vllm_without_what_is_not_set() -> None:
    assert LLMConfig("m").engine_kwargs == {
        "model": "m",
        "tokenizer_mode": "auto",
        "trust_remote_code": False,
        "dtype": "bfloat16",
        "seed": 0,
        "enforce_eager": False,
    }
    llm = LLMConfig("m", "t", max_model_len=10, lora_path="/l", llm_kwargs={"dtype": "half", "enable_lora": True})
    assert llm.engine_kwargs["tokenizer"] == "t"
    assert llm.engine_kwargs["max_model_len"] == 10
    assert llm.engine_kwargs["dtype"] == "half", "llm_kwargs win over the fields"
    assert llm.engine_kwargs["enable_lora"] is True
    assert not {"lora_path", "llm_kwargs", "model_name"} & set(llm.engine_kwargs)
    assert "seed" not in LLMConfig("m", llm_kwargs={"seed": None}).engine_kwargs, "None unsets a field"


# ------------------------------------------------------------------------------------------------------------ placement


@pytest.mark.parametrize(
    ("serve", "gpus_per_server", "expected"),
    [
        (ServeConfig(), 1, [None]),
        (ServeConfig(servers=3), 1, [None, None, None]),
        (ServeConfig(servers=2), 4, [None, None]),
        (ServeConfig([0]), 1, [(0,)]),
        (ServeConfig([3, 1]), 1, [(3,), (1,)]),
        (ServeConfig([0, 1, 2, 3]), 2, [(0, 1), (2, 3)]),
        (ServeConfig([5, 0, 7, 2]), 4, [(5, 0, 7, 2)]),
        (ServeConfig([0, 1], port=65534), 1, [(0,), (1,)]),
    ],
)
def test_servers_get_their_gpus_in_order(serve: ServeConfig, gpus_per_server: int, expected: list[Any]) -> None:
    assert serve.placement(gpus_per_server) == expected


def test_a_server_takes_tensor_times_pipeline_gpus() -> None:
    llm = LLMConfig("m", llm_kwargs={"tensor_parallel_size": 2, "pipeline_parallel_size": 3})
    assert llm.gpus_per_server == 6
    assert check_placement(llm, ServeConfig(range_of(12))) == [(0, 1, 2, 3, 4, 5), (6, 7, 8, 9, 10, 11)]


def test_servers_may_share_gpus_but_no_server_has_one_twice() -> None:
    alone, pairs = LLMConfig("m"), LLMConfig("m", llm_kwargs={"tensor_parallel_size": 2})
    assert check_placement(alone, ServeConfig([0, 0, 1], share_gpu=True)) == [(0,), (0,), (1,)]
    assert check_placement(pairs, ServeConfig([0, 1, 0, 1], share_gpu=True)) == [(0, 1), (0, 1)]
    with pytest.raises(ConfigError) as refused:
        check_placement(pairs, ServeConfig([0, 0, 1, 1], share_gpu=True))
    assert str(refused.value) == "a server would get the same GPU twice: [0, 0] - at $.serve.gpu_ids"


def test_each_group_of_gpus_has_servers_per_gpu_servers() -> None:
    alone, pairs = LLMConfig("m"), LLMConfig("m", llm_kwargs={"tensor_parallel_size": 2})
    assert check_placement(alone, ServeConfig([3, 1], servers_per_gpu=2, min_ready=4)) == [(3,), (3,), (1,), (1,)]
    assert check_placement(pairs, ServeConfig([0, 1], servers_per_gpu=3)) == [(0, 1)] * 3
    assert check_placement(alone, ServeConfig(servers_per_gpu=2)) == [None, None]
    assert ServeConfig([0], servers_per_gpu=2).shares_gpus
    assert not ServeConfig([0]).shares_gpus


def test_auto_is_a_number_of_servers_that_is_not_known_yet(tmp_path: Path) -> None:
    (tmp_path / "c.yaml").write_text(LLM + "serve: {gpu_ids: [0], servers_per_gpu: auto, min_ready: 2}")
    serve = load(tmp_path / "c.yaml")[0].serve
    assert (serve.servers_per_gpu, serve.shares_gpus) == ("auto", False)
    assert ServeConfig(servers=2, servers_per_gpu="auto").servers == 2, "without a GPU, it has no effect"


def range_of(count: int) -> list[int]:
    return list(range(count))


@pytest.mark.parametrize(
    ("llm_kwargs", "serve", "expected"),
    [
        (
            {"tensor_parallel_size": 2},
            ServeConfig([0, 1, 2]),
            "3 GPUs cannot be divided into servers of 2 (tensor_parallel_size times pipeline_parallel_size):"
            " add or remove ids - at $.serve.gpu_ids",
        ),
        ({"tensor_parallel_size": 0}, ServeConfig([0]), "expected a number of GPUs, got 0"),
        ({"pipeline_parallel_size": "2"}, ServeConfig([0]), "expected a number of GPUs, got '2'"),
        (
            {},
            ServeConfig([0, 1], port=65535),
            "2 servers from port 65535 would need ports above 65535 - at $.serve.port",
        ),
        (
            {},
            ServeConfig(servers=3, port=65534),
            "3 servers from port 65534 would need ports above 65535 - at $.serve.port",
        ),
    ],
)
def test_a_placement_that_cannot_be_is_an_error(llm_kwargs: dict[str, Any], serve: ServeConfig, expected: str) -> None:
    place = "".join(f" - at $.llm.llm_kwargs.{name}" for name in llm_kwargs if "$" not in expected)
    assert message(lambda: check_placement(LLMConfig("m", llm_kwargs=llm_kwargs), serve)) == expected + place


# ----------------------------------------------------------------------------------------------------------- right YAML


def test_a_yaml_file_says_the_same_as_python(tmp_path: Path) -> None:
    file = tmp_path / "c.yaml"
    file.write_text("""
llm:
  model_name: some/model
  max_model_len: 4096
  gpu_memory_utilization: 0.5
  llm_kwargs: {tensor_parallel_size: 2, hf_overrides: {a: [1, null, x]}}
serve: {gpu_ids: [0, 1], port: 8000, startup_timeout: 300, client_timeout: null}
launcher: {type: slurm, partition: gpu}
transport: {type: http, max_body_mib: 1}
engine: {type: echo}
plugins: [a.b]
""")
    config, document = load(file)
    assert config == Config(
        LLMConfig(
            "some/model",
            max_model_len=4096,
            gpu_memory_utilization=0.5,
            llm_kwargs={"tensor_parallel_size": 2, "hf_overrides": {"a": [1, None, "x"]}},
        ),
        ServeConfig([0, 1], port=8000, startup_timeout=300.0, client_timeout=None),
        {"type": "slurm", "partition": "gpu"},
        {"type": "http", "max_body_mib": 1},
        {"type": "echo"},
        ["a.b"],
    )
    assert document.file == file


def test_only_the_model_has_to_be_said(tmp_path: Path) -> None:
    (tmp_path / "c.yaml").write_text(LLM)
    assert load(tmp_path / "c.yaml")[0] == Config(LLMConfig("m"))


def llm_of(folder: Path) -> LLMConfig:
    llm = load(folder / "c.yaml")[0].llm
    assert llm is not None
    return llm


def test_the_gpus_of_a_server_are_divided_evenly_over_its_nodes() -> None:
    with pytest.raises(
        ConfigError, match=r"the 3 GPUs of a server \(.*\) cannot be divided evenly over 2 nodes"
    ) as told:
        check_placement(LLMConfig("m", llm_kwargs={"tensor_parallel_size": 3}), ServeConfig(nodes_per_server=2))
    assert told.value.at == "$.serve.nodes_per_server"


@pytest.mark.parametrize("options", [{"gpu_ids": [0, 1]}, {"share_gpu": True}, {"servers_per_gpu": 2}], ids=str)
def test_options_for_one_node_do_not_go_with_several(options: dict[str, Any]) -> None:
    with pytest.raises(ConfigError, match=r"is for servers on one node: remove it, or nodes_per_server") as raised:
        ServeConfig(**options, nodes_per_server=2)
    assert raised.value.at == f"$.{next(iter(options))}"


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("12:30:00", "12:30:00"),
        ("02:00:00", "02:00:00"),
        ("2026-01-01", "2026-01-01"),
        ("on", "on"),
        ("no", "no"),
        ("yes", "yes"),
        ("y", "y"),
        ("=", "="),
        ("1_000", "1_000"),
        ("0123", "0123"),
        ("True", True),
        ("false", False),
        ("~", None),
        ("null", None),
        ("", None),
        ("1e-3", 0.001),
        ("1E3", 1000.0),
        (".5", 0.5),
        ("1.", 1.0),
        ("-1", -1),
        ("0o17", 15),
        ("0x1F", 31),
        ("'8000'", "8000"),
        ("!!str 8000", "8000"),
        ("|\n      a\n      b", "a\nb\n"),
        ("&x [1, 2]", [1, 2]),
    ],
)
def test_plain_values_are_read_as_yaml_1_2(tmp_path: Path, text: str, expected: object) -> None:
    (tmp_path / "c.yaml").write_text(f"{LLM}  llm_kwargs:\n    value: {text}\n")
    value = llm_of(tmp_path).llm_kwargs["value"]
    assert (value, type(value)) == (expected, type(expected))


def test_aliases_repeat_what_they_stand_for(tmp_path: Path) -> None:
    (tmp_path / "c.yaml").write_text("llm:\n  model_name: &name m\n  llm_kwargs: {a: *name}\n")
    assert llm_of(tmp_path).llm_kwargs == {"a": "m"}


# ----------------------------------------------------------------------------------------------------------- wrong YAML

TOP = "engine, gateway, launcher, llm, models, plugins, serve, transport"
ONLY = "expected texts, numbers, lists and mappings"
WRONG: dict[str, tuple[str | bytes, str]] = {
    # what is wrong: (the file, the message after its name)
    "unknown key": (LLM + "serv: {}\n", ":3: unknown key 'serv'; did you mean 'serve'? - at $.serv"),
    "unknown key like no other": (LLM + "zzz: {}\n", f":3: unknown key 'zzz'; expected one of {TOP} - at $.zzz"),
    "unknown key below": (
        LLM + "serve:\n  prot: 80\n",
        ":4: unknown key 'prot'; did you mean 'port'? - at $.serve.prot",
    ),
    "unknown key in llm": (
        LLM + "  max_len: 80\n",
        ":3: unknown key 'max_len'; did you mean 'max_model_len'? - at $.llm.max_len",
    ),
    "wrong type": (LLM + "serve:\n  port: eight\n", ":4: expected int | null, got str - at $.serve.port"),
    "quoted number": (LLM + "serve:\n  port: '8000'\n", ":4: expected int | null, got str - at $.serve.port"),
    "truth for a number": (LLM + "serve:\n  port: true\n", ":4: expected int | null, got bool - at $.serve.port"),
    "text for a truth": (LLM + "serve:\n  verbose: yes\n", ":4: expected bool, got str - at $.serve.verbose"),
    "wrong type in a list": (
        LLM + "serve:\n  gpu_ids:\n  - 0\n  - a\n",
        ":6: expected int, got str - at $.serve.gpu_ids[1]",
    ),
    "number for a list": (LLM + "serve: {gpu_ids: 0}\n", ":3: expected list | null, got int - at $.serve.gpu_ids"),
    "text for a list": (LLM + "plugins: a\n", ":3: expected list, got str - at $.plugins"),
    "text for a mapping": (LLM + "launcher: slurm\n", ":3: expected mapping, got str - at $.launcher"),
    "duplicate key": (
        LLM + "serve:\n  port: 1\n  port: 2\n",
        ":5: duplicate key 'port', first set in line 4 - at $.serve.port",
    ),
    "duplicate section": (LLM + "llm: {}\n", ":3: duplicate key 'llm', first set in line 1 - at $.llm"),
    "null section": (LLM + "serve:\n", ":3: expected a mapping, got null - at $.serve"),
    "null model": ("llm:\n  model_name:\n", ":2: expected str, got null - at $.llm.model_name"),
    "null host": (LLM + "serve:\n  host: ~\n", ":4: expected str, got null - at $.serve.host"),
    "no llm": ("serve: {}\n", ":1: missing key 'llm', or 'models' for several models"),
    "no model_name": ("\nllm: {dtype: float16}\n", ":2: missing key 'model_name' - at $.llm"),
    "empty model_name": (
        "llm: {model_name: ' '}\n",
        ":1: model_name is empty: expected a model id or a folder - at $.llm.model_name",
    ),
    "an option as model_name": (
        "llm: {model_name: --lease}\n",
        ":1: '--lease' looks like an option: write a folder as ./--lease - at $.llm.model_name",
    ),
    "a list": ("- a\n", ":1: expected a mapping, got list"),
    "a text": ("hello\n", ":1: expected a mapping, got str"),
    "null": ("null\n", ":1: expected a mapping, got null"),
    "empty": ("", ": the config is empty: expected a mapping with the key 'llm'"),
    "only a comment": ("# nothing\n", ": the config is empty: expected a mapping with the key 'llm'"),
    "two documents": (
        LLM + "---\n" + LLM,
        ":3: not YAML: expected a single document in the stream, but found another document",
    ),
    "not UTF-8": (b"llm: {model_name: \xff}\n", ": expected UTF-8 text: invalid start byte at byte 18"),
    "a control character": (LLM + "serve: \x01\n", ":3: not YAML: the character '\\x01' is not allowed"),
    "an open bracket": (LLM + "serve: [1\nx", ":4: not YAML: expected ',' or ']', but got '<stream end>'"),
    "a tab": (LLM + "serve:\n\tport: 1\n", ":4: not YAML: found character '\\t' that cannot start any token"),
    "two colons": (LLM + "serve: a: b\n", ":3: not YAML: mapping values are not allowed here"),
    "an undefined alias": (LLM + "serve: *x\n", ":3: not YAML: found undefined alias 'x'"),
    "too deep": ("llm: " + "[" * 5000, ": not YAML: maximum recursion depth exceeded"),
    "a python tag": (
        "llm: !!python/object/apply:os.system ['touch owned']\n",
        f":1: unknown tag '!!python/object/apply:os.system': {ONLY} - at $.llm",
    ),
    "a python name": (
        "llm:\n  model_name: !!python/name:os.system\n",
        f":2: unknown tag '!!python/name:os.system': {ONLY} - at $.llm.model_name",
    ),
    "a binary": (LLM + "engine: {a: !!binary aGk=}\n", f":3: unknown tag '!!binary': {ONLY} - at $.engine.a"),
    "a tag of one's own": (LLM + "engine: {a: !x y}\n", f":3: unknown tag '!x': {ONLY} - at $.engine.a"),
    "a wrong number": (LLM + "engine: {a: !!int x}\n", ": not YAML: invalid literal for int() with base 10: 'x'"),
    "an alias in itself": (
        LLM + "  llm_kwargs: &a {a: *a}\n",
        ":3: the aliases of this YAML expand to too many values",
    ),
    "larger than 1 MiB": (LLM + "#" * (1 << 20), ": the config is larger than 1 MiB"),
    "a merge key": (
        LLM + "serve:\n  <<: {port: 1}\n",
        ":4: merge keys (<<) are not supported: write the keys out - at $.serve",
    ),
    "a number as key": (LLM + "1: 2\n", ":3: expected a text as key, got '1'"),
    "a truth as key": (LLM + "serve: {true: 2}\n", ":3: expected a text as key, got 'true' - at $.serve"),
    "a list as key": (LLM + "[1, 2]: 2\n", ":3: expected a text as key, got a sequence"),
    "a key with a line end": (
        LLM + 'serve: {"a\\nb": 1}\n',
        ":3: unknown key 'a\\nb'; expected one of adapters_root, client_timeout, env, gpu_ids, gpu_sharing, host,"
        " max_restarts, min_ready, nodes_per_server, port, prefix_affinity, servers, servers_per_gpu, share_gpu,"
        " stall_timeout, startup_timeout, verbose, weight_protocol, weights_root"
        " - at $.serve.a\nb",
    ),
    "gpu_ids and servers": (
        LLM + "serve:\n  gpu_ids: [0]\n  servers: 2\n",
        ":5: gpu_ids and servers are both set: remove servers, since the ids set the number - at $.serve.servers",
    ),
    "servers and servers_per_gpu": (
        LLM + "serve:\n  servers: 2\n  servers_per_gpu: 2\n",
        ":4: servers and servers_per_gpu are both set: remove servers, and name the GPUs in gpu_ids"
        " - at $.serve.servers",
    ),
    "repeated ids and servers_per_gpu": (
        LLM + "serve: {gpu_ids: [0, 0], servers_per_gpu: auto}\n",
        ":3: expected different GPU ids, got [0, 0]: servers_per_gpu sets the number of servers on each of them"
        " - at $.serve.gpu_ids",
    ),
    "no server on a GPU": (
        LLM + "serve: {servers_per_gpu: 0}\n",
        ":3: expected 1 to 16 servers on each GPU, or auto, got 0 - at $.serve.servers_per_gpu",
    ),
    "a word that is not auto": (
        LLM + "serve: {servers_per_gpu: many}\n",
        ":3: expected 1 to 16 servers on each GPU, or auto, got 'many' - at $.serve.servers_per_gpu",
    ),
    "no GPU ids": (
        LLM + "serve: {gpu_ids: []}\n",
        ":3: expected GPU ids from 0 up, got [] - at $.serve.gpu_ids",
    ),
    "a GPU twice": (
        LLM + "serve: {gpu_ids: [1, 1]}\n",
        ":3: expected different GPU ids, got [1, 1]: several servers on a GPU need share_gpu: true"
        " - at $.serve.gpu_ids",
    ),
    "a negative GPU": (
        LLM + "serve: {gpu_ids: [-1]}\n",
        ":3: expected GPU ids from 0 up, got [-1] - at $.serve.gpu_ids",
    ),
    "no servers": (LLM + "serve: {servers: 0}\n", ":3: expected 1 to 65535 servers, got 0 - at $.serve.servers"),
    "too many servers": (
        LLM + "serve: {servers: 1000000000000}\n",
        ":3: expected 1 to 65535 servers, got 1000000000000 - at $.serve.servers",
    ),
    "port 0": (LLM + "serve: {port: 0}\n", ":3: expected a port from 1 to 65535, got 0 - at $.serve.port"),
    "port 65536": (LLM + "serve: {port: 65536}\n", ":3: expected a port from 1 to 65535, got 65536 - at $.serve.port"),
    "ports past the end": (
        LLM + "serve:\n  servers: 2\n  port: 65535\n",
        ":5: 2 servers from port 65535 would need ports above 65535 - at $.serve.port",
    ),
    "uneven split": (
        LLM + "  llm_kwargs: {tensor_parallel_size: 2}\nserve: {gpu_ids: [0]}\n",
        ":4: 1 GPUs cannot be divided into servers of 2 (tensor_parallel_size times pipeline_parallel_size):"
        " add or remove ids - at $.serve.gpu_ids",
    ),
    "a wrong size": (
        LLM + "  llm_kwargs:\n    tensor_parallel_size: two\n",
        ":4: expected a number of GPUs, got 'two' - at $.llm.llm_kwargs.tensor_parallel_size",
    ),
    "an empty host": (
        LLM + "serve: {host: ''}\n",
        ":3: host is empty: expected an address to listen on - at $.serve.host",
    ),
    "a negative timeout": (
        LLM + "serve: {startup_timeout: -1}\n",
        ":3: expected seconds above 0, at most 1e9, or null for no limit, got -1 - at $.serve.startup_timeout",
    ),
    "no time": (
        LLM + "serve: {client_timeout: 0}\n",
        ":3: expected seconds above 0, at most 1e9, or null for no limit, got 0 - at $.serve.client_timeout",
    ),
    "a timeout that is no number": (
        LLM + "serve: {client_timeout: .nan}\n",
        ":3: expected seconds above 0, at most 1e9, or null for no limit, got nan - at $.serve.client_timeout",
    ),
    "an endless timeout": (
        LLM + "serve: {client_timeout: .inf}\n",
        ":3: expected seconds above 0, at most 1e9, or null for no limit, got inf - at $.serve.client_timeout",
    ),
    "a fraction above 1": (
        LLM + "  gpu_memory_utilization: 90\n",
        ":3: expected a fraction above 0 and up to 1, got 90 - at $.llm.gpu_memory_utilization",
    ),
    "NaN for vLLM": (
        LLM + "  llm_kwargs:\n    a: {b: [1, .nan]}\n",
        ":4: expected a finite number, got nan - at $.llm.llm_kwargs.a.b[1]",
    ),
    "no tokens": (LLM + "  max_model_len: 0\n", ":3: expected a number of tokens, got 0 - at $.llm.max_model_len"),
    "model in llm_kwargs": (
        LLM + "  llm_kwargs: {model: x}\n",
        ":3: 'model' is not allowed here: set model_name - at $.llm.llm_kwargs",
    ),
}


@pytest.mark.parametrize("kind", WRONG)
def test_a_wrong_file_is_named_with_line_and_path(tmp_path: Path, kind: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    text, expected = WRONG[kind]
    Path("c.yaml").write_bytes(text if isinstance(text, bytes) else text.encode())
    assert message(lambda: load("c.yaml")) == "c.yaml" + expected
    assert list(tmp_path.iterdir()) == [tmp_path / "c.yaml"], "nothing in the file was run"


def test_a_file_that_cannot_be_read_says_why(tmp_path: Path) -> None:
    missing = tmp_path / "none.yaml"
    assert message(lambda: load(missing)) == f"{missing}: cannot read the config: No such file or directory"
    assert message(lambda: load(tmp_path)) == f"{tmp_path}: cannot read the config: Is a directory"


def test_an_alias_bomb_is_refused_within_a_second(tmp_path: Path) -> None:
    file = tmp_path / "bomb.yaml"
    lines = ["a0: &a0 [x, x, x, x, x, x, x, x, x, x]"]
    lines += [f"a{level}: &a{level} [{', '.join([f'*a{level - 1}'] * 10)}]" for level in range(1, 10)]
    file.write_text("\n".join(lines))
    began = time.process_time()
    assert message(lambda: load(file)).endswith("the aliases of this YAML expand to too many values")
    assert time.process_time() - began < 1


# ---------------------------------------------------------------------------------------------------------------- --set


@pytest.fixture
def file(tmp_path: Path) -> Path:
    (tmp_path / "c.yaml").write_text(LLM + "serve:\n  servers: 2\n  port: 8000\n")
    return tmp_path / "c.yaml"


@pytest.mark.parametrize(
    ("overrides", "expected"),
    [
        (["serve.port=9000"], Config(LLMConfig("m"), ServeConfig(servers=2, port=9000))),
        (["serve.port=null"], Config(LLMConfig("m"), ServeConfig(servers=2))),
        (["serve.port= 9000 "], Config(LLMConfig("m"), ServeConfig(servers=2, port=9000))),
        (["serve.port=1", "serve.port=2"], Config(LLMConfig("m"), ServeConfig(servers=2, port=2))),
        (["serve={gpu_ids: [0, 1]}"], Config(LLMConfig("m"), ServeConfig([0, 1]))),
        (["serve={}", "serve.verbose=true"], Config(LLMConfig("m"), ServeConfig(verbose=True))),
        (["llm={model_name: other}", "serve={}"], Config(LLMConfig("other"))),
        (["llm.quantization=on", "serve={}"], Config(LLMConfig("m", quantization="on"))),
        (
            ["llm.llm_kwargs.a.a=1e-3", "llm.llm_kwargs.a.b=x=y", "serve={}"],
            Config(LLMConfig("m", llm_kwargs={"a": {"a": 0.001, "b": "x=y"}})),
        ),
        (
            ["launcher.type=slurm", "launcher.time=02:00:00", "serve={}"],
            Config(LLMConfig("m"), launcher={"type": "slurm", "time": "02:00:00"}),
        ),
        (["plugins=[a, b]", "serve={}"], Config(LLMConfig("m"), plugins=["a", "b"])),
    ],
)
def test_set_overrides_the_file(file: Path, overrides: list[str], expected: Config) -> None:
    assert load(file, overrides)[0] == expected


def test_overrides_are_a_list(file: Path) -> None:
    with pytest.raises(ConfigError, match=r"a list of overrides as 'key\.key=value', got the text 'serve\.port=1'"):
        load(file, "serve.port=1")


@pytest.mark.parametrize(
    ("override", "expected"),
    [
        ("serve.port=x", "--set serve.port=x: expected int | null, got str - at $.serve.port"),
        ("serve={port: x}", "--set serve={port: x}: expected int | null, got str - at $.serve.port"),
        ("serve.port=0", "--set serve.port=0: expected a port from 1 to 65535, got 0 - at $.serve.port"),
        (
            "serve.port=65535",
            "--set serve.port=65535: 2 servers from port 65535 would need ports above 65535 - at $.serve.port",
        ),
        ("serve.prot=1", "--set serve.prot=1: unknown key 'prot'; did you mean 'port'? - at $.serve.prot"),
        ("port=1", "--set port=1: unknown key 'port'; did you mean 'serve.port'? - at $.port"),
        ("llm.adapters.x=5", "--set llm.adapters.x=5: expected str, got int - at $.llm.adapters.x"),
        ("seed=1", "--set seed=1: unknown key 'seed'; did you mean 'llm.seed'? - at $.seed"),
        ("serv.port=1", "--set serv.port=1: unknown key 'serv'; did you mean 'serve'? - at $.serv"),
        ("llm=1", "--set llm=1: expected a mapping, got int - at $.llm"),
        ("llm.model_name=", "--set llm.model_name=: expected str, got null - at $.llm.model_name"),
        ("llm.model_name.x=1", "--set llm.model_name.x=1: expected a mapping, got str - at $.llm.model_name"),
        ("llm.llm_kwargs={'a[b': .nan}", "--set llm.llm_kwargs={'a[b': .nan}: expected a finite number, got nan"
         " - at $.llm.llm_kwargs.a[b"),
        ("serve.port", "expected --set key.key=value, got 'serve.port'"),
        ("=1", "expected --set key.key=value, got '=1'"),
        ("serve..port=1", "expected --set key.key=value, got 'serve..port=1'"),
        ("serve.port=[1", "--set serve.port=[1: not YAML: expected ',' or ']', but got '<stream end>'"),
        ("serve.port=!!int x", "--set serve.port=!!int x: not YAML: invalid literal for int() with base 10: 'x'"),
        ("serve={a: 1, a: 2}", "--set serve={a: 1, a: 2}: duplicate key 'a', first set in line 1 - at $.serve.a"),
        ("serve={1: 2}", "--set serve={1: 2}: expected a text as key, got '1' - at $.serve"),
        (
            "llm.dtype=!!python/name:os.system",
            f"--set llm.dtype=!!python/name:os.system: unknown tag '!!python/name:os.system': {ONLY} - at $.llm.dtype",
        ),
    ],
)  # fmt: skip
def test_a_wrong_set_is_named(file: Path, override: str, expected: str) -> None:
    assert message(lambda: load(file, [override])) == expected


def test_set_of_a_file_that_is_no_mapping_says_so(tmp_path: Path) -> None:
    (tmp_path / "c.yaml").write_text("- a\n")
    assert message(lambda: load(tmp_path / "c.yaml", ["a=1"])) == "--set a=1: expected a mapping, got list"


# ---------------------------------------------------------------------------------------------------------------- build


@dataclasses.dataclass(frozen=True, kw_only=True)
class Retries:
    count: int = 3


@dataclasses.dataclass(frozen=True, kw_only=True)
class Options:
    env: dict[str, int] = dataclasses.field(default_factory=dict)
    words: tuple[str, ...] = ()
    retries: Retries = Retries()

    def __post_init__(self) -> None:
        if "bad" in self.words:
            raise ValueError("bad is no word")


@pytest.mark.parametrize(
    ("options", "expected"),
    [
        ({"env": {"a": "x"}}, "expected int, got str - at $.o.env.a"),
        ({"env": {1: 1}}, "expected str, got int in a key - at $.o.env"),
        ({"words": "abc"}, "expected list, got str - at $.o.words"),
        ({"words": ["bad"]}, "bad is no word - at $.o"),
        ({"retries": {"count": "x"}}, "expected int, got str - at $.o.retries.count"),
        ({"retries": {"counts": 1}}, "unknown key 'counts'; did you mean 'count'? - at $.o.retries.counts"),
        ([], "expected a mapping, got list - at $.o"),
        ({3: 1}, "unknown key '3'; expected one of env, retries, words - at $.o.3"),
    ],
)
def test_options_of_any_dataclass_are_checked_to_the_bottom(options: object, expected: str) -> None:
    assert message(lambda: build(Options, options, "$.o")) == expected


def test_options_of_any_dataclass_are_built() -> None:
    made = build(Options, {"env": {"a": 1}, "words": ["a", "b"], "retries": {"count": 1}})
    assert made == Options(env={"a": 1}, words=("a", "b"), retries=Retries(count=1))


KEYS = st.one_of(
    st.sampled_from(
        ["llm", "serve", "launcher", "transport", "engine", "plugins", "model_name", *defaults(ServeConfig)]
    ),
    st.sampled_from([*defaults(LLMConfig)]),
    st.text(max_size=8),
    st.integers(),
    st.none(),
)
VALUES = st.recursive(
    st.one_of(st.none(), st.booleans(), st.integers(), st.floats(), st.text(max_size=8), st.binary(max_size=4)),
    lambda inner: st.one_of(st.lists(inner, max_size=4), st.dictionaries(KEYS, inner, max_size=6)),
    max_leaves=20,
)
MAPPINGS = st.one_of(
    VALUES,
    st.dictionaries(KEYS, VALUES, max_size=6),
    st.fixed_dictionaries(
        {"llm": st.fixed_dictionaries({"model_name": st.text()}, optional=dict.fromkeys(("seed", "dtype"), VALUES))},
        optional={"serve": st.dictionaries(st.sampled_from([*defaults(ServeConfig)]), VALUES, max_size=3)},
    ),
)


@settings(max_examples=500, deadline=None, database=None, suppress_health_check=[HealthCheck.too_slow])
@given(mapping=MAPPINGS)
def test_any_mapping_is_a_config_or_a_config_error(mapping: object) -> None:
    made = attempt(lambda: build(Config, mapping))
    if isinstance(made, ConfigError):
        assert str(made)
        assert made.at.startswith("$")
    else:
        assert isinstance(made, Config)
        placed = attempt(lambda: check_places(made))
        assert not isinstance(placed, ConfigError) or placed.at.startswith(("$.llm.", "$.serve.", "$.gateway."))


def attempt(call: Callable[[], object]) -> object:
    try:
        return call()
    except ConfigError as error:
        return error


def test_a_mapping_in_place_of_a_config_is_told_what_to_write() -> None:
    llm: Any = {"model_name": "m"}
    serve: Any = {"servers": 2}
    for make, name in (
        (lambda: VLLMService(llm), "LLMConfig"),
        (lambda: VLLMService(LLMConfig("m"), serve), "ServeConfig"),
        (lambda: VLLMServer(llm), "LLMConfig"),
    ):
        with pytest.raises(ConfigError, match=f"expected an instance of gserve.{name}, got dict: write gserve.{name}"):
            make()
