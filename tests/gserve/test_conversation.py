"""`gserve chat` without a message: a conversation whose answers are streamed."""

import json
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest

from gserve import GatewayConfig, ItemError, VLLMService
from gserve.cli.conversation import Answers
from gserve.cli.display import printable
from gserve_core.errors import TransportError
from tests.gserve.place import Place, Terminal

SLOW = {"max_tokens": 3000, "ignore_eos": True}
"""Parameters of an answer that takes minutes."""
SCRIPTED = '''
import json
from dataclasses import dataclass
from gserve import hookimpl
from gserve_core.engines.echo import EchoEngine


@dataclass(frozen=True, kw_only=True)
class Scripted(EchoEngine):
    """Answers by OpenAI's API with what it was asked; by gserve's own, as echo."""

    name = "scripted"

    async def start(self, llm, report):
        engine = await super().start(llm, report)

        async def answer(scope, receive, send):
            kind = b"text/event-stream"
            if scope["path"] == "/v1/models":
                kind, body = b"application/json", json.dumps({"data": MODELS}).encode()
            else:
                asked = json.loads((await receive())["body"])
                told = {name: asked.get(name) for name in ("model", "seed", "temperature", "max_tokens")}
                told["turns"] = [message["content"] for message in asked["messages"]]
                deltas = [{"role": "assistant", "content": ""}, {"reasoning": "hm"}, {"content": "\\u2028"}]
                events = [
                    json.dumps({"choices": [{"index": 0, "delta": delta}]}, ensure_ascii=False)
                    for delta in [*deltas, {"content": json.dumps(told)}]
                ]
                if asked["messages"][-1]["content"] == "break":
                    events = [*events, json.dumps({"error": {"message": "it broke", "code": 500}})]
                elif asked["messages"][-1]["content"] != "cut":
                    events.append("[DONE]")
                body = "".join(f"data: {event}\\n\\n" for event in events).encode()
            await send({"type": "http.response.start", "status": 200, "headers": [(b"content-type", kind)]})
            await send({"type": "http.response.body", "body": body})

        async def http():
            return answer if MODELS else None

        engine.http = http
        return engine


@hookimpl
def gserve_register_engines():
    return [Scripted]
'''


def config_of(folder: Path, *models: Any, **llm: Any) -> Path:
    """Write the config of a service of this engine. Its OpenAI's API has these models, or does not exist."""
    module = f"scripted_{len(models)}"  # this process imports it only once
    (folder / f"{module}.py").write_text(f"MODELS = {list(models)!r}\n{SCRIPTED}")
    config = {"llm": {"model_name": "m"} | llm, "plugins": [module], "engine": {"type": "scripted"}}
    (folder / "scripted.yaml").write_text(json.dumps(config))
    return folder / "scripted.yaml"


@contextmanager
def scripted(folder: Path, *models: Any, **llm: Any) -> Iterator[VLLMService]:
    """Run such a service."""
    with VLLMService.from_yaml(config_of(folder, *models, **llm), gateway=GatewayConfig()) as service:
        yield service


@pytest.fixture(scope="module")
def service(tmp_path_factory: pytest.TempPathFactory) -> Iterator[VLLMService]:
    """Return a service whose model has an adapter and a seed."""
    models = {"id": "m"}, {"id": "lora", "parent": "m"}
    with scripted(tmp_path_factory.mktemp("scripted"), *models, seed=7) as service:
        yield service


def answer(answers: Answers, *contents: str) -> tuple[str, list[str]]:
    """Return an answer, and its parts as they came."""
    parts: list[str] = []
    text = answers.write([{"role": "user", "content": content} for content in contents], parts.append)
    return text, parts


def asked(answers: Answers, *contents: str) -> Any:
    """Return what the scripted engine was asked."""
    text, _ = answer(answers, *contents)
    return json.loads(text.strip())


# --------------------------------------------------------------------------------------------------------- its answers


def test_an_answer_comes_in_parts_what_the_model_thinks_first(service: VLLMService) -> None:
    text, parts = answer(Answers(service, None), "one", "two")
    assert parts == ["hm", "\n\n", "\u2028", text.removeprefix("\u2028")]
    assert json.loads(text.strip())["turns"] == ["one", "two"]


def test_the_adapter_and_the_seed_of_the_model_apply_as_they_do_to_other_items(service: VLLMService) -> None:
    first, again = Answers(service, None), Answers(service, None)
    one, two = asked(first, "one"), asked(first, "two")
    assert one["model"] == "lora"
    assert one["seed"] != two["seed"]
    assert asked(again, "one")["seed"] == one["seed"], "the seeds of the turns follow from the seed of the model"
    assert asked(Answers(service, {"seed": 3}), "one")["seed"] == 3
    assert asked(Answers(service, {"temperature": 0}), "one")["seed"] is None


def test_without_parameters_the_model_decides_and_with_some_the_rest_is_vllms_defaults(
    service: VLLMService,
) -> None:
    free, given = asked(Answers(service, None), "one"), asked(Answers(service, {"temperature": 0.5}), "one")
    assert (free["temperature"], free["max_tokens"]) == (None, None)
    assert (given["temperature"], given["max_tokens"]) == (0.5, 16)


def test_an_answer_that_breaks_off_is_an_error(service: VLLMService) -> None:
    with pytest.raises(TransportError, match="it broke"):
        answer(Answers(service, None), "break")
    with pytest.raises(TransportError, match="the answer ended before it was complete"):
        answer(Answers(service, None), "cut")
    with pytest.raises(TransportError, match="the request cannot be sent: "):
        answer(Answers(service, None), "\udcff")


def test_parameters_without_an_equal_in_openais_api_give_an_answer_in_one_piece(service: VLLMService) -> None:
    assert answer(Answers(service, {"logprobs": 1}), "one two") == ("one two", ["one two"])
    with pytest.raises(ItemError, match="unknown sampling parameter 'max_new_tokens'; write 'max_tokens'"):
        answer(Answers(service, {"max_new_tokens": 1}), "one two")


def test_an_engine_without_openais_api_answers_in_one_piece(tmp_path: Path) -> None:
    with scripted(tmp_path) as service:
        assert answer(Answers(service, None), "one two") == ("one two", ["one two"])


# ------------------------------------------------------------------------------------------------------ at the terminal


def test_ctrl_c_and_the_death_of_a_server_end_an_answer_and_not_the_conversation(place: Place) -> None:
    config = place.config("slow", capacity=1, latency=0.2)
    launched = place.start("launch", config, "--set", "serve.max_restarts=1000")
    place.run("wait", "slow")
    terminal = Terminal(place, "chat", "--attach", "slow", "--params", json.dumps(SLOW))
    terminal.expect("you> ")
    terminal.type("one two\n")
    for _ in range(3):
        terminal.expect("one two ")
    terminal.type("\x03")
    terminal.expect("\r\ncancelled\r\nyou> ")
    done = place.run("chat", "--attach", "slow", stdin="the only item\n")
    assert (done.stdout, done.stderr) == ("the only item\n", "")
    terminal.type("three four\n")
    terminal.expect("three four three")
    (server,) = place.servers()
    server.kill()
    terminal.expect("\r\nerror: the server died before the answer was complete\r\nyou> ")
    terminal.type("five six\n")
    terminal.expect("five six five")
    terminal.type("\x03")
    terminal.expect("you> ")
    terminal.type("\x04")
    assert terminal.end() == 0
    launched.terminate()
    assert launched.wait(30) == 0


def test_a_turn_that_fails_is_not_kept(place: Place) -> None:
    config = str(config_of(place.folder, {"id": "m"}))
    done = place.run("chat", config, "--system", "be brief", stdin="one\n\nbreak\ntwo\n/exit\nthree\n", code=1)
    first, _, second = (json.loads(line.strip()) for line in done.stdout.split("\n") if '"turns"' in line)
    assert second["turns"] == ["be brief", "one", "\u2028" + json.dumps(first), "two"]
    assert second["model"] is None, "there is no adapter"
    assert done.stderr.splitlines()[-2:] == ["error: it broke", "error: 1 of 3 messages failed"]


def test_control_characters_of_an_answer_do_not_reach_the_terminal(place: Place) -> None:
    config, shown = place.config(), r"a\u001b]0;title\u0007b\u009bc"
    place.write("in.txt", "a\x1b]0;title\x07b\x9bc")
    for arguments in ((), ("a\x1b]0;title\x07b\x9bc",)):
        with (place.folder / "in.txt").open() as stdin:
            terminal = Terminal(place, "chat", config, *arguments, stdin=stdin)
        terminal.expect(shown)
        assert terminal.end() == 0
    assert place.run("chat", config, stdin="a\x1bb\x9bc\n").stdout == "a\x1bb\x9bc\n"


def test_json_without_its_control_characters_is_the_same_json() -> None:
    text = json.dumps("a\x1b\x7f\x9b\n\tb", ensure_ascii=False)
    assert "\x7f" in text
    assert json.loads(printable(text)) == json.loads(text)
    assert printable("lines\nand\ttabs, ü and \u2028") == "lines\nand\ttabs, ü and \u2028"
