"""Measuring models: each command with its options, its run and its report."""
