"""What runs servers: the service, its pool with the supervisor, and what a client talks to."""
