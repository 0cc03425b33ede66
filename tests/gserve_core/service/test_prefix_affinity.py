"""Prompts that share a long prefix go to the same server: items of calls, and requests to the gateway."""

import random
import re
from collections import defaultdict
from collections.abc import Iterable, Iterator
from importlib import import_module
from pathlib import Path
from typing import Any

import httpx
import pytest

from gserve import GatewayConfig, LLMConfig, ServeConfig, VLLMService

PLACED = """
import os
from dataclasses import dataclass
from typing import ClassVar
from gserve import hookimpl
from gserve_core.engines.echo import EchoEngine, RunningEcho

@dataclass(frozen=True, kw_only=True)
class Placed(EchoEngine):
    name: ClassVar[str] = "placed"

    async def start(self, llm, report):
        running = await super().start(llm, report)
        running.__class__ = RunningPlaced
        return running

class RunningPlaced(RunningEcho):
    async def run(self, prepared):
        text, words, params, tokens = prepared
        return await super().run((text, [words[0], str(os.getpid())], params, tokens))

@hookimpl
def gserve_register_engines():
    return [Placed]
"""
"""An engine that answers with the first word of the prompt and the process of the server."""
DOCUMENTS = [f"document-{number} " * 200 for number in range(8)]


@pytest.fixture(scope="module", params=[True, False], ids=["on", "off"])
def service(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Iterator[VLLMService]:
    folder: Path = tmp_path_factory.mktemp("plugins")
    name = f"placed_{request.param}".lower()
    (folder / f"{name}.py").write_text(PLACED)
    serve = ServeConfig(servers=2, prefix_affinity=request.param)
    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(str(folder))
        engine = import_module(name).Placed(capacity=4)
        with VLLMService(
            LLMConfig("m", max_model_len=2000), serve, engine=engine, plugins=[name], gateway=GatewayConfig(),
            name=name.replace("_", "-"),
        ) as made:  # fmt: skip
            yield made


def servers_of(answers: Iterable[str]) -> list[set[str]]:
    """Return the servers of each document."""
    found: defaultdict[str, set[str]] = defaultdict(set)
    for answer in answers:
        document, server = answer.split()
        found[document].add(server)
    return [*found.values()]


def is_on(service: VLLMService) -> bool:
    return service.dispatcher_of().prefix_affinity


@pytest.mark.parametrize("is_attached", [False, True], ids=["own", "attached"])
def test_the_questions_to_a_document_go_to_one_server(service: VLLMService, is_attached: bool) -> None:
    prompts = [f"{document}question {number}?" for document in DOCUMENTS for number in range(12)]
    random.Random(0).shuffle(prompts)
    if is_attached:
        with VLLMService.attach("placed-true" if is_on(service) else "placed-false") as attached:
            answers = attached.generate(prompts, {"max_tokens": 9})
    else:
        answers = service.generate(prompts, {"max_tokens": 9})
    found = servers_of(answer for (answer,) in answers)
    assert len(set.union(*found)) == 2
    count = sum(map(len, found))
    assert count <= 9 if is_on(service) else count >= 13, f"{count} times, a server got a document"


@pytest.mark.parametrize("route", ["/generate", "/chat", "/v1/completions", "/v1/chat/completions"])
def test_the_gateway_asks_the_server_that_has_the_document(service: VLLMService, route: str) -> None:
    assert service.base_url is not None
    answers = []
    with httpx.Client(
        base_url=service.base_url.removesuffix("/v1"), headers={"Authorization": f"Bearer {service.api_key}"}
    ) as client:
        for number in range(4):
            for document in DOCUMENTS[:3]:
                reply = client.post(route, json=body_of(route, f"{document}question {number}?"))
                assert reply.status_code == 200, reply.text
                (answer,) = re.findall(r"document-\d+ \d+", reply.text)
                answers.append(answer)
    found = servers_of(answers)
    assert len(set.union(*found)) == 2
    assert [len(it) for it in found] == ([1, 1, 1] if is_on(service) else [2, 2, 2])


def body_of(route: str, prompt: str) -> dict[str, Any]:
    messages = [{"role": "user", "content": prompt}]
    match route:
        case "/generate":
            return {"prompts": [prompt], "params": {"max_tokens": 9}}
        case "/chat":
            return {"conversations": [messages], "params": {"max_tokens": 9}}
        case "/v1/completions":
            return {"model": "m", "prompt": prompt, "max_tokens": 9}
    return {"model": "m", "messages": messages, "max_tokens": 9}
