"""Reads the bodies of requests as messages, for servers and gateways."""

import json
from typing import Any

import msgspec

from gserve_core.errors import RemoteError


def decode_msgpack(body: bytearray, type_: Any) -> Any:
    """Return the value in a msgpack body. Raises RemoteError: it is none of this type."""
    try:
        return msgspec.msgpack.decode(body, type=type_)
    except (msgspec.MsgspecError, UnicodeDecodeError, RecursionError) as error:
        raise RemoteError(f"the body cannot be read: {error}", status=400) from error


def decode_json(body: bytearray, type_: Any) -> Any:
    """Return the value in a JSON body. Raises RemoteError: it is none of this type, or has a duplicate key."""
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
