"""The bodies of requests to gserve's own routes, as servers and gateways read them."""

import json
import re
from collections.abc import Mapping
from typing import Any
from urllib.parse import parse_qs

import msgspec

from gserve_core.errors import RemoteError
from gserve_core.messages import CancelRequest, RunRequest

from .frames import CONTENT_TYPE

HEARTBEATS = 0.01, 3600.0
"""Minimum and maximum heartbeat interval that a client may request, in seconds."""


class _Named(msgspec.Struct):
    """The part of a body that names the model."""

    model: Any = None


FORM_MODEL = re.compile(rb'name="model"[^\r\n]*\r\n(?:[^\r\n]+\r\n)*\r\n([^\r\n]*)\r\n--')
"""The field `model` in the body of a form with a file."""


def asked_model(scope: Mapping[str, Any], body: bytes) -> str | None:
    """Return the model that a request names, in its body or, if it has none, in its URL; None: it names none.

    Raises RemoteError: the body cannot be read (400).
    """
    if not body:
        query: str = scope["query_string"].decode("latin-1")
        given = parse_qs(query).get("model")
        return given[0] if given else None
    if dict(scope["headers"]).get(b"content-type", b"").startswith(b"multipart/"):
        found = FORM_MODEL.search(body)
        return None if found is None else found[1].decode(errors="replace")
    model: object = read_json(body, _Named).model
    if model is None or isinstance(model, str):
        return model
    raise RemoteError(f"'model': expected a text, got {model!r:.50}", status=400)


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
