"""What a cache holds is checked like any input; what is damaged is made anew."""

import json
import shutil

import numpy as np
import pytest
from text_inputs import TEXT, files

from hamt.data import tokens
from hamt.data.cache import CHECKSUMS
from hamt.data.corpus import load_corpus
from hamt.data.tokenizer import own_tokenizer
from hamt.data.tokens import tokenise
from hamt.errors import UserError


@pytest.fixture
def corpus(tmp_path):
    return load_corpus(str(files(tmp_path, a_txt=TEXT * 9) / "a.txt"))


def info(**changes):
    """Change the record of a split."""

    def damage(folder):
        path = folder / "train.json"
        path.write_text(json.dumps(json.loads(path.read_text()) | changes))

    return damage


def ids(change):
    def damage(folder):
        path = folder / "train.bin"
        path.write_bytes(change(path.read_bytes()))

    return damage


def starts(*places, **options):
    return lambda folder: np.save(folder / "train.starts.npy", np.array(places, **options))


def text(name, content):
    return lambda folder: (folder / name).write_text(content)


DAMAGES = {
    "a type that points into memory": info(dtype="object"),
    "a type of other numbers": info(dtype="float16"),
    "a smaller type": info(dtype="uint8"),
    "a type that takes the half": info(dtype="uint32"),
    "a type that is none": info(dtype=[]),
    "more tokens than there are": info(length=10**12),
    "less than no tokens": info(length=-1),
    "a word for a length": info(length="100"),
    "no whole number of tokens": info(length=9.5),
    "a text of no bytes": info(num_bytes=0),
    "no record": lambda folder: (folder / "train.json").unlink(),
    "half a record": text("train.json", '{"dtype": "uint16", "len'),
    "another record": text("train.json", "[1, 2]"),
    "a file that was cut": ids(lambda content: content[:-10]),
    "a file that is longer": ids(lambda content: content + b"ab"),
    "an empty file": ids(lambda content: b""),
    "ids beyond the vocabulary": ids(lambda content: b"\xff\xff" + content[2:]),
    "no file": lambda folder: (folder / "train.bin").unlink(),
    "documents that begin behind the end": starts(0, 10**9),
    "documents that begin before the text": starts(-5, 4),
    "documents in disorder": starts(9, 4),
    "places of another type": starts(0.0, 4.0),
    "places that are pickled": starts({}, dtype=object),
}


@pytest.mark.parametrize("damage", DAMAGES.values(), ids=DAMAGES)
def test_damaged_tokens_are_made_anew(corpus, tokenizer, tmp_path, damage):
    """Also without checksums, which earlier versions did not write, and which can be forged."""
    cache = tmp_path / "cache"
    whole = tokenise(corpus, tokenizer, cache)
    expected, folder = whole.train.ids.tolist(), cache / whole.fingerprint
    (folder / CHECKSUMS).unlink()
    damage(folder)
    found = tokenise(corpus, tokenizer, cache)
    assert found.train.ids.tolist() == expected
    assert (found.train.starts.tolist(), found.train.num_bytes) == ([0], whole.train.num_bytes)
    assert json.loads((folder / CHECKSUMS).read_text()).keys() >= {"train.bin", "held_out.bin"}


@pytest.mark.parametrize("place", [0, 77, 500])
def test_a_flipped_bit_is_noticed(corpus, tokenizer, tmp_path, place):
    def flip(content):
        return content[:place] + bytes([content[place] ^ 1]) + content[place + 1 :]

    folder = tmp_path / "cache" / tokenise(corpus, tokenizer, tmp_path / "cache").fingerprint
    before = (folder / "train.bin").read_bytes()
    ids(flip)(folder)
    tokenise(corpus, tokenizer, tmp_path / "cache")
    assert (folder / "train.bin").read_bytes() == before


def test_tokens_that_an_earlier_version_cached_are_used(corpus, tokenizer, tmp_path, monkeypatch):
    first = tokenise(corpus, tokenizer, tmp_path)
    (tmp_path / first.fingerprint / CHECKSUMS).unlink()
    monkeypatch.setattr(tokens, "encode", None)
    assert np.array_equal(tokenise(corpus, tokenizer, tmp_path).train.ids, first.train.ids)


@pytest.mark.parametrize("damage", [
    text("tokenizer.json", "{}"),
    text("tokenizer.json", ""),
    text("tokenizer_config.json", "no JSON"),
    lambda folder: (folder / "tokenizer.json").unlink(),
    lambda folder: (folder / CHECKSUMS).write_text("{}"),
    lambda folder: (folder / "more.json").write_text("{}"),
])  # fmt: skip
def test_a_damaged_tokenizer_is_learnt_anew(corpus, tmp_path, damage):
    first = own_tokenizer(corpus, 300, tmp_path / "cache").backend_tokenizer.to_str()
    (folder,) = (tmp_path / "cache").iterdir()
    damage(folder)
    assert own_tokenizer(corpus, 300, tmp_path / "cache").backend_tokenizer.to_str() == first


def test_a_cache_that_cannot_be_mended_is_told(corpus, tokenizer, tmp_path, monkeypatch):
    folder = tmp_path / tokenise(corpus, tokenizer, tmp_path).fingerprint
    (folder / "train.bin").write_bytes(b"")

    def fail(*_):
        raise PermissionError(13, "Permission denied")

    monkeypatch.setattr(shutil, "rmtree", fail)
    with pytest.raises(UserError, match=r"Permission denied.*--token_cache"):
        tokenise(corpus, tokenizer, tmp_path)
