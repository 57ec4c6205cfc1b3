"""``hamt ablate``: what each choice of the architecture is worth."""
