"""Requests that a machine has thought up, against a real server: none is answered with a 5xx, and none harms it.

`LONG=1` sends 100,000 instead of 5,000.
"""

import json
import logging
import os
import subprocess
import sys
import threading
from collections import Counter
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import closing
from http.client import HTTPConnection
from pathlib import Path
from typing import Any

import msgspec
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from gserve import LLMConfig, VLLMServer
from gserve_core.engines.echo import EchoEngine, EchoParams
from gserve_core.messages import ChatRequest, GenerateRequest, Health, Heartbeat, ResponseOutput, RunRequest
from gserve_core.sampling import public_fields
from gserve_transports import HttpTransport
from gserve_transports.frames import Unpacker

REQUESTS = 100_000 if os.environ.get("LONG") else 5_000
AT_ONCE = 8
DRAWN = 4
"""How many bodies one example of hypothesis holds; each is sent to all three routes."""
ROUTES = ("/chat", "/generate", "/run")

logger = logging.getLogger(__name__)


@pytest.fixture(scope="module")
def server() -> Iterator[VLLMServer]:
    server = VLLMServer(LLMConfig("m", max_model_len=100), engine=EchoEngine(), transport=HttpTransport(max_body_mib=1))
    with server:
        yield server


def is_sound(server: VLLMServer) -> None:
    """Assert that nothing has harmed the server."""
    assert server.is_running()
    with server.client() as client:
        assert client.generate(["a b c"]) == [["a b c"]]
        assert client.chat([[{"role": "user", "content": "c"}]]) == [["c"]]
    log = server.status().log
    assert log is not None
    assert "Traceback" not in log.read_text()


# --------------------------------------------------------------------------------------------------------- hypothesis

ODD = st.sampled_from([
    "", " ", "\0", "\ud800", "\udfff", "\ufeff", "\r\n", "é", "𝄞", "a" * 3000, "a " * 120, "{{x}}", "<|im_start|>",
])  # fmt: skip
TEXTS = st.one_of(st.just("a b"), st.text(max_size=8), ODD)
NUMBERS = st.one_of(
    st.integers(-3, 3), st.sampled_from([2**31, 2**63 - 1, 2**63, 2**64 - 1, 2**64, -(2**63), 10**30]), st.floats()
)
PLAIN = st.one_of(st.none(), st.booleans(), NUMBERS, TEXTS)
JUNK = st.recursive(
    PLAIN, lambda inner: st.lists(inner, max_size=3) | st.dictionaries(TEXTS, inner, max_size=3), max_leaves=5
)
PARAMS = st.one_of(
    st.none(),
    st.just({}),
    st.fixed_dictionaries(
        {},
        optional={
            "n": st.integers(1, 3),
            "max_tokens": st.none() | st.integers(1, 200),
            "temperature": st.floats(0, 2),
            "logprobs": st.none() | st.integers(-1, 3),
            "stop": st.none() | TEXTS | st.lists(TEXTS, max_size=3),
            "seed": st.none() | st.integers(-(2**63), 2**63 - 1),
            "ignore_eos": st.booleans(),
        },
    ),
    st.dictionaries(st.sampled_from(public_fields(EchoParams)), JUNK, max_size=2),
    JUNK,
)
TOKENS = st.lists(st.integers(0, 9) | NUMBERS, max_size=4)
MESSAGES = st.lists(
    st.one_of(
        st.fixed_dictionaries(
            {"role": st.sampled_from(["user", "system", "assistant"]) | TEXTS, "content": TEXTS},
            optional={"name": TEXTS},
        ),
        st.fixed_dictionaries(
            {
                "role": st.just("user"),
                "content": st.lists(st.fixed_dictionaries({"type": st.just("text"), "text": TEXTS}), max_size=2) | JUNK,
            }
        ),
        JUNK,
    ),
    max_size=3,
)
PROMPTS = st.lists(st.one_of(TEXTS, TOKENS, TEXTS, JUNK), max_size=4)
GROUPS = st.lists(
    st.fixed_dictionaries(
        {"prompts": st.lists(TEXTS | TOKENS | st.fixed_dictionaries({"messages": MESSAGES}), max_size=4)},
        optional={"params": PARAMS, "seeds": st.none() | st.lists(NUMBERS, max_size=4)},
    ),
    max_size=3,
)
RIGHT_PARAMS = st.none() | st.fixed_dictionaries({}, optional={"n": st.integers(1, 3), "max_tokens": st.integers(1, 9)})
RIGHT_TEXTS = st.lists(st.sampled_from(["a", "b c", "é 𝄞"]) | st.lists(st.integers(0, 9), min_size=1), max_size=4)
CHATS = st.fixed_dictionaries(
    {"conversations": st.lists(MESSAGES, max_size=3)},
    optional={
        "params": PARAMS,
        "add_generation_prompt": st.booleans() | JUNK,
        "continue_final_message": st.booleans(),
        "tools": JUNK | st.lists(st.dictionaries(TEXTS, JUNK), max_size=2),
        "return_prompt_token_ids": st.booleans(),
        "chat_template_kwargs": st.dictionaries(TEXTS | st.just("tokenize"), JUNK | NUMBERS, max_size=2),
    },
)
COMPLETIONS = st.one_of(
    st.fixed_dictionaries({"prompts": RIGHT_TEXTS, "params": RIGHT_PARAMS}),
    st.fixed_dictionaries({"prompts": PROMPTS}, optional={"params": PARAMS}),
)
RUNS = st.one_of(
    st.fixed_dictionaries(
        {
            "groups": st.lists(
                st.fixed_dictionaries({"prompts": RIGHT_TEXTS, "params": RIGHT_PARAMS | PARAMS}), max_size=3
            )
        }
    ),
    st.fixed_dictionaries({"groups": GROUPS}, optional={"heartbeat": st.just(1.0) | NUMBERS}),
)
OTHERS = JUNK | st.fixed_dictionaries(
    {}, optional={"prompts": JUNK, "conversations": JUNK, "groups": JUNK, "params": JUNK, "model": JUNK}
)
HARM = st.tuples(st.integers(0, 400), st.integers(0, 20), st.binary(max_size=4))


def as_json(body: Any) -> bytes:
    return json.dumps(body).encode()


def as_utf8(body: Any) -> bytes:
    return json.dumps(body, ensure_ascii=False).encode("utf-8", "surrogatepass")


def as_msgpack(body: Any) -> bytes:
    try:
        return msgspec.msgpack.encode(body)
    except (UnicodeEncodeError, OverflowError):
        return as_json(body)


def harmed(made: tuple[bytes, tuple[int, int, bytes]]) -> bytes:
    body, (place, length, instead) = made
    return body[:place] + instead + body[place + length :]


MADE = st.one_of(
    st.tuples(st.just(as_json) | st.just(as_utf8), CHATS | COMPLETIONS | OTHERS),
    st.tuples(st.just(as_msgpack), RUNS),
    st.tuples(st.just(as_msgpack), RUNS | OTHERS),
    st.tuples(st.just(as_json), COMPLETIONS),
).map(lambda made: made[0](made[1]))
REQUEST = st.one_of(MADE, MADE, MADE, st.tuples(MADE, HARM).map(harmed), st.binary(max_size=60))
"""A body: right, nearly right, or nothing like one."""


class Asker:
    """Sends bodies, on a lasting connection for each thread; counts and judges the answers."""

    def __init__(self, server: VLLMServer) -> None:
        self._server = server
        self._own = threading.local()
        self._lines: list[HTTPConnection] = []
        self.statuses: Counter[tuple[str, int]] = Counter()

    def close(self) -> None:
        for line in self._lines:
            line.close()

    def ask(self, route: str, body: bytes) -> None:
        line = getattr(self._own, "line", None)
        if line is None:
            line = self._own.line = HTTPConnection("127.0.0.1", self._server.port, timeout=60)
            self._lines.append(line)
        line.request("POST", route, body, {"Authorization": f"Bearer {self._server.record().token}"})
        reply = line.getresponse()
        answer = reply.read()
        self.statuses[route, reply.status] += 1
        where = f"{route} with {body!r}: {reply.status} {answer[:300]!r}"
        if reply.status != 200:
            assert reply.status in (400, 413, 422), where
            told = json.loads(answer)["error"]
            assert told["status"] == reply.status, where
            assert told["message"], where
        elif route == "/run":
            asked = msgspec.msgpack.decode(body, type=RunRequest)
            items = sum(len(group.prompts) for group in asked.groups)
            events = [event for batch in Unpacker().feed(answer) for event in batch]
            ended = [event.index for event in events if not isinstance(event, Heartbeat)]
            assert sorted(ended) == list(range(items)), where
        else:
            asked_json = json.loads(body)
            items = len(asked_json["prompts" if route == "/generate" else "conversations"])
            assert len(msgspec.json.decode(answer, type=list[list[ResponseOutput]])) == items, where


@pytest.mark.timeout(3600)
def test_no_body_makes_a_server_fail(server: VLLMServer) -> None:
    asker = Asker(server)
    examples = -(-REQUESTS // (DRAWN * len(ROUTES)))
    with closing(asker), ThreadPoolExecutor(AT_ONCE) as pool:

        @settings(max_examples=examples, deadline=None, database=None, suppress_health_check=list(HealthCheck))
        @given(bodies=st.lists(REQUEST, min_size=DRAWN, max_size=DRAWN))
        def send(bodies: list[bytes]) -> None:
            for asked in [pool.submit(asker.ask, route, body) for body in bodies for route in ROUTES]:
                asked.result(60)

        send()
    counts = asker.statuses
    logger.info("%d requests: %s", counts.total(), dict(sorted(counts.items())))
    assert counts.total() >= REQUESTS
    for route in ROUTES:  # it is no test if nothing, or everything, is let in
        assert counts[route, 200] > REQUESTS / 100
        assert counts[route, 400] + counts[route, 422] > REQUESTS / 100
    is_sound(server)


# ------------------------------------------------------------------------------------------------------- schemathesis


def description() -> dict[str, Any]:
    """Return what an OpenAPI document of the server would say; it serves none."""
    types = [ChatRequest, GenerateRequest, Health, list[list[ResponseOutput]]]
    template = "#/components/schemas/{name}"
    (chat, generate, health, outputs), parts = msgspec.json.schema_components(types, ref_template=template)
    statuses = ("400", "401", "403", "404", "405", "413", "422", "503")
    errors = {status: {"description": "an error"} for status in statuses}

    def asks(name: str, kind: str, schema: Any, example: Any, answer: Any = None) -> dict[str, Any]:
        done: dict[str, Any] = {"description": "done", "links": {"then": {"operationId": "health"}}}
        if answer is not None:
            done["content"] = {"application/json": {"schema": answer}}
        return {
            "post": {
                "operationId": name,
                "security": [{"token": []}],
                "requestBody": {"required": True, "content": {kind: {"schema": schema, "example": example}}},
                "responses": errors | {"200": done},
            }
        }

    works = {
        "description": "works",
        "content": {"application/json": {"schema": health}},
        "links": {"then": {"operationId": "generate", "requestBody": {"prompts": ["a b c"]}}},
    }
    said = {"conversations": [[{"role": "user", "content": "a"}]]}
    ends = {"operationId": "end", "security": [{"token": []}], "responses": errors | {"200": {"description": "ends"}}}
    binary = {"type": "string", "format": "binary"}
    return {
        "openapi": "3.1.0",
        "info": {"title": "gserve", "version": "1"},
        "paths": {
            "/health": {"get": {"operationId": "health", "responses": errors | {"200": works}}},
            "/chat": asks("chat", "application/json", chat, said, outputs),
            "/generate": asks("generate", "application/json", generate, {"prompts": ["a", [1]]}, outputs),
            "/run": asks("run", "application/octet-stream", binary, "x"),
            "/shutdown": {"post": ends},
        },
        "components": {"schemas": parts, "securitySchemes": {"token": {"type": "http", "scheme": "bearer"}}},
    }


CHECKS = "not_a_server_error,content_type_conformance,response_schema_conformance,ignored_auth,unsupported_method"


@pytest.mark.timeout(3600)
def test_schemathesis_finds_nothing(server: VLLMServer, tmp_path: Path) -> None:
    file = tmp_path / "openapi.json"
    file.write_bytes(msgspec.json.encode(description()))
    ran = subprocess.run(
        [
            sys.executable, "-m", "schemathesis.cli", "run", str(file), "--url", f"http://127.0.0.1:{server.port}",
            "--header", f"Authorization: Bearer {server.record().token}",
            "--phases", "examples,coverage,fuzzing,stateful",
            "--checks", CHECKS, "--max-examples", "1000" if os.environ.get("LONG") else "100",
            "--generation-database", "none", "--workers", "2", "--no-color", "--request-timeout", "20",
            "--continue-on-failure", "--suppress-health-check", "all",
        ],
        cwd=tmp_path, capture_output=True, text=True, check=False, timeout=1800,
    )  # fmt: skip
    logger.info("%s", ran.stdout[-2000:])
    assert ran.returncode == 0, ran.stdout[-6000:] + ran.stderr[-2000:]
    is_sound(server)
