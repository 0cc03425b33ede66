"""`python -m gserve.cli`."""

from gserve.cli.app import main

main()
