"""OpenAI's batch files: what is refused, sent, sent again, and continued. Over real servers and a scripted one."""

import contextlib
import errno
import gzip
import json
import os
import signal
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, nullcontext
from pathlib import Path
from typing import Any

import pytest

from gserve import (
    ConfigError,
    GatewayConfig,
    GserveError,
    LLMConfig,
    RemoteError,
    ServeConfig,
    TransportError,
    VLLMService,
)
from gserve_core.engines.echo import EchoEngine
from gserve_core.interfaces import Reply
from gserve_core.rows import openai_batch
from gserve_core.rows.batch_files import BatchSummary
from gserve_core.rows.job import FileJob
from gserve_core.rows.parts import Part, parts_in
from tests.gserve_core.fake_servers import until
from tests.listeners import listener

CHAT = "/v1/chat/completions"
OK = b'{"id": "x", "usage": {"prompt_tokens": 2, "completion_tokens": 3}}'


def line(name: str, text: str = "one two", url: str = CHAT, **body: Any) -> dict[str, Any]:
    asked = {"messages": [{"role": "user", "content": text}]} if url == CHAT else {"prompt": text}
    return {"custom_id": name, "method": "POST", "url": url, "body": {"model": "m", **asked, **body}}


def write(path: Path, *lines: Any) -> Path:
    path.write_text("".join(f"{it if isinstance(it, str) else json.dumps(it)}\n" for it in lines))
    return path


def read(path: Path) -> list[dict[str, Any]]:
    return [json.loads(row) for row in path.read_text().splitlines()]


@pytest.fixture
def source(tmp_path: Path) -> Path:
    return tmp_path / "batch.jsonl"


@pytest.fixture
def output(tmp_path: Path) -> Path:
    return tmp_path / "out.jsonl"


@pytest.fixture(scope="module")
def service() -> Iterator[VLLMService]:
    with VLLMService(
        LLMConfig("m", max_model_len=50), ServeConfig(servers=2), engine=EchoEngine(), gateway=GatewayConfig()
    ) as running:
        yield running


class Scripted:
    """The way to a gateway that answers as a function says."""

    capacity = 100

    def __init__(self, answer: Callable[[dict[str, Any]], Reply] = lambda _: Reply(200, OK)) -> None:
        self._answer = answer
        self.sent: Counter[str] = Counter()
        self.state = "ok"
        self.is_gone = False
        self.entered = self.left = 0

    async def post(self, path: str, body: bytes, request_id: str) -> Reply:
        if self.is_gone:
            raise TransportError("nothing listens there", is_gone=True)
        assert path == CHAT
        assert len(request_id) == 32
        asked = json.loads(body)
        self.sent[asked["messages"][0]["content"]] += 1
        return self._answer(asked)

    async def status(self) -> str:
        if self.is_gone:
            raise TransportError("nothing listens there", is_gone=True)
        return self.state

    async def close(self) -> None:
        self.left += 1

    def serving(self, lines: int) -> AbstractContextManager[Callable[[], object]]:
        self.entered = lines
        return nullcontext(lambda: None)


def run(source: Path, output: Path, requests: Scripted, *, overwrite: bool = False, **facts: Any) -> BatchSummary:
    return openai_batch.run(
        source, output, requests, facts, overwrite=overwrite, serving=requests.serving, is_over=lambda _: False
    )


@pytest.fixture
def quick(monkeypatch: pytest.MonkeyPatch) -> None:
    """Let broken connections, and the look at the gateway, take no time."""
    monkeypatch.setattr(openai_batch, "RETRY_SECONDS", 0.01)
    monkeypatch.setattr(openai_batch, "CHECK_SECONDS", 0.01)


# ---------------------------------------------------------------------------------------------------- over real servers


def test_every_line_is_answered_in_the_form_of_openai(service: VLLMService, source: Path, output: Path) -> None:
    lines = [line(f"chat-{number}", f"word{number} two") for number in range(300)]
    lines += [line(f"text-{number}", f"word{number}", url="/v1/completions", max_tokens=1) for number in range(20)]
    summary = service.run_batch(write(source, *lines), output)
    found = {it["custom_id"]: it for it in read(output)}
    assert found.keys() == {it["custom_id"] for it in lines}
    assert len(read(output)) == len(lines)
    first = found["chat-7"]
    assert list(first) == ["id", "custom_id", "response", "error"]
    assert first["id"].startswith("batch_req_")
    assert first["error"] is None
    assert list(first["response"]) == ["status_code", "request_id", "body"]
    assert first["response"]["status_code"] == 200
    assert first["response"]["body"]["choices"][0]["message"]["content"] == "word7 two"
    assert found["text-3"]["response"]["body"]["choices"][0]["text"] == "word3"
    assert len({it["id"] for it in found.values()} | {it["response"]["request_id"] for it in found.values()}) == 640
    assert (summary.lines, summary.answered, summary.failed, summary.skipped) == (320, 320, 0, 0)
    assert (summary.prompt_tokens, summary.completion_tokens) == (620, 620)
    assert sorted(it.name for it in output.parent.iterdir()) == [".out.jsonl.gserve.json", "batch.jsonl", "out.jsonl"]


def test_what_a_server_refuses_is_the_answer_of_its_line(service: VLLMService, source: Path, output: Path) -> None:
    lines = [
        line("fine"),
        line("model", model="nobody"),
        line("long", "word " * 60),
        line("route", url="/v1/embeddings"),
        line("value", temperature="hot"),
        line("refused", chat_template="{{ x }}"),
    ]
    summary = service.run_batch(write(source, *lines), output)
    found = {it["custom_id"]: it for it in read(output)}
    status = {name: it["response"]["status_code"] for name, it in found.items()}
    assert status == {"fine": 200, "model": 404, "long": 400, "route": 404, "value": 400, "refused": 400}
    assert found["model"]["response"]["body"]["error"]["message"] == "The model `nobody` does not exist."
    assert all(it["error"] is None for it in found.values())
    assert summary.failures == {"status 404": 2, "status 400": 3}
    again = service.run_batch(source, output)
    assert (again.skipped, again.failures, again.prompt_tokens) == (6, summary.failures, summary.prompt_tokens)
    assert "6 lines (6 by an earlier run): 1 answered, 5 failed; 2 tokens in, 2 tokens out" in str(again)


def test_servers_that_are_killed_in_mid_run_cost_no_line(source: Path, output: Path) -> None:
    lines = [line(str(number), f"word{number} two three") for number in range(400)]
    serve = ServeConfig(servers=2, max_restarts=1000)
    engine = EchoEngine(latency=0.02, capacity=8)
    with VLLMService(LLMConfig("m"), serve, engine=engine, gateway=GatewayConfig()) as service:
        write(source, *lines)
        done = threading.Event()

        def kill() -> None:
            least = 0
            while not done.wait(0.5):
                now = output.read_bytes().count(b"\n") if output.exists() else 0
                if now < least:  # those that saw the last death finish first
                    continue
                with contextlib.suppress(ProcessLookupError):
                    if (pid := listener(service.servers[0].port)) is not None:
                        os.kill(pid, signal.SIGKILL)
                        least = now + 50

        killer = threading.Thread(target=kill)
        killer.start()
        try:
            summary = service.run_batch(source, output)
        finally:
            done.set()
            killer.join()
    statuses = Counter(it["response"] and it["response"]["status_code"] for it in read(output))
    assert sorted(int(it["custom_id"]) for it in read(output)) == list(range(400))
    assert statuses[200] == summary.answered == 400, statuses


def test_its_state_is_told_and_a_job_on_rows_does_not_continue_it(source: Path, output: Path) -> None:
    run(write(source, line("a"), line("b")), output, Scripted())
    assert parts_in(output.parent) == [Part("out.jsonl", "done", 2, 0, 2)]
    rows = write(source.with_name("rows.jsonl"), {"prompt": "a"})
    with (
        pytest.raises(ConfigError, match=r"out\.jsonl was made .*choose another --output, or --overwrite"),
        FileJob(source=rows, output=output).begin({}),
    ):
        raise AssertionError("it has begun")


def test_a_key_with_a_limit_only_takes_longer(source: Path, output: Path) -> None:
    gateway = GatewayConfig(keys={"few": {"key": "k" * 20, "max_requests": 16}})
    with VLLMService(LLMConfig("m"), engine=EchoEngine(latency=0.01), gateway=gateway) as service:
        assert service.base_url is not None
        with VLLMService.attach(service.base_url, api_key="k" * 20) as attached:
            summary = attached.run_batch(write(source, *(line(str(number)) for number in range(80))), output)
    assert (summary.answered, summary.failed) == (80, 0)


def test_a_service_without_a_gateway_or_that_does_not_run_says_so(source: Path, output: Path) -> None:
    write(source, line("a"))
    with pytest.raises(GserveError, match="goes through the gateway, and this service has none: add a section"):
        VLLMService(LLMConfig("m"), engine=EchoEngine()).run_batch(source, output)
    with pytest.raises(GserveError, match="the service is not running"):
        VLLMService(LLMConfig("m"), engine=EchoEngine(), gateway=GatewayConfig()).run_batch(source, output)


# --------------------------------------------------------------------------------------------------------- wrong lines

WRONG = [
    ("{", "not JSON"),
    ("[1]", "expected a JSON object with custom_id, method, url and body"),
    ("\udcff", "not JSON"),
    ('{"method": "POST"}', "expected a custom_id, a text that is not empty, got None"),
    (line("x") | {"custom_id": 7}, "expected a custom_id, a text that is not empty, got 7"),
    (line("get") | {"method": "GET"}, "expected the method 'POST', got 'GET'"),
    (line("models") | {"url": "/v1/models"}, "a batch cannot use the url '/v1/models'; "),
    (line("typo") | {"url": "/v1/chat/completion"}, "did you mean '/v1/chat/completions'?"),
    (line("audio") | {"url": "/v1/audio/translations"}, "audio is sent as a form, not in a batch"),
    (line("no url") | {"url": None}, "expected a url such as '/v1/chat/completions', got None"),
    (line("body") | {"body": [1]}, "expected a JSON object as the body, got [1]"),
    ({"custom_id": "none", "method": "POST", "url": CHAT}, "expected a JSON object as the body, got null"),
    (line("stream", stream=True), "an answer in a batch cannot be streamed: leave 'stream' out of the body"),
    (line("fine"), "the custom_id 'fine' stands on an earlier line too"),
    (line("get"), "the custom_id 'get' stands on an earlier line too"),
]


def test_a_wrong_line_is_one_error_with_its_number_and_the_rest_goes_on(source: Path, output: Path) -> None:
    lines = [line("fine"), "", *(it for it, _ in WRONG), line("last", stream=False)]
    source.write_bytes(
        b"\xef\xbb\xbf"
        + b"\r\n".join((it if isinstance(it, str) else json.dumps(it)).encode(errors="surrogateescape") for it in lines)
    )
    requests = Scripted()
    summary = run(source, output, requests)
    found = read(output)
    errors = {it["error"]["line"]: it for it in found if it["error"] is not None}
    assert list(errors) == list(range(3, 3 + len(WRONG)))
    for (number, it), (_, text) in zip(errors.items(), WRONG, strict=True):
        assert it["response"] is None
        assert it["error"]["code"] == "invalid_line"
        assert it["error"]["message"].startswith(f"line {number}: ")
        assert text in it["error"]["message"]
    names = Counter(it["custom_id"] for it in found if it["custom_id"] is not None)
    assert set(names.values()) == {1}
    assert {"fine", "last", "get", "stream"} <= names.keys()
    assert (summary.lines, summary.answered, summary.failures) == (17, 2, {"invalid_line": 15})
    assert "for example: line 3: not JSON" in str(summary)
    again = run(source, output, requests)
    assert (again.lines, again.answered, again.failed) == (17, 2, 15)
    assert requests.sent == {"one two": 2}
    assert len(read(output)) == 17


def test_bodies_are_sent_as_they_stand(source: Path, output: Path) -> None:
    bodies: list[bytes] = []

    class Seen(Scripted):
        async def post(self, path: str, body: bytes, request_id: str) -> Reply:
            bodies.append(body)
            return Reply(200, OK)

    body = '{"messages": [], "seed": 12345678901234567890, "x": 1.10, "é": "\\u00e9"}'
    write(source, f'{{"custom_id": "a", "method": "POST", "url": "{CHAT}", "body": {body}}}')
    run(source, output, Seen())
    assert bodies == [body.encode()]


# ------------------------------------------------------------------------------------------------------- sending again


def test_a_busy_gateway_is_waited_for_and_a_refusal_for_good_is_the_answer(
    source: Path, output: Path, quick: None
) -> None:
    def answer(asked: dict[str, Any]) -> Reply:
        text = asked["messages"][0]["content"]
        if requests.sent[text] < 3 and text in ("429", "503"):
            return Reply(int(text), b"{}", 0.01)
        return Reply(503, b'{"error": {"message": "it is not sent again"}}') if text == "killer" else Reply(200, OK)

    requests = Scripted(answer)
    write(source, line("a", "429"), line("b", "503"), line("c", "killer"), line("d", "fine"))
    summary = run(source, output, requests)
    assert requests.sent == {"429": 3, "503": 3, "killer": 1, "fine": 1}
    assert summary.failures == {"status 503": 1}
    assert summary.example == "'c': it is not sent again"


def test_lines_that_another_attempt_may_help_are_tried_again(source: Path, output: Path) -> None:
    statuses = {"a": 200, "b": 404, "c": 500, "d": 503, "e": 429}
    write(source, *(line(name, name) for name in statuses))
    run(source, output, Scripted(lambda asked: Reply(statuses[asked["messages"][0]["content"]], b"{}")))
    requests = Scripted()
    summary = run(source, output, requests)
    assert sorted(requests.sent) == ["c", "d", "e"]
    assert (requests.entered, summary.skipped, summary.answered, summary.failed) == (3, 2, 4, 1)
    assert sorted(it["custom_id"] for it in read(output)) == list(statuses)


def test_a_gateway_that_comes_back_is_waited_for(source: Path, output: Path, quick: None) -> None:
    requests = Scripted()
    requests.is_gone = True
    timer = threading.Timer(0.3, lambda: setattr(requests, "is_gone", False))
    timer.start()
    assert run(write(source, line("a"), line("b")), output, requests).answered == 2
    timer.join()


def test_a_gateway_that_does_not_come_back_ends_the_job_and_another_run_goes_on(
    source: Path, output: Path, quick: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(openai_batch, "RETURN_SECONDS", 0.2)
    requests = Scripted()
    requests.is_gone = True
    write(source, *(line(str(number)) for number in range(200)))
    with pytest.raises(TransportError, match=r"not answered for 0\.2 s: nothing listens there; the same command cont"):
        run(source, output, requests)
    assert requests.left == 1
    requests.is_gone = False
    assert run(source, output, requests).answered == 200


def test_a_request_whose_connection_breaks_thrice_has_failed(source: Path, output: Path, quick: None) -> None:
    def answer(asked: dict[str, Any]) -> Reply:
        if asked["messages"][0]["content"] == "cut" or not requests.sent["twice"] > 2:
            raise TransportError("it broke")
        return Reply(200, OK)

    requests = Scripted(answer)
    summary = run(write(source, line("a", "cut"), line("b", "twice")), output, requests)
    assert requests.sent == {"cut": 3, "twice": 3}
    assert summary.failures == {"connection_lost": 1}
    (lost,) = [it for it in read(output) if it["error"]]
    assert (lost["custom_id"], lost["error"]["line"]) == ("a", 1)
    assert lost["error"]["message"] == "line 1: 3 connections broke: it broke"


@pytest.mark.parametrize(("state", "why"), [("draining", "the service is ending"), ("stopped", "no server any more")])
def test_a_service_that_ends_leaves_the_rest_for_another_run(
    source: Path, output: Path, quick: None, state: str, why: str
) -> None:
    def answer(asked: dict[str, Any]) -> Reply:
        if int(asked["messages"][0]["content"]) < 50:
            return Reply(200, OK)
        requests.state = state
        return Reply(503, b"{}")

    requests = Scripted(answer)
    write(source, *(line(str(number), str(number)) for number in range(500)))
    with pytest.raises(GserveError, match=f"{why}.*; the same command continues"):
        run(source, output, requests)
    assert sorted(int(it["custom_id"]) for it in read(output)) == list(range(50))
    summary = run(source, output, Scripted())
    assert (summary.skipped, summary.answered, summary.failed) == (50, 500, 0)


def test_a_key_that_is_refused_ends_the_job(source: Path, output: Path) -> None:
    with pytest.raises(RemoteError, match="refuses the API key"):
        run(write(source, line("a"), line("b")), output, Scripted(lambda _: Reply(401, b"{}")))


def test_answers_of_any_form_become_one_line_of_json(source: Path, output: Path) -> None:
    bodies = {"a": b'{\n "x": "\\n"\r\n}', "b": b"a\ntext", "c": b"", "d": b"\xff", "e": b"[1,\n2]"}
    write(source, *(line(name, name) for name in bodies))
    run(source, output, Scripted(lambda asked: Reply(200, bodies[asked["messages"][0]["content"]])))
    found = {it["custom_id"]: it["response"]["body"] for it in read(output)}
    assert found == {"a": {"x": "\n"}, "b": "a\ntext", "c": "", "d": "\ufffd", "e": [1, 2]}


# ---------------------------------------------------------------------------------------------------------- continuing


def test_a_line_that_was_cut_off_is_made_anew(source: Path, output: Path) -> None:
    write(source, *(line(str(number), str(number)) for number in range(5)))
    run(source, output, Scripted())
    whole = output.read_bytes()
    for cut in (1, 30, len(whole.splitlines()[-1])):
        output.write_bytes(whole[:-cut])
        requests = Scripted()
        assert run(source, output, requests).skipped == 4
        assert sum(requests.sent.values()) == 1
        assert sorted(it["custom_id"] for it in read(output)) == list("01234")


def test_nothing_is_started_when_nothing_is_to_be_sent(source: Path, output: Path) -> None:
    write(source, *(line(str(number)) for number in range(5)), "{")
    run(source, output, Scripted())
    requests = Scripted()
    assert run(source, output, requests).skipped == 5
    assert (requests.entered, requests.sent) == (0, {})


def test_another_model_or_another_input_is_refused(source: Path, output: Path) -> None:
    run(write(source, line("a")), output, Scripted(), model="m")
    with pytest.raises(ConfigError, match='was made with model "m", not "n"'):
        run(source, output, Scripted(), model="n")
    write(source, line("a", "another text"))
    with pytest.raises(ConfigError, match="was made with input "):
        run(source, output, Scripted(), model="m")
    requests = Scripted()
    assert run(source, output, requests, overwrite=True, model="n").answered == 1
    assert requests.sent == {"another text": 1}
    assert len(read(output)) == 1


def test_files_that_are_none_are_refused(source: Path, output: Path) -> None:
    with pytest.raises(ConfigError, match="does not exist"):
        run(source, output, Scripted())
    with pytest.raises(ConfigError, match="is not a file"):
        run(source.parent, output, Scripted())
    source.write_bytes(gzip.compress(b"{}"))
    with pytest.raises(ConfigError, match="it is compressed: expected a batch file of plain text"):
        run(source, output, Scripted())
    write(source, line("a"))
    with pytest.raises(ConfigError, match="expected another file for the output"):
        run(source, source, Scripted())
    with pytest.raises(ConfigError, match="from a file and written to a file"):
        run(source, Path("-"), Scripted())
    run(source, output, Scripted())
    output.write_text('{"not": "ours"}\n')
    with pytest.raises(ConfigError, match="not a line of a batch output"):
        run(source, output, Scripted())


def test_a_full_disk_ends_the_job_and_leaves_whole_lines(
    source: Path, output: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    write(source, *(line(str(number)) for number in range(100)))
    room, real = 5000, os.write

    def full(descriptor: int, text: bytes) -> int:
        nonlocal room
        if Path(f"/proc/self/fd/{descriptor}").readlink() != output:
            return real(descriptor, text)
        if not room:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        done = real(descriptor, text[:room])
        room -= done
        return done

    with monkeypatch.context() as patched:
        patched.setattr(os, "write", full)
        with pytest.raises(GserveError, match=r"out\.jsonl: cannot write the results: No space left on device; the sa"):
            run(source, output, Scripted())
    assert 0 < len(read(output)) < 100
    assert output.read_bytes().endswith(b"\n")
    assert run(source, output, Scripted()).answered == 100
    assert len(read(output)) == 100


def test_memory_is_bounded_by_the_bodies_in_flight(source: Path, output: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(openai_batch, "MOST_BYTES", 1000)
    write(source, *(line(str(number), "x" * 400) for number in range(20)), line("large", "x" * 2000))
    most = now = 0

    class Counting(Scripted):
        async def post(self, path: str, body: bytes, request_id: str) -> Reply:
            nonlocal most, now
            now += len(body)
            most = max(most, now if len(body) < 1000 else 0)
            reply = await super().post(path, body, request_id)
            now -= len(body)
            return reply

    assert run(source, output, Counting()).answered == 21
    assert most <= 1000


def test_an_interrupt_ends_the_requests_in_flight(source: Path, output: Path) -> None:
    write(source, *(line(str(number), "word " * 20) for number in range(50)))

    with VLLMService(
        LLMConfig("m"), ServeConfig(servers=1), engine=EchoEngine(latency=1.0), gateway=GatewayConfig()
    ) as slow:
        main = threading.main_thread().ident
        assert main is not None

        def interrupt() -> None:
            until(output.exists, 60)
            time.sleep(0.5)
            signal.pthread_kill(main, signal.SIGINT)

        thread = threading.Thread(target=interrupt, daemon=True)
        thread.start()
        began = time.monotonic()
        with pytest.raises(KeyboardInterrupt):
            slow.run_batch(source, output)
        assert time.monotonic() - began < 14  # an answer takes 16 s at least
        thread.join()
    assert output.read_bytes() == b""
