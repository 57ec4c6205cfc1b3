"""``hamt evaluate``: perplexity, benchmark tasks and samples of one model."""
