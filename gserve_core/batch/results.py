"""The results of a call, with the numbers of tokens that it used."""

from collections.abc import Iterable

from msgspec import Struct

from ..messages import ResponseOutput


class Usage(Struct):
    """Numbers of tokens. The prompt of an item counts once, however many completions it has.

    `prompt_tokens`: 0 for items whose engine does not count them.
    """

    prompt_tokens: int = 0
    completion_tokens: int = 0

    @property
    def total_tokens(self) -> int:
        """The sum of both."""
        return self.prompt_tokens + self.completion_tokens

    def add(self, outputs: Iterable[ResponseOutput]) -> None:
        """Add the tokens of an item."""
        prompt = 0
        for output in outputs:
            prompt = output.prompt_tokens or prompt
            self.completion_tokens += len(output.token_ids)
        self.prompt_tokens += prompt


class Results[T](list[T]):
    """The results of a call, in its order: a list with a `usage`, which counts the items that have finished."""

    __slots__ = ("usage",)

    def __init__(self, results: Iterable[T] = (), usage: Usage | None = None) -> None:
        super().__init__(results)
        self.usage = Usage() if usage is None else usage
