"""What the tests of evaluate and compare have in common."""

from command_inputs import words

WORDS = "one two three four five six seven eight nine ten eleven twelve. " * 30
# What a comparison is told to measure, so that it takes no time.
SMALL = words(max_documents=1, max_characters=200, contexts=8, batch_sizes=1, rounds=1)
SMALL += words(decode_tokens=2)
