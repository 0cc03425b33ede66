"""The import statements of the packages, held to section "The rooms" of the design: who may know what."""

import ast
import os
import re
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent

PACKAGES = {  # package: the packages that it may import
    "gserve_core": set(),
    "gserve_launchers": {"gserve_core"},
    "gserve_transports": {"gserve_core"},
    "gserve": {"gserve_core", "gserve_launchers", "gserve_transports"},
}
CORE_LAYERS = (  # of the core, lowest first: a module may import those of the layers before its own
    {"errors", "host.sweep", "plain", "weights"},
    {"images", "pauses", "overview"},
    {"commands"},
    {"messages", "document", "host.redaction", "host.environment"},
    {"config"},
    {"interfaces"},
    {"host.descriptors", "host.child_process", "host.control_group", "host.poll", "host.ports", "host.forks",
     "host.locks", "host.mps_keeper"},
    {"host.processes"},
    {"host.process_groups"},
    {"host.folders"},
    {
        "hookspecs",
        "sampling",
        "command_launcher",
        "lease",
        "host.addresses",
        "host.run_files",
        "host.adapter_folders", "host.weight_folders",
        "host.logs",
        "host.scratch",
        "host.gpus", "host.gpu_locks",
    },
    {"template_kwargs", "tasks", "host.core_locks"},
    {"host.server_log", "openai_api", "run_requests"},
    {"host.tokens", "host.api_keys", "host.certificates", "diagnosis", "batch.prefixes"},
    {"plugins", "service.nursery", "service.records", "service.mps"},
    {"service.state", "service.model_names", "service.checkpoints"},
    {"service.rates", "service.routing", "service.watch"},
    {"service.metrics"},
    {"service.supervisor"},
    {"batch.waiting"},
    {"batch.pieces", "batch.progress", "batch.results", "batch.output_lock"},
    {"batch.retries"},
    {"batch.item_queue"},
    {"batch.items", "batch.dispatcher"},
    {"batch.batch", "service.remote_calls"},
    {"rows.kinds", "rows.fingerprint", "rows.id_set", "rows.formats", "rows.templates"},
    {"rows.prompts", "rows.batch_files"},
    {"rows.reading"},
    {"rows.writing"},
    {"rows.answers"},
    {"rows.row_items", "rows.output", "rows.openai_batch"},
    {"rows.job", "rows.mapping"},
    {"rows.parts", "service.vector_calls"},
    {"service.inference", "service.gateway"},
    {"service.followed"},
    {"service.client", "service.pool", "service.attached", "service.remote"},
    {"service.gateway_requests"},
    {"service.server_command"},
    {"service.gpu_sharing"},
    {"service.server_life"},
    {"service.gates", "service.weight_updates", "service.memory_weights"},
    {"service.changes"},
    {"service.server", "service.plan"},
    {"service.trl_pushes"},
    {"service.model", "service.followed_models", "service.deployment"},
    {"service.service"},
    {"tune.search"},
    {"tune.settings"},
    {"tune.trials"},
)  # fmt: skip
CORE_LEAVES = {  # modules that nothing in the core imports, and what each may import
    "process.main": {
        "errors", "config", "interfaces", "lease", "plugins", "host.addresses", "host.environment", "host.folders",
        "host.gpus", "host.logs", "host.processes", "host.redaction", "host.scratch",
        "host.server_log", "host.sweep", "process.nursery",
        "process.ranks", "process.server",
    },
    "process.far": {
        "errors", "interfaces", "lease", "host.gpus", "host.poll", "host.process_groups", "host.processes",
        "host.scratch",
    },
    "process.nursery": {
        "lease", "host.control_group", "host.poll", "host.process_groups", "host.processes", "host.scratch",
    },
    "process.server": {
        "errors", "messages", "config", "interfaces", "lease", "host.ports",
        "host.redaction", "host.tokens", "process.engine_watchdog", "process.openai_face", "process.ranks",
        "process.work", "tasks", "process.orders", "pauses", "weights",
    },
    "process.orders": {"errors", "interfaces", "lease", "host.redaction", "pauses", "weights", "process.work"},
    "process.ranks": {
        "errors", "config", "interfaces", "lease", "host.addresses", "host.forks", "host.gpu_locks", "host.gpus",
    },
    "process.openai_face": {"errors", "interfaces", "openai_api", "host.redaction", "process.work"},
    "process.engine_watchdog": {"errors", "interfaces", "lease", "process.work"},
    "process.work": {
        "errors", "messages", "interfaces", "overview", "run_requests", "host.redaction", "process.requests",
        "pauses", "weights",
    },
    "process.requests": {"errors", "messages", "interfaces", "run_requests", "tasks"},
    "host.gpu_facts": set(),
    "reap": {"host.processes", "host.scratch", "service.records"},
    "openai_params": {"messages"},
    "doctor.examination": {
        "errors", "config", "interfaces", "plugins", "service.plan", "doctor.machine", "doctor.node",
    },
    "doctor.machine": {"errors", "config", "interfaces", "host.gpus"},
    "doctor.node": {
        "errors", "config", "interfaces", "host.addresses", "host.folders", "plugins", "doctor.machine",
    },
    "testing": {"testing.contracts", "testing.leftovers", "testing.signals"},
    "testing.contracts": {"errors", "messages", "config", "interfaces", "host.processes"},
    "testing.leftovers": {"host.processes", "host.run_files"},
    "testing.signals": set(),
    "engines.echo": {
        "errors", "images", "messages", "config", "interfaces", "hookspecs", "sampling", "template_kwargs",
        "engines.echo_json", "engines.echo_openai", "engines.echo_process", "engines.echo_vectors", "tasks",
        "host.weight_folders", "weights",
    },
    "engines.echo_process": {"engines.orphans"},
    "engines.echo_json": set(),
    "engines.echo_openai": {"errors", "messages", "interfaces", "tasks", "engines.echo_openai_vectors"},
    "engines.echo_openai_vectors": {"errors", "messages", "interfaces", "tasks"},
    "engines.echo_vectors": {"messages"},
    "engines.vllm.engine": {
        "errors", "config", "interfaces", "hookspecs", "sampling", "template_kwargs", "messages",
        "engines.vllm.adapter_files", "engines.vllm.adapters", "engines.vllm.chats", "engines.vllm.compile_turn",
        "engines.vllm.cuda_graphs", "engines.vllm.model_size", "host.adapter_folders", "host.processes",
        "engines.vllm.demo_model", "engines.vllm.differences", "engines.vllm.examination", "engines.vllm.files",
        "engines.vllm.hub", "engines.vllm.in_flight", "engines.vllm.installed",
        "engines.vllm.known_errors", "engines.vllm.nodes", "engines.vllm.openai_app", "engines.vllm.outputs",
        "engines.vllm.patches", "engines.vllm.pooling", "engines.vllm.prompt_lengths",
        "engines.vllm.progress", "engines.vllm.series", "engines.vllm.token_counts", "engines.vllm.tokenizing",
        "engines.vllm.weight_files", "engines.vllm.weight_loading", "engines.vllm.weight_transfer", "weights",
    },
}  # fmt: skip
OF_AN_ENGINE = {
    "engines.vllm.differences": {"errors", "engines.vllm.installed"},
    "engines.vllm.safetensors_files": {"errors"},
    "engines.vllm.weight_loading": set(),
    "engines.vllm.weight_transfer": {"engines.vllm.weight_loading"},
    "engines.vllm.weight_files": {
        "errors",
        "host.weight_folders",
        "engines.vllm.hub",
        "engines.vllm.safetensors_files",
        "engines.vllm.weight_loading",
    },
    "engines.vllm.adapter_files": {
        "errors",
        "host.adapter_folders",
        "engines.vllm.hub",
        "engines.vllm.safetensors_files",
    },
    "engines.vllm.adapters": {"errors", "engines.vllm.adapter_files", "engines.vllm.differences"},
    "engines.vllm.chats": {"messages"},
    "engines.vllm.cuda_graphs": set(),
    "engines.vllm.model_size": {
        "config",
        "errors",
        "host.folders",
        "engines.vllm.demo_model",
        "engines.vllm.hub",
        "engines.vllm.safetensors_files",
    },
    "engines.vllm.nodes": {"errors", "config", "interfaces", "engines.vllm.differences"},
    "engines.vllm.openai_app": {"errors", "interfaces", "engines.vllm.differences"},
    "engines.vllm.pooling": {"errors", "messages", "tasks", "engines.vllm.differences"},
    "engines.vllm.progress": {"engines.vllm.differences"},
    "engines.vllm.series": set(),
    "engines.vllm.token_counts": {"engines.vllm.differences"},
    "engines.vllm.compile_turn": {"interfaces", "host.redaction", "host.locks"},
    "engines.vllm.demo_model": {"errors", "host.folders", "interfaces", "host.locks"},
    "engines.vllm.hub": {"errors", "host.folders", "interfaces", "host.locks", "engines.vllm.demo_model"},
    "engines.vllm.examination": {
        "errors",
        "config",
        "host.folders",
        "engines.vllm.hub",
        "interfaces",
        "engines.vllm.adapter_files",
        "engines.vllm.demo_model",
        "engines.vllm.installed",
    },
    "engines.vllm.files": {"errors", "host.folders"},
    "engines.vllm.installed": {"errors"},
    "engines.vllm.outputs": {"messages"},
    "engines.echo_json": set(),
    "engines.vllm.prompt_lengths": {
        "config",
        "errors",
        "messages",
        "engines.vllm.demo_model",
        "engines.vllm.files",
    },
    "engines.vllm.patches": {"engines.orphans", "engines.vllm.differences"},
    "engines.orphans": {"host.environment", "host.folders", "host.processes", "host.sweep", "host.forks"},
    "engines.vllm.in_flight": {"engines.vllm.differences", "engines.vllm.token_counts"},
    "engines.vllm.known_errors": {"interfaces"},
    "engines.vllm.tokenizing": {"engines.vllm.differences"},
}
ROOMS = {"batch", "doctor", "engines", "engines.vllm", "host", "process", "rows", "service", "tune"}
"""Packages that hold modules, and nothing themselves."""
FOR_PLUGINS = {
    "errors", "messages", "config", "interfaces", "command_launcher", "hookspecs", "lease", "host.child_process",
    "host.core_locks", "host.forks", "host.descriptors", "openai_api", "overview", "commands", "pauses", "process.far",
}  # fmt: skip
"""What launchers and transports need of the core: no more than a plugin's author."""

HOMES = {  # third parties: the only files that may import them
    "vllm": {"gserve_core/engines/vllm/differences.py"},
    "torch": {
        f"gserve_core/engines/vllm/{name}.py"
        for name in ("demo_model", "patches", "weight_files", "weight_loading", "weight_transfer")
    },
    "safetensors": {
        f"gserve_core/{name}.py"
        for name in ("engines/vllm/weight_files", "engines/vllm/weight_loading", "service/memory_weights")
    },
    "transformers": {f"gserve_core/engines/vllm/{name}.py" for name in ("demo_model", "prompt_lengths")},
    "httpx": {"gserve_transports/http_client.py"},
    "anyio": {"gserve_core/batch/dispatcher.py"},
    "sniffio": {"gserve_transports/http_client.py"},
    "fastapi": {"gserve_transports/http_server.py"},
    "starlette": {f"gserve_transports/{name}.py" for name in ("http_front", "http_gateway", "http_server", "http_trl")},
    "uvicorn": {"gserve_transports/http_front.py"},
    "httptools": {"gserve_transports/http_upstream.py"},
    "prometheus_client": {"gserve_core/engines/vllm/series.py", "gserve_core/service/metrics.py"},
    "pluggy": {"gserve_core/hookspecs.py", "gserve_core/plugins.py"},
    "psutil": {
        f"gserve_core/{name}.py"
        for name in ("reap", "host/addresses", "host/gpu_locks", "host/processes", "process/main", "testing/leftovers")
    },
    "yaml": {"gserve_core/document.py"},
    "uvloop": {
        f"gserve_core/{name}.py"
        for name in ("batch/dispatcher", "process/main", "rows/openai_batch", "service/gateway")
    },
    "typer": {
        f"gserve/cli/{name}.py"
        for name in (
            "app",
            "batch",
            "checkpoints",
            "examine",
            "job_flags",
            "options",
            "run_batch",
            "serve",
            "slurm",
            "tune",
            "watch",
        )
    },
    "rich": {"gserve/cli/display.py", "gserve/cli/job_progress.py"},
    "tqdm": {"gserve_core/batch/progress.py"},
    "huggingface_hub": {"gserve_core/engines/vllm/hub.py"},
    "numpy": {"gserve_core/service/vector_calls.py"},
    "pytest": {"gserve_core/testing/__init__.py"},
    "jinja2": {"gserve_core/rows/templates.py"},
    "jsonschema": {"gserve_core/rows/answers.py"},
    "referencing": {"gserve_core/rows/answers.py"},
    "pyarrow": {f"gserve_core/rows/{name}.py" for name in ("formats", "reading", "writing")},
}
EVERYWHERE = {"msgspec"}
LATE = {  # imports that do not stand at the top of their file, and why
    "gserve_core/engines/vllm/engine.py": {"vllm"},  # takes 10 s, and health is answered meanwhile
    "gserve_core/engines/vllm/patches.py": {"torch", "vllm"},  # vLLM is there when they are called
    "gserve_core/engines/vllm/demo_model.py": {"torch", "transformers"},
    "gserve_core/engines/vllm/weight_files.py": {"torch", "safetensors"},  # they are there when it is called
    "gserve_core/engines/vllm/weight_loading.py": {"safetensors", "torch"},
    "gserve_core/engines/vllm/weight_transfer.py": {"torch"},
    "gserve_core/engines/vllm/prompt_lengths.py": {"transformers"},  # takes seconds
    "gserve_core/testing/__init__.py": {"pytest"},  # only its fixtures need pytest
    "gserve_core/batch/progress.py": {"tqdm"},  # it may be missing
    "gserve_core/engines/vllm/hub.py": {"huggingface_hub"},  # it comes with vLLM
    "gserve_core/service/vector_calls.py": {"numpy"},  # it may be missing
    "gserve_core/service/memory_weights.py": {"safetensors"},  # it comes with vLLM
    "gserve_core/host/certificates.py": {"ssl"},  # only HTTPS needs it
    "gserve_core/engines/vllm/series.py": {"prometheus_client"},  # 0.15 s, and only a scrape needs it
    "gserve_core/service/metrics.py": {"prometheus_client"},
    **{f"gserve_core/rows/{name}.py": {"pyarrow"} for name in ("formats", "reading", "writing")},  # it is optional
    "gserve_core/rows/templates.py": {"jinja2"},  # only a job with a template needs it
    "gserve_core/rows/answers.py": {"jsonschema", "referencing"},
    "gserve_core/service/inference.py": {"gserve_core"},  # only jobs on tables need `rows`
    "gserve_core/service/model.py": {"gserve_core"},
    "gserve_core/service/service.py": {"gserve_core"},  # an attached service needs no part that runs servers
    "gserve_core/config.py": {"gserve_core"},  # a client reads no YAML
    "gserve_transports/__init__.py": {"gserve_transports"},  # httpx or fastapi, by the half that is used
    "gserve/vllm_server.py": {"gserve_core"},  # after the search path is right
    **{  # `gserve --help` needs none of them
        f"gserve/cli/{name}.py": {"gserve", "gserve_core", "gserve_launchers", "gserve_transports", "rich"}
        for name in (
            "batch",
            "display",
            "examine",
            "job_flags",
            "job_progress",
            "run_batch",
            "checkpoints",
            "serve",
            "service",
            "slurm",
            "tune",
            "watch",
        )
    },
}
HEAVY = {"vllm", "torch", "fastapi", "uvicorn", "httpx", "numpy", "transformers", "prometheus_client", "pyarrow"}


@dataclass(frozen=True)
class Import:
    """One imported module, by its full name."""

    file: str
    line: int
    module: str
    is_late: bool

    @property
    def package(self) -> str:
        return self.module.partition(".")[0]

    def __str__(self) -> str:
        return f"{self.file}:{self.line} imports {self.module}"


def sources() -> dict[str, ast.Module]:
    files = [file for package in PACKAGES for file in sorted((ROOT / package).rglob("*.py"))]
    return {str(file.relative_to(ROOT)): ast.parse(file.read_text()) for file in files}


def module_name(file: str) -> str:
    return file.removesuffix(".py").removesuffix("/__init__").replace("/", ".")


def imports(file: str, tree: ast.Module) -> Iterator[Import]:
    package = module_name(file) if file.endswith("__init__.py") else module_name(file).rpartition(".")[0]
    for_types = {
        id(node)
        for branch in ast.walk(tree)
        if isinstance(branch, ast.If) and ast.unparse(branch.test) == "TYPE_CHECKING"
        for node in branch.body
    }
    for node in ast.walk(tree):
        if not isinstance(node, (ast.Import, ast.ImportFrom)):
            continue
        names = [alias.name for alias in node.names]
        if isinstance(node, ast.ImportFrom):
            above = package.split(".")[: len(package.split(".")) + 1 - node.level] if node.level else []
            base = ".".join([*above, *filter(None, [node.module])])
            # `from package import module` imports the module; `from module import name` the module that it names.
            names = [f"{base}.{name}" if f"{base}.{name}" in MODULES else base for name in names]
        for name in dict.fromkeys(names):
            yield Import(file, node.lineno, name, node not in tree.body and id(node) not in for_types)


SOURCES = sources()
MODULES = {module_name(file) for file in SOURCES}
IMPORTS = [one for file, tree in SOURCES.items() for one in imports(file, tree)]


def allowed_in_core() -> dict[str, set[str]]:
    table: dict[str, set[str]] = {}
    below: set[str] = set()
    for layer in CORE_LAYERS:
        table |= {module: set(below) for module in layer}
        below |= layer
    return table | CORE_LEAVES | OF_AN_ENGINE


def test_packages_import_one_way() -> None:
    wrong = [
        one
        for one in IMPORTS
        if one.package in PACKAGES
        and one.package != (own := one.file.partition("/")[0])
        and one.package not in PACKAGES[own]
    ]
    assert not wrong, "\n".join(map(str, wrong))


def test_a_module_of_the_core_imports_only_those_below_it() -> None:
    table = allowed_in_core()
    modules = {name.removeprefix("gserve_core.") for name in MODULES if name.startswith("gserve_core.")}
    assert modules - ROOMS == set(table), "every module of the core has its place in this table"
    wrong = [
        one
        for one in IMPORTS
        if one.file.startswith("gserve_core/")
        and one.package == "gserve_core"
        and one.module.removeprefix("gserve_core.") not in table[module_name(one.file).removeprefix("gserve_core.")]
    ]
    assert not wrong, "\n".join(map(str, wrong))


def test_launchers_and_transports_need_no_more_of_the_core_than_a_plugin() -> None:
    wrong = [
        one
        for one in IMPORTS
        if one.file.startswith(("gserve_launchers/", "gserve_transports/"))
        and one.package == "gserve_core"
        and one.module.removeprefix("gserve_core.") not in FOR_PLUGINS
    ]
    assert not wrong, "\n".join(map(str, wrong))


def test_every_third_party_has_its_home() -> None:
    known = set(sys.stdlib_module_names) | set(PACKAGES) | EVERYWHERE
    wrong = [one for one in IMPORTS if one.package not in known and one.file not in HOMES.get(one.package, set())]
    assert not wrong, "\n".join(map(str, wrong))


def test_imports_stand_at_the_top_of_a_file_but_for_a_reason() -> None:
    wrong = [one for one in IMPORTS if one.is_late and one.package not in LATE.get(one.file, set())]
    assert not wrong, "\n".join(map(str, wrong))


def test_no_module_bears_the_name_of_one_of_pythons_or_a_name_that_says_nothing() -> None:
    names = {part for name in MODULES for part in name.split(".")}
    assert not names & set(sys.stdlib_module_names)
    assert not names & {"utils", "util", "helpers", "helper", "common", "manager", "misc", "base"}


def test_nothing_prints_but_the_command_line() -> None:
    wrong = [
        f"{file}:{node.lineno}"
        for file, tree in SOURCES.items()
        if not file.startswith("gserve/cli/")
        for node in ast.walk(tree)
        if isinstance(node, ast.Call) and isinstance(node.func, ast.Name) and node.func.id == "print"
    ]
    assert not wrong


def test_no_module_has_mutable_state() -> None:
    wrong = [
        f"{file}:{node.lineno} {name}"
        for file, tree in SOURCES.items()
        for node in tree.body
        for name, value in assigned(node)
        if is_mutable(value) and name != "__all__" and not re.fullmatch(r"_?[A-Z][A-Z0-9_]*", name)
    ]
    wrong += [
        f"{file}:{node.lineno} global {', '.join(node.names)}"
        for file, tree in SOURCES.items()
        for node in ast.walk(tree)
        if isinstance(node, ast.Global)
    ]
    assert not wrong


def assigned(node: ast.stmt) -> Iterator[tuple[str, ast.expr]]:
    if isinstance(node, ast.Assign):
        yield from ((target.id, node.value) for target in node.targets if isinstance(target, ast.Name))
    elif isinstance(node, ast.AnnAssign) and isinstance(node.target, ast.Name) and node.value is not None:
        yield node.target.id, node.value


def is_mutable(value: ast.expr) -> bool:
    if isinstance(value, ast.Call):
        return ast.unparse(value.func).rpartition(".")[2] in {
            "list", "dict", "set", "bytearray", "defaultdict", "deque", "Counter", "OrderedDict",
            "WeakSet", "WeakKeyDictionary", "WeakValueDictionary", "ContextVar", "Queue", "SimpleQueue",
        }  # fmt: skip
    return isinstance(value, (ast.List, ast.Dict, ast.Set, ast.ListComp, ast.DictComp, ast.SetComp))


# ----------------------------------------------------------------------------------------------- what it brings in


@pytest.mark.parametrize(
    "program",
    ["import gserve", "import gserve; [getattr(gserve, name) for name in gserve.__all__]"],
    ids=["the package", "every public name"],
)
def test_importing_gserve_brings_in_nothing_heavy(program: str) -> None:
    program += "\nimport sys; sys.stdout.write(' '.join({name.partition('.')[0] for name in sys.modules}))"
    ran = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True)
    assert not HEAVY & set(ran.stdout.split())


def test_importing_gserve_takes_less_than_100_ms(tmp_path: Path) -> None:
    environ = os.environ | {"PYTHONPYCACHEPREFIX": str(tmp_path)}
    environ.pop("PYTHONDONTWRITEBYTECODE", None)

    def milliseconds() -> float:
        program = "import time; began = time.process_time(); import gserve; print(time.process_time() - began)"
        command = [sys.executable, "-c", program]  # the time of others, on a loaded machine, is not counted
        ran = subprocess.run(command, env=environ, capture_output=True, text=True, check=True)
        return 1000 * float(ran.stdout)

    milliseconds()  # writes the bytecode
    assert min(milliseconds() for _ in range(5)) < 100


def test_every_public_name_is_there_and_no_other() -> None:
    program = """
import gserve
assert dir(gserve) == gserve.__all__ == sorted(gserve.__all__), gserve.__all__
assert all(getattr(gserve, name).__name__ == name for name in gserve.__all__ if name != "hookimpl")
try:
    gserve.VLLMServise
except AttributeError as error:
    assert str(error) == "module 'gserve' has no attribute 'VLLMServise'", error
else:
    raise AssertionError
"""
    ran = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=False)
    assert ran.returncode == 0, ran.stderr
