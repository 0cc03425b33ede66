"""The server of the tests of HTTP whose every effect is noted, as fixtures."""

from collections.abc import Iterator

import pytest

from tests.gserve_transports.noted import Noted, served


@pytest.fixture(scope="module")
def noted_server() -> Iterator[Noted]:
    """One server for a module."""
    with served(Noted()) as api:
        yield api


@pytest.fixture
def noted(noted_server: Noted) -> Noted:
    """The server, as if nobody had asked it for anything yet."""
    noted_server.effects.clear()
    noted_server.busy = None
    return noted_server
