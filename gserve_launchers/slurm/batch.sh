#!/bin/bash
# The script of every job of `gserve sbatch`: $1 is the Python that it was submitted from, $2 the file that says the rest.
trap '' USR1 # until Python hears it
exec "$1" -P -m gserve.cli.batch_job "$2"
