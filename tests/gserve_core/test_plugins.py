"""Plugins as their authors write them: modules beside a YAML file, installed entry points, and all that goes wrong."""

import os
import subprocess
import sys
import textwrap
from dataclasses import dataclass
from itertools import count
from pathlib import Path
from typing import Any, ClassVar

import psutil
import pytest

from gserve import CommandLauncher, ConfigError, Job, LLMConfig, PluginError, ServeConfig, VLLMService
from gserve_core import plugins
from gserve_core.engines.echo import EchoEngine
from gserve_launchers.local import SubprocessLauncher
from gserve_transports import HttpTransport

NUMBERS = count()
LAUNCHER = """
from gserve import CommandLauncher, hookimpl

class Prefix(CommandLauncher):
    name = "prefix"

    def command(self, job):
        return ["env", "MARK=1", *job.command]

@hookimpl
def gserve_register_launchers():
    return [Prefix]
"""
ENGINE = """
from dataclasses import dataclass
from gserve import Engine, hookimpl
from gserve_core.engines.echo import EchoEngine

@dataclass(frozen=True, kw_only=True)
class Small(Engine):
    name = "small"
    size: int = 2

    async def start(self, llm, report):
        return await EchoEngine(capacity=self.size).start(llm, report)

@hookimpl
def gserve_register_engines():
    return [Small]
"""
HEAD = "from dataclasses import dataclass\nfrom gserve import CommandLauncher, Engine, Launcher, Transport, hookimpl\n"


def write(folder: Path, source: str) -> str:
    """Write a plugin module with a name of its own, since Python imports a name once; return the name."""
    name = f"plugin_{next(NUMBERS)}"
    (folder / f"{name}.py").write_text(textwrap.dedent(source))
    return name


def brings(kind: str, result: str, body: str = "") -> str:
    return f"{HEAD}\n{textwrap.dedent(body)}\n@hookimpl\ndef gserve_register_{kind}s():\n    return {result}\n"


def config(folder: Path, text: str) -> Path:
    (folder / "service.yaml").write_text("llm: {model_name: any}\n" + textwrap.dedent(text))
    return folder / "service.yaml"


def server_environments() -> list[dict[str, str]]:
    """Return the environments of the server processes below this one."""
    below = psutil.Process().children(recursive=True)
    return [process.environ() for process in below if "vllm_server.py" in " ".join(process.cmdline())]


# ------------------------------------------------------------------------------------------------------- what works


def test_a_launcher_of_one_method_starts_servers_from_yaml_and_cannot_lose_their_gpus(tmp_path: Path) -> None:
    name = write(tmp_path, LAUNCHER)
    file = config(
        tmp_path,
        f"""
        serve: {{gpu_ids: [1, 3]}}
        launcher: {{type: prefix}}
        engine: {{type: echo}}
        plugins: [{name}]
        """,
    )
    with VLLMService.from_yaml(file) as service:
        assert service.generate(["a b", "c"]) == [["a b"], ["c"]]
        found = {(it["MARK"], it["CUDA_VISIBLE_DEVICES"]) for it in server_environments()}
    assert found == {("1", "1"), ("1", "3")}


def test_an_engine_beside_the_yaml_file_is_found_by_the_server_process(tmp_path: Path) -> None:
    name = write(tmp_path, ENGINE)
    file = config(tmp_path, f"engine: {{type: small, size: 3}}\nplugins: [{name}]\n")
    with VLLMService.from_yaml(file) as service:
        ((_, command),) = service.jobs()
        assert command[command.index("--plugin_folder") + 1] == str(tmp_path.resolve())
        assert service.generate(["a b"]) == [["a b"]]
        (status,) = service.status()
        assert status.info is not None
        assert status.info.capacity == 3


def test_a_plugin_beside_a_script_is_found_by_the_server_process_too(tmp_path: Path) -> None:
    (tmp_path / "beside.py").write_text(ENGINE)
    (tmp_path / "script.py").write_text("""
import beside
from gserve import LLMConfig, VLLMService

with VLLMService(LLMConfig("any"), engine=beside.Small(size=3), plugins=["beside"]) as service:
    print(service.generate(["a b"]))
""")
    command = [sys.executable, str(tmp_path / "script.py")]
    ran = subprocess.run(command, capture_output=True, text=True, check=False, cwd="/")
    assert (ran.stdout, ran.returncode) == ("[['a b']]\n", 0), ran.stderr


def test_a_module_that_is_named_twice_or_built_in_is_loaded_once(tmp_path: Path) -> None:
    name = write(tmp_path, LAUNCHER)
    registry = plugins.load([name, name, "gserve_launchers.local"], tmp_path)
    assert registry.sources[registry.classes["launcher"]["prefix"]] == name
    assert registry.sources[SubprocessLauncher] == "gserve_launchers.local"


def test_an_instance_from_python_goes_before_the_yaml(tmp_path: Path) -> None:
    file = config(tmp_path, "launcher: {type: no_such}\nengine: {type: echo, capacity: 7}\ntransport: {type: none}\n")

    class Here(CommandLauncher):
        name: ClassVar[str] = "here"

        def command(self, job: Job) -> list[str]:
            return ["env", "HERE=1", *job.command]

    service = VLLMService.from_yaml(file, launcher=Here(), transport=HttpTransport(max_body_mib=3))
    ((_, command),) = service.jobs()
    assert command[:2] == ["env", "HERE=1"]
    assert command[command.index("--transport") + 1] == '{"type":"http","max_body_mib":3}'
    assert '"capacity":7' in command[command.index("--engine") + 1]


@pytest.mark.parametrize(
    ("kind", "value"),
    [
        ("launcher", SubprocessLauncher(nice=5)),
        ("transport", HttpTransport(max_body_mib=3)),
        ("engine", EchoEngine(latency=0.5, die_on="x", hang_at=3)),
    ],
)
def test_a_section_is_the_inverse_of_build(kind: str, value: Any) -> None:
    registry = plugins.load()
    section = registry.section(kind, value)
    assert section["type"] == value.name
    assert registry.build(kind, section) == value


# ----------------------------------------------------------------------------------------------- what is said of errors

NO_METHOD = "class Mine(Launcher):\n    name = 'mine'\n"
NOT_DECORATED = "class Mine(CommandLauncher):\n    name = 'mine'\n    partition: str = ''\n    size: int = 1\n"
NOTHING = (
    "the plugin 'NAME' (FILE) has no hook: expected a function named one of gserve_register_launchers,"
    " gserve_register_transports, gserve_register_engines, decorated with @gserve.hookimpl"
)
WRONG = {
    # what is wrong: (the module, the message; NAME and FILE are the module's)
    "it fails while it is imported": ("1 / 0", "the plugin 'NAME' is broken: ZeroDivisionError: division by zero"),
    "it is not Python": ("def", "the plugin 'NAME' is broken: SyntaxError: invalid syntax (NAME.py, line 1)"),
    "it needs what is not installed": (
        "import no_such_module",
        "the plugin 'NAME' is broken: ModuleNotFoundError: No module named 'no_such_module'",
    ),
    "its hook is misspelt": (
        brings("launcher", "[]").replace("launchers()", "launcher()"),
        "the plugin 'NAME' has an unknown hook 'gserve_register_launcher'; did you mean 'gserve_register_launchers'?",
    ),
    "its hook is misspelt and not decorated": (
        "def gserve_register_engine(): return []",
        "the plugin 'NAME' has an unknown hook 'gserve_register_engine'; did you mean 'gserve_register_engines'?",
    ),
    "its hook has another prefix": (
        brings("launcher", "[]").replace("gserve_register_l", "register_l"),
        "the plugin 'NAME' has an unknown hook 'register_launchers'; did you mean 'gserve_register_launchers'?",
    ),
    "its hook is not decorated": (
        "def gserve_register_launchers(): return []",
        "the hook 'gserve_register_launchers' of the plugin 'NAME' lacks the decorator @gserve.hookimpl",
    ),
    "its hook takes an argument": (
        brings("launcher", "[]").replace("launchers()", "launchers(config)"),
        "the plugin 'NAME' is broken: hooks take no arguments: Plugin 'NAME' for hook 'gserve_register_launchers'"
        " hookimpl definition: gserve_register_launchers(config) Argument(s) {'config'} are declared in the hookimpl"
        " but can not be found in the hookspec",
    ),
    "its hook fails": (
        brings("launcher", "1 / 0"),
        "the hook 'gserve_register_launchers' of the plugin 'NAME' failed: ZeroDivisionError: division by zero",
    ),
    "its hook returns nothing": (
        brings("engine", "None"),
        "the hook 'gserve_register_engines' of the plugin 'NAME': expected a list of classes, got None",
    ),
    "it has no hook": ("value = 1", NOTHING),
    "it is empty": ("", NOTHING),
    "its class is no launcher": (
        brings("launcher", "[dict]"),
        "the launcher dict of the plugin 'NAME': expected a subclass of gserve.Launcher",
    ),
    "its launcher is an instance": (
        brings("launcher", "[3]"),
        "the launcher 3 of the plugin 'NAME': expected a subclass of gserve.Launcher",
    ),
    "its engine is a launcher": (
        brings("engine", "[CommandLauncher]"),
        "the engine CommandLauncher of the plugin 'NAME': expected a subclass of gserve.Engine",
    ),
    "its class lacks a method": (
        brings("launcher", "[Mine]", NO_METHOD),
        "the launcher Mine of the plugin 'NAME': it lacks the methods launch",
    ),
    "its class lacks several": (
        brings("transport", "[Transport]"),
        "the transport Transport of the plugin 'NAME': it lacks the methods connect, serve",
    ),
    "its class lacks a name": (
        brings("launcher", "[CommandLauncher]"),
        "the launcher CommandLauncher of the plugin 'NAME': it has no name: expected `name = \"…\"` in the class",
    ),
    "its class has an empty name": (
        brings("launcher", "[Mine]", "class Mine(CommandLauncher):\n    name = ''\n"),
        "the launcher Mine of the plugin 'NAME': it has no name: expected `name = \"…\"` in the class",
    ),
    "its class has options and is no dataclass": (
        brings("launcher", "[Mine]", NOT_DECORATED),
        "the launcher Mine of the plugin 'NAME': its options (partition, size) need a dataclass: decorate it with"
        " @dataclasses.dataclass(frozen=True, kw_only=True)",
    ),
    "its class can be changed": (
        brings("launcher", "[Mine]", "@dataclass\n" + NOT_DECORATED),
        "the plugin 'NAME' is broken: TypeError: cannot inherit non-frozen dataclass from a frozen one",
    ),
    "its options have types that are not there": (
        brings("launcher", "[Mine]", "@dataclass(frozen=True)\n" + NOT_DECORATED.replace("str", "'Strr'")),
        "the options of NAME.Mine have types that cannot be read: name 'Strr' is not defined",
    ),
    "its name is taken": (
        brings("launcher", "[Mine]", "class Mine(CommandLauncher):\n    name = 'subprocess'\n"),
        "two plugins claim the launcher 'subprocess': gserve_launchers.local.SubprocessLauncher of"
        " 'gserve_launchers.local' and NAME.Mine of 'NAME'; rename or uninstall one",
    ),
    "it claims a name twice": (
        brings(
            "launcher",
            "[One, Two]",
            "class One(CommandLauncher):\n    name = 'same'\nclass Two(CommandLauncher):\n    name = 'same'\n",
        ),
        "two plugins claim the launcher 'same': NAME.One of 'NAME' and NAME.Two of 'NAME'; rename or uninstall one",
    ),
}


@pytest.mark.parametrize("kind", WRONG)
def test_a_wrong_plugin_is_named_with_what_is_wrong(tmp_path: Path, kind: str) -> None:
    source, expected = WRONG[kind]
    name = write(tmp_path, source)
    with pytest.raises(PluginError) as caught:
        plugins.load([name], tmp_path)
    assert str(caught.value) == expected.replace("NAME", name).replace("FILE", str(tmp_path / f"{name}.py"))


@pytest.mark.parametrize(
    ("module", "expected"),
    [
        ("no_such_plugin", "no module named 'no_such_plugin' for plugins: expected a dotted name that Python can import"
         " here (from the environment, or from the config's folder)"),
        ("no_such_plugin.below", "no module named 'no_such_plugin.below' for plugins: expected a dotted name that"
         " Python can import here (from the environment, or from the config's folder)"),
        ("json.no_such", "no module named 'json.no_such' for plugins: expected a dotted name that Python can import"
         " here (from the environment, or from the config's folder)"),
        ("", "the plugin '' is broken: ValueError: Empty module name"),
        ("__main__", "a server process cannot import '__main__' for plugins: put the plugin into its own module"),
    ],
)  # fmt: skip
def test_a_module_that_is_not_there_is_named(tmp_path: Path, module: str, expected: str) -> None:
    with pytest.raises(PluginError) as caught:
        plugins.load([module], tmp_path)
    assert str(caught.value) == expected


def test_a_module_that_hides_the_one_beside_the_config_is_named_with_its_file(tmp_path: Path) -> None:
    (tmp_path / "queue.py").write_text(LAUNCHER)
    with pytest.raises(PluginError, match=r"^the plugin 'queue' \(/.*/queue\.py\) has no hook: ") as caught:
        plugins.load(["queue"], tmp_path)
    assert str(tmp_path) not in str(caught.value)


@pytest.mark.parametrize(
    ("section", "expected"),
    [
        ("launcher: {type: optoins}", "unknown launcher 'optoins'; did you mean 'options'? - at $.launcher.type"),
        ("engine: {type: zzz}", "unknown engine 'zzz'; expected one of echo, vllm - at $.engine.type"),
        ("engine: {type: 3}", "expected the name of the engine, got 3 - at $.engine.type"),
        ("transport: {}", "missing key 'type'; expected one of http - at $.transport"),
        ("launcher: {type: options, siz: 1}", "unknown key 'siz'; did you mean 'size'? - at $.launcher.siz"),
        ("launcher: {type: options, size: x}", "expected int, got str - at $.launcher.size"),
        ("launcher: {type: options, words: {a: [1]}}", "expected str, got int - at $.launcher.words.a[0]"),
        (
            "launcher: {type: options, name: x}",
            "unknown key 'name'; expected one of prefix, size, words - at $.launcher.name",
        ),
        ("launcher: {type: options, size: 0}", "expected a size above 0 - at $.launcher.size"),
        ("launcher: {type: options, size: 99}", "99 is too large - at $.launcher"),
    ],
)  # fmt: skip
def test_wrong_options_of_a_plugin_are_named_with_their_place(tmp_path: Path, section: str, expected: str) -> None:
    body = """
    from dataclasses import field
    from typing import ClassVar
    from gserve import ConfigError

    @dataclass(frozen=True, kw_only=True)
    class Options(CommandLauncher):
        name: ClassVar[str] = "options"
        size: int = 1
        words: dict[str, list[str]] = field(default_factory=dict)

        def __post_init__(self):
            if self.size < 1:
                raise ConfigError("expected a size above 0", at="$.size")
            if self.size > 9:
                raise ValueError(f"{self.size} is too large")
    """
    name = write(tmp_path, brings("launcher", "[Options]", body))
    engine = "" if section.startswith("engine") else "engine: {type: echo}\n"
    file = config(tmp_path, f"plugins: [{name}]\n{engine}{section}\n")
    with pytest.raises(ConfigError) as caught:
        VLLMService.from_yaml(file)
    line = 3 if not engine else 4
    assert str(caught.value) == f"{file}:{line}: {expected}"


def test_what_is_given_from_python_must_be_a_value_of_the_right_kind() -> None:
    def service(**parts: Any) -> VLLMService:
        return VLLMService(LLMConfig("any"), ServeConfig(), **{"engine": EchoEngine()} | parts)

    with pytest.raises(ConfigError, match=r"^expected an instance of gserve\.Launcher, got 'slurm' - at \$\.launcher$"):
        service(launcher="slurm")
    with pytest.raises(ConfigError, match=r"^expected an instance of gserve\.Engine, got <class .*EchoEngine'> - at"):
        service(engine=EchoEngine)
    with pytest.raises(ConfigError, match=r"^expected str, got int - at \$\.(engine\.)?die_on$"):
        service(engine=EchoEngine(die_on=2))  # type: ignore[arg-type]


@dataclass(frozen=True, kw_only=True)
class Unregistered(EchoEngine):
    name: ClassVar[str] = "unregistered"


@dataclass(frozen=True, kw_only=True)
class UnregisteredTransport(HttpTransport):
    name: ClassVar[str] = "http"  # the name of another


@pytest.mark.parametrize(
    ("parts", "expected"),
    [
        (
            {"engine": Unregistered()},
            "the server process must find the engine Unregistered by name: return the class from"
            " gserve_register_engines() in its module, and name that module in plugins=[…]",
        ),
        (
            {"engine": EchoEngine(), "transport": UnregisteredTransport()},
            "the server process must find the transport UnregisteredTransport by name: return the class from"
            " gserve_register_transports() in its module, and name that module in plugins=[…]",
        ),
    ],
)
def test_an_instance_that_a_server_could_not_build_is_refused_before_it_starts(parts: Any, expected: str) -> None:
    service = VLLMService(LLMConfig("any"), **parts)
    for call in (service.jobs, service.start):
        with pytest.raises(PluginError) as caught:
            call()
        assert str(caught.value) == expected


# --------------------------------------------------------------------------------------------------------- entry points


def install(folder: Path, name: str, source: str) -> None:
    """Make what an installed package with an entry point looks like."""
    (folder / f"{name}_module.py").write_text(source)
    info = folder / f"{name}-1.0.dist-info"
    info.mkdir()
    (info / "METADATA").write_text(f"Metadata-Version: 2.1\nName: {name}\nVersion: 1.0\n")
    (info / "entry_points.txt").write_text(f"[gserve]\n{name} = {name}_module\n")


def run(folder: Path, program: str) -> str:
    """Run a program that sees what is installed in `folder`; return what it prints."""
    head = "from gserve import *\nfrom gserve_core import plugins\nregistry = plugins.load()\n"
    environ = os.environ | {"PYTHONPATH": str(folder)}
    command = [sys.executable, "-c", head + textwrap.dedent(program)]
    ran = subprocess.run(command, env=environ, capture_output=True, text=True, check=False)
    assert ran.returncode == 0, ran.stderr
    return ran.stdout.strip()


def test_an_installed_plugin_is_found_without_being_named(tmp_path: Path) -> None:
    install(tmp_path, "prefixes", LAUNCHER)
    program = """
    made = registry.build("launcher", {"type": "prefix"})
    print(made, registry.sources[type(made)])
    """
    assert run(tmp_path, program) == "Prefix() prefixes (prefixes_module)"


def test_an_installed_plugin_may_be_named_in_the_config_too(tmp_path: Path) -> None:
    install(tmp_path, "prefixes", LAUNCHER)
    assert run(tmp_path, "print('prefix' in plugins.load(['prefixes_module']).classes['launcher'])") == "True"


@pytest.mark.parametrize(
    ("source", "why"),
    [
        ("import no_such", "ModuleNotFoundError: No module named 'no_such'"),
        (
            "def gserve_register_engine(): return []",
            "the plugin 'old (old_module)' has an unknown hook 'gserve_register_engine';"
            " did you mean 'gserve_register_engines'?",
        ),
        (
            brings("launcher", "1 / 0"),
            "the hook 'gserve_register_launchers' of the plugin 'old (old_module)' failed:"
            " ZeroDivisionError: division by zero",
        ),
        (
            brings("launcher", "[dict]"),
            "the launcher dict of the plugin 'old (old_module)': expected a subclass of gserve.Launcher",
        ),
    ],
    ids=["does not import", "has a wrong hook", "has a hook that fails", "brings a wrong class"],
)
def test_a_broken_installed_plugin_is_quoted_only_when_it_is_asked_for(tmp_path: Path, source: str, why: str) -> None:
    install(tmp_path, "old", source)
    install(tmp_path, "prefixes", LAUNCHER)
    said = run(
        tmp_path,
        """
        for name in ("subprocess", "prefix", "old", "prefixx"):
            try:
                print(registry.build("launcher", {"type": name}))
            except GserveError as error:
                print(f"{type(error).__name__}: {error}")
        """,
    )
    assert said.splitlines() == [
        "SubprocessLauncher(nice=0, nursery=True)",
        "Prefix()",
        f"PluginError: the plugin 'old' is installed but broken: {why}",
        "ConfigError: unknown launcher 'prefixx'; did you mean 'prefix'?"
        f" (the plugin 'old' is broken: {why}) - at $.launcher.type",
    ]


def test_two_installed_plugins_that_claim_a_name_are_both_named(tmp_path: Path) -> None:
    install(tmp_path, "first", LAUNCHER)
    install(tmp_path, "second", LAUNCHER)
    environ = os.environ | {"PYTHONPATH": str(tmp_path)}
    command = [sys.executable, "-c", "from gserve_core import plugins; plugins.load()"]
    ran = subprocess.run(command, env=environ, capture_output=True, text=True, check=False)
    said = ran.stderr.splitlines()[-1].partition("PluginError: ")[2]
    assert said.startswith("two plugins claim the launcher 'prefix': ")
    assert "first_module.Prefix of 'first (first_module)'" in said
    assert "second_module.Prefix of 'second (second_module)'" in said
