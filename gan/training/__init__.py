"""The training loop and everything that it keeps, times and writes."""
