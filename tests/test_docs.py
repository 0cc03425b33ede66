"""README and docs/ are complete and true: every name, key, option, command, route and message stands there."""

import asyncio
import re
import subprocess
import sys
from dataclasses import MISSING, fields
from pathlib import Path

import msgspec
import pytest
import typer
import yaml

import gserve
from gserve import GatewayConfig, LLMConfig, ServeConfig
from gserve.cli import app
from gserve_core import config, diagnosis, errors, hookspecs, interfaces, messages, openai_api, plugins
from gserve_core.engines.vllm.known_errors import KNOWN_ERRORS
from gserve_core.interfaces import Address, Backend
from gserve_core.service.metrics import Metrics, Waiting
from gserve_core.service.plan import Plan
from gserve_core.service.routing import Routing
from gserve_core.service.service import VLLMService
from gserve_core.service.state import ServerState
from gserve_launchers.slurm import process as slurm
from gserve_launchers.ssh import messages as ssh
from gserve_launchers.ssh.places import SshHost
from tests.pages import ROOT, blocks

DOCS = ROOT / "docs"
PAGES = sorted([ROOT / "README.md", ROOT / "CONTRIBUTING.md", ROOT / "SECURITY.md", *DOCS.rglob("*.md")])
CONFIGS = {"llm": LLMConfig, "serve": ServeConfig, "gateway": GatewayConfig}
MENTIONED = pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(ROOT)))


def page(name: str) -> str:
    return (DOCS / name).read_text()


def anchors(text: str) -> set[str]:
    """Return the anchors of a page's headings, as mkdocs makes them."""
    text = re.sub(r"^```.*?^```", "", text, flags=re.MULTILINE | re.DOTALL)
    titles = re.findall(r"^#+ (.*)", text, flags=re.MULTILINE)
    return {re.sub(r"[-\s]+", "-", re.sub(r"[^\w\s-]", "", title.lower()).strip()) for title in titles}


# ------------------------------------------------------------------------------------------------------- the reference


@pytest.mark.parametrize("name", gserve.__all__)
def test_every_public_name_is_in_it(name: str) -> None:
    assert re.search(rf"\b{name}\b", page("reference/python.md"))


@pytest.mark.parametrize("name", [name for name in vars(errors) if name.endswith("Error")])
def test_every_error_is_in_it(name: str) -> None:
    assert f"`{name}`" in page("reference/python.md")


@pytest.mark.parametrize("cls", [VLLMService, gserve.VLLMServer, gserve.VLLMClient], ids=lambda cls: cls.__name__)
def test_every_method_is_in_it(cls: type) -> None:
    for name in dir(cls):
        if not name.startswith("_") and callable(getattr(cls, name)):
            assert re.search(rf"\b{name}\b", page("reference/python.md")), name


def section(text: str, title: str) -> str:
    """Return the text below a heading of the second level."""
    (found,) = re.findall(rf"^## {title}\n(.*?)(?=^## |\Z)", text, flags=re.MULTILINE | re.DOTALL)
    return str(found)


@pytest.mark.parametrize(("name", "field"), [(name, it.name) for name, cls in CONFIGS.items() for it in fields(cls)])
def test_every_field_of_the_configs_is_in_it(name: str, field: str) -> None:
    assert f"\n| `{field}` |" in section(page("reference/config.md"), name)


def test_every_default_in_it_is_right() -> None:
    compared = 0
    for name, cls in CONFIGS.items():
        text = section(page("reference/config.md"), name)
        for item in fields(cls):
            row = re.search(rf"^\| `{item.name}` \| (.*?) \|", text, flags=re.MULTILINE)
            assert row is not None, item.name
            if item.default is not MISSING:
                compared += 1
                assert row[1].strip("`") == (
                    item.default
                    if isinstance(item.default, str)
                    else msgspec.json.encode(item.default).decode().removesuffix(".0")
                ), f"{name}.{item.name}"
    assert compared > 20


@pytest.mark.parametrize("kind", ["launcher", "transport", "engine"])
def test_every_built_in_part_and_its_options_are_in_it(kind: str) -> None:
    for name, cls in plugins.load().classes[kind].items():
        assert re.search(rf"`(type: )?{name}`", page("reference/config.md")), name
        for item in fields(cls):
            assert f"`{item.name}`" in page("reference/config.md"), f"{item.name} of {kind} {name}"


def test_every_command_and_its_options_are_in_it() -> None:
    command = typer.main.get_command(app.app)
    for name, sub in command.commands.items():  # type: ignore[attr-defined]
        (section,) = re.findall(
            rf"^## gserve {name}\n(.*?)(?=^## |\Z)", page("reference/cli.md"), flags=re.MULTILINE | re.DOTALL
        )
        for parameter in sub.params:
            for option in () if getattr(parameter, "hidden", False) else parameter.opts:
                if option.startswith("-") and option != "--help":
                    assert re.search(rf"(?<![\w-]){option}(?![\w-])", section), f"{option} of gserve {name}"


@pytest.mark.parametrize(
    "route", ["/health", "/metrics", "/chat", "/generate", "/shutdown", "/run", "/cancel", "/adapters"]
)
def test_every_route_is_in_it(route: str) -> None:
    assert re.search(rf"`(GET|POST) {route}`", page("reference/http.md"))


@pytest.mark.parametrize(("method", "path"), openai_api.ROUTES)
def test_every_route_of_openais_api_is_in_it(method: str, path: str) -> None:
    assert f"`{method} {path}`" in page("reference/http.md")


@pytest.mark.parametrize(
    "cls", [messages.ChatRequest, messages.GenerateRequest, messages.ResponseOutput, messages.Health]
)
def test_every_field_of_a_body_is_in_it(cls: type[msgspec.Struct]) -> None:
    for field in msgspec.structs.fields(cls):
        assert f"`{field.encode_name}`" in page("reference/http.md"), field.name


def test_every_series_is_in_it() -> None:
    text, names = page("reference/metrics.md"), re.findall(r"# TYPE (\w+) ", all_series())
    assert len(names) > 10
    for name in names:
        assert f"`{name}`" in text, name
    for label in set(re.findall(r"(\w+)=\"", all_series())) - {"le"}:
        assert f"`{label}`" in text, label


def all_series() -> str:
    """Return the text of a service with at least one sample of each series."""
    routing = Routing(None)
    series = Metrics(routing, lambda: {"m": Waiting(items=0, requests=0)})
    series.update(ServerState(name="server-0"))
    with series.measured("/chat") as request:
        request.begin_answer(200, Backend("server-0", "", Address([], 0), ""), is_stream=True)
        request.end_answer()
    routing.resends["", "server-0", "died"] = 1
    return asyncio.run(series.text({})).decode()


def test_every_environment_variable_is_in_it() -> None:
    found = {
        name
        for package in ("gserve", "gserve_core", "gserve_launchers", "gserve_transports")
        for file in (ROOT / package).rglob("*.py")
        for name in re.findall(
            r"environ(?:\.get|\.pop|\.setdefault)?[(\[]\s*\"(\w+)\"|_VARIABLE = \"(\w+)\"", file.read_text()
        )
        for name in name
        if name and not name.startswith("_")
    }
    assert len(found) > 15
    missing = [name for name in sorted(found) if f"`{name}`" not in page("reference/environment.md")]
    assert not missing


# ---------------------------------------------------------------------------------------------------------- the guides


def test_every_hook_and_every_member_of_a_contract_is_in_it() -> None:
    text = page("guides/plugins.md")
    for name in vars(hookspecs):
        if name.startswith("gserve_register_"):
            assert f"`{name}`" in text
    for cls in (
        interfaces.Launcher, interfaces.Transport, interfaces.Connection, interfaces.Engine, interfaces.RunningEngine,
        interfaces.RunningRank,
        interfaces.GatewayApi, interfaces.Measurement, interfaces.Attempts,
    ):  # fmt: skip
        for name in vars(cls):
            if not name.startswith("_"):
                assert f"`{name}" in text, f"{cls.__name__}.{name}"
    for item in fields(interfaces.Job):
        assert f"`{item.name}`" in text, item.name


@pytest.mark.parametrize("name", ["taskset_launcher.py", "reverse_engine.py", "reverse.yaml", "check.py"])
def test_the_plugins_in_it_are_the_files(name: str) -> None:
    assert (ROOT / "configs" / "plugin" / name).read_text() in page("guides/plugins.md")


def test_the_plugins_in_it_keep_the_contracts() -> None:
    command = [sys.executable, str(ROOT / "configs" / "plugin" / "check.py")]
    ran = subprocess.run(command, capture_output=True, text=True, check=False)
    assert ran.returncode == 0, ran.stderr


def test_every_cause_and_every_hint_is_in_it() -> None:
    text = page("guides/troubleshooting.md")
    for known in (*diagnosis.KNOWN, *KNOWN_ERRORS):
        for part in (known.sentence, known.hint):
            assert re.sub(r"\{\d\}", "…", part) in text, part


@pytest.mark.parametrize("name", [item.name for item in fields(ServerState)])
def test_every_field_of_a_servers_state_is_in_it(name: str) -> None:
    assert f"`{name}`" in page("reference/python.md")


def test_every_reason_why_a_host_fails_is_in_it() -> None:
    text = page("guides/ssh.md")
    for meaning in ssh.MEANINGS:
        assert f"| {meaning.sentence.format(host='…')} | {meaning.hint} |" in text


def test_every_key_of_a_host_is_in_it() -> None:
    for item in fields(SshHost):
        assert f"`{item.name}`" in page("reference/config.md").partition("| key of a host |")[2]


def test_every_end_of_a_job_is_in_it() -> None:
    for name, words in slurm.STATE_REASONS.items():
        assert f"| `{name}` | {words} |" in page("guides/slurm.md"), name


# ----------------------------------------------------------------------------------------------------------- all pages


def test_the_readme_is_short() -> None:
    assert len((ROOT / "README.md").read_text().splitlines()) <= 150


@MENTIONED
def test_every_link_leads_somewhere(page: Path) -> None:
    text = page.read_text()
    for target in re.findall(r"\]\(([^)\s]+)\)", text):
        if "://" in target:
            continue
        path, _, anchor = target.partition("#")
        there = (page.parent / path).resolve() if path else page
        assert there.exists(), target
        if anchor:
            assert anchor in anchors(there.read_text()), target


@MENTIONED
def test_its_python_compiles_and_its_yaml_is_a_config(page: Path, tmp_path: Path) -> None:
    text = page.read_text()
    for block in blocks(text, "python"):
        compile(block, page.name, "exec")
    for block in blocks(text, "yaml"):
        document = yaml.safe_load(block)
        if {"llm", "models"} & document.keys():
            (tmp_path / "config.yaml").write_text(block)
            for file in (ROOT / "configs" / "plugin").glob("*.py"):
                (tmp_path / file.name).write_text(file.read_text())
            loaded, found = config.load(tmp_path / "config.yaml")
            assert Plan.of(loaded, found.file.parent).servers
