"""State carried from call to call: segments, packed documents and checkpointing."""

import pytest
import torch
from model_inputs import (
    VOCAB,
    assert_close,
    assert_same_gradients,
    gradients,
    in_segments,
    logits_of,
    padded,
    ragged_rows,
    random_ids,
    tiny_model,
    variants,
    without_fused,
)
from torch import Tensor
from transformers import DataCollatorWithFlattening, DynamicCache

from hamt import HAMTCache, HAMTModel
from hamt.cpu.fused import fused_available
from hamt.memory import FORMS
from hamt.mixers import MIXERS

CUTS = [(10,), (1, 2, 5, 6), (4, 8, 12, 16), (20,)]


@pytest.mark.parametrize("cuts", CUTS, ids=str)
@variants
def test_segments_with_carried_state_equal_one_long_forward(options, cuts):
    model, ids = tiny_model(**options), random_ids(2, 21)
    logits, cache = in_segments(model, ids, cuts)
    assert_close(logits, model(ids).logits)
    assert cache.get_seq_length() == 21


@pytest.mark.parametrize("checkpointed", [False, True], ids=["plain", "checkpointed"])
@variants
def test_gradients_flow_through_the_carried_state(options, checkpointed):
    """The same gradients as in one piece: checkpointing does not drop the state."""
    model, ids = tiny_model(**options).double(), random_ids(2, 18)
    loss_of_the_end(model(ids).logits).backward()
    expected = gradients(model)
    if checkpointed:
        checkpoint(model, use_reentrant=False)  # the default of Transformers
    loss_of_the_end(in_segments(model, ids, (5, 12))[0]).backward()
    assert_same_gradients(model, expected, 1e-8)


def test_reentrant_checkpointing_truncates_gradients_where_a_segment_ends():
    """It cannot see into the state; logits are right, gradients are those of detached segments."""
    model, ids = tiny_model().double(), random_ids(2, 18)
    cache = model(ids[:, :12]).past_key_values.detach()
    expected_logits = model(ids[:, 12:], past_key_values=cache).logits
    loss_of_the_end(expected_logits, -6).backward()
    expected = gradients(model)
    checkpoint(model, use_reentrant=True)
    logits = in_segments(model, ids, (12,))[0]
    assert_close(logits[:, 12:], expected_logits, 1e-9)
    loss_of_the_end(logits).backward()
    assert_same_gradients(model, expected, 1e-8)


def loss_of_the_end(logits: Tensor, start: int = 12) -> Tensor:
    """A loss of the last 6 of 18 tokens, so that earlier ones matter through the state only."""
    return (logits[:, start:] * torch.linspace(-1, 1, logits.shape[-1], dtype=logits.dtype)).sum()


def checkpoint(model: HAMTModel, use_reentrant: bool) -> None:
    model.activation_checkpointing_enable({"use_reentrant": use_reentrant})
    model.train()


@pytest.mark.parametrize("use_reentrant", [False, True], ids=["non-reentrant", "reentrant"])
@variants
def test_checkpointing_changes_no_gradient(options, use_reentrant):
    model = tiny_model(dropout=0.1, **options).double().train()
    ids, mask = padded(ragged_rows(19, 11), "left")
    found = []
    for _ in range(2):
        torch.manual_seed(0)  # of the dropout
        model(ids, attention_mask=mask, labels=ids).loss.backward()
        found.append(gradients(model))
        checkpoint(model, use_reentrant)
    for name, expected in found[0].items():
        assert_close(found[1][name], expected, 1e-9)
    assert model.model.layers[0].gradient_checkpointing


@pytest.mark.parametrize("mixer", sorted(MIXERS))
def test_padding_before_a_first_name_leaves_a_row_in_its_document(mixer):
    """The state of a text without a name, then a row of padding, then a name."""
    options = {"mixers": mixer, "sliding_window": 4, "boundary_every": 3, "num_slots": 4}
    model, ids, more = tiny_model(**options), random_ids(2, 7), random_ids(2, 4, seed=1)
    plain = model(ids).past_key_values
    padded = plain.fork()
    mask = torch.cat((torch.ones(2, 7), torch.tensor([[0.0, 0, 0], [1, 1, 1]])), dim=1)
    names = torch.zeros(2, 3, dtype=torch.long)
    model(random_ids(2, 3), attention_mask=mask, seq_idx=names, past_key_values=padded)
    told = {"seq_idx": torch.full((2, 4), 3)}
    expected = model(more, past_key_values=plain, **told).logits[0]
    assert_close(model(more, past_key_values=padded, **told).logits[0], expected)


@pytest.mark.parametrize("mixer", sorted(MIXERS))
def test_no_tokens_and_no_rows_change_nothing(mixer, monkeypatch):
    model, ids = tiny_model(mixers=mixer, sliding_window=4, num_slots=4), random_ids(2, 7)
    names = torch.tensor([[0, 0, 1, 1, 1, 2, 2]] * 2)
    assert model(ids[:0]).logits.shape == (0, 7, VOCAB)
    without_fused(monkeypatch)
    assert model(ids[:0]).logits.shape == (0, 7, VOCAB)
    for told in ({"seq_idx": names}, {"attention_mask": names.ne(0).long()}):
        cache = model(ids, use_cache=True, **told).past_key_values
        expected = model(ids, past_key_values=cache.fork()).logits
        nothing = {name: x[:, :0] for name, x in told.items() if name == "seq_idx"}
        assert model(ids[:, :0], past_key_values=cache, **nothing).logits.shape == (2, 0, VOCAB)
        assert_close(model(ids, past_key_values=cache).logits, expected)


def test_checkpointing_computes_each_block_again():
    model, ids = tiny_model(), random_ids(2, 9)
    checkpoint(model, False)
    calls = []
    model.model.layers[0].mixer.register_forward_hook(lambda *_: calls.append(1))
    model(ids, labels=ids).loss.backward()
    assert len(calls) == 2


@pytest.mark.parametrize("side", ["left", "right"])
@pytest.mark.parametrize("later_side", ["left", "right"])
@variants
def test_padded_rows_leave_and_continue_the_state_of_their_real_tokens(options, side, later_side):
    """Three calls: ragged rows, ragged rows on top, one token; a mask may span all or the call."""
    model = tiny_model(**options)
    lengths = ((13, 2, 7), (1, 9, 3), (1, 1, 1))
    rows, later, last = (ragged_rows(*n, seed=s) for n, s in zip(lengths, (0, 5, 9), strict=True))
    ids, mask = padded(rows, side)
    later_ids, later_mask = padded(later, later_side)
    for masks in (later_mask, torch.cat((mask, later_mask), dim=1)):
        cache = model(ids, attention_mask=mask).past_key_values
        logits = model(later_ids, attention_mask=masks, past_key_values=cache).logits
        final = model(torch.stack(last), past_key_values=cache).logits
        for b in range(3):
            whole = logits_of(model, torch.cat((rows[b], later[b], last[b])))
            assert_close(logits[b, later_mask[b].bool()], whole[len(rows[b]) : -1])
            assert_close(final[b], whole[-1:])
        wanted = [len(rows[b]) + len(later[b]) + 1 for b in range(3)]
        assert cache.past.num_tokens.tolist() == wanted


def test_padding_fed_one_token_at_a_time_is_still_padding():
    model, rows = tiny_model(), ragged_rows(9, 5, 1)
    ids, mask = padded(rows, "left")
    logits, _ = in_segments(model, ids, tuple(range(1, 9)), attention_mask=mask)
    for b, row in enumerate(rows):
        assert_close(logits[b, mask[b].bool()], logits_of(model, row))


LENGTHS = (7, 1, 9, 4)
DOCUMENTS = ragged_rows(*LENGTHS)
PACKED = torch.cat(DOCUMENTS)[None]
SEQ_IDX = torch.repeat_interleave(torch.arange(4), torch.tensor(LENGTHS))[None]
POSITION_IDS = torch.cat([torch.arange(n) for n in LENGTHS])[None]
CU_SEQ_LENS = torch.tensor([0, 7, 8, 17, 21], dtype=torch.int32)


@pytest.mark.parametrize(
    "told",
    [
        {"seq_idx": SEQ_IDX},
        {"seq_idx": SEQ_IDX % 2},  # names come again
        {"position_ids": POSITION_IDS},
        {"cu_seq_lens_q": CU_SEQ_LENS},
        {"cu_seq_lens_q": CU_SEQ_LENS, "cu_seq_lens_k": CU_SEQ_LENS, "position_ids": POSITION_IDS},
    ],
    ids=["seq_idx", "repeated", "position_ids", "cu_seq_lens", "both"],
)
@variants
def test_packed_documents_equal_separate_ones(options, told):
    model = tiny_model(**options)
    outputs = model(PACKED, **told)
    for document, logits in zip(DOCUMENTS, outputs.logits[0].split(LENGTHS), strict=True):
        assert_close(logits, logits_of(model, document))
    # What is left is the state of the last document, and tokens that name no document belong to it.
    more = random_ids(1, 5, seed=8)
    whole = logits_of(model, torch.cat((DOCUMENTS[-1], more[0])))
    assert_close(model(more, past_key_values=outputs.past_key_values).logits[0], whole[4:])
    assert_close(logits_of(model, PACKED[0])[:7], outputs.logits[0, :7])
    assert (logits_of(model, PACKED[0])[8:17] - outputs.logits[0, 8:17]).abs().max() > 0.1


@pytest.mark.parametrize(
    ("cuts", "told"),
    [*((cuts, {"seq_idx": SEQ_IDX}) for cuts in CUTS), (CUTS[1], {"position_ids": POSITION_IDS})],
    ids=lambda x: next(iter(x)) if isinstance(x, dict) else str(x),
)
@variants
def test_packed_documents_may_be_cut_anywhere(options, told, cuts):
    model = tiny_model(**options)
    logits, cache = in_segments(model, PACKED, cuts, **told)
    for document, part in zip(DOCUMENTS, logits[0].split(LENGTHS), strict=True):
        assert_close(part, logits_of(model, document))
    assert cache.past.num_tokens.tolist() == [4]


@pytest.mark.parametrize(
    "told", [{"position_ids": torch.arange(9)[None]}, {"cu_seq_lens_q": torch.tensor([0, 9])}]
)
@pytest.mark.parametrize("named", [False, True], ids=["unnamed", "named"])
def test_a_document_that_starts_after_others_sees_nothing_of_them(told, named):
    """Whether or not the call before told documents apart."""
    model, ids = tiny_model(), random_ids(1, 9, seed=8)
    before = {"position_ids": torch.arange(21)[None]} if named else {}
    cache = model(random_ids(1, 21), **before).past_key_values
    assert_close(model(ids, past_key_values=cache, **told).logits[0], logits_of(model, ids[0]))


def test_positions_that_go_on_continue_the_document():
    model, ids = tiny_model(), random_ids(1, 21)
    cache = model(ids[:, :9]).past_key_values
    later = model(ids[:, 9:], past_key_values=cache, position_ids=torch.arange(9, 21)[None]).logits
    assert_close(later, model(ids).logits[:, 9:])


@pytest.mark.parametrize("side", ["left", "right"])
@pytest.mark.parametrize("filler", [0, 1])
def test_positions_of_padding_start_no_document(side, filler):
    """Transformers fills positions of padding with 0 or 1."""
    model, rows = tiny_model(), ragged_rows(9, 4)
    ids, mask = padded(rows, side)
    positions = (mask.cumsum(dim=1) - 1).masked_fill(mask == 0, filler)
    outputs = model(ids, attention_mask=mask, position_ids=positions)
    more = random_ids(2, 2, seed=8)
    later = model(more, past_key_values=outputs.past_key_values).logits
    for b, row in enumerate(rows):
        whole = logits_of(model, torch.cat((row, more[b])))
        assert_close(outputs.logits[b, mask[b].bool()], whole[:-2])
        assert_close(later[b], whole[-2:])


@pytest.mark.parametrize(
    "flags", [{}, {"return_flash_attn_kwargs": True}, {"return_seq_idx": True}], ids=str
)
def test_the_flattening_collator_gives_the_loss_of_separate_documents(flags):
    model = tiny_model()
    batch = DataCollatorWithFlattening(**flags)([{"input_ids": row.tolist()} for row in DOCUMENTS])
    assert batch["input_ids"].shape == (1, 21)
    rows = [(logits_of(model, row)[:-1], row[1:]) for row in DOCUMENTS]
    losses = [torch.nn.functional.cross_entropy(*row, reduction="sum") for row in rows]
    expected = sum(losses) / sum(n - 1 for n in LENGTHS)
    assert model(**batch).loss.item() == pytest.approx(expected.item(), rel=1e-5)


@pytest.mark.skipif(not fused_available(torch.zeros(1)), reason="there is no C++ compiler")
@variants
def test_the_fused_form_changes_nothing(options, monkeypatch):
    """Prefill of padded rows, several tokens on top, and one: logits, state, all gradients."""
    model, more = tiny_model(**options).double(), random_ids(2, 4)
    ids, mask = padded(ragged_rows(14, 7), "left")
    calls = []
    form = FORMS["fused"]
    noted = form._replace(run=lambda *args: calls.append(1) or form.run(*args))
    monkeypatch.setitem(FORMS, "fused", noted)
    fused_logits, fused_cache = continue_twice(model, ids, mask, more)
    several = len(calls) > 6 and "boundary_every" in options  # segments of each call
    assert len(calls) == 6 or several, "the fused form was not used in every call of every layer"
    expected = gradients(model)
    without_fused(monkeypatch)
    logits, cache = continue_twice(model, ids, mask, more)
    assert_close(logits, fused_logits, 1e-9)
    for state, fused_state in zip(cache.states, fused_cache.states, strict=True):
        assert state.keys() == fused_state.keys()
        for name, tensor in state.items():
            assert_close(tensor, fused_state[name], 1e-9)
    assert_same_gradients(model, expected, 1e-8)


def continue_twice(model, ids: Tensor, mask: Tensor, more: Tensor) -> tuple[Tensor, HAMTCache]:
    """Logits of the tokens after ``ids``, all but the last in one call, with gradients."""
    cache = model(ids, attention_mask=mask).past_key_values
    parts = more.split((more.shape[1] - 1, 1), dim=1)
    logits = torch.cat([model(part, past_key_values=cache).logits for part in parts], dim=1)
    loss_of_the_end(logits, 0).backward()
    return logits, cache


def test_what_is_not_a_state_of_this_model_is_refused():
    model, ids = tiny_model(), random_ids(2, 5)
    fewer = "this state has 1 layers, the model 2: it comes from another model"
    unknown = tiny_model(num_slots=5)(ids).past_key_values
    unknown.origin = None  # as of a file of an earlier version
    for past, message in (
        (DynamicCache(), "must be a HAMTCache; got DynamicCache"),
        (tiny_model(num_layers=1)(ids).past_key_values, fewer),
        (unknown, "comes from another model: its slots"),
    ):
        with pytest.raises(ValueError, match=message):
            model(ids, past_key_values=past)
    with pytest.raises(ValueError, match="2 rows, the input 1"):
        model(ids[:1], past_key_values=model(ids).past_key_values)


# ---------------------------------------------------------------- names and padding


def test_names_of_documents_are_the_callers_own():
    """A state neither follows what is written into them later, nor keeps all of them alive."""
    model, ids, names = tiny_model(), random_ids(1, 9), torch.zeros(1, 9, dtype=torch.long)
    cache = model(ids, seq_idx=names, use_cache=True).past_key_values
    assert cache.past.seq_idx.untyped_storage().nbytes() == 8
    expected = model(ids, past_key_values=cache.fork(), seq_idx=torch.zeros_like(names)).logits
    names.fill_(7)
    seen = model(ids, past_key_values=cache, seq_idx=torch.zeros_like(names)).logits
    assert torch.equal(seen, expected)


def test_a_segment_of_padding_belongs_to_the_document_that_was_read():
    """Whatever it is called."""
    model, ids, more = tiny_model(), random_ids(1, 9), random_ids(1, 4, seed=3)
    four, padding = torch.full((1, 9), 4), torch.zeros(1, 2, dtype=torch.long)
    cache = model(ids, seq_idx=four, use_cache=True).past_key_values
    model(padding, attention_mask=padding, seq_idx=padding, past_key_values=cache)
    seen = model(more, seq_idx=four[:, :4], past_key_values=cache).logits
    assert_close(seen, model(torch.cat((ids, more), dim=1)).logits[:, 9:])


def test_nothing_to_read_changes_nothing():
    model, ids = tiny_model(), random_ids(2, 9)
    nothing = ids[:, :0]
    assert model(nothing, use_cache=True).logits.shape == (2, 0, VOCAB)
    cache = model(ids, use_cache=True).past_key_values
    model(nothing, past_key_values=cache)
    assert cache.past.num_tokens.tolist() == [9, 9]
