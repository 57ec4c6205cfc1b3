"""Where a read-out comes from: the exact share of every earlier position, keys and gates fixed.

With the keys and gates that were recorded, the memory is linear in the items and in the state
before them, under every write rule:

    y_t = Σ_{j≤t} c_tj · (u_t ⊛ p_t)⁻¹ ⊛ (k_j ⊛ p_j) ⊛ v_j + (u_t ⊛ p_t)⁻¹ ⊛ Σ_s b_t[s] · M_0[s]

The coefficients follow from the adjoint of the recurrence, from t backwards:
λ = r_t, and for j = t, t-1, ...

    any but delta   c_tj = Σ_s λ[s] w_j[s]               λ ← α_j ⊙ λ
    delta           c_tj = β_j Σ_s λ[s] ŵ_j[s]           λ ← α_j ⊙ (λ - ŵ_j c_tj)

until b_t = λ. Under the delta rule this is what the triangular solve of
``hamt.memory.write_rules.delta`` gives, one row at a time.

A boundary between two tokens (``hamt.boundaries``) multiplies the slots by a matrix T, and so
backwards λ ← Tᵀ λ; where the model rounds its slots, what rounding added is nobody's share. With
``read_before_write`` a read-out has no share of its own token: λ = r_t is met by token t - 1 first.

A read-out of attention is a sum of values by their weights; its parts are those of the tokens that
are seen (``hamt.analysis.attention``).

With a short convolution an item is a mixture of its token and the few before it: a position is then
not exactly a token.

Shape legend: B batch, N tokens, Q queries, H heads, S slots, F features, d hidden_dim, D = H · F.
"""

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from hamt.analysis.attention import AttentionTrace
from hamt.analysis.record import Recording, Trace
from hamt.model import HAMTForCausalLM
from hamt.products import plain_weights


class Contributions(NamedTuple):
    """Inner products of the parts of read-outs with a direction."""

    tokens: Tensor  # of the part that each position gave, (B, Q, H, N)
    initial: Tensor  # of the part that the state before the first token gave, (B, Q, H)

    def sum(self) -> Tensor:
        """The inner product of the whole read-out, (B, Q, H)."""
        return self.tokens.sum(dim=-1) + self.initial


@torch.no_grad()
def coefficients(trace: Trace, queries: Sequence[int]) -> tuple[Tensor, Tensor]:
    """What weighs how much in the read-outs at ``queries``, Q positions of the trace.

    Returns:
        c of each bound item, (B, Q, H, N), zero after the query; b of each slot of the state before
        the first token, (B, Q, H, S).

    Raises:
        ValueError: if a query is not a position of the trace.
    """
    batch, length, heads, _ = trace.write.shape
    at = _positions(queries, length)
    # Rows of later queries come first: those already under way are a prefix, and no step touches
    # the others.
    order = at.argsort(descending=True)
    weight = trace.read[:, at[order]]
    tokens = trace.write.new_zeros(batch, len(at), heads, length)
    first = at - 1 if trace.memory.read_before_write else at  # the last token that a read sees
    for j in range(int(at.max()), -1, -1):
        crossing = trace.crossings.get(j + 1)
        if crossing is not None and crossing.mixing is not None:
            begun = int((at > j).sum())
            weight[:, :begun] = torch.einsum("bhst,bqhs->bqht", crossing.mixing, weight[:, :begun])
        under_way = int((first >= j).sum())
        tokens[:, :under_way, :, j], weight[:, :under_way] = trace.memory.rule.adjoint(
            weight[:, :under_way], trace.gates.tokens([j])
        )
    back = order.argsort()
    return tokens[:, back], weight[:, back]


@torch.no_grad()
def contributions(
    trace: Trace | AttentionTrace, queries: Sequence[int], directions: Tensor | None = None
) -> Contributions:
    """Signed contributions of all positions to the read-outs at ``queries``, along directions.

    They sum to ⟨y_t, direction⟩ for every query and head. ``directions`` (B, Q, H, F) are lowered,
    as ``trace.output``; None is y / |y|², along which the contributions are shares that sum to 1.

    Raises:
        ValueError: if a query is not a position of the trace.
    """
    at = _positions(queries, trace.output.shape[1])
    wide = torch.promote_types(trace.output.dtype, torch.float32)
    if directions is None:
        output = trace.output[:, at].to(wide)
        square = output.square().sum(dim=-1, keepdim=True)
        directions = output / square.clamp(min=torch.finfo(wide).tiny)
    if isinstance(trace, AttentionTrace):
        return Contributions(*trace.parts(at, directions.to(wide)))
    algebra = trace.memory.algebra
    weights, initial_weights = coefficients(trace, queries)
    # Keys are isometries: ⟨u⁻¹ ⊛ x, a⟩ = ⟨x, u ⊛ a⟩, one product for all pairs.
    sought = algebra.bind(algebra.lift(directions.to(wide)), trace.unbinding_keys[:, at])
    bound = algebra.bind(trace.items, trace.keys)
    tokens = weights * torch.einsum("bqhf,bjhf->bqhj", sought, bound)
    initial = torch.einsum("bqhs,bhsf,bqhf->bqh", initial_weights, trace.before.slots, sought)
    return Contributions(tokens, initial)


@torch.no_grad()
def logit_directions(
    model: HAMTForCausalLM,
    recording: Recording,
    layer: int,
    queries: Sequence[int],
    targets: Tensor,
) -> Tensor:
    """The directions (B, Q, H, F) in which a layer's read-outs raise the logits of ``targets``.

    The norms and the output gate are held at what they were. ⟨y_t, direction⟩ summed over heads is
    then exactly what the layer adds to the logit by way of the residual stream, past all later
    layers, through the last norm and the head (direct logit attribution, Elhage et al. 2021, A
    Mathematical Framework for Transformer Circuits). What later layers make of it is not counted.

    Of the model that was recorded; ``queries`` are Q positions that predict ``targets`` (B, Q).

    Raises:
        ValueError: if the head or the map out of the mixer does more than multiply.
    """
    trace, mixer = recording.trace(layer), model.model.layers[layer].mixer
    at = _positions(queries, trace.output.shape[1])
    wide, heads = torch.promote_types(trace.output.dtype, torch.float32), trace.output.shape[2]
    scale = _scale(model.model.norm, recording.final[:, at])
    matrices = plain_weights(model.lm_head, mixer.output_proj)
    if not matrices:
        raise ValueError(
            "the head or output_proj does more than multiply (an adapter, a hook or a bias): "
            "merge it into the weights first"
        )
    direction = matrices[0][targets].to(wide) * scale
    direction = direction @ matrices[1].to(wide)
    if isinstance(trace, AttentionTrace):
        return direction.unflatten(-1, (heads, -1))
    if trace.gate is not None:
        direction = direction * trace.gate[:, at].to(wide)
    return direction.unflatten(-1, (heads, -1)) * _scale(mixer.norm, trace.output[:, at])


def logit_contributions(
    model: HAMTForCausalLM, recording: Recording, queries: Sequence[int], targets: Tensor
) -> Tensor:
    """What each position adds to the logits of ``targets``, (B, Q, N).

    The sum over all recorded layers and heads, those of attention among them; the arguments are
    those of ``logit_directions``.
    """
    added = []
    for layer in recording.layers():
        directions = logit_directions(model, recording, layer, queries, targets)
        found = contributions(recording.trace(layer), queries, directions)
        added.append(found.tokens.sum(dim=2))
    return torch.stack(added).sum(dim=0)


def logits_added(
    model: HAMTForCausalLM, recording: Recording, queries: Sequence[int], targets: Tensor
) -> dict[int, Tensor]:
    """What each layer adds to the logits of ``targets``, (B, Q) by layer.

    It is the sum of its contributions, what came before the text included; the arguments are those
    of ``logit_directions``.
    """
    added = {}
    for layer in recording.layers():
        directions = logit_directions(model, recording, layer, queries, targets)
        output = recording.trace(layer).output[:, _positions(queries, recording.final.shape[1])]
        added[layer] = (output * directions).sum(dim=(2, 3))
    return added


def _scale(norm: torch.nn.RMSNorm, inputs: Tensor) -> Tensor:
    """What an RMSNorm multiplies its inputs by."""
    wide = torch.promote_types(inputs.dtype, torch.float32)
    square = inputs.to(wide).square().mean(dim=-1, keepdim=True)
    eps = torch.finfo(wide).eps if norm.eps is None else norm.eps
    return norm.weight.to(wide) * torch.rsqrt(square + eps)


def _positions(queries: Sequence[int], length: int) -> Tensor:
    at = torch.as_tensor(queries, dtype=torch.long)
    if at.ndim != 1 or not at.numel() or at.min() < 0 or at.max() >= length:
        raise ValueError(f"queries must be positions from 0 to {length - 1}; got {list(queries)}")
    return at
