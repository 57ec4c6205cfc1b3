"""What only makes HAMT faster on a GPU: this folder can be deleted without changing a result."""
