"""What stands in CUDA_VISIBLE_DEVICES, as a scheduler may have set it, and what vLLM makes of it."""

import pytest

from gserve import GserveError
from gserve_core.engines.vllm.engine import check_devices

GPU, MIG = "GPU-8f6d4b1e-0000-4000-8000-000000000001", "MIG-5c89852c-0000-4000-8000-000000000002"


class Older:
    """A version of vLLM that takes numbers only."""


class Newer:
    """A version of vLLM that asks NVML about what is no number."""

    @classmethod
    def device_control_id_to_physical_device_id(cls, entry: str) -> int:
        if entry.startswith("MIG-"):
            raise RuntimeError("Not Found")
        return 3 if entry == GPU else int(entry)


@pytest.mark.parametrize("platform", [Older, Newer])
@pytest.mark.parametrize("visible", ["", "0", "2,5", f"7,{MIG}"])
def test_numbers_are_taken_and_what_no_server_uses_is_not_looked_at(visible: str, platform: type) -> None:
    check_devices(visible, 2 if "," in visible and MIG not in visible else 1, platform)


def test_a_uuid_is_taken_where_vllm_knows_it() -> None:
    check_devices(f"{GPU},0", 2, Newer)
    with pytest.raises(
        GserveError, match=f"'{GPU}' in CUDA_VISIBLE_DEVICES stands for a GPU that this vLLM cannot use: "
    ):
        check_devices(f"{GPU},0", 2, Older)


@pytest.mark.parametrize("platform", [Older, Newer])
def test_a_mig_slice_that_vllm_cannot_use_is_refused_by_its_name(platform: type) -> None:
    with pytest.raises(
        GserveError, match=rf"^'{MIG}' in CUDA_VISIBLE_DEVICES is a MIG slice, which this vLLM cannot use: "
    ):
        check_devices(f"0,{MIG}", 2, platform)
