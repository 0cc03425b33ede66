"""A small set of many ids."""

from gserve_core.rows.id_set import IdSet


def test_it_holds_what_was_added_and_nothing_else() -> None:
    found = IdSet()
    assert all(found.add(f"id-{number}") for number in range(5000))
    assert not any(found.add(f"id-{number}") for number in range(5000))
    assert all(f"id-{number}" in found for number in range(5000))
    assert not any(f"other-{number}" in found for number in range(5000))
    assert len(found) == 5000
    assert "" not in found
    assert found.add("\ud800")
