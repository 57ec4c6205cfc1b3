"""Speed and memory of HAMT beside a transformer of the same size, and beside its ceiling."""
