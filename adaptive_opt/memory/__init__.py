"""Fewer bytes, and fewer passes over them."""
