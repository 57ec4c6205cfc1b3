"""Decoding on a CPU without PyTorch: a copy of a model for the step of ``hamt.cpu.native``.

It is made by ``HAMTPreTrainedModel.fuse_projections``, and takes over where a model reads one token
in each row after a state. It knows models whose mixers are all memories without boundaries, and
nothing that an adapter, a hook or a quantiser does: those stay with PyTorch.

Shape legend: B rows, d hidden_dim, H heads, K key size, V vocab_size.
"""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from contextvars import ContextVar
from itertools import repeat
from operator import contains, is_
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.modules import module as hooks_of_all

from hamt.batch import Batch, padding_mask
from hamt.block import HAMTMLP, HAMTBlock
from hamt.cache import HAMTCache, check_cache
from hamt.config import HAMTConfig
from hamt.convolution import ShortConvolution
from hamt.identity import Origin
from hamt.layers import HAMTLayer
from hamt.mixers import State
from hamt.parts import GatingNetwork, RetrievalHead, RMSNorm, ScaledEmbedding
from hamt.products import are_active, has_extra_behaviour
from hamt.rotation import Rotation

try:
    from hamt.cpu.native import BINDINGS, RULES, SOURCES, TURNING, WEIGHTS, NativeModel, Packed
except ModuleNotFoundError:  # hamt/cpu was deleted
    NativeModel, SOURCES, WEIGHTS = None, [], (torch.float32,)  # type: ignore[assignment,misc]

# Modules of which all that they do is known.
_KNOWN = (
    *(nn.Linear, nn.Embedding, nn.Dropout, nn.ModuleList, RMSNorm, ScaledEmbedding),
    *(HAMTBlock, HAMTMLP, HAMTLayer, ShortConvolution, GatingNetwork, RetrievalHead, Rotation),
)
# The decoder whose model stays as it is, in this thread.
_LOOKED_AT: ContextVar["Decoder | None"] = ContextVar("looked_at", default=None)


class Decoder:
    """The layers and the head of a model, with the weights as they are now."""

    def __init__(self, backbone: Any, head: nn.Linear | None, kind: torch.dtype) -> None:
        self.config: HAMTConfig = backbone.config
        self.native = NativeModel(pack(backbone, head, kind))
        self.nbytes = self.native.packed.numel()
        # The compiled code trusts sizes.
        self._shapes = [layer.mixer.state_shapes() for layer in backbone.layers]
        heads = [] if head is None else [head]
        self._head, self._head_parts = head, _Parts(heads)
        self._parts = _Parts([*backbone.modules(), *heads], unhooked=backbone)
        self._dropouts = [x for x in backbone.modules() if isinstance(x, nn.Dropout)]

    def __reduce__(self):
        return type(None), ()  # a copied or pickled model has none

    def _suits(self, hidden: Tensor) -> bool:
        """Whether hidden states (B, 1, d) are of the kind that the copy computes with, exactly."""
        return (
            not torch.compiler.is_compiling()
            and hidden.shape[1] == 1
            and hidden.device.type == "cpu"
            and hidden.dtype == torch.float32
            and not torch.is_grad_enabled()
            and not torch.is_autocast_enabled("cpu")
            and not self._parts.have_hooks()
            and not any(each.training and each.p for each in self._dropouts)
            and not hooks_of_all._has_any_global_hook()
        )

    @contextmanager
    def looked_at_once(self) -> Iterator[None]:
        """Within it parts and weights stay as they are, and are not looked at for every token."""
        token = _LOOKED_AT.set(self if self._is_copy() else None)
        try:
            yield
        finally:
            _LOOKED_AT.reset(token)

    def _is_copy(self) -> bool:
        """Whether parts and weights are still those that were copied."""
        return _LOOKED_AT.get() is self or self._parts.are_the_same()

    def run(
        self, hidden: Tensor, batch: Batch, states: Sequence[State | None]
    ) -> tuple[Tensor, list[State]] | None:
        """Hidden states (B, 1, d) through all layers and the last norm, and the states after them.

        None where the layers have to be called one by one.
        """
        if not self._suits(hidden) or batch.mask is not None:
            return None
        if batch.documents is not None and bool(batch.documents.any()):
            return None
        if not self._is_copy() or not self._fit(states, len(hidden)):
            return None
        # States are values: the step writes into new ones.
        after = [
            {name: x.clone(memory_format=torch.contiguous_format) for name, x in state.items()}
            for state in states
            if state is not None
        ]
        written = hidden[:, 0].clone(memory_format=torch.contiguous_format)
        self.native.run(written, after)
        return written[:, None], after

    def step(
        self, model: Any, ids: Tensor | None, cache: Any, attention_mask: Tensor | None = None
    ) -> Tensor | None:
        """Logits (B, 1, V) after one more token in each row, ids (B, 1), of a state, which goes on.

        So does a language model's forward pass, when it is given nothing else, with more of Python
        around. None, and all is as before, where it has to.

        Raises:
            ValueError: if the state is of another model, or has other rows.
            IndexError: if one is no token.
        """
        backbone = model.model
        if (
            torch.compiler.is_compiling()
            or self.config.output_hidden_states
            or model.lm_head is not self._head
            or not isinstance(cache, HAMTCache)
            or (past := cache.past) is None
            or past.seq_idx is not None
            or ids is None
            or ids.shape[1:] != (1,)
        ):
            return None
        check_cache(cache, backbone, len(ids))
        hidden = backbone.embed_tokens(ids)
        batch = Batch.of(padding_mask(attention_mask, 1), None, past)
        found = self.run(hidden, batch, cache.states)
        if found is None:
            return None
        normed, states = found
        logits = self.native.head(normed[:, 0])[:, None]
        cache.advance(states, batch.after(hidden, ids, past), 1)
        if cache.origin is None:
            cache.origin = Origin(backbone)
        return logits

    def _fit(self, states: Sequence[State | None], rows: int) -> bool:
        """Whether there is a state of this model for so many rows; of others PyTorch tells."""
        return all(
            state is not None
            and state.keys() == shapes.keys()
            and all(x.shape == (rows, *shapes[name]) for name, x in state.items())
            and all(x.dtype == torch.float32 for x in state.values())
            for state, shapes in zip(states, self._shapes, strict=True)
        )

    def logits(self, head: nn.Module, normed: Tensor) -> Tensor | None:
        """Logits (B, 1, V) of the model's head and normalised hidden states (B, 1, d).

        None where the head has to be called: it is another, or as for ``run``.
        """
        # Of all parts the head alone: looking at each takes time.
        if head is not self._head or not self._suits(normed):
            return None
        if not self._head_parts.are_the_same():
            return None
        return self.native.head(normed[:, 0].contiguous())[:, None]


class _Parts:
    """Parts of a model as they are now, to see whether something was put in their place.

    They are looked at for every token, so all is laid out for what loops without Python. Hooks of
    the part ``unhooked`` run whatever is done inside of it.
    """

    def __init__(self, parts: Sequence[nn.Module], unhooked: nn.Module | None = None) -> None:
        self.parts, self.types = parts, [type(part) for part in parts]
        self.own = [vars(part) for part in parts]
        self.tables = [table for part in parts for table in (part._modules, part._parameters)]
        self.counts = list(map(len, self.tables))
        held = [(table, name, x) for table in self.tables for name, x in table.items()]
        self.places, self.names = [each[0] for each in held], [each[1] for each in held]
        self.values = [each[2] for each in held]
        self.weights = [x for x in self.values if isinstance(x, Tensor)]
        self.marks = _marks(self.weights)
        hooked = [part for part in parts if part is not unhooked]
        self.hooks = [x for part in hooked for x in (part._forward_hooks, part._forward_pre_hooks)]

    def are_the_same(self) -> bool:
        """Whether all are of the same kind, with the same parts and weights, none written to."""
        now: Any = map(dict.get, self.places, self.names)  # type: ignore[arg-type]
        return (
            all(map(is_, now, self.values))
            and _marks(self.weights) == self.marks
            and all(map(is_, map(type, self.parts), self.types))
            and list(map(len, self.tables)) == self.counts
            and not any(map(contains, self.own, repeat("forward")))
        )

    def have_hooks(self) -> bool:
        """Whether a hook does something on any of them."""
        return any(self.hooks) and any(map(are_active, self.hooks))


def _marks(weights: Sequence[Tensor]) -> list[int]:
    """What changes when a weight is written to, or gets other memory."""
    # Those made in inference mode count no writes.
    counts = [-1 if weight.is_inference() else weight._version for weight in weights]
    return counts + [weight.data_ptr() for weight in weights]


def make_decoder(
    backbone: Any, head: nn.Module | None, kind: torch.dtype = torch.float32
) -> Decoder | None:
    """A decoder for a backbone and its head; None for a model that the step does not know.

    ``kind``: how matrices are kept, float32, bfloat16 or int8 with a scale for each row.
    """
    if NativeModel is None or not is_known(backbone, head) or not NativeModel.can_be_built():
        return None
    return Decoder(backbone, head, kind)  # type: ignore[arg-type]


def is_known(backbone: Any, head: nn.Module | None) -> bool:
    """Whether the step computes all that a model does."""
    config: HAMTConfig = backbone.config
    parts = [part for part in backbone.modules() if part is not backbone]
    parts += [] if head is None else [head]
    return (
        all(type(part) in _KNOWN and not has_extra_behaviour(part, type(part)) for part in parts)
        and all(x.device.type == "cpu" and x.dtype == torch.float32 for x in backbone.parameters())
        and not config.read_before_write
        and all(layer.mixer.boundary is None for layer in backbone.layers)
        and type(backbone.layers[0].mixer.memory.rule) in RULES
        and backbone.layers[0].mixer.memory.algebra.name in BINDINGS
        and getattr(head, "bias", None) is None
    )


def pack(backbone: Any, head: nn.Linear | None, kind: torch.dtype) -> Tensor:
    """The bytes of a model that is known; without a head, with one that is never asked."""
    config, packed = backbone.config, Packed(kind)
    mixer: HAMTLayer = backbone.layers[0].mixer
    algebra, features = mixer.memory.algebra, mixer.memory.head_dim
    own_head = head is not None and head.weight is not backbone.embed_tokens.weight
    packed.matrix(backbone.embed_tokens.weight)
    if head is not None and own_head:
        packed.matrix(head.weight)
    packed.vector(backbone.norm.weight)
    if algebra.name == "circular_conv":
        packed.vector(algebra.lift(torch.eye(features)).T)
        packed.vector(algebra.lower(torch.eye(features)).T)
    for layer in backbone.layers:
        _pack_layer(packed, layer)
    heads, phases = config.turning(mixer.memory.key_size)
    turning = {"none": "none", "data_dependent": "by token"}.get(config.rotation, "fixed")
    counts = {
        "vocab": config.vocab_size,
        "width": config.hidden_dim,
        "layers": config.num_layers,
        "heads": config.num_heads,
        "slots": config.num_slots,
        "features": features,
        "keys": mixer.memory.key_size,
        "taps": config.conv_kernel_size,
        "inner": config.intermediate_dim,
        "rule": RULES.index(type(mixer.memory.rule)),
        "binding": BINDINGS.index(algebra.name),
        "turning": TURNING.index(turning),
        "turning_heads": heads,
        "turning_phases": phases,
        "gates": len(mixer.gating.bias),
        "gating": int(mixer.gating.weight is not None),
        "output_gate": int(mixer.gate_proj is not None),
        "tied": int(not own_head),
    }
    scales = {
        "eps": config.rms_norm_eps,
        "decay_rate": config.decay_rate,
        "multiplier": config.embedding_multiplier,
    }
    return packed.finish(counts, scales)


def _pack_layer(packed: "Packed", layer: HAMTBlock) -> None:
    mixer: Any = layer.mixer
    packed.vector(layer.mixer_norm.weight)
    if mixer.conv is not None:
        packed.vector(mixer.conv.weight)
    head = mixer.retrieval
    maps = (mixer.item_proj, mixer.key_proj, head.key_proj, head.read_proj)
    packed.matrix(torch.cat([each.weight for each in maps]))
    by_token = None if mixer.rotation is None else mixer.rotation.weight
    exact = [weight for weight in (mixer.gating.weight, by_token) if weight is not None]
    if exact:  # as in ``GatingNetwork``: errors of gates and turns add up from token to token
        packed.matrix(torch.cat(exact), torch.float32)
    packed.vector(mixer.gating.bias)
    packed.vector(head.read_bias)
    if mixer.rotation is not None:
        packed.vector(_turn(mixer.rotation))
    packed.vector(mixer.norm.weight)
    if mixer.gate_proj is not None:
        packed.matrix(mixer.gate_proj.weight)
    packed.matrix(mixer.output_proj.weight)
    if layer.mlp is not None and layer.mlp_norm is not None:
        packed.vector(layer.mlp_norm.weight)
        for each in (layer.mlp.gate_proj, layer.mlp.up_proj, layer.mlp.down_proj):
            packed.matrix(each.weight)


def _turn(rotation: Rotation) -> Tensor:
    """What every token turns a position by, (H, K), before what depends on the token is added."""
    shape = (rotation.num_heads, rotation.num_phases)
    if rotation.log_frequency is not None:
        turn = rotation.log_frequency.detach().exp().view(shape)
    else:
        turn = rotation.frequencies(torch.float32).expand(shape)
    whole = torch.full((rotation.config.num_heads, rotation.key_size), rotation.algebra.identity)
    whole[: shape[0], : shape[1]] = turn
    return whole
