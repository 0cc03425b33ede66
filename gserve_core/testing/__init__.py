"""Checks for authors of plugins: contracts of launchers, transports and engines, and leftovers of tests.

`check_launcher(MyLauncher())`, `check_transport(MyTransport())` and `check_engine(MyEngine(), llm_config)` check a
plugin. They raise AssertionError if it breaks a contract of `gserve_core.interfaces`. gserve's own tests check every
registered class with them.

For the pytest fixtures, write `pytest_plugins = ["gserve_core.testing"]` into your conftest.py:

- `nothing_left`: the test must leave no process and no state file of gserve behind.
- `default_signals`: for a session that sends signals to its programs.
"""

from collections.abc import Iterator
from contextlib import suppress

from .contracts import check_engine, check_launcher, check_transport
from .leftovers import END_SECONDS, RUN_VARIABLE, end_leftovers, our_files, our_processes, our_shared_memory
from .signals import signals_by_default

__all__ = [
    "END_SECONDS",
    "RUN_VARIABLE",
    "check_engine",
    "check_launcher",
    "check_transport",
    "end_leftovers",
    "our_files",
    "our_processes",
    "our_shared_memory",
    "signals_by_default",
]

try:
    import pytest
except ImportError:  # pytest is only needed for the fixtures
    pass
else:

    @pytest.fixture
    def nothing_left() -> Iterator[None]:
        """Fail if a test leaves a process or a state file of gserve behind."""
        processes, files = our_processes(), our_files()
        yield
        left: list[object] = [*end_leftovers(processes).items()]
        for file in our_files() - files:  # leftovers are removed, so that they fail no other test
            left.append(file)
            with suppress(OSError):
                file.unlink()
        assert not left, f"processes or state files left behind: {left}"

    @pytest.fixture(scope="session")
    def default_signals() -> Iterator[None]:
        """Let every program that a test starts receive its signals, even if the tests run under `nohup`."""
        with signals_by_default():
            yield
