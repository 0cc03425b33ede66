"""Every registered launcher, transport and engine keeps the contracts of `gserve_core.interfaces`."""

from dataclasses import fields

import pytest

from gserve import LLMConfig
from gserve_core import plugins, testing

registry = plugins.load()


ELSEWHERE = {"slurm", "ssh"}  # tests/slurm, tests/ssh


@pytest.mark.parametrize("name", sorted(registry.classes["launcher"].keys() - ELSEWHERE))
def test_every_launcher_keeps_its_contract(name: str) -> None:
    testing.check_launcher(registry.build("launcher", {"type": name}))


@pytest.mark.parametrize("name", registry.classes["transport"])
def test_every_transport_keeps_its_contract(name: str) -> None:
    testing.check_transport(registry.build("transport", {"type": name}))


def test_a_launcher_with_a_prefix_keeps_the_contract() -> None:
    testing.check_launcher(registry.build("launcher", {"type": "subprocess", "nice": 5}))


def test_every_launcher_has_a_prefix() -> None:
    assert all("prefix" in {it.name for it in fields(launcher)} for launcher in registry.classes["launcher"].values())


def test_echo_keeps_the_contract_of_engines() -> None:
    testing.check_engine(registry.build("engine", {"type": "echo", "latency": 0.001}), LLMConfig("any"))
