"""Exact attention to the last tokens, and a memory of those that have left them."""
