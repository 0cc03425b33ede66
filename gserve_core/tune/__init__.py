"""Settings measured on a user's own rows: the search, what it tries, and the trials."""
