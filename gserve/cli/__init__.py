"""The command line `gserve`, also `python -m gserve.cli`.

Rich and the larger modules of the core are imported inside functions: `gserve --help` does not need them.
"""
