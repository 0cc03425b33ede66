"""What the benchmarks make of figures and answers: ratios, targets, and whether a result was wrong."""

from pathlib import Path
from typing import Any

import msgspec
import pytest

from benchmarks import table, workloads
from benchmarks.rounds import different, wrong
from benchmarks.sides import Answer, Gserve
from benchmarks.table import Figures, Target
from benchmarks.workloads import Manner, Work, Workload
from gserve import LLMConfig, ServeConfig, VLLMService
from gserve_core.engines.echo import EchoEngine

WORK = Work(["one", "two"], [3, 3])
RIGHT = [("a b c", 3, 0), ("d e f", 3, 0)]


def figures(side: str, values: list[float], unit: str = "prompts/s", workload: str = "short") -> Figures:
    return Figures(workload=workload, title="a title", side=side, model="tiny", unit=unit, figures=values)


def test_the_ratio_is_that_of_the_medians() -> None:
    assert table.ratio(figures("gserve", [1, 30, 10]), figures("vllm.LLM", [5, 400, 1])) == 2


@pytest.mark.parametrize(
    ("reached", "unit", "words"),
    [
        (1.0, "prompts/s", "reached"),
        (0.99, "prompts/s", "**missed**"),
        (1.0, "s", "reached"),
        (1.01, "s", "**missed**"),
    ],
)
def test_a_rate_reaches_its_target_from_above_and_a_time_from_below(reached: float, unit: str, words: str) -> None:
    assert table.verdict(reached, Target(1.0), unit)[1] == words


def test_a_target_is_found_by_workload_side_and_the_end_of_the_models_name() -> None:
    assert table.target("long", "llama8b", "vllm.LLM") == Target(1.00, 1.03)
    assert table.target("calls", "any", "serve openai") == Target(5, 10)
    assert table.target("long", "tiny", "vllm.LLM") is None


def test_a_table_sets_every_side_beside_gserve_and_its_target(tmp_path: Path) -> None:
    found = [figures("gserve", [100, 200, 300]), figures("vllm.LLM", [250, 240, 260]), figures("serve openai", [10])]
    text = table.markdown(["today"], found)
    assert text.startswith("today  \n\n| model |")
    assert (
        "| tiny | a title | vllm.LLM | prompts/s | 250 | 240 | 260 | 3 | 0 | 0.80 x | ≥ 1.00 (1.10) | **missed** |"
        in text
    )
    assert "| 20.00 x | ≥ 15.00 (18.00) | reached |" in text
    lines = [line for line in text.splitlines() if line.startswith("|")]
    assert len({line.count("|") for line in lines}) == 1
    table.write(tmp_path, ["today"], found)
    assert (tmp_path / "table.md").read_text() == text
    whole = msgspec.json.decode((tmp_path / "table.json").read_bytes())
    assert msgspec.convert(whole["figures"], list[Figures]) == found


@pytest.mark.parametrize(("value", "words"), [(0.25, "reached"), (0.26, "**missed**")])
def test_a_figure_of_gserve_alone_has_a_limit_in_its_unit(value: float, words: str) -> None:
    _, row = table.rows([figures("gserve", [value], "ms", "gateway added")])
    assert row[-3:] == ["", "≤ 0.25 ms", words]


def test_a_figure_without_a_limit_has_no_verdict() -> None:
    _, own, _ = table.rows([figures("gserve", [9], "ms", "gateway alone"), figures("direct", [1], "ms")])
    assert own[-3:] == ["", "", ""]


def test_a_right_answer_has_no_problem() -> None:
    assert not wrong(WORK, Answer(1.0, RIGHT))
    assert not different(Answer(1.0, RIGHT), Answer(2.0, RIGHT))


@pytest.mark.parametrize(
    ("outcomes", "problem"),
    [
        ([RIGHT[0]], "1 answers to 2 prompts"),
        ([RIGHT[0], None], "1 of 2 prompts have no answer: why"),
        ([RIGHT[0], ("d e", 2, 0)], "item 1 has 2 tokens, expected 3"),
        ([("a b c", 3, 3), RIGHT[1]], "item 0 has log probabilities of 3 tokens, of 3"),
    ],
)
def test_a_wrong_result_is_told_in_a_sentence(outcomes: list[Any], problem: str) -> None:
    assert wrong(WORK, Answer(1.0, outcomes, "why")) == [problem]


def test_log_probabilities_that_are_missing_are_a_problem() -> None:
    assert wrong(Work(["one"], [3], logprobs=5), Answer(1.0, [RIGHT[0]]))


def test_errors_of_a_side_where_they_count_as_figures_are_no_problem() -> None:
    assert not wrong(WORK, Answer(1.0, [RIGHT[0], None], "why"), errors_count=True)


def test_another_text_for_the_same_prompt_is_told_and_a_part_is_compared_as_far_as_it_goes() -> None:
    own = Answer(1.0, RIGHT)
    assert not different(own, Answer(1.0, RIGHT[:1]))
    assert not different(own, Answer(1.0, [None, RIGHT[1]]))
    assert different(own, Answer(1.0, [RIGHT[0], ("d e g", 3, 0)])) == [
        "1 answers are not those of the first side, as at item 1: 'd e g', not 'd e f'"
    ]


def test_a_round_has_the_same_work_every_time_and_another_round_other_prompts() -> None:
    for workload in [*workloads.of_cpu(), *workloads.of_gpu()]:
        few = workload.scaled(0.01)
        assert few.work(1) == few.work(1)
        first, second = few.work(1).prompts, few.work(2).prompts
        assert not {str(it) for it in first} & {str(it) for it in second}
        assert len({str(it) for it in first}) == few.items


def test_conversations_of_a_round_share_their_system_message() -> None:
    work = Workload("chat", 4, 5, 16, {}, system=50).work(1)
    assert work.is_chat
    assert len({conversation[0]["content"] for conversation in work.prompts}) == 1
    assert len({conversation[1]["content"] for conversation in work.prompts}) == 4


@pytest.mark.parametrize("manner", Manner)
def test_gserve_answers_in_every_manner(manner: Manner) -> None:
    work = Work([f"{index} of several" for index in range(80)], [2] * 80, manner)
    with VLLMService(LLMConfig("echo"), ServeConfig(), engine=EchoEngine()) as service:
        answer = Gserve(service).do(work, "")
    assert not wrong(work, answer)
    assert [outcome and outcome[0] for outcome in answer.outcomes] == [f"{index} of" for index in range(80)]


def test_every_item_may_have_a_length_of_its_own() -> None:
    work = Work(["a b c d", "e f g h"], [1, 3])
    with VLLMService(LLMConfig("echo"), ServeConfig(), engine=EchoEngine()) as service:
        assert not wrong(work, Gserve(service).do(work, ""))
