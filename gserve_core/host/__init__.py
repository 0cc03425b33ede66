"""What belongs to the machine: processes, folders, files that processes share, GPUs, logs, the environment."""
