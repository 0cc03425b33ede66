"""The version of gserve, as programs and people ask for it."""

import subprocess
import sys
from importlib.metadata import version
from pathlib import Path

import gserve


def test_the_package_and_the_command_have_the_version_of_the_distribution() -> None:
    command = [str(Path(sys.executable).with_name("gserve")), "--version"]
    shown = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    assert gserve.__version__ == version("gserve")
    assert shown == f"gserve {gserve.__version__}\n"


def test_the_schemas_are_where_the_seed_has_them() -> None:
    from gserve import schema
    from gserve_core import messages

    assert {name: getattr(schema, name) for name in schema.__all__} == {
        name: getattr(messages, name) for name in ("ChatRequest", "GenerateRequest", "Message", "ResponseOutput")
    }
