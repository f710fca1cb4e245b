"""The training loop. It reads an algorithm as a value and knows none by name."""
