"""A model for other programs: one token with explicit state, as a file, and a page for browsers."""
