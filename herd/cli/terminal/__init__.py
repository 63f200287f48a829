"""What `herd chat` shows in a terminal and reads from it."""
