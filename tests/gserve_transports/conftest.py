"""The server of the tests of HTTP whose every effect is noted, and a certificate, as fixtures."""

import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.gserve_transports.noted import Noted, served


@pytest.fixture(scope="module")
def noted_server() -> Iterator[Noted]:
    """One server for a module."""
    with served(Noted()) as api:
        yield api


@pytest.fixture(scope="session")
def certificate(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A certificate and its key, in one file."""
    file = tmp_path_factory.mktemp("tls") / "both.pem"
    command = ["openssl", "req", "-x509", "-newkey", "ec", "-pkeyopt", "ec_paramgen_curve:P-256", "-nodes"]
    subprocess.run([*command, "-subj", "/CN=localhost", "-keyout", file, "-out", file], check=True, capture_output=True)
    return file


@pytest.fixture
def noted(noted_server: Noted) -> Noted:
    """The server, as if nobody had asked it for anything yet."""
    noted_server.effects.clear()
    noted_server.busy = None
    return noted_server
