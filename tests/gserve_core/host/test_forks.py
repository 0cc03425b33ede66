"""Callbacks in real forked children."""

import subprocess
import sys

PROGRAM = """
import gc, os
from gserve_core.host.forks import call_in_child

class Resource:
    def __init__(self, name):
        self.name = name
        call_in_child(self.renew)
    def renew(self):
        print("renewed", self.name, flush=True)
        if self.name == "broken":
            raise OSError("cannot renew")

first, gone, broken, last = map(Resource, ("first", "gone", "broken", "last"))
call_in_child(lambda: print("function", flush=True))
del gone
gc.collect()
child = os.fork()
if child == 0:
    os._exit(0)
os.waitpid(child, 0)
print("end", flush=True)
"""


def test_objects_that_exist_are_called_in_order_and_one_that_fails_keeps_no_other_from_it() -> None:
    done = subprocess.run([sys.executable, "-c", PROGRAM], capture_output=True, text=True, timeout=60, check=True)
    assert done.stdout.split("\n") == ["renewed first", "renewed broken", "renewed last", "function", "end", ""]
    assert done.stderr.endswith("OSError: cannot renew\n")
    assert done.stderr.count("Traceback") == 1
