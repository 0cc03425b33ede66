"""`gserve scale` and `gserve reload` at a launched service, as a user types them."""

import json
import subprocess
from typing import Any

from tests.gserve.place import Place, eventually


def servers(place: Place) -> dict[str, Any]:
    """Return the servers that `gserve ps` shows, by name."""
    (service,) = json.loads(place.run("ps", "--json").stdout)["services"]
    return {server["name"]: server for server in service["servers"]}


def test_a_launched_service_is_scaled_and_reloaded(place: Place) -> None:
    launch = place.start("launch", place.config())
    place.run("wait", "demo")
    assert place.run("scale", "demo", "2").stderr == "'demo': 2 servers ready\n"
    assert sorted(servers(place)) == ["server-0", "server-1"]
    eventually(lambda: "server-1 is ready\n" in place.stderr)
    place.config(servers=1, latency=0.01)
    assert place.run("reload", "demo").stderr == "'demo': 1 server ready\n"
    assert list(servers(place)) == ["server-2"]
    eventually(lambda: "server-2 is ready\n" in place.stderr)
    assert place.run("generate", "--attach", "demo", "a b").stdout == "a b\n"

    failed = place.run("reload", "demo", place.config(fail_start="out of words"), code=1)
    assert "the engine ran out of words" in failed.stderr
    wrong = place.run("reload", "demo", place.config(latency="slow"), code=2)
    assert "demo.yaml" in wrong.stderr
    assert "latency" in wrong.stderr
    assert "name it, as in gserve reload" in place.run("reload", "demo", "--set", "serve.servers=2", code=2).stderr
    assert "no service named 'dem'" in place.run("scale", "dem", "2", code=2).stderr
    assert list(servers(place)) == ["server-2"]

    changed = place.run("reload", "demo", place.config(), "--in-place", "--set", "llm.model_name=other")
    assert changed.stderr == "'demo': 1 server ready\n"
    assert servers(place)["server-2"]["model"] == "other"
    kept = place.run("reload", "demo", "--only-gateway").stderr
    assert kept == "'demo': the keys and the queue_timeout of the gateway were read again\n"
    assert servers(place)["server-2"]["generation"] == 2
    place.run("stop", "demo")
    assert launch.wait(30) == 0, "servers that were replaced have not failed"
    eventually(lambda: not place.servers())


def test_a_second_change_is_refused_while_the_first_has_not_ended(place: Place) -> None:
    place.start("launch", place.config())
    place.run("wait", "demo")
    place.config(load_time=60.0)
    reload = place.start("reload", "demo", stderr=subprocess.DEVNULL)
    eventually(lambda: len(servers(place)) == 2)
    refused = place.run("scale", "demo", "1", code=1).stderr
    assert "another change of this service is in progress: try again when it has ended" in refused
    place.run("stop", "demo")
    assert reload.wait(30) == 1
    eventually(lambda: not place.servers())


def test_adapters_of_a_launched_service_are_added_listed_and_removed(place: Place) -> None:
    place.start("launch", place.config(show_adapter=True))
    place.run("wait", "demo")
    folder = place.folder / "sql-2"
    folder.mkdir()
    assert "expected adapter_config.json there" in place.run("adapters", "demo", "add", "sql", "sql-2", code=2).stderr
    (folder / "adapter_config.json").write_text("{}")
    (folder / "adapter_model.safetensors").write_bytes(b"")
    assert place.run("adapters", "demo", "add", "sql", "sql-2").stderr == "'demo': the adapter 'sql' is loaded\n"
    assert place.run("adapters", "demo", "list").stdout == f"sql\t{folder}\n"
    assert place.run("generate", "--attach", "demo", "--adapter", "sql", "a b").stdout == "a b sql=sql-2\n"
    assert "expected gserve adapters demo add ADAPTER PATH" in place.run("adapters", "demo", "add", "x", code=2).stderr
    assert place.run("adapters", "demo", "remove", "sql").stderr == "'demo': the adapter 'sql' is removed\n"
    assert "the adapter 'sql' is not loaded" in place.run("adapters", "demo", "remove", "sql", code=2).stderr
    failed = place.run("generate", "--attach", "demo", "--adapter", "sql", "a", code=1).stderr
    assert "there is no adapter 'sql'; the adapters are: none" in failed
    place.run("stop", "demo")
    eventually(lambda: not place.servers())
