"""Callbacks in forked children: objects close or renew there what belongs to the parent alone."""

import inspect
import itertools
import os
import traceback
import weakref
from collections.abc import Callable

_callbacks: dict[int, Callable[[], Callable[[], object] | None]] = {}
_keys = itertools.count()


def call_in_child(callback: Callable[[], object]) -> None:
    """Call `callback` in every forked child, in the order of registration.

    A method does not keep its object alive. It is called as long as the object exists.
    """
    key = next(_keys)
    if key == 0:
        os.register_at_fork(after_in_child=_call_all)
    if inspect.ismethod(callback):
        _callbacks[key] = weakref.WeakMethod(callback, lambda _: _callbacks.pop(key, None))
    else:
        _callbacks[key] = lambda: callback


def _call_all() -> None:
    for reference in list(_callbacks.values()):
        callback = reference()
        if callback is not None:
            try:
                callback()
            except Exception:  # the other callbacks are needed all the same
                traceback.print_exc()
