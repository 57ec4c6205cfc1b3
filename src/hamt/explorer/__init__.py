"""A local web page to look into a model's memories: type, click, scrub through time, let it write."""
