"""The layer is the equations of its docstring; its parts keep their promises."""

import math
from collections.abc import Callable
from typing import NamedTuple

import pytest
import torch
import torch.nn.functional as F
from model_inputs import BINDINGS, assert_close, tiny_model, variants
from torch import Tensor

from hamt.batch import Batch, Past
from hamt.layers import GatingNetwork, HAMTLayer, RetrievalHead, ShortConvolution
from hamt.memory import WRITE_RULES
from hamt.memory.algebra import wrap_phase
from hamt.mixers import State

WIDTH = 32
write_rules = pytest.mark.parametrize("write_rule", WRITE_RULES)


def tiny_layer(seed: int = 0, **options) -> HAMTLayer:
    """In double precision, so that agreement means 1e-9."""
    return tiny_model(seed, **options).model.layers[0].mixer.double()


def random_inputs(batch: int, length: int, seed: int = 0) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(batch, length, WIDTH, generator=generator, dtype=torch.float64)


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
    """The docstrings of ``hamt.layers`` and ``hamt.memory.delta``, line by line, in a loop over one row (N, d)."""
    config, algebra = layer.config, layer.memory.algebra
    heads, head_dim = config.num_heads, config.hcm_dim // config.num_heads
    conditioned = inputs
    if layer.conv is not None:
        kernel = layer.conv.weight.T[:, None]
        past = F.pad(inputs.T[None], (config.conv_kernel_size - 1, 0))
        conditioned = F.conv1d(past, kernel, groups=WIDTH)[0].T
    outputs, position = [], algebra.identity
    memory = torch.zeros(heads, config.num_slots, head_dim, dtype=inputs.dtype)
    for x, c in zip(inputs, conditioned, strict=True):
        item = layer.item_proj(c).view(heads, head_dim)
        key = algebra.key(layer.key_proj(c).view(heads, -1))
        unbinding_key = algebra.key(layer.retrieval.key_proj(c).view(heads, -1))
        read = (layer.retrieval.read_proj(c) + layer.retrieval.read_bias).view(heads, -1)
        logits, strength = layer.gating.weight @ c + layer.gating.bias, torch.zeros(heads)
        if config.write_rule == "delta":
            logits, strength = logits.split((2 * heads * config.num_slots, heads))
        logits = logits.view(-1, heads, config.num_slots)
        write = torch.sigmoid(logits[-1])
        forget = torch.sigmoid(logits[0])
        if config.write_rule == "convex":
            forget = (1 - write) * (1 - config.decay_rate)
        if config.rotation != "none":
            size = key.shape[-1]
            powers = [config.rotation_base ** (-i / size) for i in range(size)]
            turn = torch.tensor(powers if algebra.has_phase else [1.0] * size, dtype=torch.float64)
            if config.rotation == "data_dependent":
                turn = turn + (layer.rotation.weight @ c).view(heads, size)
            position = algebra.compose(algebra.key(turn), position)
            key, unbinding_key = (algebra.compose(x, position) for x in (key, unbinding_key))
        bound = algebra.bind(algebra.lift(item), key)
        memory = forget[..., None] * memory
        if config.write_rule == "delta":
            write = logits[-1] / logits[-1].norm(dim=-1, keepdim=True)
            held = torch.einsum("hs,hsf->hf", write, memory)
            bound = torch.sigmoid(strength)[:, None] * (bound - held)
        memory = memory + write[..., None] * bound[:, None]
        mixed = torch.einsum("hs,hsf->hf", read, memory)
        retrieved = algebra.lower(algebra.unbind(mixed, unbinding_key))
        mean_square = retrieved.square().mean(dim=-1, keepdim=True)
        output = retrieved / (mean_square + config.rms_norm_eps).sqrt() * layer.norm.weight
        if layer.gate_proj is not None:
            output = output * F.silu(layer.gate_proj(x)).view(heads, head_dim)
        outputs.append(layer.output_proj(output.flatten()))
    return torch.stack(outputs)


@pytest.mark.parametrize(
    "extra", [{}, {"conv_kernel_size": 0, "use_output_gate": False, "rotation": "none"}]
)
@variants
def test_the_layer_is_its_equations(options, extra):
    layer = tiny_layer(**options | extra, rotation_base=100, decay_rate=0.05)
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
    """So a state behind padding is the state of the last real token, whatever the padding is called."""
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


def test_the_choices_of_the_configuration_reach_the_memory():
    options = {"num_slots": 5, "num_heads": 4, "decay_rate": 0.01, "chunk_size": 8}
    options["write_rule"] = "convex"
    memory = tiny_layer(**options, hcm_dim=48, binding_type="circular_conv").memory
    rule = {"decay_rate": memory.rule.decay_rate, "write_rule": memory.rule.name}
    assert {**{name: getattr(memory, name, None) for name in options}, **rule} == options
    assert (memory.head_dim, memory.algebra.name) == (12, "circular_conv")


def test_the_convolution_is_causal_and_depthwise():
    convolution = ShortConvolution(WIDTH, 4).double()
    torch.nn.init.normal_(convolution.weight)
    inputs = random_inputs(2, 9)
    outputs, tail = convolution(inputs)
    kernel = convolution.weight.T[:, None]
    expected = F.conv1d(F.pad(inputs.mT, (3, 0)), kernel, groups=WIDTH).mT
    assert_close(outputs, expected, 1e-12)
    assert torch.equal(tail, inputs[:, -3:])
    short = convolution(inputs[:, :2])[1]
    assert torch.equal(short, F.pad(inputs[:, :2], (0, 0, 1, 0)))


def gating(**options) -> GatingNetwork:
    return tiny_model(**options).model.layers[0].mixer.gating


@write_rules
def test_slots_start_with_half_lives_from_shortest_to_longest_in_every_head(write_rule):
    half_lives = {"min_half_life": 2, "max_half_life": 500}
    network = gating(write_rule=write_rule, num_slots=8, num_heads=2, **half_lives)
    write, log_forget, _ = network(torch.zeros(1, 1, WIDTH))
    kept = 1 - write if log_forget is None else log_forget.exp()
    half_lives = (math.log(0.5) / kept.log())[0, 0]
    assert half_lives.min().item() == pytest.approx(2, rel=1e-3)
    assert half_lives.max().item() == pytest.approx(500, rel=1e-3)
    ratios = half_lives[:, 1:] / half_lives[:, :-1]
    assert_close(ratios, torch.full_like(ratios, 250 ** (2 / 15)), 1e-2)
    assert (half_lives[:, 0] < 4).all()
    assert (half_lives[:, -1] > 250).all()


@write_rules
def test_gates_depend_on_the_token_unless_told_otherwise(write_rule):
    inputs = random_inputs(2, 5).float()
    write, log_forget, beta = gating(write_rule=write_rule)(inputs)
    assert (write.flatten(0, 1).std(dim=0) > 0.01).all()
    assert (log_forget is None) == (write_rule == "convex")
    assert (beta is None) == (write_rule != "delta")
    constant = gating(write_rule=write_rule, use_gating=False)
    assert [name for name, _ in constant.named_parameters()] == ["bias"]
    for gate in constant(inputs):
        if gate is not None:
            assert gate.shape[:3] == (2, 5, 2)
            assert torch.equal(gate, gate[:1, :1].expand_as(gate))
    write = constant(inputs).write
    assert write.shape == (2, 5, 2, 3)
    assert (write.norm(dim=-1) > 0.1).all()  # something is written


def test_gates_are_probabilities_and_logarithms_in_float32_whatever_the_layer_is():
    network, inputs = gating(), random_inputs(2, 5)
    for cast in (torch.bfloat16, torch.float32):
        write, log_forget, _ = network.to(cast)(100 * inputs.to(cast))
        assert log_forget.dtype == write.dtype == torch.float32
        assert log_forget.max() <= 0
        assert ((write >= 0) & (write <= 1)).all()
    with torch.autocast("cpu", torch.bfloat16):
        assert {gate.dtype for gate in network(inputs.float())[:2]} == {torch.float32}


def test_delta_gates_are_a_direction_and_a_strength_in_float32_whatever_the_layer_is():
    network, inputs = gating(write_rule="delta"), random_inputs(2, 5).float()
    expected = network(inputs)
    with torch.autocast("cpu", torch.bfloat16):
        assert all(map(torch.equal, network(inputs), expected))
    for gates in (expected, network.to(torch.bfloat16)(inputs.to(torch.bfloat16))):
        write, log_forget, beta = gates
        assert {gate.dtype for gate in gates} == {torch.float32}
        assert log_forget.shape == write.shape == (2, 5, 2, 3)
        assert beta.shape == (2, 5, 2)
        assert log_forget.max() <= 0
        assert_close(write.norm(dim=-1), torch.ones(2, 5, 2))
        assert write.min() < -0.1 < 0.1 < write.max()
        assert ((beta > 0) & (beta < 1)).all()
        assert (beta.flatten(0, 1).std(dim=0) > 0.01).all()


def test_an_item_outlives_a_few_dozen_writes_of_the_delta_rule_at_initialisation():
    network = gating(write_rule="delta", num_slots=8)
    write, _, beta = network(random_inputs(16, 64).float())
    left = write[:, 0]  # how the slots hold the first item, (B, H, S)
    for direction, strength in zip(write[:, 1:].unbind(1), beta[:, 1:].unbind(1), strict=True):
        held = (direction * left).sum(dim=-1, keepdim=True)
        left = left - strength[..., None] * held * direction
    assert left.norm(dim=-1).mean() > 0.25  # with strengths of a half it is 0.05


@pytest.mark.parametrize("binding_type", BINDINGS)
def test_reading_keys_are_unit_keys(binding_type):
    layer = tiny_layer(binding_type=binding_type)
    assert isinstance(layer.retrieval, RetrievalHead)
    keys, read = layer.retrieval(random_inputs(2, 5))
    assert keys.shape == (2, 5, 2, layer.memory.key_size)
    assert read.shape == (2, 5, 2, 3)
    item = torch.randn(2, 5, 2, layer.memory.head_dim, dtype=torch.float64)
    bound = layer.memory.bind(item, keys)
    assert_close(bound.norm(dim=-1), item.norm(dim=-1), 1e-9)
    assert not torch.allclose(bound, item, atol=0.1)


def test_frequencies_run_from_one_to_the_base_and_survive_a_cast():
    layer = tiny_layer(rotation_base=1000)
    inputs, size = torch.zeros(1, 1, WIDTH), layer.memory.key_size
    rotation = layer.rotation(inputs)
    assert rotation.shape == (1, 1, 1, size)  # the same for all tokens and heads
    assert rotation[0, 0, 0, 0] == 1
    ratios = rotation[..., 1:] / rotation[..., :-1]
    assert_close(ratios, torch.full_like(ratios, 1000 ** (-1 / size)), 1e-6)
    assert torch.equal(layer.to(torch.bfloat16).rotation(inputs), rotation)


def test_a_turn_is_computed_in_float32_whatever_the_layer_is():
    """Errors of a narrow angle would add up from token to token."""
    layer, inputs = tiny_layer(rotation="data_dependent").float(), random_inputs(2, 5).float()
    turns = layer.rotation(inputs)
    assert turns.shape == (2, 5, 2, layer.memory.key_size)
    with torch.autocast("cpu", torch.bfloat16):
        assert torch.equal(layer.rotation(inputs), turns)
    assert layer.to(torch.bfloat16).rotation(inputs.to(torch.bfloat16)).dtype == torch.float32


def test_the_auxiliary_loss_belongs_to_training():
    layer, inputs = tiny_layer(use_auxiliary_loss=True), random_inputs(2, 9)
    assert layer.eval()(inputs)[2] is None
    assert layer.train()(inputs)[2].item() > 0
    assert tiny_layer().train()(inputs)[2] is None
