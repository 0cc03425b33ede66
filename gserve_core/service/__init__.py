"""Running servers: the service, its pool with the supervisor, and the clients."""
