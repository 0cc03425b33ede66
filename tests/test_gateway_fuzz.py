"""Requests that a machine made up, to a gateway and to a server: nothing acts without its key, and nothing breaks."""

import json
import logging
import os
from collections import Counter
from collections.abc import Collection, Iterator
from contextlib import closing
from http.client import HTTPConnection
from urllib.parse import urlsplit

import httpx
import psutil
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from typer.testing import CliRunner

from gserve import GatewayConfig, LLMConfig, ServeConfig, VLLMService
from gserve.cli.app import app
from gserve_core.engines.echo import EchoEngine
from gserve_core.openai_api import ROUTES
from gserve_core.service import records
from gserve_core.testing import our_processes
from tests.gserve_transports.test_http_fuzz import JUNK, MESSAGES, REQUEST, TEXTS, TOKENS, as_json

REQUESTS = 50_000 if os.environ.get("LONG") else 5_000
DRAWN = 8
"""How many requests one example of hypothesis holds; each is sent to the gateway and to a server."""
METHODS = ("GET", "POST", "PUT", "DELETE", "OPTIONS", "HEAD", "PATCH")
OTHER_PATHS = (
    "/health",
    "/chat",
    "/generate",
    "/run",
    "/cancel",
    "/shutdown",
    "/metrics",
    "/status",
    "/logs",
    "/logs?server=server-0&after=0",
    "/logs?server=%00&after=x&file=%ff",
    "/",
    "/v1",
    "/docs",
    "/v1/x",
)
CONTROL_PATHS = (
    "/control",
    "/adapters",
    "/adapters/one",
    "/adapters?model=m",
    "/weights",
    "/pause",
    "/resume",
    "/sleep",
    "/wake",
    "/reset_cache",
)
"""Paths of the gateway that need the control secret."""
TRAINER_PATHS = (
    "/update_weights",
    "/x/update_weights",
    "/x/init_weight_transfer_engine",
    "/x/start_weight_update",
    "/x/get_world_size",
    "/x/v1/completions",
)
"""Paths of a trainer with no secret, or a wrong one."""
FIELDS = ("n", "stop", "logprobs", "seed", "temperature", "max_tokens", "tools", "structured_outputs", "prompt_embeds")

logger = logging.getLogger(__name__)

BODIES = st.fixed_dictionaries(
    {"model": st.just("m") | TEXTS},
    optional={
        "messages": MESSAGES,
        "prompt": TEXTS | TOKENS | st.lists(TEXTS | TOKENS, max_size=3) | JUNK,
        "input": JUNK,
        "stream": st.booleans() | JUNK,
        "max_tokens": st.integers(1, 5),
        "n": st.integers(1, 3) | JUNK,
    },
)
ODD_BODIES = st.tuples(BODIES, st.dictionaries(st.sampled_from(FIELDS), JUNK, max_size=3)).map(lambda it: it[0] | it[1])
HEADERS = st.dictionaries(
    st.sampled_from(["Content-Type", "Accept", "X-Request-Id", "X-Api-Key", "Connection", "Expect", "Cookie"]),
    st.sampled_from(["application/json", "text/event-stream", "keep-alive", "100-continue", "é", "x" * 500, ""]),
    max_size=2,
)
KEYS = st.sampled_from(["right", "right", "right", "none", "near", "of the other", "control", "twice", "no scheme"])
REQUESTED = st.tuples(
    st.sampled_from(["POST"] * 5 + [*METHODS]),
    st.sampled_from([path for _, path in ROUTES]) | st.sampled_from([*OTHER_PATHS, *CONTROL_PATHS, *TRAINER_PATHS]),
    BODIES.map(as_json) | ODD_BODIES.map(as_json) | REQUEST,
    HEADERS,
    KEYS,
)
RIGHT = st.tuples(
    st.just("POST"),
    st.sampled_from(["/v1/chat/completions", "/v1/completions"]),
    st.fixed_dictionaries(
        {"prompt": st.just("a b"), "messages": st.just([{"role": "user", "content": "a b"}])},
        optional={"stream": st.booleans(), "n": st.integers(1, 3), "max_tokens": st.integers(1, 5)},
    ).map(as_json),
    st.just({"Content-Type": "application/json"}),
    KEYS,
)


@pytest.fixture(scope="module")
def service() -> Iterator[VLLMService]:
    llm, serve = LLMConfig("m", max_model_len=100), ServeConfig(servers=2, weight_protocol="trl")
    with VLLMService(llm, serve, engine=EchoEngine(), gateway=GatewayConfig(), name="fuzzed") as service:
        yield service


class Asker:
    """Sends requests to one address; judges the answers.

    `control`: the control secret, which is no key. `control_paths`: those that need it. Nothing sends it to them.
    """

    def __init__(
        self,
        port: int,
        key: str,
        other: str,
        control: str,
        open_routes: set[tuple[str, str]],
        control_paths: Collection[str],
    ) -> None:
        self._port = port
        self._open_routes = open_routes
        self._control_paths = control_paths
        self._keys = {
            "right": [f"Bearer {key}"], "none": [], "near": [f"Bearer {key[:-1]}"], "of the other": [f"Bearer {other}"],
            "control": [f"Bearer {control}"], "twice": [f"Bearer {key}", f"Bearer {key}"], "no scheme": [key],
        }  # fmt: skip
        self.statuses: Counter[int] = Counter()

    def ask(self, method: str, path: str, body: bytes, headers: dict[str, str], key: str) -> None:
        if key == "control" and path in self._control_paths:
            key = "right"  # with the control secret, it would act
        with closing(HTTPConnection("127.0.0.1", self._port, timeout=30)) as line:
            line.putrequest(method, path)
            for name, value in headers.items():
                line.putheader(name, value.encode("latin-1"))
            for value in self._keys[key]:
                line.putheader("Authorization", value)
            line.putheader("Content-Length", str(len(body)))
            line.endheaders(body)
            reply = line.getresponse()
            answer = reply.read()
        self.statuses[reply.status] += 1
        where = f"{method} {path} with {headers}, key {key}, {body!r}: {reply.status} {answer[:300]!r}"
        assert reply.status < 500 or reply.status == 503, where
        if (method, path) in self._open_routes:
            assert reply.status == 200, where
        elif ("HEAD", path) in self._open_routes:  # an open path of the gateway, which has no other method
            assert reply.status == 405, where
        elif key != "right" or "X-Api-Key" in headers:
            assert reply.status == 401, where
        elif path in self._control_paths:
            assert reply.status == 403, where
        elif reply.status not in (200, 400) and method != "HEAD":
            assert json.loads(answer)["error"]["message"], where


@pytest.mark.timeout(1800)
def test_nothing_acts_without_its_key_and_nothing_breaks(service: VLLMService) -> None:
    assert service.base_url is not None
    url, server = urlsplit(service.base_url), service.servers[0].record()
    assert url.port is not None
    assert service.api_key is not None
    record = records.find_service("fuzzed").gateway
    assert record is not None
    assert server.control is not None
    assert service.trl_url is not None
    gateway = Asker(
        url.port, service.api_key, server.token, record.control,
        {(method, path) for method in ("GET", "HEAD") for path in ("/", "/health")}, CONTROL_PATHS,
    )  # fmt: skip
    direct = Asker(
        server.address.port, server.token, service.api_key, server.control, {("GET", "/health")}, ["/shutdown"]
    )  # fmt: skip

    @settings(
        max_examples=REQUESTS // 2 // DRAWN, deadline=None, database=None, suppress_health_check=list(HealthCheck)
    )
    @given(requests=st.lists(REQUESTED | RIGHT, min_size=DRAWN, max_size=DRAWN))
    def send(requests: list[tuple[str, str, bytes, dict[str, str], str]]) -> None:
        for request in requests:
            gateway.ask(*request)
            direct.ask(*request)

    send()
    for asker in (gateway, direct):
        logger.info("%s", dict(asker.statuses))
        assert asker.statuses[200] > REQUESTS / 100
        assert asker.statuses[401] > REQUESTS / 100
        assert asker.statuses[400] + asker.statuses[422] > REQUESTS / 100
    assert service.generate(["a b"]) == [["a b"]]
    secrets = [service.api_key, server.token, server.control, record.control, service.trl_url.rpartition("/")[2]]
    root, headers = service.base_url.removesuffix("/v1"), {"Authorization": f"Bearer {service.api_key}"}
    shown = [httpx.get(f"{root}{path}", headers=headers).text for path in ("/", "/metrics", "/status")]
    shown += [str(process.cmdline()) for process in map(psutil.Process, our_processes())]
    shown.append(CliRunner().invoke(app, ["ps"]).output)
    assert "fuzzed" in shown[-1]
    assert not [text for text in shown for secret in secrets if secret in text]
    for state in service.status():
        assert (state.restarts, state.gate) == (0, "open")
        assert state.log is not None
        log = state.log.read_text()
        assert "Traceback" not in log, log[-3000:]
        assert not any(secret in log for secret in secrets)
