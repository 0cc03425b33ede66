"""What a call is: its items, the queue that they wait in, and the dispatcher that sends them to servers."""
