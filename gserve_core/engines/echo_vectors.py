"""The vectors of the engine `echo`: they follow from the text alone, so that two servers make the same."""

import array
import hashlib
import math
from collections.abc import Sequence

from ..messages import VectorOutput

WIDEST = 1 << 31


def embedding(text: str, dimensions: int, *, is_normalized: bool) -> list[float]:
    """Return a vector of so many numbers from -1 to 1, or of the length 1."""
    digest = hashlib.shake_128(text.encode(errors="replace")).digest(4 * dimensions)
    numbers = [number / WIDEST - 1 for number in array.array("I", digest)]
    if not is_normalized:
        return numbers
    length = math.hypot(*numbers) or 1.0
    return [number / length for number in numbers]


def classes(text: str, number: int, *, are_probabilities: bool) -> list[float]:
    """Return a number for each class of a text: its probability, or any number. A class alone has one from 0 to 1."""
    numbers = embedding(text, number, is_normalized=False)
    if not are_probabilities:
        return numbers
    weights = [(number + 1) / 2 for number in numbers]
    total = sum(weights) if number > 1 else 1.0
    return [weight / (total or 1.0) for weight in weights]


def similarity(first: Sequence[float], second: Sequence[float]) -> float:
    """Return the cosine of the angle between two vectors."""
    return math.sumprod(first, second) / ((math.hypot(*first) * math.hypot(*second)) or 1.0)


def output(numbers: Sequence[float], tokens: int) -> VectorOutput:
    """Return numbers as the output of an item. `tokens`: number of tokens of its prompt."""
    return VectorOutput("", vector=array.array("f", numbers).tobytes(), prompt_tokens=tokens)
