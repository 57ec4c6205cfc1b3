"""``hamt recall``: what a memory of a given size remembers."""
