"""Window and memory in one softmax: a loop over tokens is the definition, all else equals it."""

import copy

import pytest
import torch
from model_inputs import assert_close
from torch import Tensor
from window_inputs import (
    GROUPS,
    HEADS,
    WIDTH,
    Loop,
    one_by_one,
    pieces,
    random_heads,
    slots_of,
    taker,
)

from hamt.batch import Batch
from hamt.window_and_memory.mixer import WindowAndMemory
from hamt.window_and_memory.sizes import Sizes
from hamt.window_and_memory.slots import PARTS, later

LENGTH = 43
# Windows of one block, of several, and one that no text here leaves; no sinks, no slots, neither.
SIZES = [
    (Sizes(8, 2, 3, 0, 4), 2000),
    (Sizes(12, 0, 3, 0, 4), 10),
    (Sizes(4, 4, 2, 0, 4), 5),
    (Sizes(8, 2, 3, 0, 8), 20),
    (Sizes(2, 1, 2, 0, 1), 7),
    (Sizes(8, 2, 0, 0, 4), 9),
    (Sizes(8, 0, 0, 0, 4), 9),
    (Sizes(64, 2, 3, 0, 16), 9),
    (Sizes(8, 2, 3, 5, 4), 15),
]
kinds = pytest.mark.parametrize(("sizes", "reach"), SIZES, ids=str)
CUTS = [(), (1,), (5, 6, 20), (8, 16, 32), tuple(range(1, LENGTH))]
cuts = pytest.mark.parametrize("cuts", CUTS, ids=["whole", "1", "odd", "even", "tokens"])


def same_states(found: dict[str, Tensor], expected: dict[str, Tensor], tolerance: float) -> None:
    assert found.keys() == expected.keys()
    for name, x in expected.items():
        assert_close(found[name], x, tolerance)


@cuts
@kinds
def test_it_is_a_loop_over_tokens(sizes, reach, cuts):
    mixer, heads = taker(sizes, reach), random_heads(2, LENGTH)
    with torch.no_grad():
        loops = [Loop(mixer, heads[0]) for _ in range(2)]
        expected = torch.stack([loop.run(*row) for loop, *row in zip(loops, *heads, strict=True)])
        outputs, state = pieces(mixer, heads, cuts)
        assert_close(outputs, expected, 1e-12)
        if sizes.num_slots:
            boundary = LENGTH - LENGTH % sizes.block
            slots = torch.stack([loop.aged_slots(boundary) for loop in loops])
            assert_close(slots_of(state), slots, 1e-12)
        same_states(state, mixer(*heads)[1], 1e-12)


@kinds
def test_its_gradients_are_those_of_the_loop(sizes, reach):
    mixer, heads = taker(sizes, reach), random_heads(2, 31)
    leaves = {**dict(mixer.named_parameters()), **dict(zip("qkv", heads, strict=True))}
    for x in leaves.values():
        x.requires_grad_()
    weight = random_heads(2, 31 + 7)[0][:, 7:]

    def gradients(outputs: Tensor) -> dict[str, Tensor]:
        loss = (outputs * weight).sum()
        found = torch.autograd.grad(loss, list(leaves.values()), materialize_grads=True)
        return dict(zip(leaves, found, strict=True))

    expected = gradients(one_by_one(mixer, heads))
    for run in (mixer(*heads)[0], pieces(mixer, heads, (1, 8, 19))[0]):
        for name, found in gradients(run).items():
            assert_close(found, expected[name], 1e-11)
            never = sizes.window > 31 and name.startswith("slots.")
            assert never or expected[name].abs().max() > 1e-3, name


@cuts
@kinds
def test_padding_anywhere_changes_nothing(sizes, reach, cuts):
    """Rows with gaps at the left, in the middle and at the end, one without and one all padding."""
    mixer, heads = taker(sizes, reach), random_heads(5, LENGTH)
    mask = torch.ones(5, LENGTH, dtype=torch.bool)
    mask[0, :9] = mask[1, 5:9] = mask[1, [11, 20, 21, 40]] = mask[2, 30:] = mask[3] = False
    spoilt = [torch.where(mask[..., None, None], x, 1e2) for x in heads]
    with torch.no_grad():
        outputs, state = pieces(mixer, spoilt, cuts, mask=mask)
        assert outputs.isfinite().all()
        for b in (0, 1, 2, 4):
            row = [x[b : b + 1, mask[b]] for x in heads]
            expected, after = mixer(*row)
            assert_close(outputs[b : b + 1, mask[b]], expected, 1e-12)
            same_states({name: x[b : b + 1] for name, x in state.items()}, after, 1e-12)


@cuts
@kinds
def test_documents_have_windows_and_memories_of_their_own(sizes, reach, cuts):
    """Packed in a row, with padding among them; the last goes on behind the last cut."""
    mixer, heads = taker(sizes, reach), random_heads(2, LENGTH)
    names = torch.tensor([[0] * 7 + [5] + [0] * 35, [3] * 2 + [4] * 9 + [5] * 30 + [6, 6]])
    mask = torch.ones(2, LENGTH, dtype=torch.bool)
    mask[0, [0, 3, 9, 30]] = mask[1, [1, 12, 41]] = False
    with torch.no_grad():
        outputs, state = pieces(mixer, heads, cuts, names=names, mask=mask)
        for b in range(2):
            runs = (names[b].diff(prepend=names[b, :1]) != 0).cumsum(dim=0)
            for run in runs.unique():
                here = (runs == run) & mask[b]
                row = [x[b : b + 1, here] for x in heads]
                expected, after = mixer(*row)
                assert_close(outputs[b : b + 1, here], expected, 1e-12)
            if "slot_keys" in after:
                assert_close(slots_of(state)[b : b + 1], slots_of(after), 1e-12)


def test_a_window_that_is_never_left_is_attention():
    mixer, (queries, keys, values) = taker(Sizes(64, 2, 3, 2, 16)), random_heads(2, LENGTH)
    places = torch.arange(LENGTH)[:, None]
    told = (mixer.turn(queries, places), mixer.turn(keys, places), values)
    expected = torch.nn.functional.scaled_dot_product_attention(
        *(x.transpose(1, 2) for x in told), is_causal=True, enable_gqa=True, scale=0.7
    )
    outputs, _ = mixer(queries, keys, values, scale=0.7)
    assert_close(outputs, expected.transpose(1, 2), 1e-12)


@pytest.mark.parametrize("reach", [1, 6, 30])
def test_what_is_beyond_the_reach_is_seen_from_there(reach):
    """A sink and slots of the same tokens are seen alike, however long ago they were."""
    mixer, heads = taker(Sizes(4, 1, 2, 0, 4), reach), random_heads(1, 24)
    with torch.no_grad():
        mixer.slots.log_half_life.fill_(40.0)
        mixer.slots.strength.zero_()
        near = [x[:, :12] for x in heads]
        _, state = mixer(*near)
        asked = [x[:, 12:14] for x in heads]
        found = []
        for begin in (40, 4000):
            older = later(state, torch.tensor([begin - 12]))
            moved = {**older, "keys": mixer.turn(state["keys"], torch.tensor(begin - 12))}
            batch = Batch(num_tokens=torch.tensor([begin]))
            found.append(mixer(*asked, batch, moved)[0])
        assert_close(found[0], found[1], 1e-9)
        plain = taker(Sizes(4, 1, 2, 0, 4), 10**9)
        plain.load_state_dict(mixer.state_dict())
        batch = Batch(num_tokens=torch.tensor([4000]))
        assert (plain(*asked, batch, moved)[0] - found[1]).abs().max() > 1e-3


@kinds
def test_the_state_has_the_shapes_that_are_told_and_one_size_at_any_length(sizes, reach):
    mixer, heads = taker(sizes, reach), random_heads(2, 150)
    with torch.no_grad():
        for length in (1, 3, 4, 17, 64, 150):
            _, state = mixer(*(x[:, :length] for x in heads))
            assert {name: tuple(x.shape[1:]) for name, x in state.items()} == mixer.state_shapes()
            storages = {x.untyped_storage().data_ptr(): x.untyped_storage() for x in state.values()}
            held = sum(storage.nbytes() for storage in storages.values())
            # Keys and values of slots are views of what has the counts in it, too.
            more = 2 * state["keys"][:, :1].nbytes * sizes.block
            more += state["slot_counts"].nbytes if sizes.num_slots else 0
            itself = sum(x.nbytes for x in state.values())
            assert held <= itself + more, "a state holds on to more than itself and a block"


def test_layers_that_turn_otherwise_share_a_batch():
    """What is worked out once for all layers is so for those that are alike."""
    sizes, heads, batch = Sizes(8, 2, 3, 0, 4), random_heads(2, 33), Batch()
    mixers = [taker(sizes), taker(sizes), taker(sizes._replace(window=12)), taker(sizes, reach=5)]
    mixers[1].frequencies = 3 * mixers[1].frequencies
    with torch.no_grad():
        found = [mixer(*heads, batch)[0] for mixer in mixers]
        for mixer, output in zip(mixers, found, strict=True):
            assert_close(output, mixer(*heads)[0], 1e-12)
    assert all((output - found[0]).abs().max() > 1e-3 for output in found[1:])


def test_a_state_is_a_value():
    mixer, heads = taker(Sizes(8, 2, 3, 2, 4)), random_heads(2, 33)
    with torch.no_grad():
        _, state = mixer(*(x[:, :23] for x in heads))
        kept = copy.deepcopy(state)
        for end in (24, 33):
            batch = Batch(num_tokens=torch.tensor([23, 23]))
            mixer(*(x[:, 23:end] for x in heads), batch, state)
            assert all(torch.equal(state[name], x) for name, x in kept.items())


def test_no_tokens_leave_the_state_as_it_was():
    mixer, heads = taker(Sizes(8, 2, 3, 2, 4)), random_heads(2, 13)
    output, state = mixer(*(x[:, :0] for x in heads))
    assert output.shape == (2, 0, HEADS, WIDTH)
    assert {name: tuple(x.shape[1:]) for name, x in state.items()} == mixer.state_shapes()
    assert not any(x.any() for x in state.values())
    _, filled = mixer(*heads)
    batch = Batch(num_tokens=torch.tensor([13, 13]))
    _, after = mixer(*(x[:, :0] for x in heads), batch, filled)
    assert all(torch.equal(after[name], x) for name, x in filled.items())


@pytest.mark.parametrize("num_exact", [0, 3])
def test_sums_are_float32_when_heads_are_bfloat16(num_exact):
    """So that 4,096 tokens add up: the slots are those of float64 but for the items' rounding."""
    sizes = Sizes(16, 2, 4, num_exact, 8)
    mixer, heads = taker(sizes, dtype=torch.bfloat16), random_heads(1, 2048, torch.bfloat16)
    wide = taker(sizes)
    wide.load_state_dict(mixer.state_dict())
    with torch.no_grad():
        for each in (mixer, wide):
            each.slots.log_half_life.fill_(7.0)
        output, state = mixer(*heads)
        expected, after = wide(*(x.double() for x in heads))
    narrow = {name: x.dtype for name, x in state.items()}
    sums = {*PARTS, "exact_ages", "exact_salience"} & narrow.keys()
    assert {narrow.pop(name) for name in sums} == {torch.float32}
    assert {output.dtype, *narrow.values()} == {torch.bfloat16}
    mass, expected_mass = slots_of(state)[..., -2], slots_of(after)[..., -2]
    assert mass.max() > 256, "bfloat16 could count as far"
    if not num_exact:  # which tokens are held may differ
        assert_close(mass.double(), expected_mass, 2e-2)
        assert_close(output.double(), expected, 5e-2)


def test_autocast_leaves_sums_alone():
    mixer, heads = taker(Sizes(8, 2, 3, 0, 4), dtype=torch.float32), random_heads(1, 40)
    narrow = [x.bfloat16() for x in heads]
    with torch.no_grad(), torch.autocast("cpu", dtype=torch.bfloat16):
        _, state = mixer(*narrow)
    assert slots_of(state).dtype == torch.float32
    with torch.no_grad():
        _, expected = mixer(*(x.float() for x in narrow))
    assert_close(slots_of(state), slots_of(expected), 5e-2)


@pytest.mark.parametrize(("sizes", "advice"), [
    (Sizes(0), "window and block must be at least 1, the other sizes at least 0"),
    (Sizes(block=0), "window and block must be at least 1"),
    (Sizes(num_slots=-1), "the other sizes at least 0"),
    (Sizes(48), "window must be a multiple of 32, the tokens of a block"),
    (Sizes(num_sinks=33), "num_sinks must be at most 32, the tokens of a block"),
    (Sizes(num_slots=0, num_exact=1), "num_exact needs slots to write to"),
    (Sizes(num_slots=5000), "num_slots at most 4,096"),
    (Sizes(2**21), "sizes must be at most 1,048,576"),
], ids=str)  # fmt: skip
def test_sizes_that_do_not_fit_are_refused(sizes, advice):
    with pytest.raises(ValueError, match=advice):
        WindowAndMemory(HEADS, GROUPS, WIDTH, sizes, torch.ones(WIDTH // 2))
