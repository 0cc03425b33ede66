"""The trials of settings: each starts a service with one setting, and answers rows of the user."""

import itertools
import json
import math
import os
import random
import secrets
import threading
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

from ..batch.output_lock import NO_LINKS
from ..config import FRACTION, load
from ..document import Document, dump
from ..errors import ConfigError, GserveError, ServerExited
from ..host import gpu_locks, gpus
from ..host.control_group import usable_cores, usable_memory
from ..rows.job import FileJob, Run
from ..rows.output import Totals
from ..service.deployment import Deployment
from ..service.model import check_params
from ..service.model_names import find_model
from ..service.nursery import Nursery
from ..service.plan import Plan
from ..service.server_command import pinning
from ..service.service import VLLMService
from ..service.state import ONLY, State
from .search import GIVEN, Measured, Search, Setting
from .settings import dimensions

END_SECONDS = 5.0
"""Time that is kept for the end of servers, in seconds. A tenth of the time given if that is less."""
PIECES = 30
"""The time given, divided by the time of the rows that are measured in a trial."""
FIRST_PIECE = 16
"""Number of rows that are answered first, to learn the speed."""
CHANCE = 3.0
"""How many more rows may fail than with the config as given, in standard deviations of the difference.
Sampled answers differ each time."""
MOST_ROWS = 20_000
"""Maximum number of rows that are read."""
PREFIX = "gserve tune: "
"""Begins the names of the columns of answers, so that rows may have columns of the usual names."""
MADE_UP_ROWS, MADE_UP_WORDS = 4096, 100
"""Number of prompts if the user gives none, and of words in each."""
MADE_UP_PARAMS = '{"temperature": 0, "max_tokens": 64, "ignore_eos": true}'
"""The sampling parameters for them, in JSON."""
WORDS = (
    "about after again animal answer around because before below between big book both boy call change child city "
    "close country day different door earth end every eye family farm father few find food four girl good great "
    "group hand hard head help high home house idea important keep kind land large last letter life light line long"
)
"""The words of these prompts, as one text."""


class Trials:
    """Trials of settings of a config, with the rows of a job. A context manager.

    Between trials it keeps the imports of vLLM, and the locks of the GPUs.

    `config`, `overrides`: see `config.load`.
    `model`: the name of one of several models; None: the only one.
    `job`: makes prompts of rows, and reads them if it names a file.
    `seconds`: time for all trials, counted from now.
    `output`: the file for the best setting. `overwrite`: whether it may exist.

    Raises ConfigError or PluginError: the config, the model, the rows or the output are wrong.
    """

    def __init__(
        self, config: Path, overrides: Sequence[str], job: FileJob, *, model: str | None, seconds: float, output: Path,
        overwrite: bool = False,
    ) -> None:  # fmt: skip
        self._end = time.monotonic() + seconds - min(END_SECONDS, seconds / 10)
        self._piece_seconds = seconds / PIECES
        self._nursery = _KeptNursery()
        self._locks: gpu_locks.Hold | None = None
        self._config, self._overrides = config, overrides
        loaded, document = load(config, overrides)
        self._content = config.read_bytes()
        with document.located():
            self._name = find_model({name: name for name in loaded.pools}, model)
            if loaded.models and "." in self._name:
                raise ConfigError(f"'{self._name}' has a dot, so that --set cannot name its keys: rename the model")
        self._output, self._overwrite = output, overwrite
        self._check_output(has_plugins=bool(loaded.plugins))
        self._at = f"models.{self._name}." if loaded.models else ""
        self._model = self._plan(GIVEN).models[ONLY]
        check_params(self._model, job.make_prompts().params)
        self._job = replace(job, output=Path(os.devnull), format=None, limit=None, prefix=PREFIX)
        most = MOST_ROWS if job.limit is None else min(job.limit, MOST_ROWS)
        places = itertools.islice(job.rows(job.sources(), job.wanted()), most)
        self._rows = [row.values for row in places if row.values is not None]
        if not self._rows:
            raise ConfigError("the sample has no rows that can be read")
        replace(self._job, source=self._rows).check()
        self._warm_up: Sequence[Mapping[str, Any]] = ()
        self._measured: Sequence[Mapping[str, Any]] = ()
        self._capacity = self._failed = 0
        self.rows = self.fitting_rows = 0
        """Number of rows of each measurement, and the number that could be measured in the time."""

    def search(self, report: Callable[[Measured], object]) -> Search:
        """Search for the best setting until the time is over. `report`: called with each outcome.

        Raises GserveError: the config as given does not start, or there is no time to measure it.
        """

        def measure(setting: Setting) -> Measured:
            measured = self._measure(setting)
            report(measured)
            return measured

        search = Search(measure, self._left)
        cores, memory = usable_cores(), usable_memory()
        search.run(lambda: [*dimensions(self._model, self._at, self._capacity, len(self._measured), cores, memory)])
        return search

    def write(self, setting: Setting, comment: str) -> None:
        """Write the config with a setting to the output, below a comment. Raises ConfigError: it cannot be written."""
        self._check_config()
        text = f"# {comment}\n{dump(Document(self._config, [*self._overrides, *_changes(setting)]).data)}"
        out = self._output.resolve()
        scratch = out.with_name(f".{out.name}.{secrets.token_hex(4)}")
        try:
            mode = self._config.stat().st_mode & (0o600 if self._overrides else 0o777)  # they may hold secrets
            descriptor = os.open(scratch, os.O_WRONLY | os.O_CREAT | os.O_EXCL, mode)
            try:
                with os.fdopen(descriptor, "w", encoding="utf-8") as stream:
                    stream.write(text)
                if self._overwrite:
                    scratch.replace(out)
                else:
                    _put(scratch, out)
            finally:
                scratch.unlink(missing_ok=True)
        except OSError as error:
            raise ConfigError(f"cannot write the config: {error.strerror}", file=self._output) from error

    def _check_config(self) -> None:
        """Raise ConfigError: the config has another content than at the beginning."""
        try:
            is_same = self._config.read_bytes() == self._content
        except OSError:
            is_same = False
        if not is_same:
            raise ConfigError("the file was changed during the measurements: start again", file=self._config)

    def _check_output(self, *, has_plugins: bool) -> None:
        out, folder = self._output, self._config.parent.resolve()
        if out.exists():
            is_replaceable = out.is_file() and not out.samefile(self._config)
            if not (self._overwrite and is_replaceable):
                remedy = "use another --output" + ", or --overwrite" * is_replaceable
                raise ConfigError(f"the file exists already: {remedy}", file=out)
        if not os.access(out.parent, os.W_OK):
            raise ConfigError(f"cannot write into the folder '{out.parent}': use another --output", file=out)
        if has_plugins and out.parent.resolve() != folder:
            raise ConfigError(f"its plugins are looked for beside it: use an --output in {folder}", file=out)

    def __enter__(self) -> "Trials":
        model = self._model
        if model.parts.launcher.runs_here and model.parts.engine.needs_gpus():
            environ = os.environ | pinning(model.serve.gpu_ids) | model.serve.env
            devices = gpus.visible(environ, len(model.serve.gpu_ids or [0] * model.llm.gpus_per_server))
            if not model.serve.shares_gpus:  # nobody else may have them
                gpu_locks.hold(devices, share=False).release()
            self._locks = gpu_locks.hold(devices, share=True)
        return self

    def __exit__(self, *_: object) -> None:
        self._nursery.end()
        if self._locks is not None:
            self._locks.release()

    def _left(self) -> float:
        return self._end - time.monotonic()

    def _plan(self, setting: Setting) -> Plan:
        """Return the plan of a service with the model alone, and its part of the memory. It has no gateway.

        All servers have to be ready before a measurement. Raises ConfigError: the setting, or the file, is wrong.
        """
        self._check_config()
        config, document = load(self._config, [*self._overrides, *_changes(setting)])
        with document.located():
            name, folder = self._name, document.file.parent
            given = replace(config.pools[name].serve, weight_protocol=None, min_ready=None, port=None)
            config = config.with_model(name, serve=given)
            model = Plan.of(config, folder).models[name if config.models else ONLY]
            llm, parts = model.llm, [part * model.serve.least_per_gpu for part in model.gpu_memory.values()]
            if config.models and parts:  # the other models have the rest
                llm = replace(llm, llm_kwargs={**llm.llm_kwargs, FRACTION: min(parts)})
            serve = replace(
                model.serve,
                share_gpu=given.share_gpu or self._locks is not None,  # the lock is shared with us
                gpu_sharing=given.gpu_sharing if model.serve.shares_gpus else None,
            )
            return Plan.of(replace(config.only(name), llm=llm, serve=serve, gateway=None), folder)

    def _measure(self, setting: Setting) -> Measured:
        """Start a service with a setting, measure it, and stop it. A failure is an outcome too.

        Raises GserveError: the config as given fails at the first time.
        """
        began, is_first = time.monotonic(), not self._measured
        totals, ready, failure, is_cut = Totals(), None, "", False
        try:
            with self._started(setting) as service:
                ready = time.monotonic()
                if is_first:
                    self._choose_rows(service)
                else:
                    self._answer(service, self._warm_up)
                totals = self._answer(service, self._measured)
                expected = max(self._failed, min(len(self._measured) / 100, 1))
                if setting != GIVEN and totals.failed > self._failed + CHANCE * math.sqrt(2 * expected):
                    raise GserveError(str(totals))
                for state in service.status():
                    if state.restarts or state.state != State.READY:
                        cause = f": {_sentence(state.failure)}" if state.failure else ", and was started again"
                        raise GserveError(f"{state.name} died{cause}")
                if setting == GIVEN:
                    self._failed = max(self._failed, totals.failed)
        except GserveError as error:
            if self._left() <= 0:
                failure, is_cut = "not finished: the time was over", True
                if is_first:
                    raise GserveError(
                        "the config as given could not be measured in the time given: give more --minutes"
                    ) from error
            elif is_first:
                raise
            else:
                failure = f"{'failed' if ready else 'did not start'}: {_sentence(error)}"
        seconds = time.monotonic() - began
        if failure:
            return Measured(setting, seconds=seconds, failure=failure, is_cut=is_cut)
        assert ready is not None
        rows, tokens = totals.done / totals.seconds, totals.completion_tokens / totals.seconds
        return Measured(setting, rows, tokens, seconds, start=ready - began)

    @contextmanager
    def _started(self, setting: Setting) -> Iterator["_Service"]:
        """Yield a started service with a setting, as `_serving` does.

        The first start may download the model, by whose size `servers_per_gpu: auto` then decides anew.
        """
        while True:
            with self._serving(self._plan(setting)) as service:
                service.start()
                known = self._model if self._measured else self._plan(GIVEN).models[ONLY]
                if known.serve.servers_per_gpu == self._model.serve.servers_per_gpu:
                    yield service
                    return
            self._model = known

    @contextmanager
    def _serving(self, plan: Plan) -> Iterator["_Service"]:
        """Yield a service that is shut down at the end of the block, and when the time is over."""
        plan = replace(plan, models={ONLY: replace(plan.models[ONLY], nursery=self._nursery)})
        service, is_over = _Service(plan), threading.Event()

        def stop_in_time() -> None:
            is_over.wait(max(self._left(), 0.0))
            while not is_over.wait(0.1):  # again and again: the start may not have begun
                service.shutdown()

        threading.Thread(target=stop_in_time, name="time limit", daemon=True).start()
        try:
            yield service
        finally:
            is_over.set()
            try:
                service.shutdown()
            except BaseException:  # a signal has interrupted it
                service.shutdown()
                raise

    def _choose_rows(self, service: "_Service") -> None:
        """Answer rows until the speed is known, and choose the rows of all trials by it."""
        rows, at, size = self._rows, 0, FIRST_PIECE
        self._capacity = max(state.info.capacity for state in service.status() if state.info is not None)
        while True:
            size = min(size, max((len(rows) - at) // 2, 1))
            totals = self._answer(service, rows[at : at + size], may_fail=at + size < len(rows))
            at, size = at + size, size * 2
            if totals.done and (at >= len(rows) // 2 or totals.seconds >= self._piece_seconds / 4):
                break
        count = int(totals.done / totals.seconds * self._piece_seconds)
        self._warm_up = rows[:at]
        self._measured = rows[at : at + max(count, FIRST_PIECE)] or rows
        self.rows, self.fitting_rows = len(self._measured), min(count, MOST_ROWS)

    def _answer(self, service: "_Service", rows: Sequence[Mapping[str, Any]], *, may_fail: bool = False) -> Totals:
        """Answer rows, and throw the answers away.

        Raises GserveError: the service ends; or none was answered, unless all of them `may_fail`.
        """
        totals = service.answer_rows(Run(replace(self._job, source=rows), [], None))
        if not totals.done and not may_fail:
            raise GserveError(f"no row was answered: {totals}")
        return totals


def _put(scratch: Path, out: Path) -> None:
    """Give a file the name `out`, which must not exist. Raises OSError."""
    try:
        out.hardlink_to(scratch)
    except OSError as error:
        if error.errno not in NO_LINKS or out.exists():
            raise
        scratch.replace(out)


class _Service(VLLMService):
    """A service with a plan that is made already."""

    def __init__(self, plan: Plan) -> None:
        self._set_up(Deployment(plan, None))


class _KeptNursery(Nursery):
    """A nursery that stays when its service ends."""

    def close(self) -> None:
        """Do nothing."""

    def end(self) -> None:
        """End it. Idempotent."""
        super().close()


def made_up_rows() -> list[dict[str, str]]:
    """Return prompts of random words, always the same."""
    chance, words = random.Random(0), WORDS.split()  # noqa: S311 - no secret
    return [{"prompt": " ".join(chance.choices(words, k=MADE_UP_WORDS))} for _ in range(MADE_UP_ROWS)]


def setting_text(setting: Setting) -> str:
    """Return a setting as the options of a command line."""
    return " ".join(_changes(setting)) or "as given"


def _changes(setting: Setting) -> list[str]:
    return [f"{key}={json.dumps(value)}" for key, value in setting]


def _sentence(error: GserveError) -> str:
    """Return the cause of an error in one line."""
    if isinstance(error, ServerExited) and error.cause:
        return error.cause
    return str(error).partition("\n")[0]
