"""Variables that open vLLM to attacks: a server does not inherit them."""

from collections.abc import Mapping

import pytest

from gserve import LLMConfig, ServeConfig, VLLMService
from gserve_core.interfaces import Engine

UNSAFE = {"VLLM_SERVER_DEV_MODE": "1", "PYTHONOPTIMIZE": "2", "VLLM_ALLOW_INSECURE_SERIALIZATION": "1"}


def environ_of_a_server(engine: Engine | None = None, env: Mapping[str, str] | None = None) -> dict[str, str]:
    service = VLLMService(LLMConfig("any"), ServeConfig(env=dict(env or {})), engine=engine)
    ((job, _),) = service.jobs()
    return {name: value for name, value in job.env.items() if name in UNSAFE}


def test_they_are_overridden_unless_the_config_sets_them(monkeypatch: pytest.MonkeyPatch) -> None:
    for name, value in UNSAFE.items():
        monkeypatch.setenv(name, value)
    chosen = {"VLLM_ALLOW_INSECURE_SERIALIZATION": "1"}
    assert environ_of_a_server(env=chosen) == {"VLLM_SERVER_DEV_MODE": "0", "PYTHONOPTIMIZE": ""} | chosen


def test_an_environment_without_them_stays_as_it_is(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in UNSAFE:
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("VLLM_SERVER_DEV_MODE", "0")
    assert environ_of_a_server() == {}
