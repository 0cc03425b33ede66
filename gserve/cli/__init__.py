"""The command line `gserve`. `python -m gserve.cli` is the same program.

Imports inside functions are those of rich and of the core's larger modules: `gserve --help` needs none of them.
"""
