#!/bin/bash
# The script of every job of `gserve sbatch`. $1: the Python that submitted it. $2: the file with the job's task.
trap '' USR1 # until Python handles it
exec "$1" -P -m gserve.cli.batch_job "$2"
