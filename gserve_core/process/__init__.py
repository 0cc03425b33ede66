"""What runs inside a server's process, and the nursery that forks such processes."""
