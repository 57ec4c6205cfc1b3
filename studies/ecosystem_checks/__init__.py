"""Checks of HAMT beside other libraries, by library; ``studies/ecosystem.py`` runs them."""
