"""A call and its parts: its items, their queue, and the dispatcher that sends them to servers."""
