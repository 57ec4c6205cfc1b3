"""``hamt explore``: a local web page to look into a memory."""
