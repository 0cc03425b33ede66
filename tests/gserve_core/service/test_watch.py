"""What a gateway shows of its service, without a server or a socket."""

import asyncio
from dataclasses import replace
from pathlib import Path

import pytest

from gserve_core.errors import LaunchError, RemoteError
from gserve_core.interfaces import Address, EngineInfo
from gserve_core.overview import ServerOverview
from gserve_core.service.state import Listening, Logging, Ready, ServerState, Start
from gserve_core.service.watch import MAX_ENDINGS, Watch

NEW = ServerState(name="server-0")
STARTING = NEW.begun(Start("an-instance", "canary-token", "canary-control"), NEW)
READY = STARTING.after(Listening(Address(["10.0.0.1"], 4321))).after(Ready(EngineInfo(model="m", capacity=8)))


def only(watch: Watch) -> ServerOverview:
    (server,) = watch.overview("ok", waiting=0, requests={}).servers
    return server


def test_the_servers_come_in_the_order_of_their_numbers() -> None:
    watch = Watch("a-service", lambda: 7)
    for number in (10, 2, 0):
        watch.update(replace(NEW, name=f"server-{number}"))
    shown = watch.overview("starting", waiting=3, requests={"server-2": 5})
    assert [(server.name, server.requests) for server in shown.servers] == [
        ("server-0", 0),
        ("server-2", 5),
        ("server-10", 0),
    ]
    assert (shown.name, shown.status, shown.waiting, shown.seed) == ("a-service", "starting", 3, 7)
    assert 0 <= shown.seconds < 60


def test_a_ready_server_has_an_address_and_a_model_and_a_dead_one_has_none() -> None:
    watch = Watch("", lambda: 0)
    watch.update(READY)
    shown = only(watch)
    assert (shown.state, shown.address, shown.model, shown.capacity) == ("ready", "10.0.0.1:4321", "m", 8)
    watch.update(READY.draining("cleaning up: killed", returns=True, died=True))
    shown = only(watch)
    assert (shown.state, shown.phase, shown.address) == ("draining", "cleaning up: killed", None)
    assert (shown.model, shown.capacity) == (None, None)


def test_each_failure_is_shown_once_and_stays_when_the_server_is_ready_again() -> None:
    watch = Watch("", lambda: 0)
    dying = READY.draining("cleaning up: killed", returns=True, died=True)
    for failure in (LaunchError("killed"), LaunchError("killed")):
        failed = replace(dying, failure=failure)
        for state in (READY, dying, failed, failed.queued("waiting to restart")):
            watch.update(state)
        assert only(watch).error == "killed"
    watch.update(replace(READY, generation=3))
    shown = watch.overview("ok", waiting=0, requests={})
    assert shown.servers[0].error is None
    assert [(ending.server, ending.cause) for ending in shown.endings] == [("server-0", "killed")] * 2


def test_the_newest_failures_are_kept() -> None:
    watch = Watch("", lambda: 0)
    for generation in range(MAX_ENDINGS + 10):
        watch.update(replace(NEW, generation=generation).failed(LaunchError(f"failure {generation}")))
    endings = watch.overview("stopped", waiting=0, requests={}).endings
    assert len(endings) == MAX_ENDINGS
    assert endings[0].generation == MAX_ENDINGS + 9
    assert all(ending.seconds >= 0 for ending in endings)


def test_an_overview_holds_no_secret() -> None:
    watch = Watch("", lambda: 0)
    watch.update(READY)
    assert "canary" not in str(watch.overview("ok", waiting=0, requests={}))


# ---------------------------------------------------------------------------------------------------------------- logs


def test_a_log_begins_anew_when_the_server_is_started_again(tmp_path: Path) -> None:
    watch = Watch("", lambda: 0)
    first, second = tmp_path / "server-0.log", tmp_path / "server-0.2.log"
    first.write_text("one\ntwo\n")
    second.write_text("three\nfour\nfive\n")
    watch.update(STARTING.after(Logging(first)))
    part = asyncio.run(watch.log_part("server-0", None, ""))
    assert (part.text, part.end) == ("one\ntwo\n", 8)
    assert asyncio.run(watch.log_part("server-0", 4, part.file)).text == "two\n"
    watch.update(STARTING.after(Logging(second)))
    again = asyncio.run(watch.log_part("server-0", part.end, part.file))
    assert (again.text, again.end) == ("three\nfour\nfive\n", 16)
    assert again.file != part.file


def test_a_log_that_is_not_there_is_told(tmp_path: Path) -> None:
    watch = Watch("", lambda: 0)
    for number in (10, 2):
        watch.update(replace(NEW, name=f"server-{number}"))
    with pytest.raises(RemoteError, match="no server 'x' here; the servers: server-2, server-10") as error:
        asyncio.run(watch.log_part("x", None, ""))
    assert error.value.status == 404
    with pytest.raises(RemoteError, match="server-2 has no log yet: it is stopped") as error:
        asyncio.run(watch.log_part("server-2", None, ""))
    assert error.value.status == 404
    watch.update(STARTING.after(Logging(tmp_path / "removed.log")))
    with pytest.raises(RemoteError, match="the log of server-0 cannot be read: No such file") as error:
        asyncio.run(watch.log_part("server-0", None, ""))
    assert error.value.status == 503
