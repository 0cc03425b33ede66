"""The command line `gserve`. `python -m gserve.cli` is the same program."""
