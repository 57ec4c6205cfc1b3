"""Recall and state tracking: tasks, models of equal state, sweeps over both."""
