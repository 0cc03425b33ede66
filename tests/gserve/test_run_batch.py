"""`gserve run-batch`, as its users run it."""

import json
import random
import signal
import subprocess
import time
from collections import Counter
from contextlib import suppress
from functools import partial
from pathlib import Path
from typing import Any

import psutil

from tests.gserve.place import Place, eventually


def lines(count: int, **body: Any) -> list[dict[str, Any]]:
    return [
        {
            "custom_id": f"request-{number}",
            "method": "POST",
            "url": "/v1/chat/completions",
            "body": {"model": "demo-model", "messages": [{"role": "user", "content": f"word{number} two"}], **body},
        }
        for number in range(count)
    ]


def answers(place: Place) -> Counter[str]:
    """Return how often each custom_id has a right answer in the output."""
    found: Counter[str] = Counter()
    for row in (place.folder / "out.jsonl").read_text().splitlines():
        it = json.loads(row)
        content = it["response"]["body"]["choices"][0]["message"]["content"]
        assert content == f"word{it['custom_id'].removeprefix('request-')} two"
        found[it["custom_id"]] += 1
    return found


def test_a_batch_is_answered_and_only_the_same_one_continues_its_output(place: Place) -> None:
    config = place.config(servers=2)
    place.write("in.jsonl", *lines(20), *lines(22, model="nobody")[20:], "no request")
    done = place.run("run-batch", config, "-i", "in.jsonl", "-o", "out.jsonl", code=1)
    assert done.stdout == ""
    assert done.stderr.splitlines()[-4:] == [
        "23 lines: 20 answered, 3 failed; 40 tokens in, 40 tokens out",
        "failed: 2 x status 404, 1 x invalid_line",
        "for example: line 23: expected a JSON object with custom_id, method, url and body",
        "error: 3 of 23 lines failed",
    ]
    files = ("-i", "in.jsonl", "-o", "out.jsonl")
    again = place.run("run-batch", config, *files, code=1)
    assert "starting" not in again.stderr, "there is nothing to send"
    assert "23 lines (22 by an earlier run): 20 answered, 3 failed" in again.stderr
    other = ("run-batch", config, "--set", "llm.model_name=nobody", *files)
    refused = place.run(*other, code=2)
    assert 'out.jsonl was made with model "demo-model", not "nobody": choose another --output' in refused.stderr
    done = place.run(*other, "--overwrite", code=1)
    assert "23 lines: 2 answered, 21 failed" in done.stderr


def test_wrong_arguments_are_refused(place: Place) -> None:
    config = place.config()
    place.write("in.jsonl", *lines(1))
    files = ("-i", "in.jsonl", "-o", "out.jsonl")
    assert "expected a CONFIG" in place.run("run-batch", *files, code=2).stderr
    assert "--input" in place.run("run-batch", config, "-o", "out.jsonl", code=2).stderr
    missing = place.run("run-batch", config, "-i", "no.jsonl", "-o", "out.jsonl", code=2)
    assert "expected a batch file, but 'no.jsonl' does not exist" in missing.stderr
    assert "unexpected argument 'word'" in place.run("run-batch", "word", "--attach", "x", *files, code=2).stderr


def test_kill_9_of_the_job_and_of_servers_at_random_moments_leaves_each_line_once(place: Place) -> None:
    count, chance = 1500, random.Random(15)
    place.config("busy", servers=2, latency=0.01, capacity=32)
    place.write("in.jsonl", *lines(count))
    launched = place.start("launch", "busy.yaml", "--set", "serve.max_restarts=1000")
    place.run("wait", "busy")
    output = place.folder / "out.jsonl"
    command = ("run-batch", "--attach", "busy", "-i", "in.jsonl", "-o", "out.jsonl")
    for turn in range(5):
        before = size(output)
        with (place.folder / "log").open("w") as log:
            job = place.start(*command, stderr=log)
        eventually(partial(has_grown, output, before + 10_000, job))
        time.sleep(chance.random() / 10)
        if turn % 2:
            with suppress(IndexError, psutil.Error):  # all of them are being started again
                chance.choice(place.servers()).kill()
        job.kill()
        job.wait()
    done = place.run(*command)
    assert f"{count:,} lines (" in done.stderr
    assert f"{count:,} answered, 0 failed" in done.stderr
    found = answers(place)
    assert len(found) == count
    assert set(found.values()) == {1}
    launched.send_signal(signal.SIGTERM)
    assert launched.wait(60) == 0


def size(path: Path) -> int:
    return path.stat().st_size if path.exists() else 0


def has_grown(path: Path, most: int, job: "subprocess.Popen[str]") -> bool:
    return size(path) > most or job.poll() is not None


def test_two_jobs_do_not_write_one_output(place: Place) -> None:
    place.config("slow", latency=1.0)
    place.write("in.jsonl", *lines(200))
    command = ("run-batch", "slow.yaml", "-i", "in.jsonl", "-o", "out.jsonl")
    job = place.start(*command)
    eventually((place.folder / ".out.jsonl.lock").exists)
    assert f"already being written by process {job.pid}" in place.run(*command, code=2).stderr
    job.send_signal(signal.SIGINT)
    assert job.wait(30) == 130


def test_a_service_that_is_launched_anew_is_waited_for(place: Place) -> None:
    place.config("again", latency=0.05, capacity=4)
    place.write("in.jsonl", *lines(200))
    launched = place.start("launch", "again.yaml")
    place.run("wait", "again")
    job = place.start("run-batch", "--attach", "again", "-i", "in.jsonl", "-o", "out.jsonl")
    eventually(lambda: size(place.folder / "out.jsonl") > 1000)
    launched.kill()
    launched.wait()
    launched = place.start("launch", "again.yaml")
    assert job.wait(60) == 0
    assert set(answers(place).values()) == {1}
    assert len(answers(place)) == 200
    launched.send_signal(signal.SIGTERM)
    assert launched.wait(60) == 0
