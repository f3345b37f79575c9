"""The algorithms, each a list of lines."""
