"""Every other architecture: how it is built, matched in size, counted, loaded and trained."""
