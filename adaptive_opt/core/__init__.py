"""What everything rests on: the step, its stages, brackets and recipes, and the policies."""
