"""Writes the pages of the site that nobody writes by hand: one a rule, one a public name."""
