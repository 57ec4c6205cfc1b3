"""The engine: each row is what ``generate`` writes of it alone, and nothing is read twice."""

import threading

import pytest
import torch
from converted_inputs import SEVERAL, tiny_converted
from model_inputs import VOCAB, tiny_model
from transformers import GenerationConfig

from hamt.serving import engine as module
from hamt.serving.engine import Busy, Engine, Text
from hamt.serving.states import StateStore

GREEDY = {"do_sample": False, "eos_token_id": None}
MIXERS = {
    "memory": {},
    "delta": {"write_rule": "delta"},
    "hierarchical": {"mixers": "hierarchical_memory", "num_slots": 4, "boundary_every": 3},
    "hybrid": {"mixers": ["memory", "sliding_attention"], "sliding_window": 5},
    "full": {"mixers": ["full_attention", "memory"]},
}


def of(name):
    """A model of these mixers, or one that was converted."""
    if name == "converted":
        return tiny_converted(sizes=SEVERAL)
    return tiny_model(**MIXERS[name])


@pytest.fixture
def engines():
    """Make engines, which end with the test."""
    made = []

    def make(model, max_rows=8, max_bytes=10**8):
        made.append(Engine(model, StateStore(max_bytes), max_rows))
        return made[-1]

    yield make
    for engine in made:
        engine.close()


class Written:
    """A text that was asked for, and its tokens."""

    def __init__(self, engine, ids, count=8, stop=None, seed=None, **options):
        self.tokens, self.error, self._done, self._stop = [], None, threading.Event(), stop
        config = GenerationConfig(**{**GREEDY, **options, "max_new_tokens": count})
        self.text = Text(ids, config, seed, self._take, self._end)
        self._count = count
        engine.submit(self.text)

    def _take(self, token):
        self.tokens.append(token)
        return len(self.tokens) < self._count and (self._stop is None or self._stop(self))

    def _end(self, error):
        assert not self._done.is_set(), "ended twice"
        self.error = error
        self._done.set()

    def wait(self):
        assert self._done.wait(60)
        if self.error is not None:
            raise self.error
        return self.tokens


def prompts(*lengths):
    generator = torch.Generator().manual_seed(1)
    return [torch.randint(VOCAB, (n,), generator=generator).tolist() for n in lengths]


def generated(model, ids, count=8):
    output = model.generate(torch.tensor([ids]), max_new_tokens=count, **GREEDY)
    return output[0, len(ids) :].tolist()


@pytest.mark.parametrize("name", [*MIXERS, "converted"])
def test_rows_write_what_each_would_alone(name, engines, monkeypatch):
    """They come one after the other, of all lengths, and leave at different times."""
    monkeypatch.setattr(module, "PART", 7)
    model = of(name)
    engine = engines(model, max_rows=4)
    given = prompts(1, 2, 30, 9, 1, 17, 5, 40)
    counts = [8, 3, 12, 1, 5, 8, 20, 6]
    texts = [Written(engine, ids, n) for ids, n in zip(given, counts, strict=True)]
    for text, ids, count in zip(texts, given, counts, strict=True):
        assert text.wait() == generated(model, ids, count)


@pytest.mark.parametrize("name", [*MIXERS, "converted"])
def test_what_was_read_is_not_read_again(name, engines):
    model = of(name)
    engine = engines(model)
    (first,) = prompts(30)
    answer = Written(engine, first).wait()
    again = Written(engine, first)
    assert again.wait() == answer
    assert again.text.known == 29  # the last token is what the answer begins from
    longer = [*first, *answer, 5, 6, 7]
    seen = []
    hook = model.model.register_forward_pre_hook(
        lambda _, args, named: seen.append(named["input_ids"]), with_kwargs=True
    )
    turn = Written(engine, longer, 1)
    assert turn.wait() == generated(model, longer, 1)
    hook.remove()
    assert turn.text.known == 37  # all but the last token of the answer, which was not read
    assert sum(ids.numel() for ids in seen) == len(longer) - 37 + len(longer)  # and by generate


def test_an_answer_that_is_told_otherwise_is_read_from_where_it_began(engines):
    model = tiny_model()
    engine = engines(model)
    (first,) = prompts(30)
    answer = Written(engine, first).wait()
    other = [*first, *answer[:3], (answer[3] + 1) % VOCAB, 5, 6]
    turn = Written(engine, other)
    assert turn.wait() == generated(model, other)
    assert turn.text.known == 29


def test_options_are_those_of_generate(engines):
    """Greedy choices that penalties and biases change; drawn ones by the seed of the text."""
    model = tiny_model()
    engine = engines(model)
    (ids,) = prompts(12)
    options = {"repetition_penalty": 5.0, "sequence_bias": {(3,): 2.0}}
    changed = Written(engine, ids, 20, **options).wait()
    output = model.generate(torch.tensor([ids]), max_new_tokens=20, **{**GREEDY, **options})
    assert changed == output[0, 12:].tolist()
    assert changed != generated(model, ids, 20)
    drawn = [Written(engine, ids, 20, seed=seed, do_sample=True) for seed in (1, 1, 2)]
    first, same, other = (text.wait() for text in drawn)
    assert first == same
    assert first != other
    narrow = Written(engine, ids, 20, seed=1, do_sample=True, top_k=1)
    assert narrow.wait() == generated(model, ids, 20)


def test_a_text_that_nobody_wants_makes_room(engines):
    model = tiny_model()
    engine = engines(model, max_rows=1)
    first, second = prompts(5, 6)

    def leave(written):
        written.text.wanted = len(written.tokens) < 3
        return True

    left = Written(engine, first, 10**5, stop=leave)
    assert Written(engine, second).wait() == generated(model, second)
    assert len(left.wait()) == 3


def test_a_fault_of_one_text_ends_that_text_alone(engines, caplog):
    model = tiny_model()
    engine = engines(model)
    first, second = prompts(5, 6)

    def fail(written):
        raise RuntimeError("on purpose")

    good, bad = Written(engine, second, 30), Written(engine, first, 30, stop=fail)
    with pytest.raises(RuntimeError, match="on purpose"):
        bad.wait()
    assert good.wait() == generated(model, second, 30)
    odd = Written(engine, first, 3, do_sample=True, temperature=-1.0)  # no processor takes it
    with pytest.raises(ValueError, match="temperature"):
        odd.wait()
    beyond = Written(engine, [VOCAB], 3)
    with pytest.raises(Exception, match="range"):
        beyond.wait()
    assert Written(engine, second).wait() == generated(model, second)


def test_too_many_are_refused_and_an_end_is_told(monkeypatch):
    monkeypatch.setattr(module, "MAX_WAITING", (2, 1000))
    engine = Engine(tiny_model(), StateStore(0), 1)
    (ids,) = prompts(5)
    texts = []

    def ask():
        for _ in range(5):  # one is written, and perhaps one is about to be
            texts.append(Written(engine, ids, 10**5))

    with pytest.raises(Busy, match="2 requests wait"):
        ask()
    engine.close()
    for text in texts:
        with pytest.raises(RuntimeError, match="ended"):
            text.wait()


def test_states_make_room_for_newer_ones():
    model = tiny_model()
    texts = prompts(20, 21, 22)
    states = []
    for ids in texts:
        states.append(model(torch.tensor([ids]), use_cache=True).past_key_values)
    store = StateStore(2 * states[0].nbytes)
    for ids, state in zip(texts[:2], states, strict=False):
        store.keep(ids, state)
    assert store.find([*texts[0], 1])[0] == 20  # used last: it stays
    store.keep(texts[2], states[2])
    assert len(store) == 2
    assert store.nbytes <= store.max_bytes
    found = {len(ids): store.find([*ids, 1]) for ids in texts}
    assert [found[n][0] for n in (20, 21, 22)] == [20, 0, 22]
    assert found[22][1].get_seq_length() == 22
    assert store.find(texts[0]) == (0, None)  # its last token is left to be read
    StateStore(0).keep(texts[0], states[0])  # nothing fits


def test_the_longest_of_what_was_read_is_found():
    model = tiny_model()
    (ids,) = prompts(20)
    store = StateStore(10**8)
    for length in (5, 12, 19):
        store.keep(ids[:length], model(torch.tensor([ids[:length]])).past_key_values)
    assert store.find(ids)[0] == 19
    assert store.find([*ids[:13], VOCAB - 1])[0] == 12
    assert store.find([(ids[0] + 1) % VOCAB, *ids[1:]]) == (0, None)
    count = store.nbytes
    store.keep(ids[:5], model(torch.tensor([ids[:5]])).past_key_values)
    assert (len(store), store.nbytes) == (3, count)
