"""Saving, and moving in and out."""
