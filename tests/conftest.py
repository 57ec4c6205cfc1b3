"""Settings of the test run."""

from hypothesis import settings

# The same examples at every run, so that a red test is red again; CI machines are too uneven for a
# deadline in milliseconds.
settings.register_profile("hamt", derandomize=True, deadline=None, max_examples=60)
settings.load_profile("hamt")
