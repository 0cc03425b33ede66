"""Documents: many questions to each of many long documents, in random order, on two servers.

The same service sends its items with and without prefix affinity, in turn. With two GPUs, it is also compared with one
server on one of them. Then *short* and *skewed*, whose prompts share no prefix, show what the affinity costs.
"""

import contextlib
import random
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace

from gserve import ServeConfig, VLLMService

from . import machine, workloads
from .balance import bind
from .models import WORDS
from .rounds import WARM_UP, Benchmark, say, wrong
from .sides import READY_SECONDS, Gserve, llm_config
from .table import GSERVE, no_figures
from .workloads import Work, Workload

WITHOUT = "no affinity"
"""The side that takes no notice of prefixes."""
ALONE = "one server on one GPU"
"""The side that needs no affinity."""
QUESTION, ANSWER = 15, 16
"""Length of a question, in words, and of its answer, in tokens."""


@dataclass(frozen=True)
class Documents(Workload):
    """The workload. `words`: length of a document. `questions`: number of questions to each of them."""

    questions: int = 1

    @property
    def title(self) -> str:
        """A short description for the table."""
        documents = self.items // self.questions
        return f"documents: {documents} x {self.words:,} in, {self.questions} questions to each, {self.tokens} out"

    def scaled(self, scale: float) -> "Documents":
        """Return the same workload with more or fewer documents."""
        return replace(self, items=self.questions * max(2, round(self.items / self.questions * scale)))

    def work(self, turn: int) -> Work:
        """Return the work of a round. It is the same in every call."""
        chance = random.Random(f"{self.name} {turn}")
        texts = [_text(chance, self.words) for _ in range(self.items // self.questions)]
        prompts = [f"{text} {_text(chance, QUESTION)}" for text in texts for _ in range(self.questions)]
        chance.shuffle(prompts)
        return Work(prompts, [ANSWER] * len(prompts))


def measure(bench: Benchmark, model: str, scale: float) -> None:
    """Measure the workloads with and without affinity, on two servers: on two GPUs, on one, or without any."""
    here = machine.gpus()
    serve = ServeConfig(share_gpu=bool(here), startup_timeout=READY_SECONDS)
    two = replace(serve, gpu_ids=[0, min(1, len(here) - 1)]) if here else replace(serve, servers=2)
    config = llm_config(machine.engine_arguments(model, 2 if here else 1))
    shared = _documents(64, 1500, 16) if here else _documents(12, 900, 8)
    short, items = (workloads.of_gpu()[0], 512) if here else (workloads.of_demo()[0], 64)
    with contextlib.ExitStack() as stack:
        service = stack.enter_context(VLLMService(config, two))
        sides = {GSERVE: (service, True), WITHOUT: (service, False)}
        if not here:
            for index, server in enumerate(service.servers):
                bind(server, index)
        others: dict[str, tuple[VLLMService, bool]] = {}
        if len(here) > 1:
            others[ALONE] = stack.enter_context(VLLMService(config, replace(serve, gpu_ids=[0]))), True
        _compare(bench, sides | others, model, shared.scaled(scale))
        for workload in (replace(short, name="short"), workloads.skewed(items, {})):
            _compare(bench, sides, model, workload.scaled(scale))


def _documents(count: int, words: int, questions: int) -> Documents:
    return Documents("documents", count * questions, words, ANSWER, {}, questions=questions)


def _compare(bench: Benchmark, sides: Mapping[str, tuple[VLLMService, bool]], model: str, workload: Workload) -> None:
    """Measure a workload on services, with or without affinity, in turn. No prompt is like one of another round."""
    title = f"{workload.title}, 2 servers"
    name = f"{workload.name} of two" + " GPUs" * (ALONE in sides)
    made = {side: no_figures(name, title, side, model, "tokens/s") for side in sides}
    for service in {id(it): it for it, _ in sides.values()}.values():
        Gserve(service).do(workload.scaled(WARM_UP).work(0), "")
    for turn in bench.turns(title):
        work = workload.work(turn)
        for side in list(sides)[:: 1 if turn % 2 else -1]:
            service, has_affinity = sides[side]
            service.reset_cache()
            with _affinity(service, is_on=has_affinity):
                answer = Gserve(service).do(work, "")
            say(f"{title}, round {turn}, {side}: {answer.seconds:.2f} s")
            bench.problems += [f"{title}, {side}: {problem}" for problem in wrong(work, answer)]
            made[side].figures.append(answer.tokens / answer.seconds)
    bench.figures += [one for one in made.values() if one.figures]


@contextlib.contextmanager
def _affinity(service: VLLMService, *, is_on: bool) -> Iterator[None]:
    dispatcher = service.dispatcher_of()
    dispatcher.set_prefix_affinity(is_on)
    try:
        yield
    finally:
        dispatcher.set_prefix_affinity(True)


def _text(chance: random.Random, words: int) -> str:
    return " ".join(chance.choices(WORDS, k=words))
