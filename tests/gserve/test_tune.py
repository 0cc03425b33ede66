"""`gserve tune`, run as its users run it, with an engine whose speed depends on the settings."""

import json
import os
import re
import signal
import stat
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import pytest
import yaml

from gserve_core.config import load
from gserve_core.errors import ConfigError, LaunchError
from gserve_core.host import gpu_locks, gpus
from gserve_core.rows.job import FileJob
from gserve_core.rows.prompts import RowOptions
from gserve_core.service import plan as plans
from gserve_core.service.plan import ModelPlan, Plan
from gserve_core.service.state import ONLY
from gserve_core.tune import trials
from gserve_core.tune.search import Search
from tests.gserve.place import Place, eventually

ENGINE = '''
from dataclasses import dataclass, replace
from pathlib import Path
from typing import ClassVar

from gserve import GserveError, hookimpl
from gserve_core.engines.echo import EchoEngine


@dataclass(frozen=True, kw_only=True)
class Tunable(EchoEngine):
    """Works on `max_num_seqs` items at once, of which 8 are too many. With 8 tokens in a batch, rows fail.

    Without prefix caching, the first server dies once.
    """

    name: ClassVar[str] = "tunable"
    uses_gpus: ClassVar[bool] = {uses_gpus}
    downloaded: ClassVar[Path] = Path(__file__).with_name("downloaded")

    def weight_bytes(self, llm):
        return 1 << 30 if self.downloaded.exists() else None

    async def start(self, llm, report):
        self.downloaded.touch()
        seqs = llm.llm_kwargs.get("max_num_seqs", 2)
        if seqs >= 8:
            raise GserveError(f"no memory for {{seqs}} sequences")
        latency = self.latency * (2 / seqs) ** 3  # much faster, so that a stall of the machine decides nothing
        fault = "b 7" if llm.llm_kwargs["max_num_batched_tokens"] == 8 else self.error_on
        died = Path(__file__).with_name("died")
        dies = not llm.llm_kwargs.get("enable_prefix_caching", True) and not died.exists()
        if dies:
            died.touch()
        changed = replace(self, capacity=seqs, latency=latency, error_on=fault, die_at=50 if dies else None)
        return await super(Tunable, changed).start(llm, report)


@hookimpl
def gserve_register_engines():
    return [Tunable]
'''
GPU = "GPU-00000000-0000-0000-0000-0000000000aa"


def config(folder: Path, name: str = "demo", *, uses_gpus: bool = False, **engine: Any) -> Path:
    """Write a config for the engine above. Its servers have GPU ids, so that their number stays on a CPU."""
    module = f"tunable_{uses_gpus}".lower()  # Python imports a module once
    (folder / f"{module}.py").write_text(ENGINE.format(uses_gpus=uses_gpus))
    data = {
        "llm": {"model_name": "any", "revision": "on", "llm_kwargs": {"max_num_batched_tokens": 2}},
        "serve": {"gpu_ids": [0]},
        "engine": {"type": "tunable", "latency": 0.005} | engine,
        "plugins": [module],
    }
    (folder / f"{name}.yaml").write_text(f"# by hand\n{json.dumps(data)}")
    return folder / f"{name}.yaml"


def rows(place: Place, count: int) -> str:
    place.write("rows.jsonl", *({"title": f"a b {number}"} for number in range(count)))
    return "rows.jsonl"


def test_it_writes_a_config_with_the_fastest_setting_and_shows_those_that_failed(place: Place) -> None:
    given = config(place.folder, latency=0.01)
    given.chmod(0o600)
    words = ("tune", "demo.yaml", "-i", rows(place, 80), "--template", "{{ title }}", "--minutes", "3")
    done = place.run(*words)
    seqs = "llm.llm_kwargs.max_num_seqs"
    header, first, *lines = done.stdout.splitlines()
    assert header.split() == ["setting", "rows/s", "tokens/s", "ratio"]
    assert first.startswith("as given ")
    won = next(line for line in lines if re.match(rf"{seqs}=4 +\d", line))
    assert won.count("#") > first.count("#") > 0
    (failed,) = [line for line in lines if line.startswith(f"{seqs}=8 ")]
    assert failed.rstrip().endswith("did not start: no memory for 8 sequences"), failed
    (failed,) = [line for line in lines if line.startswith(f"{seqs}=4 llm.llm_kwargs.max_num_batched_tokens=8 ")]
    assert re.search(r"failed: rows: \d+ answered, \d+ failed", failed), failed
    (failed,) = [line for line in lines if line.startswith(f"{seqs}=4 llm.llm_kwargs.enable_prefix_caching=false ")]
    assert failed.rstrip().endswith("failed: server-0 died, and was started again"), failed
    assert any(line.startswith("as given (again)") for line in lines)
    assert "noise: " in done.stderr
    assert re.search(r"measured with \d+ rows, and [\d,]+ fit: give more rows", done.stderr)

    out = place.folder / "demo.tuned.yaml"
    comment, text = out.read_text().split("\n", 1)
    assert comment.startswith("# gserve tune, 2")
    assert " times the rows/s of demo.yaml" in comment
    data = yaml.safe_load(given.read_text())
    found = yaml.safe_load(text)
    assert found["llm"]["llm_kwargs"].pop("max_num_seqs") == 4
    assert found == data, "nothing else has changed"
    assert stat.S_IMODE(out.stat().st_mode) == 0o600, "it may hold the secrets of the config"
    place.run("check", "demo.tuned.yaml")
    refused = place.run(*words, code=2).stderr
    assert "demo.tuned.yaml: the file exists already: use another --output, or --overwrite" in refused


def test_the_result_is_for_its_owner_alone_if_keys_were_set_and_its_command_has_the_name_of_the_config(
    place: Place,
) -> None:
    config(place.folder).chmod(0o644)
    words = ("tune", "demo.yaml", "-i", rows(place, 40), "--column", "title", "--minutes", "0.2")
    done = place.run(*words, "--set", "engine.latency=0.001")
    launch, reload = "gserve launch demo.tuned.yaml --name demo", "gserve reload demo demo.tuned.yaml"
    assert f"start it with: {launch}; if it runs already: {reload}\n" in done.stderr
    out = place.folder / "demo.tuned.yaml"
    assert yaml.safe_load(out.read_text())["engine"]["latency"] == 0.001
    assert stat.S_IMODE(out.stat().st_mode) == 0o600, "what was set may be secret"


def test_a_signal_in_a_trial_ends_the_command_and_its_servers(place: Place) -> None:
    config(place.folder)
    process = place.start("tune", "demo.yaml", "-i", rows(place, 80), "--column", "title", "--minutes", "5")
    eventually(lambda: "as given: " in place.stderr and place.servers())
    process.send_signal(signal.SIGINT)
    assert process.wait(60) == 128 + signal.SIGINT
    eventually(lambda: not place.processes())
    assert not (place.folder / "demo.tuned.yaml").exists()


def test_a_signal_in_the_first_start_ends_the_command_and_its_servers(place: Place) -> None:
    config(place.folder, load_time=1000)
    process = place.start("tune", "demo.yaml")
    eventually(place.servers)
    process.send_signal(signal.SIGTERM)
    assert process.wait(60) == 128 + signal.SIGTERM
    eventually(lambda: not place.processes())


def test_a_config_that_cannot_be_measured_in_the_time_is_an_error_in_time(place: Place) -> None:
    config(place.folder, latency=1000)
    words = ("tune", "demo.yaml", "-i", rows(place, 40), "--column", "title", "--minutes", "0.05")
    assert "give more --minutes" in place.run(*words, code=1).stderr
    assert not (place.folder / "demo.tuned.yaml").exists()


def test_a_config_that_does_not_start_is_an_error(place: Place) -> None:
    config(place.folder)
    shown = place.run("tune", "demo.yaml", "--set", "llm.llm_kwargs.max_num_seqs=8", code=1).stderr
    assert "no memory for 8 sequences" in shown


def test_options_that_do_not_fit_are_refused(place: Place) -> None:
    config(place.folder)
    assert "--column requires --input" in place.run("tune", "demo.yaml", "--column", "title", code=2).stderr
    shown = place.run("tune", "demo.yaml", "-o", "demo.yaml", "--overwrite", code=2).stderr
    assert "demo.yaml: the file exists already: use another --output\n" in shown
    assert not (place.folder / "state").exists(), "no server has started"


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"source": []}, "the sample has no rows that can be read"),
        ({"source": [{"title": "a"}]}, "no prompt can be made of the first rows"),
        ({"params": {"max_tokens": 0}}, "max_tokens must be at least 1"),
        ({"output": "none/out.yaml"}, "cannot write into the folder '.*/none': use another --output"),
        ({"output": "other/out.yaml"}, "its plugins are looked for beside it: use an --output in "),
        ({"file": "several"}, "this service has several models: choose one of 'writer', 'judge.2'"),
        ({"file": "several", "model": "wirter"}, "did you mean 'writer'"),
        ({"file": "several", "model": "judge.2"}, "'judge.2' has a dot"),
    ],
)
def test_what_is_wrong_is_said_before_a_server_starts(tmp_path: Path, options: dict[str, Any], message: str) -> None:
    config(tmp_path)
    (tmp_path / "other").mkdir()
    models = {name: {"llm": {"model_name": name}} for name in ("writer", "judge.2")}
    (tmp_path / "several.yaml").write_text(json.dumps({"models": models, "engine": {"type": "echo"}}))
    job = FileJob(
        source=options.get("source", [{"prompt": "a"}]), prompts=RowOptions(params=options.get("params")),
    )  # fmt: skip
    file, output = tmp_path / f"{options.get('file', 'demo')}.yaml", tmp_path / options.get("output", "out.yaml")
    with pytest.raises(ConfigError, match=message):
        trials.Trials(file, [], job, model=options.get("model"), seconds=60, output=output)


@pytest.fixture
def no_more_settings(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(trials, "dimensions", lambda *_: ())


GOOD = [{"prompt": f"a b {number}", "response": "of an earlier job"} for number in range(40)]


def measured(file: Path, model: str | None = None, source: Sequence[Mapping[str, Any]] = GOOD) -> Search:
    job = FileJob(source=source)
    out = file.with_name("out.yaml")
    with trials.Trials(file, [], job, model=model, seconds=20, output=out) as opened:
        found = opened.search(lambda _: None)
        opened.write(found.best, "a comment")
    return found


@pytest.mark.parametrize(("first", "good"), [(16, 80), (16, 16), (6, 1)])
def test_rows_that_cannot_be_answered_do_not_end_it(
    first: int, good: int, tmp_path: Path, no_more_settings: None
) -> None:
    bad: list[dict[str, Any]] = [*[{"prompt": "too long"}] * first, *[{"prompt": None}] * 2 * first]
    found = measured(config(tmp_path, error_on="too long"), source=[*bad, *(GOOD * 2)[:good]])
    assert found.rate(()) > 0


def test_the_gpus_stay_locked_from_the_first_trial_to_the_last(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, no_more_settings: None
) -> None:
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", GPU)
    file = config(tmp_path, uses_gpus=True)
    refused = []

    def no_others(*_: Any) -> tuple[()]:
        with pytest.raises(LaunchError) as info:  # no server runs now
            gpu_locks.hold([GPU], share=False)
        refused.append(str(info.value))
        return ()

    monkeypatch.setattr(trials, "dimensions", no_others)
    other = gpu_locks.hold([GPU], share=True)
    with pytest.raises(LaunchError, match=f"{GPU} is held by process"):
        measured(file)
    other.release()
    assert measured(file).rate(()) > 0
    (message,) = refused
    assert f"{GPU} is held by process" in message
    gpu_locks.hold([GPU], share=False).release()


def test_the_number_that_auto_chooses_is_measured_once_the_model_is_downloaded(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", GPU)
    monkeypatch.setattr(gpus, "facts", lambda _: [gpus.GPU("H100", 80 << 30, 132)])
    monkeypatch.setattr(os, "sched_getaffinity", lambda _: range(64))
    numbers = []

    def no_others(model: ModelPlan, *_: Any) -> tuple[()]:
        numbers.append(model.serve.servers_per_gpu)
        return ()

    def choosing(self: trials.Trials, service: trials._Service) -> None:
        numbers.append(len(service.status()))
        choose(self, service)

    def starting(self: trials._Service) -> None:
        starts.append(len(starts))
        start(self)

    starts: list[int] = []
    start = trials._Service.start
    monkeypatch.setattr(trials._Service, "start", starting)

    choose = trials.Trials._choose_rows
    monkeypatch.setattr(trials.Trials, "_choose_rows", choosing)
    monkeypatch.setattr(trials, "dimensions", no_others)
    file = config(tmp_path, uses_gpus=True)
    file.write_text(file.read_text().replace('"gpu_ids": [0]', '"gpu_ids": [0], "servers_per_gpu": "auto"'))
    assert Plan.of(load(file)[0], tmp_path).models[ONLY].serve.servers_per_gpu == 1, "its size is not known yet"
    found = measured(file)
    assert numbers == [3, 3]
    assert len(starts) == len(found.measured) + 1, "the first had one server"
    starts.clear()
    file.with_name("out.yaml").unlink()
    found = measured(file)
    assert len(starts) == len(found.measured), "the number is known now"


def test_what_auto_chooses_shares_the_gpu_as_the_config_says(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", GPU)
    monkeypatch.setattr(gpus, "facts", lambda _: [gpus.GPU("H100", 80 << 30, 132)])
    monkeypatch.setattr(os, "sched_getaffinity", lambda _: range(64))
    monkeypatch.setattr(plans, "check_environ", lambda _: None)
    file = config(tmp_path, uses_gpus=True)
    (tmp_path / "downloaded").touch()
    keys = '"gpu_ids": [0], "servers_per_gpu": "auto", "gpu_sharing": "mps"'
    file.write_text(file.read_text().replace('"gpu_ids": [0]', keys))
    opened = trials.Trials(
        file, [], FileJob(source=[{"prompt": "a"}]), model=None, seconds=9, output=tmp_path / "o.yaml"
    )
    for setting, number in (((), 3), ((("serve.servers_per_gpu", 2),), 2), ((("serve.servers_per_gpu", 1),), 1)):
        serve = opened._plan(setting).models[ONLY].serve
        assert (serve.servers_per_gpu, serve.gpu_sharing) == (number, "mps" if number > 1 else None)


def test_one_of_several_models_is_measured_alone(tmp_path: Path, no_more_settings: None) -> None:
    models = {
        "writer": {"llm": {"model_name": "w"}, "engine": {"type": "echo", "fail_start": "not this one"}},
        "judge": {"llm": {"model_name": "j"}},
    }
    (tmp_path / "demo.yaml").write_text(json.dumps({"models": models, "engine": {"type": "echo"}}))
    assert measured(tmp_path / "demo.yaml", "judge").rate(()) > 0
