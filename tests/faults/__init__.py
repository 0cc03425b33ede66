"""The fault matrix: every fault that a service must survive, done for real, and counted. `python -m tests.faults`."""
