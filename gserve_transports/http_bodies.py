"""The bodies of requests to gserve's own routes, as servers and gateways read them."""

import json
from typing import Any

import msgspec

from gserve_core.errors import RemoteError
from gserve_core.messages import CancelRequest, RunRequest

from .frames import CONTENT_TYPE

HEARTBEATS = 0.01, 3600.0
"""Minimum and maximum heartbeat interval that a client may request, in seconds."""


def read_run(body: bytes | bytearray) -> RunRequest:
    """Return the request in the body of `/run`. Raises RemoteError: it is wrong (400)."""
    asked = _decode_msgpack(body, RunRequest)
    if not HEARTBEATS[0] <= asked.heartbeat <= HEARTBEATS[1]:
        raise RemoteError("expected a heartbeat from {} to {} s".format(*HEARTBEATS), status=400)
    return asked


def read_cancel(body: bytes | bytearray, content_type: str | None) -> CancelRequest:
    """Return the request in the body of `/cancel`. Raises RemoteError: it is wrong (400, 422)."""
    return _decode_msgpack(body, CancelRequest) if content_type == CONTENT_TYPE else read_json(body, CancelRequest)


def _decode_msgpack[T](body: bytes | bytearray, type_: type[T]) -> T:
    try:
        return msgspec.msgpack.decode(body, type=type_)
    except (msgspec.MsgspecError, UnicodeDecodeError, RecursionError) as error:
        raise RemoteError(f"the body cannot be read: {error}", status=400) from error


def read_json[T](body: bytes | bytearray, type_: type[T]) -> T:
    """Return the request in a body of JSON. Raises RemoteError: it is wrong (400, 422)."""
    try:
        made = msgspec.json.decode(body, type=type_)
        json.loads(body, object_pairs_hook=_refuse_duplicates)  # msgspec would use the last value
        return made
    except UnicodeDecodeError as error:
        raise RemoteError(f"the body is not UTF-8: {error.reason} at byte {error.start}", status=400) from error
    except RecursionError as error:
        raise RemoteError("the body is nested too deeply", status=400) from error
    except msgspec.ValidationError as error:
        raise RemoteError(f"the body is invalid: {error}", status=422) from error
    except msgspec.DecodeError as error:
        raise RemoteError(f"the body is not JSON: {error}", status=400) from error


def _refuse_duplicates(pairs: list[tuple[str, Any]]) -> None:
    if len(pairs) > 1 and len({key for key, _ in pairs}) < len(pairs):
        raise RemoteError("the body has an object with a duplicate key", status=400)
