"""Where a state lives on many devices."""
