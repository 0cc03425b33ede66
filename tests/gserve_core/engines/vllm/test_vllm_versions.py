"""Which versions of vLLM are started: judged by their version string alone."""

import pytest

from gserve_core.engines.vllm.installed import insecurity
from gserve_core.errors import ConfigError


@pytest.mark.parametrize("version", ["0.32.0", "0.32.1rc1", "0.40.0.dev3+g1234567", "0.32.0+cpu", "1.0"])
def test_a_version_past_the_published_holes_is_started_without_a_word(version: str) -> None:
    assert insecurity(version, is_allowed=False) is None


@pytest.mark.parametrize("version", ["0.22.0", "0.26.1", "0.31.9+cu129"])
def test_a_version_with_published_holes_is_warned_of(version: str) -> None:
    assert insecurity(version, is_allowed=False) == (
        f"vLLM {version} has security holes that are published, and fixed up to 0.32: install 0.32 or newer"
    )


@pytest.mark.parametrize("version", ["0.21.0", "0.8.5.post1", "0.0.0.dev0", "dev"])
def test_an_old_or_unknown_version_is_refused_unless_it_is_allowed(version: str) -> None:
    with pytest.raises(ConfigError) as error:
        insecurity(version, is_allowed=False)
    for part in (f"vLLM {version} ", "CVE-2026-41523", "install 0.32 or newer", "$.engine.allow_insecure_vllm"):
        assert part in str(error.value)
    warning = insecurity(version, is_allowed=True)
    assert warning is not None
    assert version in warning
