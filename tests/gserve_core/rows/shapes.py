"""Small files in the public forms of data sets and benchmarks, and the flags that make prompts of them.

Each file is written here, in the documented form of its shape. None of them copies data.
"""

import csv
import gzip
import json
import shlex
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

GSM8K = [
    {"question": "Ann has 3 pens and buys 4. How many?", "answer": "3 + 4 = <<3+4=7>>7\n#### 7"},
    {"question": "A box holds 6 eggs. How many hold 18?", "answer": "18 / 6 = <<18/6=3>>3\n#### 3"},
    {"question": "Tea costs 2 €, cake twice as much. Both?", "answer": "2 + 4 = <<2+4=6>>6\n#### 6"},
]
MMLU = [
    ["What is 2 + 3?", "4", "5", "6", "7", "B"],
    ["Which gas do plants take up, by day?", "oxygen", "helium", "carbon dioxide", "argon", "C"],
    ['Who wrote "Faust"?', "Goethe", "Schiller", "Kant", "Heine", "A"],
]
FRAME = [
    {"id": 10, "prompt": "Name a river.", "score": 0.5},
    {"id": 11, "prompt": "Name a città.", "score": None},
    {"id": 12, "prompt": "Name a star.", "score": 2.0},
]


@dataclass(frozen=True, kw_only=True)
class Shape:
    """One public form of data.

    `title`: its name in the docs.
    `file`: name of the file that `write` makes.
    `rows`: how a row looks, for the docs.
    `write`: writes three rows to a path.
    `command`: `chat`, `generate` or `run-batch`; "" if no flags make prompts of the file as it is.
    `flags`: what the command needs besides config, input and output.
    `expected`: the prompt of each row: a text, or its messages without unknown keys; for `run-batch` the body.
    `instead`: what to do first, where there is no command; a link to its section of the docs.
    """

    title: str
    file: str
    rows: str
    write: Callable[[Path], object]
    command: str
    flags: tuple[str, ...] = ()
    expected: Sequence[Any] = ()
    instead: str = ""

    def make(self, folder: Path) -> Path:
        """Write the file into a folder and return its path."""
        path = folder / self.file
        self.write(path)
        return path

    def __str__(self) -> str:
        return self.title


def users(*texts: str, system: str = "") -> list[list[dict[str, str]]]:
    """Return conversations of one message of the user each, after a system message if there is one."""
    first = [message("system", system)] if system else []
    return [[*first, message("user", text)] for text in texts]


def message(role: str, content: Any, **more: Any) -> dict[str, Any]:
    return {"role": role, "content": content, **more}


# ------------------------------------------------------------------------------------------------------------- writers


def as_json(value: Any) -> Callable[[Path], object]:
    return lambda path: path.write_text(json.dumps(value, indent=2, ensure_ascii=False))


def as_lines(rows: Sequence[dict[str, Any]]) -> Callable[[Path], object]:
    """Write JSON lines, compressed as the name of the file says."""
    content = "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows).encode()

    def write(path: Path) -> None:
        compress: dict[str, Callable[[bytes], bytes]] = {".gz": gzip.compress, ".zst": zstd}
        path.write_bytes(compress.get(path.suffix, bytes)(content))

    return write


def zstd(content: bytes) -> bytes:
    import pyarrow as pa

    sink = pa.BufferOutputStream()
    with pa.CompressedOutputStream(sink, "zstd") as stream:
        stream.write(content)
    return bytes(sink.getvalue().to_pybytes())


def as_parquet(rows: Sequence[dict[str, Any]]) -> Callable[[Path], object]:
    """Write a Parquet file. As Arrow does, structs have all keys of all rows, and None where a row has none."""

    def write(path: Path) -> None:
        import pyarrow as pa
        import pyarrow.parquet as pq

        pq.write_table(pa.Table.from_pylist(rows), path)

    return write


def as_csv(names: Sequence[str] | None, rows: Sequence[Sequence[Any]]) -> Callable[[Path], object]:
    def write(path: Path) -> None:
        with path.open("w", newline="") as stream:
            writer = csv.writer(stream)
            writer.writerows([names, *rows] if names else rows)

    return write


def as_frame(orient: str) -> Callable[[Path], object]:
    """Write what `DataFrame.to_json` makes."""

    def write(path: Path) -> None:
        import pandas as pd

        pd.DataFrame(FRAME).to_json(path, orient=orient)

    return write


# -------------------------------------------------------------------------------------------------------------- shapes


def frame_shape(orient: str, rows: str, *flags: str) -> Shape:
    return Shape(
        title=f'pandas `to_json(orient="{orient}")`',
        file=f"frame-{orient}.json",
        rows=rows,
        write=as_frame(orient),
        command="generate",
        flags=flags,
        expected=[row["prompt"] for row in FRAME],
    )


WEATHER_TOOL = {
    "type": "function",
    "function": {
        "name": "weather",
        "parameters": {"type": "object", "properties": {"city": {"type": "string"}}, "required": ["city"]},
    },
}
WEATHER_CALL = {"id": "call_1", "type": "function", "function": {"name": "weather", "arguments": '{"city": "Bern"}'}}
BODIES = [
    {"model": "gpt-4o-mini", "messages": [message("system", "Be brief."), message("user", "Hi")], "max_tokens": 16},
    {"model": "gpt-4o-mini", "messages": [message("user", "Count to 3")], "temperature": 0},
    {"model": "gpt-4o-mini", "messages": [message("user", [{"type": "text", "text": "A poem"}])]},
]
HH = [
    ("\n\nHuman: How do I boil an egg?\n\nAssistant:", " Eight minutes.", " No idea."),
    (
        "\n\nHuman: Hi\n\nAssistant: Hello!\n\nHuman: A joke?\n\nAssistant:",
        " Knock knock.",
        " I know none.",
    ),
    ("\n\nHuman: Who are you?\n\nAssistant:", " An assistant.", " Nobody."),
]
ALPACA = [
    {"instruction": "Name three colours.", "input": "", "output": "Red, green, blue."},
    {"instruction": "Translate to French.", "input": "Good day", "output": "Bonjour"},
    {"instruction": "Sort the numbers.", "input": "3, 1, 2", "output": "1, 2, 3"},
]
DOLLY = [
    {"instruction": "What is an atom?", "context": "", "response": "A small part.", "category": "open_qa"},
    {"instruction": "Who won?", "context": "Ann beat Bob.", "response": "Ann.", "category": "closed_qa"},
    {"instruction": "List two fruits.", "context": "", "response": "Fig, plum.", "category": "brainstorming"},
]
ULTRA = [
    ("Write a haiku.", ["An old silent pond"], ["Another one."]),
    ("What is rain?", ["Water from clouds."], ["And snow?"]),
    ("Name a prime.", ["Seven."], ["A larger one."]),
]
PARQUET_CHATS: list[list[dict[str, Any]]] = [
    [message("user", "Weather in Bern?"), message("assistant", None, tool_calls=[WEATHER_CALL]),
     message("tool", "5 °C", tool_call_id="call_1")],
    [message("system", "Be kind."), message("user", "Hello", name="ann")],
    [message("user", "Bye")],
]  # fmt: skip
MBPP = [
    ("Write a function to add two numbers.", ["assert add(1, 2) == 3", "assert add(0, 0) == 0"]),
    ("Write a function to reverse a list.", ["assert rev([1, 2]) == [2, 1]"]),
    ("Write a function to square a number.", ["assert square(3) == 9"]),
]
HUMAN_EVAL = [
    'def add(a: int, b: int) -> int:\n    """Return the sum.\n    >>> add(1, 2)\n    3\n    """\n',
    'def is_even(n: int) -> bool:\n    """Return whether n is even."""\n',
    'def last(items: list) -> object:\n    """Return the last item."""\n',
]
LM_EVAL_PROMPTS = ["Question: 1 + 1?\nAnswer:", "Question: 2 + 2?\nAnswer:", "Question: 3 + 3?\nAnswer:"]
SQUAD = [
    ("Basel", "Basel is on the Rhine.", "On which river is Basel?", "the Rhine"),
    ("Mars", "Mars has two moons.", "How many moons has Mars?", "two"),
    ("Tea", "Tea was first drunk in China.", "Where was tea first drunk?", "China"),
]
NEWS = [
    ("The bridge opened on Monday after two years.", "A bridge opened."),
    ("A storm closed the port.\nNobody was hurt.", "A storm closed a port."),
    ("The museum shows 40 new paintings.", "New paintings on show."),
]
WMT = [
    ("Good morning.", "Guten Morgen."),
    ("It's 5 o'clock.", "Es ist 5 Uhr."),
    ("The cat sleeps.", "Die Katze schläft."),
]
PILE = [
    ("How do I sort a list?\n\nIn Python, please.", "Use sorted()."),
    ("Why is the sky blue?", "Rayleigh scattering."),
    ("What is a monad?", "A monoid."),
]


def sharegpt(field: str = "conversations", *, system: bool = False) -> list[dict[str, Any]]:
    """Return three conversations with an answer at the end of each, as ShareGPT's exports have them."""
    turns = [["Hi", "Hello!"], ["What is 2 + 2?", "4.", "And 3 + 3?", "6."], ["Tell a joke", "Knock knock."]]
    return [
        {
            "id": f"conv_{number}",
            field: [{"from": "system", "value": "Be brief."}] * system
            + [{"from": ("human", "gpt")[place % 2], "value": text} for place, text in enumerate(texts)],
        }
        for number, texts in enumerate(turns)
    ]


def sharegpt_prompts(*, system: bool = False) -> list[list[dict[str, Any]]]:
    """Return these conversations in OpenAI's form, without the last answers."""
    roles = {"system": "system", "human": "user", "gpt": "assistant"}
    return [
        [message(roles[turn["from"]], turn["value"]) for turn in row["conversations"][:-1]]
        for row in sharegpt(system=system)
    ]


def options(question: str, a: str, b: str, c: str, d: str, _: str) -> str:
    return f"{question}\nA. {a}\nB. {b}\nC. {c}\nD. {d}\nAnswer:"


SHAPES = [
    Shape(
        title="OpenAI batch input",
        file="batch.jsonl",
        rows="`custom_id`, `method`, `url`, `body`",
        write=as_lines(
            [
                {"custom_id": f"request-{number}", "method": "POST", "url": "/v1/chat/completions", "body": body}
                for number, body in enumerate(BODIES)
            ]
        ),
        command="run-batch",
        expected=BODIES,
    ),
    Shape(
        title="OpenAI fine-tuning, chat",
        file="fine-tuning.jsonl",
        rows="`messages`, sometimes `tools`; the last message is the answer",
        write=as_lines(
            [
                {"messages": [message("system", "Be brief."), message("user", "Hi"), message("assistant", "Hello.")]},
                {
                    "messages": [
                        message("user", "1 + 1?"),
                        message("assistant", "3", weight=0),
                        message("user", "Sure?"),
                        message("assistant", "No, 2.", weight=1),
                    ]
                },
                {
                    "messages": [
                        message("user", "Weather in Bern?"),
                        {"role": "assistant", "tool_calls": [WEATHER_CALL]},
                    ],
                    "tools": [WEATHER_TOOL],
                    "parallel_tool_calls": False,
                },
            ]
        ),
        command="chat",
        flags=("--drop-answer",),
        expected=[
            [message("system", "Be brief."), message("user", "Hi")],
            [message("user", "1 + 1?"), message("assistant", "3"), message("user", "Sure?")],
            [message("user", "Weather in Bern?")],
        ],
    ),
    Shape(
        title="OpenAI Evals samples",
        file="evals.jsonl",
        rows="`input` (messages), `ideal`",
        write=as_lines(
            [
                {"input": [message("system", "Answer yes or no."), message("user", text)], "ideal": "yes"}
                for text in ("Is ice cold?", "Is fire hot?", "Is snow white?")
            ]
        ),
        command="chat",
        flags=("--column", "input"),
        expected=users("Is ice cold?", "Is fire hot?", "Is snow white?", system="Answer yes or no."),
    ),
    Shape(
        title="ShareGPT",
        file="sharegpt.json",
        rows="`conversations` with `from` and `value`",
        write=as_json(sharegpt()),
        command="chat",
        flags=("--drop-answer",),
        expected=sharegpt_prompts(),
    ),
    Shape(
        title="ShareGPT with system turns",
        file="sharegpt-system.json",
        rows="the first turn is `from` `system`",
        write=as_json(sharegpt(system=True)),
        command="chat",
        flags=("--drop-answer",),
        expected=sharegpt_prompts(system=True),
    ),
    Shape(
        title="ShareGPT with a system column",
        file="sharegpt-column.json",
        rows="`conversations`, `system`",
        write=as_json([row | {"system": "Be brief."} for row in sharegpt()]),
        command="chat",
        flags=("--system", "{{ system }}", "--drop-answer"),
        expected=sharegpt_prompts(system=True),
    ),
    Shape(
        title="ShareGPT, older",
        file="sharegpt-items.json",
        rows="`items` with `from` and `value`",
        write=as_json(sharegpt("items")),
        command="chat",
        flags=("--column", "items", "--drop-answer"),
        expected=sharegpt_prompts(),
    ),
    Shape(
        title="Alpaca",
        file="alpaca.json",
        rows="`instruction`, `input`, `output`",
        write=as_json(ALPACA),
        command="chat",
        flags=("--template", '{{ instruction }}{% if input %}{{ "\\n\\n" + input }}{% endif %}'),
        expected=users("Name three colours.", "Translate to French.\n\nGood day", "Sort the numbers.\n\n3, 1, 2"),
    ),
    Shape(
        title="Dolly",
        file="dolly.jsonl",
        rows="`instruction`, `context`, `response`, `category`",
        write=as_lines(DOLLY),
        command="chat",
        flags=(
            "--prefix",
            "new_",
            "--template",
            '{% if context %}{{ context + "\\n\\n" }}{% endif %}{{ instruction }}',
        ),
        expected=users("What is an atom?", "Ann beat Bob.\n\nWho won?", "List two fruits."),
    ),
    Shape(
        title="OpenOrca",
        file="orca.jsonl",
        rows="`system_prompt`, `question`, `response`",
        write=as_lines(
            [
                {"id": f"t0.{number}", "system_prompt": "Think first.", "question": text, "response": "Yes."}
                for number, text in enumerate(("Is 7 prime?", "Is 9 odd?", "Is 4 even?"))
            ]
        ),
        command="chat",
        flags=("--prefix", "new_", "--column", "question", "--system", "{{ system_prompt }}"),
        expected=users("Is 7 prime?", "Is 9 odd?", "Is 4 even?", system="Think first."),
    ),
    Shape(
        title="Chats of `datasets`",
        file="chats.parquet",
        rows="`messages`, with None for keys that a message lacks",
        write=as_parquet([{"messages": chat} for chat in PARQUET_CHATS]),
        command="chat",
        expected=PARQUET_CHATS,
    ),
    Shape(
        title="UltraChat",
        file="ultrachat.parquet",
        rows="`prompt`, `prompt_id`, `messages`; the last message is the answer",
        write=as_parquet(
            [
                {
                    "prompt": prompt,
                    "prompt_id": f"{number:064x}",
                    "messages": [
                        message("user", prompt),
                        *(message("assistant", text) for text in answers),
                        *(message("user", text) for text in more),
                        message("assistant", "Here it is."),
                    ],
                }
                for number, (prompt, answers, more) in enumerate(ULTRA)
            ]
        ),
        command="chat",
        flags=("--drop-answer",),
        expected=[
            [message("user", prompt), message("assistant", answers[0]), message("user", more[0])]
            for prompt, answers, more in ULTRA
        ],
    ),
    Shape(
        title="UltraFeedback, pairs",
        file="ultrafeedback.parquet",
        rows="`prompt`, `chosen`, `rejected` (messages)",
        write=as_parquet(
            [
                {
                    "prompt": prompt,
                    "chosen": [message("user", prompt), message("assistant", "Good.")],
                    "rejected": [message("user", prompt), message("assistant", "Bad.")],
                    "score_chosen": 8.5,
                    "score_rejected": 3.0,
                }
                for prompt, *_ in ULTRA
            ]
        ),
        command="chat",
        flags=("--column", "chosen", "--drop-answer"),
        expected=users(*(prompt for prompt, *_ in ULTRA)),
    ),
    Shape(
        title="LMSYS-Chat, WildChat",
        file="wildchat.parquet",
        rows="`conversation` with `role`, `content` and more",
        write=as_parquet(
            [
                {
                    "conversation_id": f"{number:032x}",
                    "model": "some-model",
                    "conversation": [
                        message("user", prompt, language="English", toxic=False),
                        message("assistant", "Sure.", language="English", toxic=False),
                    ],
                    "turn": 1,
                }
                for number, (prompt, *_) in enumerate(ULTRA)
            ]
        ),
        command="chat",
        flags=("--column", "conversation", "--drop-answer"),
        expected=users(*(prompt for prompt, *_ in ULTRA)),
    ),
    Shape(
        title="Anthropic HH",
        file="hh.jsonl.gz",
        rows="`chosen`, `rejected`, texts with `Human:` and `Assistant:`",
        write=as_lines([{"chosen": start + good, "rejected": start + bad} for start, good, bad in HH]),
        command="generate",
        flags=("--template", '{{ chosen.rpartition("\\n\\nAssistant:")[0] + "\\n\\nAssistant:" }}'),
        expected=[start for start, *_ in HH],
    ),
    Shape(
        title="lm-eval samples",
        file="samples_task.jsonl",
        rows="`doc`, `arguments` with `gen_args_0`",
        write=as_lines(
            [
                {
                    "doc_id": number,
                    "doc": {"question": text},
                    "target": "2",
                    "arguments": {"gen_args_0": {"arg_0": text, "arg_1": {"until": ["\n"], "do_sample": False}}},
                    "resps": [[" 2"]],
                    "filtered_resps": ["2"],
                    "doc_hash": "00",
                    "prompt_hash": "01",
                    "target_hash": "02",
                    "exact_match": 1.0,
                }
                for number, text in enumerate(LM_EVAL_PROMPTS)
            ]
        ),
        command="generate",
        flags=("--template", "{{ arguments.gen_args_0.arg_0 }}"),
        expected=LM_EVAL_PROMPTS,
    ),
    Shape(
        title="MT-bench, first turns",
        file="question.jsonl",
        rows="`question_id`, `category`, `turns`",
        write=as_lines(
            [
                {"question_id": 81 + number, "category": "writing", "turns": [text, "Now shorter."]}
                for number, text in enumerate(("Write a letter.", "Write a song.", "Write a mail."))
            ]
        ),
        command="chat",
        flags=("--template", "{{ turns[0] }}"),
        expected=users("Write a letter.", "Write a song.", "Write a mail."),
    ),
    Shape(
        title="AlpacaEval",
        file="alpaca_eval.json",
        rows="`instruction`, `output`, `generator`, `dataset`",
        write=as_json(
            [
                {"instruction": row["instruction"], "output": row["output"], "generator": "a-model", "dataset": "own"}
                for row in ALPACA
            ]
        ),
        command="chat",
        flags=("--column", "instruction"),
        expected=users(*(row["instruction"] for row in ALPACA)),
    ),
    Shape(
        title="IFEval",
        file="input_data.jsonl",
        rows="`key`, `prompt`, `instruction_id_list`, `kwargs`",
        write=as_lines(
            [
                {
                    "key": 1000 + number,
                    "prompt": text,
                    "instruction_id_list": ["punctuation:no_comma"],
                    "kwargs": [{"num_words": None}],
                }
                for number, text in enumerate(("No commas, please.", "Use 3 words.", "Write in capitals."))
            ]
        ),
        command="chat",
        expected=users("No commas, please.", "Use 3 words.", "Write in capitals."),
    ),
    Shape(
        title="HumanEval",
        file="HumanEval.jsonl.gz",
        rows="`task_id`, `prompt`, `entry_point`, `canonical_solution`, `test`",
        write=as_lines(
            [
                {
                    "task_id": f"HumanEval/{number}",
                    "prompt": text,
                    "entry_point": text[4 : text.index("(")],
                    "canonical_solution": "    pass\n",
                    "test": "def check(candidate):\n    pass\n",
                }
                for number, text in enumerate(HUMAN_EVAL)
            ]
        ),
        command="generate",
        expected=HUMAN_EVAL,
    ),
    Shape(
        title="MBPP",
        file="mbpp.jsonl",
        rows="`text`, `code`, `task_id`, `test_list`",
        write=as_lines(
            [
                {
                    "text": text,
                    "code": "pass",
                    "task_id": number,
                    "test_setup_code": "",
                    "test_list": tests,
                    "challenge_test_list": [],
                }
                for number, (text, tests) in enumerate(MBPP, 1)
            ]
        ),
        command="chat",
        flags=("--template", '{{ text + "\\nYour code must pass:\\n" + "\\n".join(test_list) }}'),
        expected=users(*(text + "\nYour code must pass:\n" + "\n".join(tests) for text, tests in MBPP)),
    ),
    Shape(
        title="GSM8K",
        file="gsm8k.jsonl",
        rows="`question`, `answer`",
        write=as_lines(GSM8K),
        command="chat",
        flags=("--column", "question"),
        expected=users(*(row["question"] for row in GSM8K)),
    ),
    Shape(
        title="MMLU, with a header",
        file="mmlu.csv",
        rows="`question`, `A`, `B`, `C`, `D`, `answer`",
        write=as_csv(["question", "A", "B", "C", "D", "answer"], MMLU),
        command="generate",
        flags=(
            "--template",
            '{{ "\\n".join([question, "A. " ~ A, "B. " ~ B, "C. " ~ C, "D. " ~ D, "Answer:"]) }}',
        ),
        expected=[options(*row) for row in MMLU],
    ),
    Shape(
        title="MMLU, as published",
        file="mmlu-published.csv",
        rows="no header",
        write=as_csv(None, MMLU),
        command="",
        instead="[write a header first](#a-file-without-a-header)",
    ),
    Shape(
        title="MMLU of `datasets`",
        file="mmlu.parquet",
        rows="`question`, `subject`, `choices`, `answer`",
        write=as_parquet(
            [
                {"question": row[0], "subject": "misc", "choices": row[1:5], "answer": "ABCD".index(row[5])}
                for row in MMLU
            ]
        ),
        command="generate",
        flags=(
            "--template",
            '{{ question }}{% for one in choices %}{{ "\\n" ~ "ABCD"[loop.index0] ~ ". " ~ one }}{% endfor %}'
            '{{ "\\nAnswer:" }}',
        ),
        expected=[options(*row) for row in MMLU],
    ),
    Shape(
        title="TruthfulQA",
        file="TruthfulQA.csv",
        rows="`Type`, `Category`, `Question`, `Best Answer`, …",
        write=as_csv(
            ["Type", "Category", "Question", "Best Answer", "Correct Answers", "Incorrect Answers", "Source"],
            [
                ["Adversarial", "Myths", text, "No", "No; Not at all", "Yes; Always", "https://example.org"]
                for text in ("Do cats have nine lives?", "Is the moon cheese?", 'Is "blue moon" blue, ever?')
            ],
        ),
        command="chat",
        flags=("--column", "Question"),
        expected=users("Do cats have nine lives?", "Is the moon cheese?", 'Is "blue moon" blue, ever?'),
    ),
    Shape(
        title="SQuAD, as published",
        file="squad.json",
        rows="`data` > `paragraphs` > `qas`",
        write=as_json(
            {
                "version": "1.1",
                "data": [
                    {
                        "title": title,
                        "paragraphs": [
                            {
                                "context": context,
                                "qas": [
                                    {
                                        "id": title.lower(),
                                        "question": question,
                                        "answers": [{"text": answer, "answer_start": context.index(answer)}],
                                    }
                                ],
                            }
                        ],
                    }
                    for title, context, question, answer in SQUAD
                ],
            }
        ),
        command="",
        instead="[make a row of each question](#nested-rows)",
    ),
    Shape(
        title="SQuAD of `datasets`",
        file="squad.parquet",
        rows="`id`, `title`, `context`, `question`, `answers`",
        write=as_parquet(
            [
                {
                    "id": title.lower(),
                    "title": title,
                    "context": context,
                    "question": question,
                    "answers": {"text": [answer], "answer_start": [context.index(answer)]},
                }
                for title, context, question, answer in SQUAD
            ]
        ),
        command="chat",
        flags=("--template", '{{ context + "\\n\\n" + question }}'),
        expected=users(*(f"{context}\n\n{question}" for _, context, question, _ in SQUAD)),
    ),
    Shape(
        title="XSum",
        file="xsum.parquet",
        rows="`document`, `summary`, `id`",
        write=as_parquet(
            [{"document": text, "summary": short, "id": str(number)} for number, (text, short) in enumerate(NEWS)]
        ),
        command="chat",
        flags=("--template", '{{ document + "\\n\\nSummarise this in one sentence." }}'),
        expected=users(*(f"{text}\n\nSummarise this in one sentence." for text, _ in NEWS)),
    ),
    Shape(
        title="CNN/DailyMail",
        file="cnn.parquet",
        rows="`article`, `highlights`, `id`",
        write=as_parquet(
            [{"article": text, "highlights": short, "id": str(number)} for number, (text, short) in enumerate(NEWS)]
        ),
        command="chat",
        flags=("--column", "article", "--system", "Summarise the article in three sentences."),
        expected=users(*(text for text, _ in NEWS), system="Summarise the article in three sentences."),
    ),
    Shape(
        title="WMT pairs",
        file="wmt.tsv",
        rows="`source`, `reference`, between tabs",
        write=lambda path: path.write_text("".join("\t".join(row) + "\n" for row in [("source", "reference"), *WMT])),
        command="chat",
        flags=("--column", "source", "--system", "Translate English to German."),
        expected=users(*(source for source, _ in WMT), system="Translate English to German."),
    ),
    frame_shape("records", "a list of objects"),
    frame_shape("columns", "an object for each column"),
    frame_shape("index", "an object for each row, under its index"),
    frame_shape("split", "`columns`, `index` and `data`"),
    frame_shape("table", "`schema` and `data`"),
    frame_shape("values", "lists of values; the columns are `0`, `1`, …", "--column", "1"),
    Shape(
        title='pandas `to_json(orient="records", lines=True)`',
        file="frame-lines.jsonl",
        rows="an object a line",
        write=as_lines(FRAME),
        command="generate",
        expected=[row["prompt"] for row in FRAME],
    ),
    Shape(
        title="The Pile, Stack Exchange",
        file="stackexchange.jsonl.zst",
        rows="`text` with question and answers, `meta`",
        write=as_lines(
            [
                {"text": f"Q:\n\n{question}\n\nA:\n\n{answer}\n\n", "meta": {"pile_set_name": "StackExchange"}}
                for question, answer in PILE
            ]
        ),
        command="chat",
        flags=("--template", '{{ text.partition("\\n\\nA:\\n")[0].removeprefix("Q:\\n\\n") }}'),
        expected=users(*(question for question, _ in PILE)),
    ),
    Shape(
        title="Plain text",
        file="prompts.txt",
        rows="a prompt a line; blank lines are left out",
        write=lambda path: path.write_text("Name a river.\n\nName a città.\nName a star.\n"),
        command="generate",
        expected=["Name a river.", "Name a città.", "Name a star."],
    ),
]
"""All shapes. Those without a command are not taken as they are."""


def docs_row(shape: Shape) -> str:
    """Return the row of a shape in the table of the docs."""
    how = f"`{' '.join((shape.command, shlex.join(shape.flags))).strip()}`" if shape.command else shape.instead
    suffix = "".join(Path(shape.file).suffixes)
    return f"| {shape.title} | `{suffix}` | {shape.rows} | {how} |"
