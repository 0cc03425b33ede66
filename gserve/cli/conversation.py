"""A conversation at the terminal: `gserve chat` without a message."""

import signal
import sys
from collections.abc import Callable, Mapping, Sequence
from contextlib import closing, suppress

from gserve_core.batch.items import Seeds
from gserve_core.config import LORA
from gserve_core.errors import GserveError, ItemError, RemoteError, TransportError
from gserve_core.messages import Params
from gserve_core.openai_params import chat_fields
from gserve_core.service.model import Model
from gserve_core.service.service import VLLMService
from gserve_transports.http_client import GatewayClient

from .display import print_stderr, printable
from .service import serving
from .signals import Signalled, on_signals, raise_signalled

NOT_FOUND = 404
"""Status of a route that the engine or the model does not offer."""

type Messages = Sequence[Mapping[str, str]]


def converse(
    service: VLLMService,
    model: VLLMService | Model,
    opening: Messages,
    params: Params | None,
    adapter: str | None = None,
) -> None:
    """Run a conversation with a model of a service. A message that fails or is cancelled is not kept in it.

    `adapter`: the name of its adapter; None: the default.

    Raises GserveError at the end: messages failed, and they did not come from a terminal.
    """
    prompt = "you> " if sys.stdin.isatty() and sys.stdout.isatty() else ""
    history = [*opening]
    answers = Answers(service, params, model, adapter)
    count = failed = 0
    with serving(service):
        while True:
            try:
                text = input(prompt).strip()
            except EOFError:
                if prompt:
                    print()
                break
            if text == "/exit":
                break
            if not text:
                continue
            count += 1
            asked = [*history, {"role": "user", "content": text}]
            line = _Line()
            try:
                answer = answers.write(asked, line.write)
            except Signalled as signalled:
                line.end()
                if signalled.number != signal.SIGINT:
                    raise
                on_signals(raise_signalled)  # this signal cancels only the answer
                print_stderr("cancelled")
            except (ItemError, TransportError) as error:
                line.end()
                print_stderr(f"error: {error}")
                failed += 1
            else:
                line.end(always=True)
                history = [*asked, {"role": "assistant", "content": answer}]
    if failed and not sys.stdin.isatty():
        raise GserveError(f"{failed} of {count} messages failed")


class Answers:
    """The answers of a service, streamed by OpenAI's API of its gateway. `model`: one of several models.

    Without a gateway, or if this API does not have the engine, the model or the parameters, an answer comes in one
    piece.
    """

    def __init__(
        self,
        service: VLLMService,
        params: Params | None,
        model: VLLMService | Model | None = None,
        adapter: str | None = None,
    ) -> None:
        self._service = service
        self._calls = model or service
        self._name = model.name if isinstance(model, Model) else None
        self._adapter = adapter
        self._params = params
        self._fields = chat_fields(params)
        self._seeds: Seeds | None = None

    def write(self, messages: Messages, write: Callable[[str], object]) -> str:
        """Request the answer to a conversation, pass its parts to `write` as they come, and return it.

        Raises ItemError or TransportError: it failed.
        """
        gateway = self._service.gateway
        if gateway is not None and self._fields is not None:
            client = GatewayClient(gateway.base_url, gateway.api_key, gateway.certificate)
            try:
                return self._stream(client, messages, write)
            except TransportError as error:  # a service whose gateway is gone may come back
                if not error.is_gone and not (isinstance(error, RemoteError) and error.status == NOT_FOUND):
                    raise
        (outcome,) = self._calls.chat(
            [messages], self._params, return_extra=True, on_error="return", adapter=self._adapter
        )  # fmt: skip
        if isinstance(outcome, ItemError):
            raise outcome
        text: str = outcome[0].text
        write(text)
        return text

    def _stream(self, client: GatewayClient, messages: Messages, write: Callable[[str], object]) -> str:
        body = {"messages": messages, **self._model(client), **(self._fields or {})}
        if "seed" not in body and body.get("temperature") != 0 and (seed := self._seed(client)) is not None:
            body["seed"] = seed
        answer = reasoning = ""
        with closing(client.stream_chat(body)) as deltas:
            for delta in deltas:
                if thought := delta.get("reasoning") or delta.get("reasoning_content"):
                    reasoning += thought
                    write(thought)
                if part := delta.get("content"):
                    if reasoning and not answer:
                        write("\n\n")
                    answer += part
                    write(part)
        return answer

    def _model(self, client: GatewayClient) -> dict[str, str]:
        """Return the field that names the adapter or the model, if there is a choice.

        Without the name of an adapter it is that of `lora_path`, which gserve's other routes apply too.
        """
        parents = {model["id"]: model.get("parent") for model in client.models()}
        if self._name is None:
            adapter = self._adapter or (LORA if parents.get(LORA) else None)
            return {} if adapter is None else {"model": adapter}
        own = next((it.adapters for it in client.overview().models if it.name == self._name), [])
        adapter = self._adapter or (LORA if LORA in own else None)
        if adapter is not None and parents.get(adapter) != self._name:  # another model has one of this name too
            raise RemoteError(f"'{self._name}' has no adapter of its own named '{adapter}'", status=NOT_FOUND)
        return {"model": adapter or self._name}

    def _seed(self, client: GatewayClient) -> int | None:
        """Return the seed of the next answer, as it follows from the seed of the model; None: it has none."""
        if self._seeds is None:
            seed = 0
            with suppress(GserveError):  # a service of an older version
                seen = client.overview()
                seed = next((it.seed for it in seen.models if it.name == self._name), seen.seed)
            self._seeds = Seeds(seed)
        of = self._seeds.of_next_call()
        return None if of is None else of(0)


class _Line:
    """A text on stdout that is written part by part, and then ends as a line."""

    def __init__(self) -> None:
        self._is_begun = False

    def write(self, text: str) -> None:
        """Write a part. On a terminal, its control characters are shown as text."""
        self._is_begun = True
        sys.stdout.write(printable(text) if sys.stdout.isatty() else text)
        sys.stdout.flush()

    def end(self, *, always: bool = False) -> None:
        """End the line if it has begun. `always`: even if nothing has been written."""
        if self._is_begun or always:
            print(flush=True)
