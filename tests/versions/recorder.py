"""A plugin of pytest for `make versions`: runs the tests with the mark `versions`, and writes what came out by row."""

import json
import os
from pathlib import Path

import pytest

STATES = ("passed", "skipped", "failed")
"""From the best to the worst: a row is as good as its worst test."""


class Recorder:
    """Collects the outcomes of tests by the row that their mark names."""

    def __init__(self, path: Path) -> None:
        self._path = path
        self._of: dict[str, str] = {}
        self._outcomes: dict[str, str] = {}

    @pytest.hookimpl(trylast=True)
    def pytest_collection_modifyitems(self, config: pytest.Config, items: list[pytest.Item]) -> None:
        """Keep the tests that have a row."""
        self._of = {item.nodeid: mark.args[0] for item in items if (mark := item.get_closest_marker("versions"))}
        self._outcomes = dict.fromkeys(self._of, "failed")  # until it has passed
        config.hook.pytest_deselected(items=[item for item in items if item.nodeid not in self._of])
        items[:] = [item for item in items if item.nodeid in self._of]

    def pytest_runtest_logreport(self, report: pytest.TestReport) -> None:
        """Record what came out, at once: this process may be killed."""
        if report.skipped and "LONG=1" in str(report.longrepr):  # the long form of what other tests of the row check
            self._outcomes.pop(report.nodeid, None)
        elif report.when == "call" or report.outcome != "passed":
            self._outcomes[report.nodeid] = report.outcome
        rows: dict[str, str] = {}
        for test, outcome in self._outcomes.items():
            rows[self._of[test]] = max(rows.get(self._of[test], "passed"), outcome, key=STATES.index)
        self._path.write_text(json.dumps(rows))


def pytest_configure(config: pytest.Config) -> None:
    """Record to the file in VERSIONS_RECORD."""
    config.pluginmanager.register(Recorder(Path(os.environ["VERSIONS_RECORD"])))
