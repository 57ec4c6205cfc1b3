"""Checks of the form ``fla`` of the memory: on a GPU, or on a CPU under Triton's interpreter."""
