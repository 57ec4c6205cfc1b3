"""Tiny models with loud random weights, token rows and comparisons, for tests of the model."""

from collections.abc import Sequence

import pytest
import torch
from torch import Tensor

from hamt import HAMTCache, HAMTConfig, HAMTModel
from hamt.layers import HAMTLayer
from hamt.memory import FORMS, WRITE_RULES

VOCAB = 97
BINDINGS = ("elementwise", "circular_conv", "phasor")
# Every binding with every write rule; every binding and every write rule with a rotation of either
# kind.
LEARNT_TURNS = {"elementwise": "gated", "circular_conv": "convex", "phasor": "delta"}
VARIANTS = [
    {"binding_type": binding_type, "write_rule": write_rule}
    | ({"rotation": "data_dependent"} if LEARNT_TURNS[binding_type] == write_rule else {})
    for binding_type in BINDINGS
    for write_rule in WRITE_RULES
]
# Rotations of a part; and one that learns, which all tokens share.
VARIANTS += [
    {"binding_type": "phasor", "rotation": "learned", "rotation_heads": 1},
    {"binding_type": "elementwise", "rotation": "data_dependent", "rotation_share": 0.5},
]
# And what happens at boundaries, of which there are several in every test.
BOUNDED = [
    {"write_rule": "gated", "gate_feedback": True, "boundary_every": 3},
    {
        "write_rule": "convex",
        "gate_feedback": True,
        "key_feedback": True,
        "read_before_write": True,
        "normalize_state": True,
        "boundary_every": 1,
    },
    {"write_rule": "delta", "binding_type": "elementwise", "gate_feedback": True}
    | {"boundary_every": 4, "rotation": "data_dependent"},
    {"read_before_write": True, "rotation": "data_dependent"},
    {"mixers": "hierarchical_memory", "num_slots": 4, "boundary_every": 3},
    {"mixers": "hierarchical_memory", "num_slots": 4, "boundary_every": 5, "write_rule": "delta"}
    | {"binding_type": "circular_conv", "normalize_state": True},
    {"mixers": "hierarchical_memory", "num_slots": 4, "boundary_every": 2, "write_rule": "convex"}
    | {"gate_feedback": True, "slow_decay_rate": 0.01},
]
VARIANTS += BOUNDED


def name_of(options: dict) -> str:
    """The id of a test with these options."""
    return "-".join(name if value is True else str(value) for name, value in options.items())


variants = pytest.mark.parametrize("options", VARIANTS, ids=name_of)


def tiny_config(**options) -> HAMTConfig:
    """Several tiles and several half-lives within 20 tokens.

    A head with random weights may read next to nothing; a small ε would magnify the rounding of
    that.
    """
    sizes = {"vocab_size": VOCAB, "hidden_dim": 32, "num_layers": 2, "num_slots": 3, "num_heads": 2}
    options.setdefault(
        "rotation", "none" if options.get("binding_type") == "elementwise" else "constant"
    )
    return HAMTConfig(
        **{**sizes, "chunk_size": 4, "max_half_life": 64, "rms_norm_eps": 1e-3, **options}
    )


def tiny_model(seed: int = 0, **options) -> HAMTModel:
    """In evaluation mode, with logits of size 1 that depend on all that came before.

    At its own initialisation a model mostly repeats its input, and a test of its past sees little.
    """
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        model = HAMTModel(tiny_config(**{"initializer_range": 0.2, **options}))
        with torch.no_grad():
            for block in model.model.layers:
                block.mixer.output_proj.weight.normal_(std=0.25)
                if block.mlp is not None:
                    block.mlp.down_proj.weight.normal_(std=0.25)
                if block.mixer.conv is not None:
                    block.mixer.conv.weight.normal_(std=0.5)
                if block.mixer.config.rotation == "data_dependent":
                    block.mixer.rotation.weight.normal_(std=0.3)
                if block.mixer.config.rotation == "learned":
                    block.mixer.rotation.log_frequency.normal_(mean=-1)
                for name, weight in block.mixer.named_parameters():
                    if name.startswith(("feedback.", "boundary.")):
                        weight.normal_(std=0.1)
    return model.eval()


def tiny_layer(seed: int = 0, **options) -> HAMTLayer:
    """In double precision, so that agreement means 1e-9."""
    return tiny_model(seed, **options).model.layers[0].mixer.double()


def random_inputs(batch: int, length: int, seed: int = 0, width: int = 32) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(batch, length, width, generator=generator, dtype=torch.float64)


def random_ids(batch: int, length: int, seed: int = 0) -> Tensor:
    """Tokens 1 to V - 1: 0 is left for padding."""
    return torch.randint(1, VOCAB, (batch, length), generator=torch.Generator().manual_seed(seed))


def padded(rows: Sequence[Tensor], side: str, length: int | None = None) -> tuple[Tensor, Tensor]:
    """Rows of several lengths as one batch: ids and mask, both (B, N)."""
    length = length or max(map(len, rows))
    ids, mask = torch.zeros(2, len(rows), length, dtype=torch.long)
    for b, row in enumerate(rows):
        place = slice(length - len(row), length) if side == "left" else slice(0, len(row))
        ids[b, place], mask[b, place] = row, 1
    return ids, mask


def ragged_rows(*lengths: int, seed: int = 0) -> list[Tensor]:
    return [random_ids(1, length, seed + i)[0] for i, length in enumerate(lengths)]


def logits_of(model: HAMTModel, row: Tensor, **arguments) -> Tensor:
    """Logits of one row alone, (N, V)."""
    return model(row[None], **arguments).logits[0]


def fit(model: HAMTModel, ids: Tensor, num_steps: int, learning_rate: float) -> list[float]:
    """The losses of steps over one batch, in each of which every parameter has a gradient."""
    optimizer, losses = torch.optim.AdamW(model.parameters(), learning_rate), []
    for _ in range(num_steps):
        loss = model(ids, labels=ids).loss
        loss.backward()
        assert all(parameter.grad is not None for parameter in model.parameters())
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
    return losses


def in_segments(model: HAMTModel, ids: Tensor, cuts: Sequence[int], **arguments) -> tuple:
    """Logits of rows read in pieces, and the state; arguments shaped like ``ids`` are cut along."""
    logits, cache = [], HAMTCache(model.config.num_layers)
    for start, end in zip((0, *cuts), (*cuts, ids.shape[1]), strict=True):
        parts = {name: value[:, start:end] for name, value in arguments.items()}
        outputs = model(ids[:, start:end], past_key_values=cache, **parts)
        assert outputs.past_key_values is cache
        logits.append(outputs.logits)
    return torch.cat(logits, dim=1), cache


def gradients(model: torch.nn.Module) -> dict[str, Tensor]:
    """The gradient of every parameter, taken off the model."""
    found = {name: parameter.grad for name, parameter in model.named_parameters()}
    model.zero_grad(set_to_none=True)
    missing = [name for name, gradient in found.items() if gradient is None]
    assert not missing, f"no gradient reached {missing}"
    return found


def assert_close(actual: Tensor, expected: Tensor, tolerance: float = 1e-5) -> None:
    """Equal within ``tolerance`` times the largest entry, or times 1 if that is larger."""
    assert actual.shape == expected.shape
    worst = (actual - expected).abs().max()
    scale = expected.abs().max().clamp(min=1)
    assert worst <= tolerance * scale, f"off by {worst:.1e}, largest entry {scale:.1e}"


def assert_same_gradients(
    model: torch.nn.Module, expected: dict[str, Tensor], tolerance: float = 1e-5
) -> None:
    """Each gradient equal within ``tolerance`` of its own largest entry."""
    for name, gradient in gradients(model).items():
        worst, scale = (gradient - expected[name]).abs().max(), expected[name].abs().max()
        assert scale > 0, f"the gradient of {name} is zero"
        assert worst <= tolerance * scale, f"{name}: off by {worst:.1e}, largest entry {scale:.1e}"


def without_fused(monkeypatch: pytest.MonkeyPatch) -> None:
    """As where there is no C++ compiler, or on a GPU."""
    monkeypatch.delitem(FORMS, "fused")
