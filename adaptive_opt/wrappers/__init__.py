"""What goes around an optimizer, or beside it in a training script."""
