"""The parts that run inside a server's process, and the nursery that forks such processes."""
