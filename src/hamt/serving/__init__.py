"""``hamt serve``: a model behind the interface of OpenAI's servers."""
