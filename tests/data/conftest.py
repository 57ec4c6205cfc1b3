"""Fixtures of the tests of data."""

import pytest
from text_inputs import TEXT

from hamt.data.tokenizer import train_tokenizer


@pytest.fixture(scope="module")
def tokenizer():
    return train_tokenizer([TEXT * 20], 300)
