"""``hamt serve``: an OpenAI-compatible server for a model."""
