"""The machine: processes, folders, files that processes share, GPUs, logs, and the environment."""
