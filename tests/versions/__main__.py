"""Check gserve on several versions of vLLM, on real engines; write the table of docs/reference/vllm.md.

usage: python -m tests.versions ["0.26.0 newest" | all]
"""

import json
import os
import re
import subprocess
import sys
import time
from pathlib import Path

from . import environments

DEFAULT = "0.26.0 0.29.0 0.32.0 newest"
TESTS = "tests/gserve_core/engines/vllm"
ROWS = (
    "contract", "same answers", "chat", "logprobs", "n", "stop", "structured outputs", "bad parameters",
    "late grammar failures", "killed engine", "LoRA", "OpenAI's API", "embeddings", "update",
)  # fmt: skip
PAGE = environments.ROOT / "docs" / "reference" / "vllm.md"
BEGIN, END = "<!-- written by make versions -->\n", "<!-- end -->\n"


def main() -> None:
    """Check the versions that the arguments name; exit with 1 if a check failed."""
    wanted = environments.releases(" ".join(sys.argv[1:]) or DEFAULT)
    results = {release: check(release) for release in wanted}
    write(results)
    failed = [f"{release}: {row}" for release, rows in results.items() for row in ROWS if rows.get(row) != "passed"]
    print("\n".join(["", *table(results), "", *failed, f"{len(failed)} checks failed"]))
    sys.exit(bool(failed))


def check(release: str) -> dict[str, str]:
    """Run the checks on one version; return the state of each row."""
    began = time.monotonic()
    python = environments.environment(release)
    folder = python.parents[1]
    record = folder / "record.json"
    record.unlink(missing_ok=True)
    environ = os.environ | {
        "PYTHONPATH": str(environments.ROOT), "VERSIONS_RECORD": str(record), "VLLM_CACHE_ROOT": str(folder / "cache"),
    }  # fmt: skip
    command = [
        str(python),
        "-m",
        "pytest",
        "-p",
        "tests.versions.recorder",
        "-p",
        "no:cacheprovider",
        "-q",
        "--durations=12",
        TESTS,
    ]
    with (folder / "log").open("w") as log:
        code = subprocess.call(command, cwd=environments.ROOT, env=environ, stdout=log, stderr=log)
    rows: dict[str, str] = json.loads(record.read_text()) if record.exists() else {}
    if code and "failed" not in rows.values():  # something was left when all tests had passed
        rows["killed engine"] = "failed"
    passed = sum(rows.get(row) == "passed" for row in ROWS)
    took = time.monotonic() - began
    print(f"vLLM {release}: {passed} of {len(ROWS)} checks passed in {took:.0f} s ({folder / 'log'})", flush=True)
    return rows


def table(results: dict[str, dict[str, str]]) -> list[str]:
    """Return the lines of the table."""
    lines = [f"| checked on | {' | '.join(ROWS)} |", f"|---|{':-:|' * len(ROWS)}"]
    signs = {"passed": "✓", "skipped": "skipped", "failed": "**no**"}
    for release, rows in results.items():
        cells = [signs.get(rows.get(row, ""), "**no**") for row in ROWS]
        lines.append(f"| {environments.described(release)} | {' | '.join(cells)} |")
    return lines


def write(results: dict[str, dict[str, str]], page: Path = PAGE) -> None:
    """Write the rows of these versions into the table of the documentation; other rows stay."""
    before, _, rest = page.read_text().partition(BEGIN)
    former, _, after = rest.partition(END)
    head, line, *rows = table(results)
    kept = [row + "  |" * (len(ROWS) + 2 - row.count("|")) for row in former.strip().splitlines()[2:]]  # new checks
    found = {row.split(" | ")[0]: row for row in [*kept, *rows]}
    lines = [head, line, *sorted(found.values(), key=_release)]
    page.write_text(before + BEGIN + "\n" + "\n".join(lines) + "\n\n" + END + after)


def _release(row: str) -> list[int]:
    """Return the version to which a row belongs, as numbers."""
    match = re.search(r"\d+(\.\d+)+", row)
    assert match is not None, row
    return [int(number) for number in match[0].split(".")]


if __name__ == "__main__":
    main()
