"""The numbers of tokens that an `AsyncLLM` works on, for requests of gserve and of OpenAI's API alike."""

import inspect
from typing import Any

from . import differences

OWN = "gserve-own-"
"""Beginning of the ids of gserve's own requests, which do not count."""


class TokenCounts:
    """Counts the tokens of an `AsyncLLM` from now on: of a prompt when it is added, of an answer as they are made.

    It changes two methods of vLLM's `OutputProcessor`. It costs about 1 µs a request, and 0.05 µs a token.
    If this vLLM lacks one of them, a warning is logged, and nothing is counted.
    """

    def __init__(self, engine: Any) -> None:
        self.prompt = self.completion = 0
        self._own: set[str] = set()
        """The ids of gserve's own requests in flight."""
        with differences.optional("the counts of tokens"):
            processor = engine.output_processor
            add, process = processor.add_request, processor.process_outputs
            place = [*inspect.signature(add).parameters].index("request_index") - 1

            def add_request(request: Any, *rest: Any, **named: Any) -> Any:
                index = rest[place] if len(rest) > place else named.get("request_index", 0)
                self._count_prompt(request, index)
                return add(request, *rest, **named)

            def process_outputs(outputs: Any, *rest: Any, **named: Any) -> Any:
                processed = process(outputs, *rest, **named)  # drops tokens after a stop string
                self._count_outputs(outputs)
                return processed

            processor.add_request, processor.process_outputs = add_request, process_outputs

    def _count_prompt(self, request: Any, index: int) -> None:
        """Count the prompt of a request. `index`: number of the completion. Several of one prompt count it once."""
        try:
            if request.request_id.startswith(OWN):
                self._own.add(request.request_id)
            elif not index:
                tokens = request.prompt_token_ids
                self.prompt += len(request.prompt_embeds if tokens is None else tokens)
        except (AttributeError, TypeError):  # a count is not worth a request
            return

    def _count_outputs(self, outputs: Any) -> None:
        """Count the tokens of one step."""
        try:
            for output in outputs:
                self.completion += len(output.new_token_ids)
            if self._own:
                self._discount(outputs)
        except (AttributeError, TypeError):
            return

    def _discount(self, outputs: Any) -> None:
        for output in outputs:
            if output.request_id in self._own:
                self.completion -= len(output.new_token_ids)
                if output.finish_reason is not None:
                    self._own.discard(output.request_id)
