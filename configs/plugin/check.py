"""Check the plugins beside this file against gserve's contracts: `python configs/plugin/check.py`."""

from gserve import LLMConfig
from gserve_core import testing
from reverse_engine import ReverseEngine
from taskset_launcher import TasksetLauncher

testing.check_engine(ReverseEngine(), LLMConfig("any"))
testing.check_launcher(TasksetLauncher())
print("both plugins keep the contracts")
