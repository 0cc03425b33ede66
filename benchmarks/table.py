"""The table of results: median, minimum, maximum, and the ratio of gserve to each other side, with its target."""

from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from statistics import median

import msgspec
from msgspec import Struct

GSERVE = "gserve"
"""The name of gserve's own side."""


class Figures(Struct, kw_only=True):
    """The results of one side for a workload.

    `unit`: the unit of the figures; a lower figure is better only for "s".
    `figures`: one figure for each round.
    `errors`: number of items without an answer, in all rounds.
    `note`: a remark for the table.
    """

    workload: str
    title: str
    side: str
    model: str
    unit: str
    figures: list[float]
    errors: int = 0
    note: str = ""


def no_figures(workload: str, title: str, side: str, model: str, unit: str) -> Figures:
    """Return a side's results before its first round. Of `model`, they keep only the last part of its path."""
    return Figures(workload=workload, title=title, side=side, model=Path(model).name, unit=unit, figures=[])


class Target(Struct, frozen=True):
    """The ratio that gserve must reach, and the ratio that it aims at."""

    least: float
    aim: float | None = None


TARGETS: Mapping[tuple[str, str, str], Target] = {  # by workload, model (the end of its name) and side
    ("short", "tiny", "vllm.LLM"): Target(1.00, 1.10),
    ("short", "tiny", "serve list"): Target(1.00, 1.10),
    ("short", "tiny", "serve openai"): Target(15, 18),
    ("chat", "tiny", "vllm.LLM"): Target(1.00),
    ("chat", "tiny", "serve list"): Target(1.25),
    ("logprobs", "tiny", "vllm.LLM"): Target(1.3, 1.5),
    ("logprobs", "tiny", "serve list"): Target(1.2, 1.5),
    ("short", "1b", "vllm.LLM"): Target(1.25, 1.40),
    ("short", "1b", "serve list"): Target(1.04, 1.15),
    ("long", "1b", "vllm.LLM"): Target(1.03, 1.10),
    ("long", "8b", "vllm.LLM"): Target(1.00, 1.03),
    ("short, auto", "1b", "vllm.LLM"): Target(1.7, 2.0),
    ("long, auto", "1b", "vllm.LLM"): Target(1.9, 2.5),
    ("sampled, auto", "1b", "vllm.LLM"): Target(1.5, 2.0),
    ("short, one server", "1b", "vllm.LLM"): Target(1.3),
    ("long, one server", "1b", "vllm.LLM"): Target(1.35),
    ("short, auto", "8b", "vllm.LLM"): Target(1.03, 1.10),
    ("long, auto", "8b", "vllm.LLM"): Target(1.00, 1.05),
    ("calls", "", "serve openai"): Target(5, 10),
    ("balance, one slowed", "", "static split"): Target(1.4),
    ("gateway", "", "direct"): Target(0.5),
    ("files", "", "iterator"): Target(0.8),
    ("files", "", "its program"): Target(0.8),
    ("openai", "", "vllm serve"): Target(1.10),
    ("openai first token", "", "vllm serve"): Target(1.10),
    ("sampled", "tiny", "vllm.LLM"): Target(1.05, 1.2),
    ("documents of two", "135m", "no affinity"): Target(1.5, 1.65),
    ("documents of two", "1b", "no affinity"): Target(1.35, 1.5),
    ("documents of two GPUs", "1b", "one server on one GPU"): Target(1.8, 2.0),
    ("short of two", "", "no affinity"): Target(0.98, 1.0),
    ("skewed of two", "", "no affinity"): Target(0.98, 1.0),
    ("start", "", "vllm serve"): Target(0.6, 0.3),
    ("start of two", "", "vllm serve"): Target(0.5, 0.25),
    ("second server", "1b", "vllm serve"): Target(0.25, 0.12),
    ("restart", "1b", "vllm serve"): Target(0.25, 0.12),
    ("2 GPUs", "8b", "one GPU"): Target(1.97),
    ("4 GPUs", "8b", "one GPU"): Target(3.9),
}


LIMITS: Mapping[str, float] = {"gateway added": 0.25, "gateway event": 35.0, "launch added": 1.5, "update": 3.0}
"""The most that gserve's own figure may be, by workload, where it is not compared with another side. In its unit."""


def target(workload: str, model: str, side: str) -> Target | None:
    """Return gserve's target against a side; None if there is none."""
    for (name, kind, other), found in TARGETS.items():
        if (name, other) == (workload, side) and model.endswith(kind):
            return found
    return None


def ratio(own: Figures, other: Figures) -> float:
    """Return the ratio of the medians of two sides."""
    return median(own.figures) / median(other.figures)


def verdict(reached: float, wanted: Target | None, unit: str) -> tuple[str, str]:
    """Return a target in words, and whether it is reached. The target is a minimum; for seconds, a maximum."""
    if wanted is None:
        return "", ""
    is_time = unit == "s"
    words = f"{'≤' if is_time else '≥'} {wanted.least:.2f}" + (f" ({wanted.aim:.2f})" if wanted.aim else "")
    return words, "reached" if (reached <= wanted.least if is_time else reached >= wanted.least) else "**missed**"


def limit_verdict(reached: float, limit: float | None, unit: str) -> tuple[str, str]:
    """Return the limit of a figure in words, and whether it is kept."""
    if limit is None:
        return "", ""
    return f"≤ {_figure(limit)} {unit}", "reached" if reached <= limit else "**missed**"


def rows(found: Sequence[Figures]) -> Iterator[list[str]]:
    """Yield the header and the rows of the table. `found` has gserve's results first in each workload."""
    yield [
        "model",
        "workload",
        "side",
        "unit",
        "median",
        "least",
        "most",
        "rounds",
        "errors",
        "gserve is",
        "wanted",
        "",
    ]
    for one in found:
        cells = [_figure(value) for value in (median(one.figures), min(one.figures), max(one.figures))]
        row = [one.model, one.title, one.side + (f" ({one.note})" if one.note else ""), one.unit, *cells]
        row += [str(len(one.figures)), str(one.errors)]
        own = next((it for it in found if (it.model, it.title, it.side) == (one.model, one.title, GSERVE)), None)
        if own is None or one is own:
            limit = LIMITS.get(one.workload) if one is own else None
            yield [*row, "", *limit_verdict(median(one.figures), limit, one.unit)]
        else:
            reached = ratio(own, one)
            yield [*row, f"{reached:.2f} x", *verdict(reached, target(one.workload, one.model, one.side), one.unit)]


def markdown(lines: Sequence[str], found: Sequence[Figures]) -> str:
    """Return the table as Markdown, with `lines` above it."""
    table = [f"| {' | '.join(row)} |" for row in rows(found)]
    table.insert(1, "|---" * table[0].count(" | ") + "|---|")
    return "\n".join([*(f"{line}  " for line in lines), "", *table]) + "\n"


def write(folder: Path, lines: Sequence[str], found: Sequence[Figures]) -> None:
    """Write the table as Markdown, and every figure as JSON."""
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "table.md").write_text(markdown(lines, found))
    whole = msgspec.json.encode({"header": lines, "figures": found})
    (folder / "table.json").write_bytes(msgspec.json.format(whole, indent=1) + b"\n")


def _figure(value: float) -> str:
    return f"{value:,.0f}" if value >= 100 else f"{value:.3g}"
