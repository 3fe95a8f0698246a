"""The rows of a text, found in one pass."""
