"""The parts of a layer keep their promises: convolution, gates, keys to read with, rotation."""

import math

import pytest
import torch
import torch.nn.functional as F
from model_inputs import (
    BINDINGS,
    assert_close,
    random_inputs,
    tiny_config,
    tiny_layer,
    tiny_model,
)

from hamt import HAMTModel
from hamt.attention import FullAttention
from hamt.block import HAMTMLP, HAMTBlock
from hamt.convolution import ShortConvolution
from hamt.layers import GatingNetwork, HAMTLayer, RetrievalHead, RMSNorm
from hamt.memory import WRITE_RULES, HolographicMemory, get_algebra
from hamt.rotation import Rotation
from hamt.sliding_attention import SlidingAttention

WIDTH = 32
write_rules = pytest.mark.parametrize("write_rule", WRITE_RULES)


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


PARTS = {
    "layer": lambda config: HAMTLayer(config),
    "attention": lambda config: FullAttention(config),
    "window": lambda config: SlidingAttention(config),
    "block": lambda config: HAMTBlock(config),
    "block of attention": lambda config: HAMTBlock(config, "full_attention"),
    "MLP": lambda config: HAMTMLP(config),
    "convolution": lambda config: ShortConvolution(32, 4),
    "gates": lambda config: GatingNetwork(config),
    "retrieval head": lambda config: RetrievalHead(config, get_algebra("phasor"), 16),
    "rotation": lambda config: Rotation(config, get_algebra("phasor"), 16),
    "norm": lambda config: RMSNorm(32),
}


@pytest.mark.parametrize("options", [
    {}, {"use_gating": False},
    {"write_rule": "normalized"}, {"write_rule": "convex"}, {"write_rule": "delta"},
    {"rotation": "data_dependent"}, {"binding_type": "elementwise", "rotation": "data_dependent"},
    {"rotation": "learned", "rotation_share": 0.5, "rotation_heads": 1},
], ids=str)  # fmt: skip
@pytest.mark.parametrize("part", PARTS)
def test_a_part_by_itself_is_initialised_by_its_constructor(part, options, monkeypatch):
    """Whatever was in the memory that it gets; and the random numbers of a model stay its own."""

    def spoilt(*sizes, **told):
        return torch.full(sizes[0] if isinstance(sizes[0], tuple) else sizes, torch.nan, **told)

    monkeypatch.setattr(torch, "empty", spoilt)
    module = PARTS[part](tiny_config(**{"attention_head_dim": 16, **options}))
    for name, weight in module.state_dict().items():
        assert weight.isfinite().all(), name
    outputs = module(torch.randn(2, 8, 32))
    for tensor in outputs if isinstance(outputs, tuple) else [outputs]:
        if isinstance(tensor, torch.Tensor):
            assert tensor.isfinite().all()


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


def test_slots_of_the_normalized_rule_are_of_one_size():
    """Those of the gated rule are the larger the less they forget."""
    sizes = {}
    for name in ("gated", "normalized"):
        memory = HolographicMemory(512, num_slots=3, num_heads=1, write_rule=name)
        forget = torch.tensor([0.5, 0.95, 0.995]).logit()
        gates = memory.rule.gates(torch.cat((forget, torch.zeros(3))).expand(1, 2000, -1), 1)
        torch.manual_seed(0)
        items, keys = torch.randn(1, 2000, 1, 512), memory.algebra.random_keys(1, 2000, 1, 256)
        state = memory(items, keys, keys, gates, torch.ones_like(gates.write))[1]
        sizes[name] = state.slots.square().mean(dim=-1).flatten()
    assert_close(sizes["normalized"], torch.full((3,), 0.25), 0.05)
    expected = 0.25 / (1 - torch.tensor([0.5, 0.95, 0.995]) ** 2)
    assert_close(sizes["gated"] / expected, torch.ones(3), 0.2)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_gates_of_the_normalized_rule_have_gradients_at_all_logits(dtype):
    """Also where nothing is forgotten any more, and the root ends."""
    logits = torch.tensor([-1e4, -90, -20, 0, 20, 90, 1e4], dtype=dtype).repeat(2)
    logits.requires_grad_()
    gates = WRITE_RULES["normalized"]().gates(logits, heads=1)
    (gates.write.sum() + gates.log_forget.exp().sum()).backward()
    assert gates.write.isfinite().all()
    assert logits.grad.isfinite().all()
    assert gates.write[0, -1] < 1e-18


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
    assert (write.norm(dim=-1) > 0.05).all()  # something is written


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


@pytest.mark.parametrize("binding_type", ["phasor", "circular_conv"])
@pytest.mark.parametrize("kind", ["constant", "learned", "data_dependent"])
def test_only_a_part_of_the_phases_of_some_heads_turns(kind, binding_type):
    """The first ones, at frequencies from fast to slow that are spread over the part."""
    part = {"rotation_share": 0.25, "rotation_heads": 1, "rotation_base": 1000}
    layer = tiny_layer(rotation=kind, binding_type=binding_type, num_heads=2, **part).double()
    inputs, size = random_inputs(2, 5), layer.memory.key_size
    turning, rotation = size // 4, layer.rotation(inputs)
    assert rotation.shape[2:] == (2, size)
    assert not rotation[:, :, 1].any()
    assert not rotation[..., turning:].any()
    powers = 1000 ** (-torch.arange(turning).double() / turning)
    found = rotation[:, :, 0, :turning]
    if kind == "data_dependent":
        own = F.linear(inputs, layer.rotation.weight)
        assert own.shape[-1] == turning
        found = found - layer.memory.algebra.key(own)
    if kind == "learned":
        powers = layer.rotation.log_frequency.exp()
    expected = layer.memory.algebra.key(powers)
    assert_close(found, expected.expand_as(found), 1e-6)


def test_signs_turn_in_part_too():
    part = {"rotation_share": 0.25, "rotation_heads": 1}
    layer = tiny_layer(binding_type="elementwise", rotation="data_dependent", **part)
    with torch.no_grad():
        layer.rotation.weight.normal_(std=10)
    rotation, turning = layer.rotation(random_inputs(2, 50)), layer.memory.key_size // 4
    assert rotation.abs().eq(1).all()
    assert rotation[:, :, 1].eq(1).all()
    assert rotation[..., turning:].eq(1).all()
    assert (rotation[:, :, 0, :turning] < 0).any(dim=(0, 1)).all()


def test_learned_frequencies_start_slow_for_every_head_and_survive_casts(tmp_path):
    model = tiny_model(rotation="learned", rotation_base=1000)
    rotation = HAMTLayer(model.config).rotation  # as it is initialised
    found, size = rotation(torch.zeros(1, 1, WIDTH)), rotation.key_size
    assert found.shape == (1, 1, 2, size)
    expected = 0.1 * 1000 ** (-torch.arange(size) / size)
    assert_close(found, expected.expand_as(found), 1e-6)
    before = model.model.layers[0].mixer.rotation.log_frequency.detach().clone()
    model.to(torch.bfloat16).save_pretrained(tmp_path)
    for dtype in (torch.bfloat16, torch.float16, torch.float32):
        loaded = HAMTModel.from_pretrained(tmp_path, dtype=dtype)
        for cast in (model, loaded, loaded.half(), loaded.float()):
            frequency = cast.model.layers[0].mixer.rotation.log_frequency
            assert frequency.dtype == torch.float32
            assert torch.equal(frequency, before)
    assert model.model.embed_tokens.weight.dtype == torch.bfloat16
    assert model.double().model.layers[0].mixer.rotation.log_frequency.dtype == torch.float64


def test_learned_frequencies_have_the_gradient_of_their_literal_sum():
    """By finite differences of a loss after 20 tokens, in every form that the layer has."""
    layer, inputs = tiny_layer(rotation="learned", rotation_heads=1), random_inputs(1, 20)
    weight = layer.rotation.log_frequency

    def loss(log_frequency):
        found = torch.func.functional_call(
            layer, {"rotation.log_frequency": log_frequency}, (inputs,)
        )
        return found[0].square().sum()

    (found,) = torch.autograd.grad(loss(weight), weight)
    assert found.ne(0).sum() == weight.numel() == layer.memory.key_size
    with torch.no_grad():
        for i in range(0, len(weight), 5):
            step = torch.zeros_like(weight)
            step[i] = 1e-5
            slope = (loss(weight + step) - loss(weight - step)) / 2e-5
            assert found[i].item() == pytest.approx(slope.item(), rel=1e-5, abs=1e-7)


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
