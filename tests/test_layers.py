"""The layer is the equations of its docstring, whatever it is given and goes on from."""

from collections.abc import Callable
from typing import NamedTuple

import pytest
import torch
import torch.nn.functional as F
from model_inputs import assert_close, random_inputs, tiny_layer, variants
from torch import Tensor

from hamt.batch import Batch, Past
from hamt.layers import HAMTLayer
from hamt.memory.algebra import wrap_phase
from hamt.mixers import State

WIDTH = 32


class Read(NamedTuple):
    """What a layer carries, and what has been read, as a cache keeps both."""

    state: State
    past: Past


def read(
    layer: HAMTLayer, inputs: Tensor, attention_mask=None, seq_idx=None, state: Read | None = None
) -> tuple[Tensor, Read]:
    batch = Batch.of(attention_mask, seq_idx, None if state is None else state.past)
    outputs, after, _ = layer(inputs, batch, None if state is None else state.state)
    return outputs, Read(after, batch.after(inputs))


def assert_same_state(actual: Read, expected: Read, tolerance: float = 1e-9) -> None:
    assert actual.state.keys() == expected.state.keys()
    for name, wanted in expected.state.items():
        difference = actual.state[name] - wanted
        if name == "position_key":
            difference = wrap_phase(difference)
        assert_close(difference, torch.zeros_like(difference), tolerance)
    assert actual.past.num_tokens.tolist() == expected.past.num_tokens.tolist()


def row_of(state: Read, b: int) -> Read:
    return map_state(lambda x: x[b : b + 1], state)


def nothing_like(state: Read, identity: float) -> Read:
    """An empty state of the same shape, at the position ``identity``."""
    empty = map_state(torch.zeros_like, state)
    if "position_key" in empty.state:
        empty.state["position_key"] += identity
    return empty


def map_state(function: Callable[[Tensor], Tensor], state: Read) -> Read:
    seq_idx = state.past.seq_idx
    past = Past(function(state.past.num_tokens), None if seq_idx is None else function(seq_idx))
    return Read({name: function(x) for name, x in state.state.items()}, past)


def literal_layer(layer: HAMTLayer, inputs: Tensor) -> Tensor:
    """The memory's documented equations, line by line, in a loop over one row (N, d)."""
    config, algebra = layer.config, layer.memory.algebra
    heads, head_dim = config.num_heads, config.hcm_dim // config.num_heads
    conditioned = inputs
    if layer.conv is not None:
        kernel = layer.conv.weight.T[:, None]
        past = F.pad(inputs.T[None], (config.conv_kernel_size - 1, 0))
        conditioned = F.conv1d(past, kernel, groups=WIDTH)[0].T
    tiers = 2 if config.mixers == "hierarchical_memory" else 1
    slots = config.num_slots // tiers  # that tokens write to
    outputs, position = [], algebra.identity
    memory = torch.zeros(heads, config.num_slots, head_dim, dtype=inputs.dtype)
    at_boundary = memory  # what feedback sees
    for n, (x, c) in enumerate(zip(inputs, conditioned, strict=True), 1):
        item = layer.item_proj(c).view(heads, head_dim)
        key = algebra.key(layer.key_proj(c).view(heads, -1))
        unbinding_key = algebra.key(layer.retrieval.key_proj(c).view(heads, -1))
        read = (layer.retrieval.read_proj(c) + layer.retrieval.read_bias).view(heads, -1)
        if config.rotation != "none":
            size, turning = round(key.shape[-1] * config.rotation_share), config.rotation_heads
            powers = [config.rotation_base ** (-i / size) for i in range(size)]
            turn = torch.tensor(powers if algebra.has_phase else [1.0] * size, dtype=torch.float64)
            if config.rotation == "data_dependent":
                turn = turn + (layer.rotation.weight @ c).view(turning or heads, size)
            if config.rotation == "learned":
                turn = layer.rotation.log_frequency.view(turning or heads, size).exp()
            rho = torch.full_like(key, algebra.identity)
            rho[:turning, :size] = algebra.key(turn)
            position = algebra.compose(rho, position)
            key, unbinding_key = (algebra.compose(x, position) for x in (key, unbinding_key))
        logits = layer.gating.weight @ c + layer.gating.bias
        glance = torch.einsum("hs,hsf->hf", read, at_boundary)
        if config.key_feedback:
            raw = torch.einsum("hf,hfk->hk", unit_size(glance), layer.feedback.key_weight)
            unbinding_key = algebra.compose(unbinding_key, algebra.key(raw))
        if config.gate_feedback:
            found = unit_size(algebra.lower(algebra.unbind(glance, unbinding_key)))
            told = torch.einsum("hf,hfg->hg", found, layer.feedback.gate_weight)
            parts = [told[:, s : s + slots] for s in range(0, told.shape[1], slots)]
            logits = logits + torch.cat([part.flatten() for part in parts])
        strength = torch.zeros(heads)
        if config.write_rule == "delta":
            logits, strength = logits.split((2 * heads * slots, heads))
        logits = logits.view(-1, heads, slots)
        write = torch.sigmoid(logits[-1])
        if config.write_rule == "delta":
            write = logits[-1] / logits[-1].norm(dim=-1, keepdim=True)
        forget = torch.sigmoid(logits[0])
        if config.write_rule == "convex":
            forget = (1 - write) * (1 - config.decay_rate)
        if config.write_rule == "normalized":
            write = write * (1 - forget**2).sqrt()
        if tiers == 2:
            if config.write_rule != "convex":
                forget = forget * (1 - config.decay_rate)
            forget = torch.cat((forget, torch.ones_like(write) - config.slow_decay_rate), dim=1)
            write = torch.cat((write, torch.zeros_like(write)), dim=1)
        bound = algebra.bind(algebra.lift(item), key)
        before, memory = memory, forget[..., None] * memory
        if config.write_rule == "delta":
            held = torch.einsum("hs,hsf->hf", write, memory)
            bound = torch.sigmoid(strength)[:, None] * (bound - held)
        memory = memory + write[..., None] * bound[:, None]
        mixed = torch.einsum("hs,hsf->hf", read, before if config.read_before_write else memory)
        retrieved = algebra.lower(algebra.unbind(mixed, unbinding_key))
        if n % config.boundary_every == 0:
            if tiers == 2:
                fast, slow = memory.chunk(2, dim=1)
                gate = consolidation_gate(layer.boundary, fast, slow)[..., None]
                memory = torch.cat((fast, (1 - gate) * slow + gate * fast), dim=1)
            if config.normalize_state:
                memory = memory / (memory.square().mean(-1, True) + config.rms_norm_eps).sqrt()
            at_boundary = memory
        mean_square = retrieved.square().mean(dim=-1, keepdim=True)
        output = retrieved / (mean_square + config.rms_norm_eps).sqrt() * layer.norm.weight
        if layer.gate_proj is not None:
            output = output * F.silu(layer.gate_proj(x)).view(heads, head_dim)
        outputs.append(layer.output_proj(output.flatten()))
    return torch.stack(outputs)


def unit_size(x: Tensor) -> Tensor:
    """Of root mean square 1 along the last dimension."""
    return x / (x.square().mean(dim=-1, keepdim=True) + 1e-5).sqrt()


def consolidation_gate(boundary, fast: Tensor, slow: Tensor) -> Tensor:
    """σ(MLP(summary(fast), summary(slow))), slot by slot: (H, S / 2, F) -> (H, S / 2)."""
    summaries = []
    for slots in (fast, slow):
        size = (slots.square().mean(dim=-1, keepdim=True) + 1e-6).sqrt().log()
        summaries += [size, unit_size(slots) @ boundary.summary]
    hidden = F.silu(torch.cat(summaries, dim=-1) @ boundary.hidden)
    return torch.sigmoid(hidden @ boundary.output + boundary.bias.view(boundary.heads, -1))


@pytest.mark.parametrize(
    "extra", [{}, {"conv_kernel_size": 0, "use_output_gate": False, "rotation": "none"}]
)
@variants
def test_the_layer_is_its_equations(options, extra):
    none = {"rotation_share": 1, "rotation_heads": None} if "rotation" in extra else {}
    layer = tiny_layer(**options | extra | none, rotation_base=100, decay_rate=0.05)
    inputs = random_inputs(2, 19)
    outputs = layer(inputs)[0]
    for row, output in zip(inputs, outputs, strict=True):
        assert_close(output, literal_layer(layer, row), 1e-9)


@pytest.mark.parametrize("kernel", [1, 2, 4])
@variants
def test_token_by_token_equals_the_whole_in_outputs_and_state(options, kernel):
    layer, inputs = tiny_layer(**options, conv_kernel_size=kernel), random_inputs(2, 11)
    expected, expected_state = read(layer, inputs)
    outputs, state = [], None
    for t in range(11):
        output, state = read(layer, inputs[:, t : t + 1], state=state)
        outputs.append(output)
    assert_close(torch.cat(outputs, dim=1), expected, 1e-9)
    assert_same_state(state, expected_state)


MASKS = {
    "left": [0, 0, 0, 0, 1, 1, 1, 1, 1],
    "right": [1, 1, 1, 1, 1, 0, 0, 0, 0],
    "gaps": [0, 1, 1, 0, 0, 1, 0, 1, 1],
    "all": [0, 0, 0, 0, 0, 0, 0, 0, 0],
}


@pytest.mark.parametrize("continued", [False, True], ids=["fresh", "continued"])
@pytest.mark.parametrize("kind", MASKS)
@variants
def test_padding_is_as_if_it_were_absent(options, kind, continued):
    """Wherever it stands, also on top of a filled state, whatever the padded inputs are."""
    layer, inputs = tiny_layer(**options), random_inputs(3, 9)
    state = read(layer, random_inputs(3, 6, seed=1))[1] if continued else None
    mask = torch.tensor([MASKS[kind], MASKS["gaps"], [1] * 9])
    outputs, after = read(layer, inputs, attention_mask=mask, state=state)
    for b in range(3):
        real, own_state = mask[b].bool(), None if state is None else row_of(state, b)
        if real.any():
            expected, own_state = read(layer, inputs[b : b + 1, real], state=own_state)
            assert_close(outputs[b : b + 1, real], expected, 1e-9)
        elif own_state is None:
            own_state = nothing_like(row_of(after, b), layer.memory.algebra.identity)
        assert_same_state(row_of(after, b), own_state)


@variants
def test_documents_of_a_row_are_strangers_even_if_their_names_come_again(options):
    layer, inputs = tiny_layer(**options), random_inputs(2, 12)
    names = torch.tensor([[0] * 3 + [1] + [0] * 2 + [2] * 6, [5] * 12])
    outputs, after = read(layer, inputs, seq_idx=names)
    for document in (slice(0, 3), slice(3, 4), slice(4, 6), slice(6, 12)):
        expected, last_state = read(layer, inputs[:1, document])
        assert_close(outputs[:1, document], expected, 1e-9)
    expected, whole_state = read(layer, inputs[1:])
    assert_close(outputs[1:], expected, 1e-9)
    for b, alone in enumerate((last_state, whole_state)):
        assert after.past.seq_idx[b] == names[b, -1]
        assert_same_state(row_of(after, b), alone)


@variants
def test_a_state_goes_on_only_in_its_own_document(options):
    """Rows: the document goes on; it ends; it goes on for one token, then its name comes again."""
    layer, before, inputs = tiny_layer(**options), random_inputs(3, 5, seed=1), random_inputs(3, 6)
    state = read(layer, before, seq_idx=torch.full((3, 5), 7))[1]
    names = torch.tensor([[7] * 6, [8] * 6, [7, 8, 7, 7, 7, 7]])
    outputs, after = read(layer, inputs, seq_idx=names, state=state)
    joined = torch.cat((before, inputs), dim=1)
    expected, expected_state = read(layer, joined[:1])
    assert_close(outputs[:1], expected[:, 5:], 1e-9)
    assert_same_state(row_of(after, 0), expected_state)
    expected, expected_state = read(layer, inputs[1:2])
    assert_close(outputs[1:2], expected, 1e-9)
    assert_same_state(row_of(after, 1), expected_state)
    assert_close(outputs[2:, :1], read(layer, joined[2:, :6])[0][:, 5:], 1e-9)
    expected, expected_state = read(layer, inputs[2:, 2:])
    assert_close(outputs[2:, 2:], expected, 1e-9)
    assert_same_state(row_of(after, 2), expected_state)


def test_padding_joins_the_document_beside_it():
    """A state behind padding is that of the last real token, whatever the padding is called."""
    layer, inputs = tiny_layer(), random_inputs(2, 8)
    names = torch.tensor([[9, 9, 3, 3, 3, 3, 3, 3], [3, 3, 3, 3, 3, 3, -1, -1]])
    mask = torch.tensor([[0, 0, 1, 1, 1, 1, 1, 1], [1, 1, 1, 1, 1, 1, 0, 0]])
    earlier = read(layer, random_inputs(2, 4, seed=1), seq_idx=torch.full((2, 4), 3))[1]
    after = read(layer, inputs, attention_mask=mask, seq_idx=names, state=earlier)[1]
    for b, part in enumerate((slice(2, 8), slice(0, 6))):
        alone = read(layer, inputs[b : b + 1, part], state=row_of(earlier, b))[1]
        assert_same_state(row_of(after, b), alone)


@pytest.mark.parametrize(("other", "what"), [
    ({"num_slots": 4}, "slots"),
    ({"hcm_dim": 128}, "slots"),
    ({"rotation": "none"}, "position_key"),
    ({"binding_type": "elementwise"}, "position_key"),
    ({"binding_type": "elementwise", "rotation": "data_dependent"}, "position_key"),
    ({"conv_kernel_size": 0}, "conv"),
    ({"conv_kernel_size": 3}, "conv"),
])  # fmt: skip
def test_the_state_of_another_layer_is_refused(other, what):
    inputs = random_inputs(2, 5)
    with pytest.raises(ValueError, match=f"comes from another model: its {what}"):
        read(tiny_layer(), inputs, state=read(tiny_layer(**other), inputs)[1])


@pytest.mark.parametrize("rotation", ["none", "learned", "data_dependent"])
@pytest.mark.parametrize("binding_type", ["phasor", "elementwise"])
def test_a_state_before_the_first_token_changes_nothing(rotation, binding_type):
    if (rotation, binding_type) == ("learned", "elementwise"):
        pytest.skip("signs have no frequencies")
    layer = tiny_layer(rotation=rotation, binding_type=binding_type)
    inputs, past = random_inputs(2, 9, width=WIDTH), Past(torch.zeros(2, dtype=torch.long))
    wanted, _, _ = layer(inputs)
    _, nothing, _ = layer(inputs[:, :0])
    for state in (nothing, layer.empty_state(2)):
        assert_close(layer(inputs, Batch.of(past=past), state)[0], wanted, 1e-6)


def test_the_choices_of_the_configuration_reach_the_memory():
    options = {"num_slots": 5, "num_heads": 4, "decay_rate": 0.01, "chunk_size": 8}
    options["write_rule"] = "convex"
    memory = tiny_layer(**options, hcm_dim=48, binding_type="circular_conv").memory
    rule = {"decay_rate": memory.rule.decay_rate, "write_rule": memory.rule.name}
    assert {**{name: getattr(memory, name, None) for name in options}, **rule} == options
    assert (memory.head_dim, memory.algebra.name) == (12, "circular_conv")
