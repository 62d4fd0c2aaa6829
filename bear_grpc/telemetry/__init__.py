"""What operators see of the server: observers of calls, and where they send what they see."""
