"""Documents packed in one row are strangers to each other, and padding does not exist."""

import pytest
import torch
from memory_inputs import (
    CASES,
    FULL_CASES,
    assert_same,
    every_form,
    initial_state,
    random_inputs,
    record,
    segmented,
    separate_documents,
    sequences_of,
    tokens_of,
    whole,
)

from hamt.memory import number_documents

EXACT = 1e-9
all_cases = pytest.mark.parametrize("case", CASES, ids=str)
full_cases = pytest.mark.parametrize("case", FULL_CASES, ids=str)

# (number of the document, its length): 70 tokens a row. Numbers are names, in no order; one that
# comes again later names another document.
ROWS = [
    [(7, 5), (3, 1), (-1, 1), (12, 30), (0, 33)],
    [(0, 64), (1, 6)],
    [(0, 16), (1, 16), (2, 38)],
    [(0, 20), (1, 3), (0, 47)],
]
SEQ_IDX = torch.tensor([[number for number, length in row for _ in range(length)] for row in ROWS])
STATE_DOCUMENTS = {
    "the first": SEQ_IDX[:, 0],
    # A later one by name, one that is not in the row, the first, a later one by name.
    "another": torch.tensor([12, 100, 0, 1]),
    "not told": None,
}
STRANGERS = torch.full((len(ROWS),), 100)
told = STATE_DOCUMENTS.values()
state_documents = pytest.mark.parametrize("state_seq_idx", told, ids=STATE_DOCUMENTS)


@every_form
@state_documents
@full_cases
def test_packed_documents_equal_separate_runs(case, state_seq_idx, form):
    inputs = random_inputs(case, 70, batch=len(ROWS))
    expected = record(separate_documents(case.memory(), SEQ_IDX, state_seq_idx), inputs)
    # With tiles of 1 or 2 tokens the documents also begin and end inside groups of the scan.
    for chunk_size in (1, 2, 8, 100) if form == "chunked" else (8,):
        run = whole(case.memory(chunk_size), form, seq_idx=SEQ_IDX, state_seq_idx=state_seq_idx)
        assert_same(record(run, inputs), expected, EXACT)


@every_form
@full_cases
def test_packed_documents_start_empty_without_an_initial_state(case, form):
    inputs = random_inputs(case, 70, batch=len(ROWS))
    documents = number_documents(SEQ_IDX, None)
    output, state = case.memory(8)(**tokens_of(inputs), documents=documents, form=form)
    expected, last = separate_documents(case.memory(), SEQ_IDX, STRANGERS)(inputs)
    assert_same({"y": output, "M": state.slots}, {"y": expected, "M": last.slots}, EXACT)


@every_form
@pytest.mark.parametrize("numbers", [[0, 1, 0], [1, 2, 1], [1, 0, 2], [2, 2, 0]], ids=str)
@full_cases
def test_a_number_that_comes_again_is_another_document(case, numbers, form):
    """Within tiles, at their ends, and across groups of them."""
    documents = torch.tensor(numbers).repeat_interleave(torch.tensor([20, 3, 47])).expand(2, -1)
    inputs = random_inputs(case, 70)

    def run(form):
        def memory_of(leaves):
            told = {"initial_state": initial_state(leaves), "documents": documents, "form": form}
            return case.memory(4)(**tokens_of(leaves), **told)

        return memory_of

    assert_same(record(run(form), inputs), record(run("recurrent"), inputs), EXACT)


@every_form
@state_documents
@full_cases
def test_a_packed_row_cut_into_segments_equals_separate_runs(case, state_seq_idx, form):
    inputs = random_inputs(case, 70, batch=len(ROWS))
    expected = record(separate_documents(case.memory(), SEQ_IDX, state_seq_idx), inputs)
    # On the first and the second token of documents, and elsewhere.
    cuts = [1, 5, 6, 7, 20, 22, 64, 69]
    run = segmented(case.memory(4), form, cuts, SEQ_IDX, state_seq_idx)
    assert_same(record(run, inputs), expected, EXACT)


@every_form
def test_a_constant_rotation_starts_again_with_every_document(form):
    case = FULL_CASES[-1]
    inputs = random_inputs(case, 70, batch=len(ROWS))
    constant = inputs.pop("rotation")[:1, :1]
    repeated = inputs | {"rotation": constant.repeat(len(ROWS), 70, 1, 1)}
    expected = record(separate_documents(case.memory(), SEQ_IDX, STRANGERS), repeated)
    summed = expected.pop("gradient of rotation").sum(dim=(0, 1), keepdim=True)
    run = whole(case.memory(8), form, seq_idx=SEQ_IDX, state_seq_idx=STRANGERS)
    actual = record(run, inputs | {"rotation": constant})
    assert_same(actual, expected | {"gradient of rotation": summed}, EXACT)


# Where the longer sequence has tokens too many: at both ends, alone, and over more than a tile.
NULLS = torch.tensor([0, 1, 5, *range(9, 22), 40, 69])
REAL = torch.tensor([t for t in range(70) if t not in NULLS])


def with_nulls(inputs: dict, **values: float) -> dict:
    """Insert null tokens, with these values for the arguments named, any for the others."""
    longer = {}
    for name, x in inputs.items():
        longer[name] = x
        if not name.startswith("initial_"):
            shape = (x.shape[0], 70, *x.shape[2:])
            filler = torch.rand(shape, generator=torch.Generator().manual_seed(1), dtype=x.dtype)
            longer[name] = torch.full_like(filler, values[name]) if name in values else filler
            longer[name][:, REAL] = x
    return longer


def assert_invisible(case, inputs: dict, longer: dict, form: str, **arguments) -> None:
    def outputs_of_real_tokens(leaves):
        output, state = whole(case.memory(chunk_size=8), form, **arguments)(leaves)
        return output[:, REAL], state

    seen = record(outputs_of_real_tokens, longer)
    for name in sequences_of(inputs):
        seen[f"gradient of {name}"] = seen[f"gradient of {name}"][:, REAL]
    assert_same(seen, record(whole(case.memory(), "recurrent"), inputs), EXACT)


@every_form
@pytest.mark.parametrize("case", [case for case in CASES if case.write_rule != "convex"], ids=str)
def test_tokens_with_closed_gates_change_nothing(case, form):
    inputs = random_inputs(case, len(REAL))
    closed = {"beta": 0.0} if case.write_rule == "delta" else {"write": 0.0}
    rotation = case.memory().algebra.identity
    longer = with_nulls(inputs, log_forget=0.0, rotation=rotation, **closed)
    assert_invisible(case, inputs, longer, form)


@every_form
@all_cases
@pytest.mark.parametrize("dtype", [torch.bool, torch.long], ids=str)
def test_masked_tokens_change_nothing(case, form, dtype):
    inputs = random_inputs(case, len(REAL))
    mask = torch.zeros(2, 70, dtype=dtype)
    mask[:, REAL] = 1
    assert_invisible(case, inputs, with_nulls(inputs), form, mask=mask)


@every_form
def test_rows_are_masked_each_by_its_own_mask(form):
    """Left padding: every row equals itself without padding."""
    case, padding = FULL_CASES[-1], [0, 3, 17]
    inputs = random_inputs(case, 40, batch=3)
    mask = torch.arange(40) >= torch.tensor(padding)[:, None]
    constant = {"rotation": inputs.pop("rotation")[:1, :1]}
    start = {**constant, "initial_state": initial_state(inputs)}
    output, state = case.memory(8)(**tokens_of(inputs), **start, mask=mask, form=form)
    for b, first in enumerate(padding):
        row = {name: x[b : b + 1] for name, x in inputs.items()}
        part = tokens_of(row, slice(first, None))
        start = {**constant, "initial_state": initial_state(row)}
        alone, last = case.memory()(**part, **start, form="recurrent")
        seen = {"M": state.slots[b : b + 1], "phase": state.position_key[b : b + 1]}
        seen["y"] = output[b : b + 1, first:]
        assert_same(seen, {"y": alone, "M": last.slots, "phase": last.position_key}, EXACT)
