"""What is said of versions of vLLM, and of a vLLM that differs from those with which gserve was tested."""

import logging
import sys
from types import ModuleType, SimpleNamespace

import pytest

from gserve import __version__
from gserve_core.engines.vllm import differences, examination, installed
from gserve_core.errors import ConfigError, GserveError


@pytest.mark.parametrize("version", ["0.32.0", "0.32.1rc1", "0.33.0+cpu"])
def test_a_tested_version_without_published_holes_is_started_without_a_word(version: str) -> None:
    assert installed.warnings(version, is_allowed=False) == []


@pytest.mark.parametrize("version", ["0.26.1", "0.31.9+cu129"])
def test_a_version_with_published_holes_is_warned_of(version: str) -> None:
    assert installed.warnings(version, is_allowed=False) == [
        f"vLLM {version} has security holes that are published, and fixed up to 0.32: install 0.32 or newer"
    ]


@pytest.mark.parametrize("version", ["0.34.0", "0.40.0.dev3+g1234567", "1.0"])
def test_a_version_above_the_tested_range_is_started_with_one_warning(version: str) -> None:
    first, last = (".".join(map(str, numbers)) for numbers in installed.TESTED)
    (warning,) = installed.warnings(version, is_allowed=False)
    assert warning == f"gserve {__version__} was tested with vLLM {first} to {last}; installed is {version}"


@pytest.mark.parametrize("version", ["0.25.1", "0.21.0", "0.8.5.post1", "0.0.0.dev0", "dev"])
def test_an_old_or_unknown_version_is_refused_unless_it_is_allowed(version: str) -> None:
    with pytest.raises(ConfigError) as error:
        installed.warnings(version, is_allowed=False)
    for part in (f"installed is {version}", "a grammar that does not", "install 0.32 or newer", "$.engine.allow_insec"):
        assert part.replace("a grammar that", "whose grammar") in str(error.value)
    assert ("CVE-2026-41523" in str(error.value)) == (version != "0.25.1")
    assert all(version in warning for warning in installed.warnings(version, is_allowed=True))


def test_the_doctor_notes_a_version_that_was_not_tested(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(installed, "package", lambda: ("vllm", "0.40.0"))
    (found,) = examination.examine(None, {}, allow_insecure=False)
    assert found.state == "note"
    assert "was tested with vLLM" in found.text
    assert found.text.endswith("installed is 0.40.0")


# ------------------------------------------------------------------------------------------- a vLLM with other contents


@pytest.fixture
def other(monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    """A vLLM of which only one module exists."""
    module = ModuleType("vllm")
    module.__path__ = []
    monkeypatch.setitem(sys.modules, "vllm", module)
    for name in [name for name in sys.modules if name.startswith("vllm.")]:
        monkeypatch.delitem(sys.modules, name)
    monkeypatch.setattr(installed, "package", lambda: ("vllm", "0.40.0"))
    return module


SENTENCE = r"^gserve \S+ was tested with vLLM 0\.26 to 0\.\d+; installed is 0\.40\.0, which "


def test_a_missing_name_or_module_is_a_difference_of_versions(other: ModuleType) -> None:
    with pytest.raises(GserveError, match=rf"{SENTENCE}has no vllm\.SamplingParams$"):
        differences.find("vllm:SamplingParams")
    with pytest.raises(GserveError, match=rf"{SENTENCE}has no vllm\.lora$"):
        differences.find("vllm.lora.request:LoRARequest")
    other.SamplingParams = other  # type: ignore[attr-defined]
    assert differences.find("vllm:SamplingParams") is other


def test_an_import_of_vllm_that_fails_is_no_difference_of_versions(other: ModuleType) -> None:
    def broken() -> None:
        raise AttributeError("module 'torch' has no attribute 'float8'")

    def lazy(name: str) -> None:
        if name == "Lazy":
            broken()
        raise AttributeError(f"module vllm has no attribute {name}")

    lazy.__code__ = lazy.__code__.replace(co_name="__getattr__")
    other.__dict__["__getattr__"] = lazy
    with pytest.raises(AttributeError, match="float8"):
        differences.find("vllm:Lazy")
    with pytest.raises(GserveError, match=rf"{SENTENCE}has no vllm\.Gone$"):
        differences.find("vllm:Gone")


def test_a_parameter_or_an_attribute_that_is_gone_is_a_difference_of_versions(other: ModuleType) -> None:
    def generate(prompt: str) -> str:
        return prompt

    assert differences.call(generate, "a") == "a"
    with pytest.raises(GserveError, match=rf"{SENTENCE}works otherwise: .*generate.* unexpected keyword argument"):
        differences.call(generate, "a", lora_request=None)
    with (
        pytest.raises(GserveError, match=rf"{SENTENCE}works otherwise: reading an output fails .*finish_reason"),
        differences.expected("reading an output"),
    ):
        _ = other.finish_reason


def test_what_is_optional_is_left_out_with_a_warning(other: ModuleType, caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.WARNING), differences.optional("the faster start"):
        differences.find("vllm.utils:Manager")
    (record,) = caplog.records
    assert record.getMessage().startswith("without the faster start: ")
    assert "was tested with vLLM" in record.getMessage()


def test_the_tokens_of_running_requests_are_counted_or_known_to_be_hidden() -> None:
    def request(tokens: int) -> SimpleNamespace:
        return SimpleNamespace(detokenizer=SimpleNamespace(num_output_tokens=lambda: tokens))

    states = {"a": request(2), "b": request(3), "c": SimpleNamespace(detokenizer=None)}
    engine = SimpleNamespace(output_processor=SimpleNamespace(request_states=states))
    assert differences.generated(engine) == 5
    states["d"] = SimpleNamespace(detokenizer=SimpleNamespace())
    assert differences.generated(engine) is None
    assert differences.generated(SimpleNamespace()) is None


def test_seeded_items_on_a_cpu_are_left_alone_where_vllm_has_no_mask_of_discarded_tokens() -> None:
    assert differences.generators(SimpleNamespace()) == ({}, ())
    batch, mask = SimpleNamespace(generators={0: "g"}), SimpleNamespace(np=[True])
    runner = SimpleNamespace(input_batch=batch, discard_request_mask=mask)
    assert differences.generators(runner) == ({0: "g"}, [True])
