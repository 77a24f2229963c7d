"""Breaks the numeric core on purpose, to see that the default tests notice."""
