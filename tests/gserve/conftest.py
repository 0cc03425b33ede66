"""What the tests of the command line share."""

from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.gserve.place import Place


@pytest.fixture
def place(tmp_path: Path) -> Iterator[Place]:
    """Return a place of this test's own, which must leave nothing."""
    place = Place(tmp_path)
    yield place
    place.assert_nothing_is_left()
