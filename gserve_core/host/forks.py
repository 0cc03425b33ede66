"""Callbacks in forked children: objects close or renew there what belongs to the parent alone."""

import functools
import inspect
import itertools
import os
import traceback
import weakref
from collections.abc import Callable


class _Callbacks:
    """The callbacks of this process. It is registered with the interpreter when it gets its first one."""

    def __init__(self) -> None:
        self._keys = itertools.count()
        self._callbacks: dict[int, Callable[[], object]] = {}

    def add(self, callback: Callable[[], object]) -> None:
        key = next(self._keys)
        if key == 0:
            os.register_at_fork(after_in_child=self._call_all)
        if inspect.ismethod(callback):
            owner = weakref.ref(callback.__self__, functools.partial(self._remove, key))
            callback = functools.partial(_call_method, owner, callback.__func__)
        self._callbacks[key] = callback

    def _remove(self, key: int, _: object) -> None:
        self._callbacks.pop(key, None)

    def _call_all(self) -> None:
        for callback in list(self._callbacks.values()):
            try:
                callback()
            except BaseException:  # the other callbacks are needed all the same
                traceback.print_exc()


def _call_method(owner: weakref.ref[object], method: Callable[[object], object]) -> None:
    found = owner()
    if found is not None:
        method(found)


_CALLBACKS = _Callbacks()


def call_in_child(callback: Callable[[], object]) -> None:
    """Call `callback` in every forked child, in the order of registration.

    A method does not keep its object alive. It is called as long as the object exists.
    """
    _CALLBACKS.add(callback)
