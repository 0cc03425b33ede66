"""The LoRA adapters of a running vLLM: loaded, named, counted while in use, and removed.

vLLM knows an adapter by its number. gserve never uses a number twice, so that no cache of vLLM answers for another
adapter. The server's own requests and those of OpenAI's API share one table of names.
"""

import asyncio
import inspect
import itertools
import logging
from collections.abc import Callable, Collection, Mapping
from typing import Any

from ...errors import ConfigError, GserveError, ItemError, sentence_of, unknown_adapter
from . import differences
from .adapter_files import check_adapter

DRAIN_STEP = 0.02
"""Time between two looks whether a removed adapter is still in use, in seconds."""

logger = logging.getLogger("gserve.engine")


class Adapters:
    """The adapters of an `AsyncLLM`.

    `engine`: None: it was started without adapters.
    `make`: vLLM's `LoRARequest`.
    `base`: the name or path of the model. `names`: its names for clients, which no adapter may have.
    `most`: maximum number of adapters. `rank`: the highest rank that the engine takes.

    Before the engine sees a request, it changes the request's adapter: to one whose name is unique too. Versions of
    vLLM before 0.31 cache prompts by that name.
    """

    def __init__(
        self, engine: Any, make: Callable[..., Any], base: str, names: Collection[str], *, most: int, rank: int
    ) -> None:
        self.table: dict[str, Any] = {}
        """The adapters as clients know them: vLLM's requests by name. OpenAI's API uses this table too."""
        self.faults: dict[str, str] = {}
        """Why adapters could not be loaded, by name."""
        self._engine = engine
        self._make = make
        self._base = base
        self._names = names
        self._most = most
        self._rank = rank
        self._live: dict[int, Any] = {}
        """The adapter that requests get, by the number of the one that they ask for."""
        self._paths: dict[str, str] = {}
        """The paths of the adapters in `table`, as they were given."""
        self._numbers = itertools.count(1)
        if engine is not None:
            with differences.expected("following the requests with adapters"):
                processor = engine.output_processor
                add = processor.add_request
                inspect.signature(add).bind(object(), None)

                def add_request(request: Any, *rest: Any, **named: Any) -> Any:
                    if request.lora_request is not None:
                        request.lora_request = self._current(request.lora_request)
                    return add(request, *rest, **named)

                processor.add_request = add_request

    def find(self, name: str) -> Any:
        """Return the adapter of this name for a request. Raises ItemError: there is none, or it could not be loaded."""
        found = self.table.get(name)
        if found is None:
            if (fault := self.faults.get(name)) is not None:
                raise ItemError(f"the adapter '{name}' could not be loaded: {fault}", invalid=False)
            raise unknown_adapter(name, self.table)
        return found

    async def load(self, name: str, path: str, *, is_trusted: bool = False) -> None:
        """Load an adapter, in the place of one of this name. `is_trusted`: do not check its files first.

        Raises any exception: it cannot be loaded.
        """
        if self._engine is None:
            raise ConfigError(
                "the servers were started without adapters: name one in llm.adapters, and start them again"
            )
        if name in self._names:
            raise ConfigError(f"'{name}' is a name of the model: choose another one")
        folder = path if is_trusted else await asyncio.to_thread(check_adapter, path, self._base, self._rank)
        number = next(self._numbers)
        loaded = differences.call(self._make, f"{name}#{number}", number, str(folder))
        await differences.call(self._engine.add_lora, loaded)  # with a request, a bad adapter would kill the engine
        self._live[number] = loaded
        old = self.table.get(name)
        self.table[name] = differences.call(self._make, name, number, str(folder))
        self._paths[name] = path
        self.faults.pop(name, None)
        if old is not None:
            await self._unload(old.lora_int_id, loaded)

    async def change(self, wanted: Mapping[str, str]) -> Mapping[str, str]:
        """Have the wanted adapters. See `RunningEngine.set_adapters`."""
        self.faults = {name: fault for name, fault in self.faults.items() if name in wanted}
        removed = [self.table.pop(name) for name in [*self.table] if name not in wanted]
        await asyncio.gather(*(self._unload(one.lora_int_id) for one in removed))  # the others may need their places
        for name, path in wanted.items():
            if name in self.table and self._paths.get(name) == path:
                self.faults.pop(name, None)
                continue
            try:
                if len(self.table.keys() | {name}) > self._most:
                    raise ConfigError(f"the engine has room for {self._most} adapters: raise llm.max_adapters")
                await self.load(name, path)
            except Exception as error:
                self.faults[name] = sentence_of(error)
                logger.warning("cannot load the adapter '%s': %s", name, self.faults[name])
        return dict(self.faults)

    async def load_again(self) -> None:
        """Load all adapters again, since other weights of the model may have dropped them. No request is in flight."""
        for name, known in [*self.table.items()]:
            loaded = self._live[known.lora_int_id]
            try:
                await differences.call(self._engine.add_lora, loaded)
            except Exception as error:  # its folder may be gone
                del self.table[name], self._live[known.lora_int_id]
                self.faults[name] = sentence_of(error)
                logger.warning("cannot load the adapter '%s' again: %s", name, self.faults[name])

    def _current(self, asked: Any) -> Any:
        """Return the adapter for a request that is about to reach the engine. Raises ValueError: it was removed."""
        found = self._live.get(asked.lora_int_id)
        if found is None:
            raise ValueError(f"the adapter '{asked.lora_name}' was removed")
        return found

    async def _unload(self, number: int, instead: Any = None) -> None:
        """Remove an adapter from the engine once no request uses it. `instead`: what requests on their way get."""
        sent = {asked: it for asked, it in self._live.items() if it.lora_int_id != number}
        self._live = sent | (dict.fromkeys(self._live.keys() - sent.keys(), instead) if instead is not None else {})
        while self._is_used(number):
            await asyncio.sleep(DRAIN_STEP)
        try:
            await differences.call(self._engine.remove_lora, number)
        except GserveError:
            raise
        except Exception as error:  # it stays until others need its place
            logger.warning("cannot remove an adapter: %s", error)

    def _is_used(self, number: int) -> bool:
        """Return whether a request in flight has this adapter."""
        states = self._engine.output_processor.request_states.values()
        return any(it.lora_request is not None and it.lora_request.lora_int_id == number for it in states)
