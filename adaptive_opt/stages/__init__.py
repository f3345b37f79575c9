"""The lines of the papers."""
