"""Weights from memory: tensors that become safetensors files in a private folder of shared memory.

Servers of this machine load them like those of any other folder. The folder is there until it is removed, or until this
process ends. If the process was killed, the next start of a service, the next weights from memory or `gserve reap`
remove it.
"""

import os
import shutil
import sys
import uuid
import weakref
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

from ..errors import ConfigError, GserveError
from ..host import scratch
from ..host.locks import unlock_and_close

SHARD_BYTES = 2 << 30
"""Size of a file from which another one is begun, in bytes. Copies of that many tensors exist at once at most, or of a
larger one."""
HEADER_BYTES = 1 << 20
"""Room for the header of a file, in bytes."""
RESERVE = 128 << 20
"""Room that is left in shared memory, in bytes: the processes of an engine need it too."""
TORCH, NUMPY = "torch", "numpy"
METADATA = {"format": "pt"}

type Tensors = Mapping[str, Any] | Iterable[tuple[str, Any]]


class MemoryFolder:
    """A folder with weights from memory. `path`: where it is, once it has a tensor."""

    def __init__(self) -> None:
        self.path = Path()
        self._instance = uuid.uuid4().hex
        self._bases = iter(scratch.weight_bases())
        self._tried: list[str] = []
        self._files = self._bytes = 0
        self._finalizer: weakref.finalize[Any, Any] | None = None

    def remove(self) -> None:
        """Remove the folder. Idempotent. Does nothing in a forked process, which is not its owner."""
        if self._finalizer is not None:
            self._finalizer()

    def save(self, kind: str, tensors: Mapping[str, Any]) -> None:
        """Write tensors of one kind to a file. Raises GserveError: there is no room, or they cannot be written."""
        size = sum(tensor.nbytes for tensor in tensors.values()) + HEADER_BYTES
        if self._finalizer is None or room(self.path) < size + RESERVE:
            self._move_on(size)
        file = self.path / f"model-{self._files + 1:05}.safetensors"
        try:
            _save(kind, dict(tensors), file)
        except ImportError as error:
            raise GserveError("tensors are written by the package safetensors: pip install safetensors") from error
        except Exception as error:
            raise GserveError(f"cannot write weights from memory to {file}: {error}") from error
        self._files, self._bytes = self._files + 1, self._bytes + size

    def _move_on(self, size: int) -> None:
        """Make the folder in the next place with room for `size` bytes more. Raises GserveError: there is none."""
        before, finalizer = self.path, self._finalizer
        if finalizer is not None:
            self._tried.append(_told(before.parent))
        for base in self._bases:
            if room(base) >= self._bytes + size + RESERVE:
                break
            self._tried.append(_told(base))
        else:
            raise GserveError(
                f"no room for {(self._bytes + size) >> 20} MiB of weights, and {RESERVE >> 20} MiB beside them:"
                f" {', '.join(self._tried)}; make room, or save them into a folder and pass its path"
            )
        try:
            self.path, descriptor = scratch.make_for_weights(base, self._instance)
            self._finalizer = weakref.finalize(self, _remove, self.path, descriptor, os.getpid())
            for file in before.glob("*.safetensors") if finalizer is not None else ():
                shutil.move(file, self.path)
        except OSError as error:
            raise GserveError(f"cannot make a folder for weights in {base}: {error.strerror}") from error
        finally:
            if finalizer is not None:
                finalizer()


def remove_unused() -> None:
    """Remove the folders of killed processes of this user. Never raises."""
    for path in scratch.unused_weights():
        scratch.remove(path)


def write(tensors: Tensors) -> MemoryFolder:
    """Write tensors to a folder, one file after another. Tensors of a GPU are copied one at a time.

    Raises ConfigError: these are no tensors by name, or not whole ones.
    Raises GserveError: there is no room, or they cannot be written. Raises what an iterable raises. No folder remains.
    """
    remove_unused()
    folder = MemoryFolder()
    try:
        for kind, shard in _shards(tensors):
            folder.save(kind, shard)
        if not folder.path.name:
            raise ConfigError("expected weights as tensors by name, got none")
    except BaseException:
        folder.remove()
        raise
    return folder


def _shards(tensors: Tensors) -> Iterator[tuple[str, dict[str, Any]]]:
    """Yield tensors of one kind, for one file each. Raises ConfigError."""
    shard: dict[str, Any] = {}
    size, kind, names = 0, "", set()
    may_change = not isinstance(tensors, Mapping)  # an iterable may use one buffer for several
    for name, given in _pairs(tensors):
        if name in names:
            raise ConfigError(f"two of the weights have the name '{name:.200}'")
        names.add(name)
        own, tensor = _whole(name, given, may_change=may_change)
        if shard and (own != kind or size + tensor.nbytes > SHARD_BYTES):
            yield kind, shard
            shard, size = {}, 0
        kind, size = own, size + tensor.nbytes
        shard[name] = tensor if kind == NUMPY else _apart(tensor, shard.values())
    if shard:
        yield kind, shard


def _pairs(tensors: Tensors) -> Iterator[tuple[str, Any]]:
    """Yield names and tensors. Raises ConfigError: these are no pairs."""
    hint = "expected the folder of weights, or tensors by name such as model.named_parameters()"
    if not isinstance(tensors, Iterable):
        raise ConfigError(f"{hint}, got {type(tensors).__name__}")
    for pair in tensors.items() if isinstance(tensors, Mapping) else tensors:
        if not isinstance(pair, (tuple, list)) or len(pair) != 2:
            raise ConfigError(f"{hint}, got {type(pair).__name__} in place of a name and a tensor")
        name, tensor = pair
        if not isinstance(name, str) or name in ("", "__metadata__"):
            raise ConfigError(f"expected the name of a tensor, got {name!r:.200}")
        yield name, tensor


def _whole(name: str, given: Any, *, may_change: bool) -> tuple[str, Any]:
    """Return the kind of a tensor, and the tensor in the memory of the CPU.

    `may_change`: whether its values may change before they are written, so that the result must be a copy.

    Raises ConfigError: it is none, or only a part of one.
    """
    torch, numpy = (sys.modules.get(it) for it in (TORCH, NUMPY))  # whoever has a tensor has imported its module
    if torch is not None and isinstance(given, torch.Tensor):
        if hasattr(given, "full_tensor"):
            raise ConfigError(f"'{name}' is a tensor that several processes share: pass its full_tensor()")
        if given.layout is not torch.strided or given.is_meta or given.is_quantized:
            raise ConfigError(f"'{name}' is not a plain tensor with numbers: it is sparse, quantized or without data")
        tensor = given.detach().to("cpu").contiguous()
        return TORCH, tensor.clone() if may_change and tensor.data_ptr() == given.data_ptr() else tensor
    if numpy is not None and isinstance(given, numpy.ndarray):
        if given.dtype.kind not in "biuf":
            raise ConfigError(f"'{name}' is an array of {given.dtype}, and weights are numbers")
        return NUMPY, numpy.array(given, order="C") if may_change else numpy.asarray(given, order="C")
    raise ConfigError(f"expected torch tensors or numpy arrays, got {type(given).__name__} as '{name:.200}'")


def _apart(tensor: Any, others: Iterable[Any]) -> Any:
    """Return a tensor of torch that shares no memory with others, as the format requires it."""
    place = tensor.untyped_storage().data_ptr()
    return tensor.clone() if any(other.untyped_storage().data_ptr() == place for other in others) else tensor


def _save(kind: str, tensors: dict[str, Any], file: Path) -> None:
    """Write tensors. Raises any exception."""
    if kind == TORCH:
        from safetensors.torch import save_file
    else:
        from safetensors.numpy import save_file
    save_file(tensors, file, METADATA)


def _told(base: Path) -> str:
    return f"{base} has room for {room(base) >> 20} MiB"


def room(folder: Path) -> int:
    """Return the free space of the file system of a folder, in bytes."""
    found = os.statvfs(folder)
    return found.f_bavail * found.f_frsize


def _remove(path: Path, descriptor: int, owner: int) -> None:
    if os.getpid() == owner:
        scratch.remove(path)
        unlock_and_close(descriptor)
