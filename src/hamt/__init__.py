"""HAMT: causal language models whose token mixer is a fixed-size holographic memory."""

__version__ = "0.1.0"
