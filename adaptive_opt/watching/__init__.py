"""Seeing what an optimizer does."""
