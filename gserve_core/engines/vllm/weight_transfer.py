"""Weights that a trainer pushes to vLLM's workers. vLLM adds `WeightTransfer` to its worker class.

The trainer chooses the way: vLLM's own engine for transfers, by NCCL on GPUs, or a `torch.distributed.TCPStore` of the
trainer, from which each worker reads by itself. The latter takes no GPU, and is for small models.
"""

from datetime import timedelta
from math import prod
from typing import Any

from .weight_loading import WeightLoading, is_tied, with_head

WORKER_EXTENSION = f"{__name__}.WeightTransfer"
INIT, RECEIVE, FINISH = "gserve_init_transfer", "gserve_receive_weights", "gserve_finish_transfer"
"""The methods of a worker."""
STORE = "tcpstore"
"""The `backend` of a trainer that has a store."""
STORE_SECONDS = 60.0
"""Maximum wait for a trainer's store, or for a tensor in it, in seconds."""


class WeightTransfer(WeightLoading):
    """Methods for vLLM's workers."""

    def gserve_init_transfer(self: Any, info: dict[str, Any]) -> None:
        """Connect to a trainer. `info`: its `init_info`. Raises any exception: that fails."""
        parts: dict[str, Any] = {}
        self.gserve_store, self.gserve_parts, self.gserve_has_begun = None, parts, False
        if info.get("backend") != STORE:
            self.init_weight_transfer_engine({key: value for key, value in info.items() if key != "backend"})
            return
        from torch.distributed import TCPStore

        self.gserve_store = TCPStore(
            info["master_address"], info["master_port"], is_master=False, wait_for_workers=False,
            timeout=timedelta(seconds=STORE_SECONDS),
        )  # fmt: skip

    def gserve_receive_weights(self: Any, info: dict[str, Any]) -> None:
        """Receive a part of the weights. Raises any exception: the engine cannot be used any more.

        `info`: names, types and shapes. A store has the bytes of each tensor in parts of `part` bytes, since it takes
        no more than 8 MiB at once. The key of a part is `prefix`, the name and the number, with slashes between them.
        """
        if self.gserve_store is None:
            if not self.gserve_has_begun:
                self.start_weight_update()
                self.gserve_has_begun = True
            self.update_weights(info)
            return
        import torch

        for name, kind, shape in zip(info["names"], info["dtype_names"], info["shapes"], strict=True):
            dtype = getattr(torch, kind)
            count = -(-prod(shape) * dtype.itemsize // info["part"])
            keys = [f"{info['prefix']}/{name}/{number}" for number in range(count)]
            data = bytearray().join(self.gserve_store.get(key) for key in keys)
            self.gserve_parts[name] = torch.frombuffer(data, dtype=dtype).reshape(shape)

    def gserve_finish_transfer(self: Any) -> None:
        """Use the weights. Raises any exception: the engine cannot be used any more."""
        if self.gserve_store is None:
            self.finish_weight_update()
            self.gserve_has_begun = False
            return
        parts, self.gserve_parts = self.gserve_parts, {}
        self.reload_weights(weights_iterator=with_head(parts.items(), is_tied=is_tied(self)))
