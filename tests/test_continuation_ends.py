"""``generate`` on long states, when it is interrupted, and where some rows end before others."""

from dataclasses import FrozenInstanceError

import pytest
import torch
from model_inputs import random_ids, tiny_model
from test_continuation import (
    FIRST,
    NEW,
    NEW_MASK,
    OLD,
    OLD_MASK,
    SECOND,
    assert_continues,
    mixers,
    state_of,
)
from test_generation import generate, greedy_by_recomputation
from torch import Tensor
from transformers import StoppingCriteria
from transformers.generation.streamers import BaseStreamer

from hamt import HAMTCache, generation
from hamt.data.tokenizer import train_tokenizer
from hamt.generation import Sampling, continue_tokens


def test_a_mask_is_as_long_as_the_ids_however_much_was_read():
    """After 10 billion tokens one that covers them would take 80 GB."""
    model = tiny_model(vocab_size=300)
    state = state_of(model, OLD[:1], None)
    state.seen_tokens = 10**10
    tokenizer = train_tokenizer(["one two three"], 300)
    told = Sampling(max_new_tokens=4, temperature=0)
    written = continue_tokens(model, tokenizer, NEW[1].tolist(), told, state)
    assert written == greedy_by_recomputation(model, torch.cat((OLD[0], NEW[1])), 4)[-4:]
    assert state.get_seq_length() == 10**10 + 5 + 3


def test_a_long_prompt_is_read_in_segments(monkeypatch):
    monkeypatch.setattr(generation, "SEGMENT", 8)
    model, lengths = tiny_model(vocab_size=300), []
    state, ids = state_of(model, OLD[:1], None), random_ids(1, 30)[0]
    model.model.register_forward_pre_hook(
        lambda module, args, kwargs: lengths.append(kwargs["input_ids"].shape[1]), with_kwargs=True
    )
    tokenizer = train_tokenizer(["one two three"], 300)
    written = continue_tokens(
        model, tokenizer, ids.tolist(), Sampling(max_new_tokens=2, temperature=0), state
    )
    assert lengths == [8, 8, 8, 6, 1]
    assert written == greedy_by_recomputation(model, torch.cat((OLD[0], ids)), 2)[-2:]


class Interrupted(BaseStreamer):
    """Ctrl-C while a token is shown."""

    count = 0

    def put(self, value: Tensor) -> None:
        self.count += 1
        if self.count == 4:
            raise KeyboardInterrupt

    def end(self) -> None: ...


@pytest.mark.parametrize("before", [0, 20])
def test_an_interrupted_generation_leaves_the_state_as_it_was(before):
    model, state = tiny_model(), HAMTCache(2)
    if before:
        generate(model, OLD[:1], 4, past_key_values=state)
    kept, unread = state.fork(), state.unread
    with pytest.raises(KeyboardInterrupt):
        generate(model, NEW[1:2], 9, past_key_values=state, streamer=Interrupted())
    assert state.get_seq_length() == (23 if before else 0)
    assert state.past is kept.past
    assert (state.unread is None) == (unread is None)
    written = generate(model, NEW[1:2], 4, past_key_values=state)
    assert torch.equal(written, generate(model, NEW[1:2], 4, past_key_values=kept))


class Shortest(StoppingCriteria):
    """Ends rows after one token, two, and so on."""

    def __call__(self, input_ids: Tensor, scores: Tensor, **_) -> Tensor:
        return torch.arange(len(input_ids)) < input_ids.shape[1] - 20


@pytest.mark.parametrize("eos", [None, 96])
@mixers
def test_a_row_that_a_criterion_has_ended_reads_no_padding(options, eos):
    """It has read its last token, but where it ends with the batch."""
    model, state = tiny_model(**options), HAMTCache(2)
    written = generate(
        model, OLD, 9, attention_mask=OLD_MASK, past_key_values=state, eos_token_id=eos,
        stopping_criteria=[Shortest()],
    )  # fmt: skip
    assert written.shape == (3, 23)
    assert state.past.unread.tolist() == [-1, -1, written[2, -1]]
    assert state.past.num_tokens.tolist() == [20 + 1, 7 + 2, 11 + 2]
    own = [row[20 : 21 + b] for b, row in enumerate(written)]
    whole = [torch.cat(parts) for parts in zip(FIRST, own, SECOND, strict=True)]
    told = {"attention_mask": NEW_MASK, "past_key_values": state}
    assert_continues(model, whole, generate(model, NEW, 6, **told))


@mixers
def test_beams_that_a_criterion_has_ended_read_no_padding(options):
    model = tiny_model(**options)
    told = {"num_beams": 3, "return_dict_in_generate": True, "attention_mask": OLD_MASK}
    found = generate(model, OLD, 9, stopping_criteria=[Shortest()], **told)
    lengths = found.beam_indices.ge(0).sum(dim=1)
    assert lengths.unique().numel() > 1, "no row ends before another"
    whole = [torch.cat((text, row[20 : 20 + length], new)) for text, row, length, new
             in zip(FIRST, found.sequences, lengths, SECOND, strict=True)]  # fmt: skip
    told = {"attention_mask": NEW_MASK, "past_key_values": found.past_key_values}
    assert_continues(model, whole, generate(model, NEW, 6, **told))


def test_rows_of_which_some_have_ended_go_on_with_ids_or_alone():
    model, state = tiny_model(), HAMTCache(2)
    generate(model, OLD, 9, attention_mask=OLD_MASK, past_key_values=state,
             stopping_criteria=[Shortest()])  # fmt: skip
    assert state.unread is None
    with pytest.raises(ValueError, match="some rows of the state have ended, others have not"):
        generate(model, None, 3, past_key_values=state)
    state.batch_select_indices(torch.tensor([2]))
    assert generate(model, None, 3, past_key_values=state).shape == (1, 4)


@pytest.mark.parametrize("told", [{}, {"num_beams": 3}])
def test_a_text_goes_on_from_a_token_that_is_also_the_padding(told):
    model, state = tiny_model(), HAMTCache(2)
    written = generate(model, OLD, 4, attention_mask=OLD_MASK, past_key_values=state)
    texts = [torch.cat(parts) for parts in zip(FIRST, written[:, -4:], strict=True)]
    padding = int(written[0, -1])
    found = generate(model, None, 6, past_key_values=state, pad_token_id=padding, **told)
    for text, row in zip(texts, found, strict=True):
        mask = torch.ones_like(text[None])
        expected = generate(model, text[None], 6, attention_mask=mask, pad_token_id=padding, **told)
        assert row[-6:].tolist() == expected[0, -6:].tolist()


def test_what_one_fork_notes_is_not_noted_by_another():
    model, state = tiny_model(), HAMTCache(2)
    generate(model, OLD[:1], 4, past_key_values=state)
    fork, known = state.fork(), state.unread
    with pytest.raises(FrozenInstanceError):
        state.past.unread = None
    generate(model, NEW[1:2], 4, past_key_values=state)
    assert torch.equal(fork.unread, known)
