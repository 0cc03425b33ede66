"""The command line: `launch`, `generate`, `chat`, `run`, `sbatch`, `check`, `doctor`, `plugins`, `ps`, `stop`, `reap`.

Results go to stdout, all else to stderr. What goes wrong is said there after "error:", and by the exit code: 2 for a
config, a plugin or an argument, 1 for anything else, 128 and its number for a signal.
"""

import logging
import os
import shlex
import shutil
import signal
import sys
import tempfile
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor, wait
from contextlib import closing, contextmanager, nullcontext, suppress
from importlib.metadata import version
from pathlib import Path
from types import FrameType
from typing import TYPE_CHECKING, Annotated, Any, BinaryIO, ClassVar

import msgspec
import typer
from msgspec import Struct

import gserve
from gserve_core.errors import ConfigError, GserveError, ItemError, PluginError
from gserve_core.host.environment import open_missing_descriptors
from gserve_core.host.logs import LEVEL_VARIABLE, flush, setup_logging
from gserve_core.host.redaction import hidden
from gserve_core.schema import ResponseOutput, json_safe

# Imports inside functions are those of rich and of the core's larger modules: `gserve --help` needs none of them.
if TYPE_CHECKING:
    from gserve_core.service.service import VLLMService

TICK = 0.1
"""Seconds between two looks at servers or processes."""
DRAIN_SECONDS = 30.0
"""How long servers may finish what they have, in seconds, after a SIGTERM that `gserve stop` did not send."""
END_SECONDS = 30.0
"""How long `gserve stop` waits for the end of a service whose servers may finish nothing more, in seconds."""
ATTACH_VARIABLE = "GSERVE_ATTACH"
STDIO = Path("-")
RECORD_START = b'{"id":'
ENDING = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)
SHOWN = 60
"""Characters of a word that a message repeats."""
COLOURS = {"ok": "green", "note": "yellow", "problem": "red"}

logger = logging.getLogger("gserve.cli")
app = typer.Typer(add_completion=False, pretty_exceptions_enable=False, no_args_is_help=True, rich_markup_mode=None)

type Params = dict[str, Any]
type Outcomes = Iterator[tuple[int, list[ResponseOutput] | ItemError]]

ConfigFile = Annotated[Path, typer.Argument(metavar="CONFIG", help="A YAML file.")]
ConfigFileOrNot = Annotated[
    str | None,
    typer.Argument(
        metavar="CONFIG", help="A YAML file. With --attach or $GSERVE_ATTACH there is none.", show_default=False
    ),
]
Overrides = Annotated[
    list[str] | None,
    typer.Option("--set", metavar="KEY.KEY=VALUE", help="Change the config, as in serve.port=8000. Repeatable."),
]
Attach = Annotated[
    str | None, typer.Option(metavar="NAME", help="Use a launched service (see: gserve ps) instead of a CONFIG.")
]
Verbose = Annotated[
    bool, typer.Option("--verbose", help="Show the servers' logs on stderr, as serve.verbose=true does.")
]
ParamsText = Annotated[
    str | None,
    typer.Option("--params", metavar="JSON", help='Sampling parameters, as in {"max_tokens": 64, "temperature": 0}.'),
]
Command = Annotated[list[str], typer.Argument(metavar="-- COMMAND", help="A program and its arguments.")]
CommandOrNot = Annotated[
    list[str] | None, typer.Argument(metavar="[-- COMMAND]", help="A program and its arguments.", show_default=False)
]
SlurmText = Annotated[str | None, typer.Option(help="As under 'launcher' in CONFIG.")]
SlurmNumber = Annotated[int | None, typer.Option(help="As under 'launcher' in CONFIG.")]
Output = Annotated[
    Path | None,
    typer.Option(
        "--output", "-o", metavar="OUT.jsonl", help="Write JSON lines here; what it holds already is not done again."
    ),
]  # fmt: skip


# -------------------------------------------------------------------------------------------------- errors and signals


class Signalled(BaseException):
    """A signal asked this process to end."""

    def __init__(self, number: int) -> None:
        super().__init__(number)
        self.number = number


def main() -> None:
    """Run the command line, and exit."""
    open_missing_descriptors()
    signal.signal(signal.SIGCHLD, signal.SIG_DFL)  # where it is ignored, nobody learns how a command has ended
    _on_signals(_raise)
    signal.signal(signal.SIGUSR1, _ignore)  # SLURM's notice may come to all processes of a job
    try:
        app(prog_name="gserve")
    except Signalled as signalled:
        sys.exit(128 + signalled.number)
    except (GserveError, OSError) as error:
        logger.debug("the command failed", exc_info=True)
        _say(f"error: {error}")
        sys.exit(2 if isinstance(error, (ConfigError, PluginError)) else 1)


def _on_signals(handler: Callable[[int, FrameType | None], None]) -> None:
    """Let `handler` take the signals that end a process, but for those that our parent had us ignore, as nohup does."""
    for number in ENDING:
        if signal.getsignal(number) is not signal.SIG_IGN:
            signal.signal(number, handler)


def _raise(number: int, _frame: FrameType | None) -> None:
    _on_signals(_ignore)
    raise Signalled(number)


def _ignore(_number: int, _frame: FrameType | None) -> None:
    """Do nothing: at SIGUSR1; or the end has begun, takes seconds, and must not be left half done."""


def _say(text: str) -> None:
    flush()  # the log goes before
    with suppress(OSError):  # after a SIGHUP the terminal may be gone
        print(text, file=sys.stderr, flush=True)


# ----------------------------------------------------------------------------------------------------------- commands


def _print_version(asked: bool) -> None:
    if asked:
        print(f"gserve {version('gserve')}")
        raise typer.Exit


@app.callback()
def _prepare(
    _version: Annotated[
        bool, typer.Option("--version", callback=_print_version, is_eager=True, help="Show the version.")
    ] = False,
) -> None:
    """Run vLLM on the GPUs you hold: servers, their whole life, and batched requests to them."""
    if LEVEL_VARIABLE in os.environ:  # else Python shows warnings and errors, and the servers log from INFO on
        setup_logging()


@app.command()
def launch(
    config: ConfigFile,
    name: Annotated[str | None, typer.Option(help="The name for --attach and stop [default: CONFIG's].")] = None,
    overrides: Overrides = None,
    verbose: Verbose = False,
) -> None:
    """Start the servers of CONFIG, and keep them until Ctrl-C, SIGTERM, SIGHUP or `gserve stop`.

    After `stop` and SIGTERM the servers first finish what they have; a second signal ends them at once.
    """
    service = gserve.VLLMService.from_yaml(config, overrides=_changes(overrides, verbose), name=name or config.stem)
    died: set[str] = set()
    with _serving(service):
        try:
            _print_table(
                ("name", "address", "GPUs", "model", "state"),
                [
                    (
                        server.name,
                        f"{server.host}:{server.port}",
                        ",".join(map(str, server.gpu_ids)) if server.gpu_ids else "-",
                        server.info.model if server.info else "-",
                        server.state,
                    )
                    for server in service.status()
                ],
            )
            while len(down := _down(service)) < len(service.servers):
                died |= down  # the log has said why
                time.sleep(TICK)
            raise GserveError("no server is running any more")
        except Signalled as signalled:  # the way to end it
            if signalled.number == signal.SIGTERM:
                _drain(service)
        _say("shutting down")
    if died:
        raise GserveError(f"ended without having been asked to: {', '.join(sorted(died))}")


@app.command()
def generate(
    config: ConfigFileOrNot = None,
    prompts: Annotated[list[str] | None, typer.Argument(metavar="PROMPT", help="Texts to complete.")] = None,
    source: Annotated[
        Path | None,
        typer.Option(
            "--input", "-i", metavar="IN",
            help="Prompts: a text file with one a line, or a .jsonl of texts or"
            ' {"prompt": …, "id": …, "params": {…}}; - for stdin (either of the two).',
        ),
    ] = None,
    output: Output = None,
    params: ParamsText = None,
    attach: Attach = None,
    overrides: Overrides = None,
    verbose: Verbose = False,
) -> None:  # fmt: skip
    """Complete prompts."""
    file, texts = _split("generate", config, prompts or (), attach)
    if bool(texts) == (source is not None):
        raise ConfigError("expected prompts, either as arguments after CONFIG or in a file (--input)")
    lines = _read(source, PromptLine) if source else _numbered(texts, PromptLine)
    shared = _read_params(params)
    _answer(
        _service(file, attach, _changes(overrides, verbose)), lines, shared, output, as_text=not source and not output
    )


@app.command()
def chat(
    config: ConfigFileOrNot = None,
    message: Annotated[str | None, typer.Argument(metavar="MESSAGE", help="What to say (in quotes).")] = None,
    source: Annotated[
        Path | None,
        typer.Option(
            "--input", "-i", metavar="IN.jsonl",
            help='Conversations, one a line: [{"role": …, "content": …}, …] or'
            ' {"messages": […], "id": …, "params": {…}}; - for stdin.',
        ),
    ] = None,
    output: Output = None,
    params: ParamsText = None,
    system: Annotated[str | None, typer.Option(metavar="TEXT", help="Begin with this system message.")] = None,
    attach: Attach = None,
    overrides: Overrides = None,
    verbose: Verbose = False,
) -> None:  # fmt: skip
    """Continue conversations; without MESSAGE and --input, hold one here (/exit or Ctrl-D ends it)."""
    file, texts = _split("chat", config, [message] if message is not None else [], attach)
    if len(texts) + (source is not None) > 1:
        raise ConfigError("expected one MESSAGE (in quotes), or conversations in a file (--input)")
    shared = _read_params(params)
    opening = [{"role": "system", "content": system}] if system else []
    if source is None and not texts:
        if output is not None:
            raise ConfigError("--output goes with a MESSAGE or --input")
        _converse(_service(file, attach, _changes(overrides, verbose)), opening, shared)
        return
    if source is None:
        lines = _numbered([[{"role": "user", "content": texts[0]}]], ConversationLine)
    else:
        lines = _read(source, ConversationLine)
    for line in lines:
        if not _has_system(line.messages):
            line.messages[:0] = opening
    _answer(
        _service(file, attach, _changes(overrides, verbose)), lines, shared, output, as_text=not source and not output
    )


@app.command()
def run(
    config: ConfigFile,
    command: Command,
    patience: Annotated[
        float | None,
        typer.Option(
            metavar="SECONDS", help="How long COMMAND may take to end after SIGUSR1 [default: 80, or the job's time]."
        ),
    ] = None,
    overrides: Overrides = None,
) -> None:
    """Start the servers of CONFIG, run COMMAND with $GSERVE_ATTACH set, and end with its exit code.

    SIGUSR1 says that the time is nearly over: no more items are taken, those at work finish, and COMMAND is given the
    rest back as errors.
    """
    from gserve.cli import batch_job

    ended = batch_job.run(config, overrides or (), command, patience)
    raise typer.Exit(ended.code)


@app.command()
def sbatch(
    config: ConfigFile,
    command: CommandOrNot = None,
    source: Annotated[
        Path | None, typer.Option("--input", "-i", metavar="IN", help="Without COMMAND: generate from these prompts.")
    ] = None,
    output: Output = None,
    params: ParamsText = None,
    is_chat: Annotated[bool, typer.Option("--chat", help="IN holds conversations.")] = False,
    overrides: Overrides = None,
    only_print: Annotated[bool, typer.Option("--print", help="Show what would be submitted, and leave it.")] = False,
    partition: SlurmText = None,
    account: SlurmText = None,
    qos: SlurmText = None,
    time: SlurmText = None,
    nodes: SlurmNumber = None,
    gpus_per_server: SlurmNumber = None,
    gpu_type: SlurmText = None,
    cpus_per_server: SlurmNumber = None,
    mem: Annotated[str | None, typer.Option(help="Memory of a server, as in 64G.")] = None,
    constraint: SlurmText = None,
    reservation: SlurmText = None,
    nodelist: SlurmText = None,
    exclude: SlurmText = None,
    job_name: SlurmText = None,
    comment: SlurmText = None,
    requeue: Annotated[
        bool | None, typer.Option(help="Run the job again where it was preempted, or its time was too short.")
    ] = None,
) -> None:
    """Submit a job to SLURM that starts the servers of CONFIG and runs COMMAND, with $GSERVE_ATTACH set, to its end.

    Options about the job go before those of the launcher slurm in CONFIG. COMMAND stands after --.
    """
    from gserve_core.host.redaction import secret_values
    from gserve_core.yaml_file import Document
    from gserve_launchers.slurm import batch

    given = {
        "partition": partition, "account": account, "qos": qos, "time": time, "nodes": nodes,
        "gpus_per_server": gpus_per_server, "gpu_type": gpu_type, "cpus_per_server": cpus_per_server, "mem": mem,
        "constraint": constraint, "reservation": reservation, "nodelist": nodelist, "exclude": exclude,
        "job_name": job_name, "comment": comment, "requeue": requeue,
    }  # fmt: skip
    if bool(command) == (source is not None):
        raise ConfigError("expected either a COMMAND after -- or an --input")
    if source is not None:
        command = _answering(source, output, params, ConversationLine if is_chat else PromptLine)
    elif output is not None or params is not None or is_chat:
        raise ConfigError("--output, --params and --chat go with --input")
    service = gserve.VLLMService.from_yaml(config, overrides=overrides or ())
    if secret_values(Document(config, overrides or ()).data) - secret_values(Document(config).data):
        raise ConfigError("--set holds a secret: write it into CONFIG, or into the environment")
    launcher = batch.configured(service.launcher, {name: value for name, value in given.items() if value is not None})
    jobs = [job for job, _ in service.jobs()]
    order = batch.Order(
        config=str(config.absolute()), overrides=overrides or [], command=command or [],
        patience=batch.notice(launcher) * 2 / 3, requeue=launcher.requeue, notice=batch.notice(launcher),
        output=str(output.absolute()) if output else "",
    )  # fmt: skip
    if only_print:
        print(batch.SCRIPT.read_text())
        print(shlex.join(batch.sbatch(launcher, jobs, str(batch.SCRIPT), sys.executable, f"{batch.folder()}/….json")))
        return
    number = batch.submit(launcher, jobs, order)
    print(f"job {number}: its output goes to {Path.cwd() / f'slurm-{number}.out'}")


def _answering(source: Path, output: Path | None, params: str | None, kind: "type[Line]") -> list[str]:
    """Return the command that does what `generate` and `chat` do, with the service that $GSERVE_ATTACH names."""
    if output is None or STDIO in (source, output):
        raise ConfigError("a job has no stdin and nobody to read its stdout: expected --output, and both as files")
    if not output.absolute().parent.is_dir():
        raise ConfigError(f"cannot write the results: there is no folder {output.absolute().parent}")
    _read(source, kind)  # what is wrong is to be known before the job waits in the queue
    _read_params(params)
    command = [sys.executable, "-P", "-m", "gserve.cli", "chat" if kind is ConversationLine else "generate"]
    command += ["--input", str(source.absolute()), "--output", str(output.absolute())]
    return command if params is None else [*command, "--params", params]


@app.command()
def check(config: ConfigFile, overrides: Overrides = None) -> None:
    """Check CONFIG, and print the commands that would run. Starts nothing, and asks no network."""
    from gserve_core.doctor import check_config

    for job, command in check_config(config, overrides or ()):
        gpus = f" on GPU {','.join(map(str, job.gpu_ids))}" if job.gpu_ids else ""
        print(f"# {job.name}{gpus}")
        print(*(f"{key}={shlex.quote(value)}" for key, value in hidden(job.env).items()), shlex.join(command))


@app.command()
def doctor(
    config: Annotated[
        Path | None, typer.Argument(metavar="[CONFIG]", help="Look for what it needs too, and try its launcher.")
    ] = None,
    on_node: Annotated[
        bool, typer.Option("--on-node", help="Look around on a node too, where servers would run.")
    ] = False,
    overrides: Overrides = None,
) -> None:
    """Check that everything the servers need is there: vLLM, GPUs, the model, SLURM, the way to a node."""
    from gserve_core.doctor import examine

    problems = 0
    with closing(examine(config, overrides or (), on_node=on_node, waiting=_say)) as findings:
        for finding in findings:
            problems += finding.state == "problem"
            state = typer.style(f"{finding.state:<8}", fg=COLOURS[finding.state])
            typer.echo(f"{state} {finding.subject:<16} {finding.text}")
            if finding.hint:
                typer.echo(f"{'':<25} -> {finding.hint}")
    if problems:
        raise GserveError(f"{problems} problem{'s' * (problems > 1)}, see above")


@app.command("plugins")
def list_plugins(
    config: Annotated[
        Path | None, typer.Argument(metavar="[CONFIG]", help="Load the plugins that it names too.")
    ] = None,
) -> None:
    """List the launchers, transports and engines that there are."""
    from gserve_core import plugins
    from gserve_core.config import load

    if config is None:
        registry = plugins.load()
    else:
        loaded, document = load(config)
        with document.located():
            registry = plugins.load(loaded.plugins, document.file.parent)
    rows = [
        (kind, name, f"{cls.__module__}.{cls.__qualname__}", registry.sources[cls])
        for kind, classes in registry.classes.items()
        for name, cls in sorted(classes.items())
    ]
    broken = [("broken", name, "-", reason) for name, reason in registry.broken.items()]
    _print_table(("kind", "name", "class", "from"), [*rows, *broken])


@app.command()
def ps() -> None:
    """List the launched services of this user on this machine."""
    from gserve_core.service import records

    services, unreadable = records.services(), records.unreadable()
    for file in unreadable:
        _say(f"error: {file}")
    if not services:
        if not unreadable:
            _say("no service is running")
        return
    rows: list[tuple[str, ...]] = []
    for record in services:
        rows += [
            (record.name, str(record.pid), server.name, str(server.address), server.model) for server in record.servers
        ] or [(record.name, str(record.pid), "-", record.status, "-")]
    _print_table(("name", "pid", "server", "address", "model"), rows)


@app.command()
def stop(
    name: Annotated[str, typer.Argument(metavar="NAME", help="A launched service.")],
    timeout: Annotated[
        float, typer.Option(metavar="SECONDS", min=0, help="How long its servers may finish what they have.")
    ] = 60.0,
    now: Annotated[bool, typer.Option("--now", help="End it at once: items that are not finished are lost.")] = False,
) -> None:
    """End a launched service once its servers have finished what they have, and wait until it has ended."""
    from gserve_core.service import records

    record = records.find_service(name)
    seconds = 0.0 if now else timeout
    deadline = time.monotonic() + seconds
    try:
        records.write_stop(record, seconds)
    except GserveError as error:  # a full disk, for one
        _say(f"{error}; it is told to end all the same, and decides itself how long its servers may finish")
    try:
        _terminate(record.pid)
        while record.is_alive and time.monotonic() < deadline:
            time.sleep(TICK)
        if record.is_alive and not now:
            _terminate(record.pid)  # the second one ends it at once
        deadline = time.monotonic() + END_SECONDS
        while record.is_alive:
            if time.monotonic() > deadline:
                raise GserveError(
                    f"'{name}' (process {record.pid}) was told to end, and has not within {seconds + END_SECONDS:g} s"
                )
            time.sleep(TICK)
    finally:
        records.remove_stop(record.pid)
    _say(f"stopped '{name}'")


def _terminate(pid: int) -> None:
    with suppress(ProcessLookupError):
        os.kill(pid, signal.SIGTERM)


@app.command()
def reap(
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Only show what is there, and leave it.")] = False,
) -> None:
    """End and remove what services have left that were killed: processes, temporary folders, state files.

    Also the files of SLURM jobs that were cancelled before they ran.
    """
    from gserve_core import reap as left_behind
    from gserve_launchers.slurm.batch import stale_orders

    orphans = left_behind.orphans()
    shown = [str(process) for process in orphans]  # their commands go with them
    stuck = [] if dry_run else left_behind.end(orphans)
    for process, text in zip(orphans, shown, strict=True):
        print(f"{'left' if dry_run else 'stuck' if process in stuck else 'ended'}: {text}")
    files = left_behind.unused_files() + stale_orders()
    for path in files:
        if not dry_run:
            left_behind.remove(path)
        print(f"{'left' if dry_run else 'removed'}: {path}")
    unreadable = left_behind.unreadable()
    for file in unreadable:
        _say(f"left alone: {file}")
    if not orphans and not files and not unreadable:
        _say("nothing to do")


# ------------------------------------------------------------------------------------------------------------- service


def _split(
    command: str, config: str | None, texts: Sequence[str], attach: str | None
) -> tuple[Path | None, Sequence[str]]:
    """Return the config, and the texts after it.

    A service that is attached to, by --attach or $GSERVE_ATTACH, has no config: then the first word is a text too.
    """
    if attach is None and config is not None and _is_config(config):
        return Path(config), texts
    if attach is not None or os.environ.get(ATTACH_VARIABLE):
        return None, texts if config is None else [config, *texts]
    word = "TEXT" if config is None else shlex.quote(config if len(config) <= SHOWN else f"{config[:SHOWN]}…")
    raise ConfigError(
        (
            "expected a CONFIG (a YAML file)"
            if config is None
            else f"expected a CONFIG (a YAML file), and {word} is no file"
        )
        + f": write gserve {command} CONFIG {word}, or gserve {command} --attach NAME {word} (see: gserve ps)"
    )


def _is_config(word: str) -> bool:
    """Say whether a word is a config rather than a text: it is a file, or has the name of a YAML file."""
    with suppress(OSError):  # a long text cannot be a file's name
        if Path(word).is_file():
            return True
    return word.endswith((".yaml", ".yml")) and len(word.split()) == 1


def _changes(overrides: Sequence[str] | None, verbose: bool) -> list[str]:
    """Return what the options of a command change in its config."""
    return [*(overrides or ()), *(["serve.verbose=true"] if verbose else ())]


def _service(config: Path | None, attach: str | None, overrides: Sequence[str]) -> "VLLMService":
    if config is not None:
        return gserve.VLLMService.from_yaml(config, overrides=overrides)
    if overrides:
        raise ConfigError(
            "--set and --verbose change a config: they cannot go with --attach or $GSERVE_ATTACH, which use a service"
            " as it is"
        )
    return gserve.VLLMService.attach(attach)


@contextmanager
def _serving(service: "VLLMService") -> Iterator[None]:
    """Start a service and show how that goes; shut it down in the end, whichever way that comes."""
    try:
        with ThreadPoolExecutor(1) as threads:
            starting = threads.submit(service.start)
            try:
                _show_phases(service, starting)
            except BaseException:
                while not starting.done():  # it undoes all when a server of its is told to stop
                    for server in service.servers:
                        server.ask_to_stop()
                    wait([starting], TICK)
                raise
            starting.result()
        yield
    finally:
        _on_signals(_ignore)
        service.shutdown()


def _drain(service: "VLLMService") -> None:
    """Shut a service down once its servers have finished what they have, or the time for that is over."""
    from gserve_core.service import records

    asked = records.take_stop()
    seconds = DRAIN_SECONDS if asked is None else asked
    if seconds <= 0:
        return
    with suppress(Signalled):  # a second one, which ends it at once
        _on_signals(_raise)
        _say(f"finishing what the servers have, for {seconds:g} s at most")
        service.shutdown(drain=seconds)
        _on_signals(_ignore)


def _down(service: "VLLMService") -> set[str]:
    return {server.name for server in service.status() if server.state in ("failed", "stopped")}


def _show_phases(service: "VLLMService", starting: Future[None]) -> None:
    """Show what the servers do until they have started: on a terminal in place, else a line for each change."""
    from rich.console import Console
    from rich.text import Text

    console = Console(stderr=True)
    shown: dict[str, str] = {}
    with console.status("starting") if console.is_terminal else nullcontext() as status:
        is_over = False
        while not is_over:
            is_over = bool(wait([starting], TICK).done)
            servers = [it for it in service.status() if (it.name in shown if is_over else it.state != "stopped")]
            servers = [it for it in servers if it.usable or not is_over]
            doing = {it.name: it.phase if it.phase and it.returns else it.state for it in servers}
            if status is not None:
                status.update(Text("\n  ".join(f"{name}: {phase}" for name, phase in doing.items())))
            else:
                for name, phase in doing.items():
                    if shown.get(name) != phase:
                        _say(f"{name}: {phase}")
            shown = doing


def _print_table(header: Sequence[str], rows: Iterable[Sequence[str]]) -> None:
    from rich.console import Console
    from rich.table import Table

    table = Table(*header, box=None, pad_edge=False)
    for row in rows:
        table.add_row(*row)
    wide = None if sys.stdout.isatty() else 10_000  # another program wants whole lines
    Console(markup=False, highlight=False, emoji=False, width=wide).print(table)


# --------------------------------------------------------------------------------------------------- items and answers


class Line(Struct, kw_only=True, forbid_unknown_fields=True):
    """One item of the input, as a line of JSON may have it."""

    field: ClassVar[str]
    id: int | str
    params: Params | None = None

    @property
    def content(self) -> Any:
        """What the model is asked."""
        return getattr(self, self.field)


class PromptLine(Line):
    """A prompt: a text or a list of token ids."""

    field: ClassVar[str] = "prompt"
    prompt: str | list[int]


class ConversationLine(Line):
    """A conversation."""

    field: ClassVar[str] = "messages"
    messages: list[Any]


class Record(Struct, kw_only=True, omit_defaults=True):
    """One line of the output: what came of an item, under its id."""

    id: int | str
    prompt: str | list[int] | None = None
    messages: list[Any] | None = None
    outputs: list[Any] | None = None
    error: str | None = None

    def __post_init__(self) -> None:
        if self.outputs is None and self.error is None:
            raise ValueError("neither 'outputs' nor 'error'")

    @property
    def content(self) -> Any:
        """What the model was asked."""
        return self.prompt if self.messages is None else self.messages


def _numbered[T: Line](values: Iterable[Any], kind: type[T]) -> list[T]:
    try:
        lines = [kind(**{"id": index, kind.field: value}) for index, value in enumerate(values)]
        msgspec.json.encode(lines)
    except UnicodeEncodeError as error:
        raise ConfigError(f"the arguments are not UTF-8 text: {error.reason}") from error
    return lines


def _read[T: Line](path: Path, kind: type[T]) -> list[T]:
    """Read all items of an input, so that what is wrong with it is known before a server starts."""
    try:
        text = (sys.stdin.buffer.read() if path == STDIO else path.read_bytes()).decode("utf-8-sig")
    except OSError as error:
        raise ConfigError(f"cannot read the input: {error.strerror}", file=path) from error
    except UnicodeDecodeError as error:
        raise ConfigError(f"expected UTF-8 text: {error.reason} at byte {error.start}", file=path) from error
    rows = [(number, row.rstrip("\r")) for number, row in enumerate(text.split("\n"), 1) if row.strip()]
    if kind is PromptLine and not _has_json(path, rows):
        return _numbered((row for _, row in rows), kind)
    lines: dict[int | str, T] = {}
    for index, (number, row) in enumerate(rows):
        try:
            value = msgspec.json.decode(row)
            given = value if isinstance(value, dict) else {kind.field: value}
            line = msgspec.convert({"id": index} | given, kind)
        except (ValueError, RecursionError) as error:
            raise ConfigError(f"not a {kind.field} line: {error}".replace("`", "'"), file=path, line=number) from error
        if line.id in lines:
            raise ConfigError(f"the id {line.id!r} is there twice", file=path, line=number)
        lines[line.id] = line
    return list(lines.values())


def _has_json(path: Path, rows: Sequence[tuple[int, str]]) -> bool:
    """Say whether an input is JSON lines: its name tells, or, for stdin, its first line."""
    if path != STDIO or not rows:
        return path.suffix == ".jsonl"
    try:
        return isinstance(msgspec.json.decode(rows[0][1]), (str, dict))
    except (ValueError, RecursionError):
        return False


def _has_system(messages: Sequence[Any]) -> bool:
    return bool(messages) and isinstance(messages[0], dict) and messages[0].get("role") == "system"


def _read_params(text: str | None) -> Params | None:
    if text is None:
        return None
    try:
        return msgspec.json.decode(text, type=dict[str, Any])
    except (ValueError, RecursionError) as error:
        raise ConfigError(f"expected --params as a JSON object like {{\"max_tokens\": 64}}, got '{text}'") from error


def _answer(
    service: "VLLMService", lines: Sequence[Line], params: Params | None, output: Path | None, *, as_text: bool
) -> None:
    """Send items, and put out what comes of each the moment it is ready: texts in order, or JSON lines as they come."""
    from gserve_core.batch.output_lock import only_writer
    from gserve_launchers.slurm.batch import is_over

    output = None if output == STDIO else output
    with nullcontext() if output is None else only_writer(output, is_over):
        _answer_into(output, service, lines, params, as_text=as_text)


def _answer_into(
    output: Path | None, service: "VLLMService", lines: Sequence[Line], params: Params | None, *, as_text: bool
) -> None:
    finished = _finished(output, lines) if output is not None and output.is_file() else set()
    todo = [line for line in lines if line.id not in finished]
    if len(todo) < len(lines):
        _say(f"skipped {len(lines) - len(todo)} of {len(lines)} items: {output} has them")
    if not todo:
        return
    contents = [line.content for line in todo]
    each = [params if line.params is None else (params or {}) | line.params for line in todo]
    failed = 0
    with _opened(output) as stream, _serving(service), _progress(len(todo), stream) as advance:
        outcomes: Outcomes = (
            service.generate_iter(contents, each)
            if isinstance(todo[0], PromptLine)
            else service.chat_iter(contents, each)
        )
        for index, outcome in _in_order(outcomes) if as_text else outcomes:
            failed += isinstance(outcome, ItemError)
            if not as_text:
                stream.write(_record(todo[index], outcome))
            elif isinstance(outcome, ItemError):
                _say(f"error: item {index}: {outcome}")
            else:
                stream.writelines(f"{it.text}\n".encode() for it in outcome)
            stream.flush()
            advance()
    if failed:
        raise GserveError(f"{failed} of {len(todo)} items failed")


def _record(line: Line, outcome: list[ResponseOutput] | ItemError) -> bytes:
    if isinstance(outcome, ItemError):
        record = Record(id=line.id, error=str(outcome))
    else:
        outputs = [json_safe(output) for output in outcome]
        record = Record(id=line.id, outputs=outputs, **{line.field: line.content})
    return msgspec.json.encode(record) + b"\n"


def _in_order(outcomes: Outcomes) -> Outcomes:
    waiting: dict[int, list[ResponseOutput] | ItemError] = {}
    turn = 0
    for index, outcome in outcomes:
        waiting[index] = outcome
        while turn in waiting:
            yield turn, waiting.pop(turn)
            turn += 1


def _finished(path: Path, lines: Sequence[Line]) -> set[int | str]:
    """Return the ids that an earlier run has finished, and take out of the file what it has not.

    That is, its errors, and a last line that it was killed in. Raises ConfigError: the file holds something else.
    """
    asked = {line.id: line.content for line in lines}
    finished: set[int | str] = set()
    unfinished: set[int] = set()
    with path.open("rb") as stream:
        for number, row in enumerate(stream, 1):
            torn = not row.endswith(b"\n") and (row.startswith(RECORD_START) or RECORD_START.startswith(row))
            try:
                record = None if torn else msgspec.json.decode(row, type=Record)
            except (ValueError, RecursionError) as error:
                raise ConfigError("not a result of gserve: choose another --output", file=path, line=number) from error
            if record is None or record.error is not None:
                unfinished.add(number)
                continue
            if record.id in asked and record.content != asked[record.id]:
                raise ConfigError(
                    f"the id {record.id!r} has another prompt here than in the input: choose another --output",
                    file=path, line=number,
                )  # fmt: skip
            finished.add(record.id)
    if unfinished:
        _rewrite(path, without=unfinished)
    return finished


def _rewrite(path: Path, without: set[int]) -> None:
    """Write a file anew without some of its lines; it is whole at every moment."""
    descriptor, scratch = tempfile.mkstemp(dir=path.parent, prefix=f".{path.name}.")
    try:
        with os.fdopen(descriptor, "wb") as new, path.open("rb") as old:
            new.writelines(row.rstrip(b"\n") + b"\n" for number, row in enumerate(old, 1) if number not in without)
        shutil.copymode(path, scratch)
        Path(scratch).replace(path.resolve())
    except BaseException:
        Path(scratch).unlink()
        raise


@contextmanager
def _opened(path: Path | None) -> Iterator[BinaryIO]:
    if path is None:
        yield sys.stdout.buffer
        return
    try:
        stream = path.open("ab")
    except OSError as error:
        raise ConfigError(f"cannot write the results: {error.strerror}", file=path) from error
    with stream:
        yield stream


@contextmanager
def _progress(total: int, stream: BinaryIO) -> Iterator[Callable[[], object]]:
    """Show a bar on a terminal that the results do not go to; hand out what to call for each item that is done."""
    from rich.console import Console
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TimeRemainingColumn

    is_quiet = not sys.stderr.isatty() or (stream is sys.stdout.buffer and sys.stdout.isatty())
    columns = (BarColumn(), MofNCompleteColumn(), TimeRemainingColumn())
    with Progress(*columns, console=Console(stderr=True), disable=is_quiet, redirect_stdout=False) as progress:
        task = progress.add_task("", total=total)
        yield lambda: progress.advance(task)


def _converse(service: "VLLMService", opening: Sequence[Mapping[str, str]], params: Params | None) -> None:
    """Hold a conversation at the terminal. What fails or is interrupted leaves no trace in it."""
    prompt = "you> " if sys.stdin.isatty() and sys.stdout.isatty() else ""
    history = [*opening]
    with _serving(service):
        while True:
            try:
                text = input(prompt).strip()
            except EOFError:
                if prompt:
                    print()
                return
            if text == "/exit":
                return
            if not text:
                continue
            asked = [*history, {"role": "user", "content": text}]
            try:
                (outcome,) = service.chat([asked], params, return_extra=True, on_error="return")
            except Signalled as signalled:
                if signalled.number != signal.SIGINT:
                    raise
                _on_signals(_raise)  # this one was for the answer alone
                _say("cancelled")
                continue
            if isinstance(outcome, ItemError):
                _say(f"error: {outcome}")
                continue
            print(outcome[0].text, flush=True)
            history = [*asked, {"role": "assistant", "content": outcome[0].text}]


if __name__ == "__main__":
    main()
