"""Who may come in, how often, and how many at once."""
