"""What only makes HAMT faster on a CPU: this folder can be deleted without changing a result."""
