"""The client of a gateway, over a real one."""

import json
import subprocess
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from gserve import GatewayConfig, LLMConfig, VLLMService
from gserve_core.engines.echo import EchoEngine
from gserve_core.errors import RemoteError, TransportError
from gserve_transports.http_client import GatewayClient


@contextmanager
def served(gateway: GatewayConfig) -> Iterator[VLLMService]:
    with VLLMService(LLMConfig("m"), engine=EchoEngine(), gateway=gateway) as service:
        yield service


def client(service: VLLMService, *, key: str | None = None, certificate: str | None = None) -> GatewayClient:
    gateway = service.gateway
    assert gateway is not None
    return GatewayClient(
        gateway.base_url,
        gateway.api_key if key is None else key,
        gateway.certificate if certificate is None else certificate,
    )


@pytest.fixture(scope="module")
def service() -> Iterator[VLLMService]:
    with served(GatewayConfig()) as service:
        yield service


def test_it_reads_the_overview_and_the_models(service: VLLMService) -> None:
    overview = client(service).overview()
    assert (overview.status, [server.state for server in overview.servers]) == ("ok", ["ready"])
    assert [model["id"] for model in client(service).models()] == ["m"]


def test_it_yields_the_deltas_of_a_stream(service: VLLMService) -> None:
    body = {"messages": [{"role": "user", "content": "one two"}]}
    assert [delta["content"] for delta in client(service).stream_chat(body)] == ["one", " two", ""]


def test_a_refusal_is_a_remote_error_and_no_gateway_a_transport_error(service: VLLMService) -> None:
    with pytest.raises(RemoteError, match="requires its API key") as refused:
        client(service, key="wrong").overview()
    assert refused.value.status == 401
    with pytest.raises(TransportError, match=r"the connection to the gateway at http://127\.0\.0\.1:1 broke") as gone:
        GatewayClient("http://127.0.0.1:1/v1", "key").overview()
    assert gone.value.is_gone


def test_the_certificate_of_the_gateway_is_accepted_and_no_other(tmp_path: Path) -> None:
    command = ["openssl", "req", "-x509", "-newkey", "ec", "-pkeyopt", "ec_paramgen_curve:P-256", "-nodes"]
    for name in ("own", "other"):
        files = ["-subj", "/CN=elsewhere", "-keyout", f"{tmp_path}/{name}.key", "-out", f"{tmp_path}/{name}.pem"]
        subprocess.run([*command, *files], check=True, capture_output=True)
    both = tmp_path / "both.pem"
    both.write_text((tmp_path / "own.key").read_text() + (tmp_path / "own.pem").read_text())
    with served(GatewayConfig(certfile=str(both), keyfile=str(both))) as service:
        assert service.gateway is not None
        assert service.gateway.certificate == (tmp_path / "own.pem").read_text().strip(), "the private key is not shown"
        assert client(service).overview().status == "ok"
        for certificate in ((tmp_path / "other.pem").read_text(), ""):
            with pytest.raises(TransportError, match="certificate verify failed"):
                client(service, certificate=certificate).overview()
        body = {"messages": [{"role": "user", "content": "one two"}]}
        line = {"custom_id": "a", "method": "POST", "url": "/v1/chat/completions", "body": body}
        (tmp_path / "batch.jsonl").write_text(json.dumps(line))
        assert service.run_batch(tmp_path / "batch.jsonl", tmp_path / "out.jsonl").answered == 1
