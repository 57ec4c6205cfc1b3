"""The page's scripts beside the Python that they stand for, in Node.js."""

import json
import math
import random
import time
import unicodedata
from pathlib import Path

import pytest
import torch
from model_inputs import name_of, random_ids, tiny_model
from tokenizers import AddedToken, Tokenizer, decoders, models, normalizers, pre_tokenizers
from transformers import ByT5Tokenizer, PreTrainedTokenizerFast, TopPLogitsWarper

from hamt import HAMTCache
from hamt.analysis.contributions import contributions
from hamt.analysis.record import record
from hamt.checkpoint import PRETRAINED
from hamt.errors import UserError
from hamt.export import traces
from hamt.export.step import read_tokens, run_eagerly
from hamt.export.traces import TracedStep
from hamt.export.web import check_tokenizer
from hamt.generation import encode_text

BACKEND = Tokenizer.from_file(str(PRETRAINED / "tokenizer.json"))
DIFFICULT = [
    "",
    " ",
    "  two  spaces   and more    ",
    "\n",
    "\n\n\nlines\r\n\r\nof\tall \n kinds \x0b\x0c\x1c\x1d\x1e\x1f",
    "It's we'll I'VE they're '' 'st 'd'd",
    "naïve café ÀÉÎÕÜ ß ﬁ ſ",
    "e\u0301 combined, precomposed é",
    "Ελληνικά, русский, العربية, עברית, हिन्दी, ไทย",
    "漢字とかな、한국어。",
    "🙂 👩‍👩‍👧‍👦 🏳️‍🌈 🇩🇪 ✊🏽",
    "𝔘𝔫𝔦𝔠𝔬𝔡𝔢 𐍈 𒀀",
    "½ ² ③ Ⅷ ٣ १ 1,234.5e-6",
    "\ufeffmark \u200bzero\u200bwidth\u200d \u2060 \u00ad",
    "\u0085\u00a0\u1680\u180e\u2000\u2009\u2028\u2029\u202f\u205f\u3000 spaces\u3000",
    "a\u00a0b \u00a0 c\u0085 d",
    "\0\x01\x7f\x80\x9f\xa1\xad\xff",
    "<|endoftext|>",
    "before<|endoftext|>after <|pad|> <|endoftext|<|endoftext|>|>",
    "supercalifragilisticexpialidocious" * 5,
    "____----====    ....!!!???",
    "{'json': [1, 2]}\tif (x) { return; } // 100%",
]


def drawn_texts(count: int) -> list[str]:
    """Characters from anywhere in Unicode, runs of white space and words among them."""
    draw, texts = random.Random(0), []
    for _ in range(count):
        parts = []
        for _ in range(draw.randrange(1, 12)):
            kind = draw.randrange(4)
            if kind == 0:
                parts.append(draw.choice([" ", "\n", "\t", "\u00a0", "\u3000", "\u2028"]) * 2)
            elif kind == 1:
                parts.append(draw.choice(["Congress", "'s", "l'été", "42", "Ünïon", "…"]))
            else:
                # What is not assigned may be a letter to a younger version of Unicode.
                code = draw.randrange(0x20, 0x2FFFF if kind == 2 else 0x250)
                if unicodedata.category(chr(code)) not in ("Cs", "Cn"):
                    parts.append(chr(code))
        texts.append("".join(parts))
    return texts


ENCODE = """({Tokenizer, Decoder}, {file, texts}) => {
  const tokenizer = new Tokenizer(file);
  return texts.map((text) => {
    const ids = tokenizer.encode(text), decoder = new Decoder(tokenizer);
    return {ids, pieces: ids.map((id) => decoder.push(id)), later: tokenizer.encode(text, true)};
  });
}"""


def encoded(javascript, backend, texts):
    return javascript("tokenizer", ENCODE, {"file": json.loads(backend.to_str()), "texts": texts})


def test_texts_become_the_same_tokens(javascript):
    texts = [*DIFFICULT, *drawn_texts(400)]
    found = encoded(javascript, BACKEND, texts)
    wanted = [BACKEND.encode(text, add_special_tokens=False).ids for text in texts]
    for text, each, ids in zip(texts, found, wanted, strict=True):
        assert each["ids"] == ids, repr(text)
    assert sum(map(len, wanted)) > 5000
    docs = Path(__file__).parents[2] / "docs" / "export.md"
    assert f"400 random and {len(DIFFICULT)} difficult strings" in docs.read_text(encoding="utf-8")


def test_tokens_become_the_same_text(javascript):
    """Special ones are left out; a character is written with the last of its tokens."""
    found = encoded(javascript, BACKEND, DIFFICULT)
    for text, each in zip(DIFFICULT, found, strict=True):
        plain = text.replace("<|endoftext|>", "").replace("<|pad|>", "")
        assert "".join(each["pieces"]) == plain
    (smile,) = encoded(javascript, BACKEND, ["🙂"])
    assert smile["pieces"][-1] == "🙂"
    assert {*smile["pieces"][:-1]} == {""}


def test_a_space_is_put_in_front_where_the_tokenizer_does_so(javascript):
    """But not where a text goes on, as in ``hamt generate --state``."""
    backend = Tokenizer.from_str(BACKEND.to_str())
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=True)
    texts = ["Union", " Union", "<|endoftext|>Union<|pad|> x", ""]
    found = encoded(javascript, backend, texts)
    assert [each["ids"] for each in found] == [backend.encode(text).ids for text in texts]
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=backend)
    for text, each in zip(texts, found, strict=True):
        assert each["later"] == encode_text(tokenizer, text, goes_on=True)


def with_model(**changed) -> Tokenizer:
    """The tokenizer with other values in its model."""
    content = json.loads(BACKEND.to_str())
    content["model"] |= changed
    return Tokenizer.from_str(json.dumps(content))


def test_added_tokens_are_found_and_written_as_by_the_library(javascript):
    """With any characters in them, special or not; what overlaps goes to the same ones."""
    backend = Tokenizer.from_str(BACKEND.to_str())
    plain = ["HAMT", "two words", "café", "日本", "xa", "a/b-c", "^.*$"]
    backend.add_tokens([AddedToken(each, normalized=True) for each in plain])
    backend.add_special_tokens(["<|fim-middle|>", "ab", "[CLS-1] "])
    texts = ["HAMT: two words", "un café, 日本!", "xab", "a/b-c^.*$", "<|fim-middle|>a[CLS-1] b"]
    for text, each in zip(texts, encoded(javascript, backend, texts), strict=True):
        ids = backend.encode(text, add_special_tokens=False).ids
        assert each["ids"] == ids, text
        assert "".join(each["pieces"]) == backend.decode(ids), text


def test_bytes_without_a_token_are_left_out(javascript):
    vocabulary = {piece: id for piece, id in BACKEND.get_vocab().items() if "Ã" not in piece}
    backend = with_model(vocab=vocabulary, merges=[])
    (found,) = encoded(javascript, backend, ["né"])
    assert found["ids"] == backend.encode("né").ids
    assert len(found["ids"]) == 2


def test_the_end_of_a_word_merges_with_nothing(javascript):
    """Not with what JavaScript calls it, either."""
    backend = with_model(
        vocab=BACKEND.get_vocab() | {"undefined": 3000, "aundefined": 3001},
        merges=[["a", "undefined"]],
    )
    texts = ["a", "ba"]
    found = encoded(javascript, backend, texts)
    assert [each["ids"] for each in found] == [backend.encode(text).ids for text in texts]


def test_long_words_take_seconds(javascript):
    """Of one letter, of four, and of characters that are tokens of their bytes: as are pasted."""
    texts = ["a" * 50_000, "acgt" * 12_500, "漢字" * 25_000]
    begun = time.perf_counter()
    found = encoded(javascript, BACKEND, texts)
    assert time.perf_counter() - begun < 20
    for text, each in zip(texts, found, strict=True):
        assert each["ids"] == BACKEND.encode(text).ids


@pytest.mark.parametrize(("part", "value", "told"), [
    ("pre_tokenizer", pre_tokenizers.Whitespace(), "words are not cut as GPT-2's"),
    ("pre_tokenizer", pre_tokenizers.ByteLevel(use_regex=False), "words are not cut as GPT-2's"),
    ("model", models.WordLevel({"a": 0}, "a"), "its model is WordLevel"),
    ("model", models.BPE({"a": 0}, [], unk_token="a"), "a token for bytes that it lacks"),
    ("model", models.BPE({"a": 0}, [], dropout=0.1), "it has dropout"),
    ("model", models.Unigram([("a", 0.0)], 0), "its model is Unigram"),
    ("normalizer", normalizers.NFC(), "it has normalizer"),
    ("decoder", decoders.Fuse(), None),
])  # fmt: skip
def test_other_tokenizers_are_refused(part, value, told):
    backend = Tokenizer.from_str(BACKEND.to_str())
    setattr(backend, part, value)
    fast = PreTrainedTokenizerFast(tokenizer_object=backend)
    if told is None:
        assert check_tokenizer(fast)["model"]["type"] == "BPE"
        return
    with pytest.raises(UserError, match=told):
        check_tokenizer(fast)


def test_a_tokenizer_without_a_fast_form_is_refused():
    with pytest.raises(UserError, match="it has no fast form"):
        check_tokenizer(ByT5Tokenizer())


MODELS = [
    {},
    {"write_rule": "delta", "binding_type": "elementwise", "rotation": "data_dependent"},
    {"write_rule": "convex", "binding_type": "circular_conv", "read_before_write": True},
    {"mixers": ["hierarchical_memory", "sliding_attention", "memory"], "num_slots": 4}
    | {"num_layers": 3, "boundary_every": 5, "sliding_window": 4, "normalize_state": True},
    {"mixers": "hierarchical_memory", "num_slots": 4, "boundary_every": 1}
    | {"gate_feedback": True, "write_rule": "delta"},
]
SHARES = """({Record}, {page, traces, query, begin}) => {
  const record = new Record(page);
  traces.forEach((trace, index) => {
    const {boundary_every: every} = page;
    record.add(Float32Array.from(trace), every !== null && (index + 1) % every === 0);
  });
  begin ??= record.begin;
  const found = page.layers.map((_, index) => record.shares(index, query, begin));
  return [...found, record.meanShares(query, begin)].map(
    ({begin, shares, before}) => ({begin, shares: Array.from(shares), before}));
}"""

TAKEN = """({Record}, {page, size}) => {
  const record = new Record(page), {boundary_every: every} = page;
  for (let i = 1; i <= 1000; i++) {
    record.add(new Float32Array(size), every !== null && i % every === 0);
  }
  return [record.numbers, ...record.boundaries.values()].reduce((sum, x) => sum + x.byteLength, 0);
}"""


@pytest.mark.parametrize("window", [64, 16])
@pytest.mark.parametrize("options", MODELS, ids=name_of)
def test_shares_are_those_of_the_analysis(options, window, javascript):
    """Of the last token and of an earlier one, also where the first tokens are forgotten."""
    step, ids, length = TracedStep(tiny_model(**options)), random_ids(1, 40), 40
    page = {**step.describe()["page"], "window": window}
    traces = [each[-1][0].tolist() for each in read_tokens(step, run_eagerly(step), ids)]
    cache, begin = HAMTCache(len(step.model.model.layers)), max(0, length - window)
    if begin:
        with torch.no_grad():
            step.model.model(ids[:, :begin], past_key_values=cache)
    recording = record(step.model, ids[:, begin:], cache=cache)
    for query in (length - 1, length - 9):
        given = {"page": page, "traces": traces, "query": query}
        *layers, mean = javascript("sources", SHARES, given)
        wanted, before = [], []
        for index in step.memories:
            parts = contributions(recording.trace(index), [query - begin])
            wanted.append(parts.tokens[0, 0].mean(dim=0)[: query - begin + 1])
            before.append(parts.initial[0, 0].mean())
        wanted.append(torch.stack(wanted).mean(dim=0))
        before.append(torch.stack(before).mean())
        for found, shares, rest in zip([*layers, mean], wanted, before, strict=True):
            assert found["begin"] == begin
            assert torch.allclose(torch.tensor(found["shares"]), shares, atol=1e-4)
            assert found["before"] == pytest.approx(rest.item(), abs=1e-4)
            assert sum(found["shares"]) + found["before"] == pytest.approx(1, abs=1e-4)
    assert (begin > 0) == (window == 16)
    assert any(abs(rest) > 0.01 for rest in before) == (begin > 0)


@pytest.mark.parametrize("options", MODELS, ids=name_of)
def test_the_window_takes_the_memory_that_is_told(options, javascript, monkeypatch):
    """Matrices of boundaries, which may be more than all else, among it."""
    monkeypatch.setattr(traces, "WINDOW_BYTES", 100_000)
    step = TracedStep(tiny_model(**options))
    page = step.describe()["page"]
    size = step.outputs[-1].shape[0]
    taken = javascript("sources", TAKEN, {"page": page, "size": size})
    assert taken == page["window_bytes"]
    assert taken <= 1.1 * 100_000 or page["window"] == traces.LEAST_WINDOW
    assert taken > 0.8 * 100_000


def test_what_came_before_can_be_told_as_one(javascript):
    """From a later token on than the first that is known."""
    step = TracedStep(tiny_model())
    outputs = read_tokens(step, run_eagerly(step), random_ids(1, 20))
    traces = [each[-1][0].tolist() for each in outputs]
    given = {"page": step.describe()["page"], "traces": traces, "query": 19}
    for all_of_it, rest in zip(
        javascript("sources", SHARES, given),
        javascript("sources", SHARES, {**given, "begin": 7}),
        strict=True,
    ):
        assert rest["shares"] == all_of_it["shares"][7:]
        assert rest["before"] == pytest.approx(sum(all_of_it["shares"][:7]), abs=1e-5)


def test_a_first_token_that_reads_nothing_has_no_shares(javascript):
    step = TracedStep(tiny_model(read_before_write=True))
    traces = [
        each[-1][0].tolist() for each in read_tokens(step, run_eagerly(step), random_ids(1, 3))
    ]
    given = {"page": step.describe()["page"], "traces": traces, "query": 0}
    assert all(each["shares"] == [0] and each["before"] == 0
               for each in javascript("sources", SHARES, given))  # fmt: skip


def test_models_that_the_page_cannot_look_into_are_refused():
    with pytest.raises(UserError, match="this model has none: use --format onnx"):
        TracedStep(tiny_model(mixers="sliding_attention"))
    model = tiny_model()
    rule = type(model.model.layers[0].mixer.memory.rule)
    model.model.layers[0].mixer.memory.rule = type("Mine", (rule,), {"name": "mine"})()
    with pytest.raises(UserError, match="does not know the write rule 'mine' of layer 0"):
        TracedStep(model)


CHOOSE = """({choose}, {logits, temperature, top, count}) => {
  const found = new Array(logits.length).fill(0);
  for (let i = 0; i < count; i++) {
    found[choose(logits, temperature, top, () => (i + 0.5) / count)]++;
  }
  return found;
}"""


@pytest.mark.parametrize(("temperature", "top"), [(0, 0.9), (1, 1), (0.5, 1), (1, 0.8), (2, 0.3)])
def test_tokens_are_drawn_as_hamt_generate_does(temperature, top, javascript):
    """Shares of many draws at even intervals; ``top`` as Transformers' TopPLogitsWarper has it."""
    logits = [0.3, 2.0, -1.0, 1.2, 1.9, -5.0]
    given = {"logits": logits, "temperature": temperature, "top": top, "count": 10_000}
    found = torch.tensor(javascript("sampling", CHOOSE, given)) / 10_000
    if temperature == 0:
        assert found.tolist() == [0, 1, 0, 0, 0, 0]
        return
    scaled = torch.tensor([logits]) / temperature
    wanted = TopPLogitsWarper(top)(None, scaled) if top < 1 else scaled
    assert torch.allclose(found, wanted.softmax(dim=-1)[0], atol=2e-3)
    assert math.isclose(found.sum(), 1, abs_tol=1e-6)
