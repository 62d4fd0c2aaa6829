"""The server's side of worker processes: starting them, talking to them, their async face."""
