"""HAMTConfig: every choice of the architecture, checked when it is made, and the named presets."""

import math
from typing import Any

from huggingface_hub.dataclasses import strict

from hamt.config_values import CHOICES, ODD_SLOTS, RANGES, ROTATIONS
from hamt.memory import get_algebra
from hamt.mixers import MIXERS, look_up
from hamt.standard_config import StandardNamesConfig


@strict
class HAMTConfig(StandardNamesConfig):
    r"""Configuration of a HAMT language model.

    The Transformers names ``hidden_size``, ``num_hidden_layers``, ``num_attention_heads`` and
    ``intermediate_size`` are accepted for ``hidden_dim``, ``num_layers``, ``num_heads`` and
    ``intermediate_dim``.

    Args:
        vocab_size: tokens in the vocabulary.
        hidden_dim: d, width of the residual stream.
        hcm_dim: D, width of the holographic memory over all heads; None is 2 · hidden_dim.
        num_layers: blocks of mixer and MLP.
        mixers: the token mixer of each layer, one name for all or a list of ``num_layers`` names:
            ``memory``, ``hierarchical_memory``, ``sliding_attention`` or ``full_attention`` (see
            ``hamt.mixers.MIXERS``); None is ``memory``.
        num_slots: S, slots per head.
        num_heads: H, heads; an item of a head has hcm_dim / num_heads features.
        binding_type: ``phasor``, ``circular_conv`` or ``elementwise`` (see
            ``hamt.memory.algebra``).
        write_rule: ``gated`` (forget and write gates), ``normalized`` (the same, with slots of one
            size), ``convex`` (one gate for both) or ``delta`` (error-correcting, see
            ``hamt.memory.write_rules``).
        rotation: ``none``, ``constant`` (position keys at many time scales; where the binding has
            phases), ``learned`` (the same with a learned frequency for each head and phase, ten
            times as slow at initialisation) or ``data_dependent`` (each token turns the position by
            an angle, or sign, of its own: state tracking). What is recalled at a lag that varies
            loses the phases that turn fast.
        rotation_base: the slowest phase turns by 1 / rotation_base radians a token, the fastest by
            1.
        rotation_share: the share of each head's phases (or signs) that turn; the frequencies are
            spread over them, the rest stay at the identity.
        rotation_heads: how many heads turn, the first ones; None is all.
        decay_rate: λ of the convex rule, the share forgotten at every token; and what the fast
            slots of a hierarchical memory forget beside what their gates let go.
        slow_decay_rate: the share that slow slots of a hierarchical memory forget at every token.
        boundary_every: tokens from one boundary to the next, at which the slots of a hierarchical
            memory are consolidated, and the options below act (see ``hamt.boundaries``).
        gate_feedback: the gates also see what the token reads from the memory of the last boundary.
        key_feedback: so do the unbinding keys.
        read_before_write: a token reads the memory as it was before its own item was written.
        normalize_state: divide each slot by its root mean square at boundaries.
        state_precision: round the slots at boundaries to what ``bfloat16`` holds, or ``int8`` with
            a scale for each slot; ``float32`` does not round.
        min_half_life: half-life in tokens of the fastest slot at initialisation.
        max_half_life: half-life in tokens of the slowest slot at initialisation.
        chunk_size: tile of the chunked form in tokens; changes speed, never a result (the auxiliary
            loss asks for the items of one tile).
        conv_kernel_size: width of the short convolution; 0 leaves it out.
        use_gating: gates depend on the token; False leaves a learned constant for each slot.
        use_output_gate: multiply the read-out by SiLU(W_g x).
        gating_network: what makes the gates, by its name in ``hamt.mixers.GATING_NETWORKS``.
        retrieval_head: what makes unbinding keys and read weights, by its name in
            ``hamt.mixers.RETRIEVAL_HEADS``.
        attention_head_dim: features of a head of attention layers; None is 64 from a width of 256
            on, below it 32.
        sliding_window: W, tokens that a query of a ``sliding_attention`` layer sees: itself and the
            W - 1 before it.
        num_sinks: first tokens of a document that stay visible to those layers for ever.
        intermediate_dim: width of the SwiGLU MLP; None is 8/3 · hidden_dim, rounded up to 32; 0
            leaves the MLP out.
        max_position_embeddings: advisory, the context trained on; the memory has no length limit.
        dropout: after the mixer and after the MLP.
        use_auxiliary_loss: add a loss in training that asks the memory for what it was given.
        aux_loss_weight: weight of the auxiliary loss.
        auxiliary_loss: ``reconstruction`` (1 - cosine of stored and retrieved items) or
            ``contrastive`` (InfoNCE: tell an item from others that the same state holds; see
            ``hamt.losses``).
        contrastive_temperature: what the contrastive loss divides cosines by.
        rms_norm_eps: ε of every RMSNorm.
        initializer_range: standard deviation of embeddings.
        embedding_multiplier: what an embedding is multiplied by on its way into the first layer,
            not in the head that it is tied to. √hidden_dim makes it as large as what layers add to
            it, and as quick to learn.
        tie_word_embeddings: the head is the embedding, transposed.

    Raises:
        ValueError: if the sizes do not fit together; the message says what would.
    """

    model_type = "hamt"
    keys_to_ignore_at_inference = ["past_key_values"]  # noqa: RUF012
    attribute_map = {  # noqa: RUF012
        "hidden_size": "hidden_dim",
        "num_hidden_layers": "num_layers",
        "num_attention_heads": "num_heads",
        "intermediate_size": "intermediate_dim",
    }

    vocab_size: int = 50257
    hidden_dim: int = 256
    hcm_dim: int | None = None
    num_layers: int = 4
    mixers: list[str] | str | None = None
    num_slots: int = 16
    num_heads: int = 4
    binding_type: str = "phasor"
    write_rule: str = "gated"
    rotation: str = "none"
    rotation_base: float | int = 10_000.0
    rotation_share: float | int = 1.0
    rotation_heads: int | None = None
    decay_rate: float | int = 0.001
    slow_decay_rate: float | int = 0.0001
    boundary_every: int = 64
    gate_feedback: bool = False
    key_feedback: bool = False
    read_before_write: bool = False
    normalize_state: bool = False
    state_precision: str = "float32"
    min_half_life: float | int = 4.0
    max_half_life: float | int = 4096.0
    chunk_size: int = 16
    conv_kernel_size: int = 4
    use_gating: bool = True
    use_output_gate: bool = True
    gating_network: str = "linear"
    retrieval_head: str = "linear"
    attention_head_dim: int | None = None
    sliding_window: int = 256
    num_sinks: int = 0
    intermediate_dim: int | None = None
    max_position_embeddings: int = 1024
    dropout: float | int = 0.0
    use_auxiliary_loss: bool = False
    aux_loss_weight: float | int = 0.05
    auxiliary_loss: str = "reconstruction"
    contrastive_temperature: float | int = 0.1
    rms_norm_eps: float | int = 1e-6
    initializer_range: float | int = 0.02
    embedding_multiplier: float | int = 1.0
    use_cache: bool = True
    tie_word_embeddings: bool = True
    bos_token_id: int | None = None
    eos_token_id: int | list[int] | None = None
    pad_token_id: int | None = None

    def __post_init__(self, **kwargs: Any) -> None:
        # Sizes under their Transformers names count before other sizes are derived from them.
        for alias in self.attribute_map.keys() & kwargs.keys():
            setattr(self, alias, kwargs.pop(alias))
        kwargs.pop("layer_types", None)  # follows from the mixers
        if self.hcm_dim is None:
            self.hcm_dim = 2 * self.hidden_dim
        if self.intermediate_dim is None:
            self.intermediate_dim = -(-8 * self.hidden_dim // 96) * 32
        # Before Transformers reads ``layer_types``. ``@strict`` calls it too, on every later save,
        # but wraps the error in a type of its own.
        self.validate_architecture()
        super().__post_init__(**kwargs)

    @property
    def layer_mixers(self) -> list[str]:
        """The name of each layer's mixer."""
        if isinstance(self.mixers, list):
            return self.mixers
        return ["memory" if self.mixers is None else self.mixers] * self.num_layers

    @property
    def layer_types(self) -> list[str]:
        """What Transformers calls them."""
        return [look_up(MIXERS, mixer).layer_type for mixer in self.layer_mixers]

    def validate_architecture(self) -> None:
        """Refuse what cannot be built.

        Raises:
            ValueError: with what is wrong and what would be right.
        """
        self._check_sizes()
        self._check_parts()

    def _check_sizes(self) -> None:
        if not 0 < self.min_half_life <= self.max_half_life < math.inf:
            raise ValueError(
                f"half-lives must satisfy 0 < min_half_life <= max_half_life < inf; got "
                f"{self.min_half_life} and {self.max_half_life}"
            )
        for name, (least, most) in RANGES.items():
            value = getattr(self, name)
            if not least <= value <= most:  # as NaN is not
                low = "must not be negative" if least == 0 else f"must be at least {least:g}"
                told = f"must be at most {most:g}" if value > most else low
                raise ValueError(f"{name} {told}; got {value}")
        assert self.hcm_dim is not None  # filled in above
        step = 2 * self.num_heads
        if self.hcm_dim < step or self.hcm_dim % step:
            lower, upper = self.hcm_dim // step * step, -(-self.hcm_dim // step) * step
            near = " or ".join(str(size) for size in (lower, upper) if size)
            raise ValueError(
                f"hcm_dim must be a multiple of 2 * num_heads = {step}; "
                f"got {self.hcm_dim}, try {near}"
            )
        for name in ("decay_rate", "slow_decay_rate", "dropout"):
            if not 0 <= getattr(self, name) < 1:
                raise ValueError(f"{name} must lie in [0, 1); got {getattr(self, name)}")
        for name in ("bos_token_id", "eos_token_id", "pad_token_id"):
            value = getattr(self, name)
            if value == []:
                raise ValueError(f"{name} must be a token, several, or None; got none of several")
            for token in value if isinstance(value, list) else [value]:
                if token is not None and not 0 <= token < self.vocab_size:
                    raise ValueError(
                        f"{name} must be a token, from 0 to {self.vocab_size - 1}; got {token}"
                    )

    def _check_parts(self) -> None:
        get_algebra(self.binding_type)  # refuses what there is not
        for name, choices in CHOICES.items():
            if getattr(self, name) not in choices:
                raise ValueError(
                    f"{name} must be one of {', '.join(choices)}; got {getattr(self, name)!r}"
                )
        if isinstance(self.mixers, list) and len(self.mixers) != self.num_layers:
            raise ValueError(
                f"mixers must name one mixer for each of the {self.num_layers} layers, "
                f"or one for all; got {len(self.mixers)}"
            )
        for mixer in {*self.layer_mixers}:
            if mixer not in MIXERS:
                raise ValueError(f"mixers must be among {', '.join(MIXERS)}; got {mixer!r}")
        if "hierarchical_memory" in self.layer_mixers and self.num_slots % 2:
            raise ValueError(ODD_SLOTS.format(self.num_slots))
        attention = not {"full_attention", "sliding_attention"}.isdisjoint(self.layer_types)
        if self.attention_head_dim is not None or attention:
            size = self.attention_head_dim
            size = usual_head_dim(self.hidden_dim) if size is None else size
            check_head_dim(size, self.hidden_dim)
        self._check_rotation()

    def _check_rotation(self) -> None:
        algebra = get_algebra(self.binding_type)
        if self.rotation in ("constant", "learned") and not algebra.has_phase:
            raise ValueError(
                f"rotation={self.rotation!r} needs a binding with phases: use rotation='none' or "
                "'data_dependent', or binding_type phasor or circular_conv"
            )
        share, heads = self.rotation_share, self.rotation_heads
        if not 0 < share <= 1:
            raise ValueError(f"rotation_share must lie in (0, 1]; got {share}")
        if heads is not None and not 1 <= heads <= self.num_heads:
            raise ValueError(
                f"rotation_heads must lie in [1, num_heads = {self.num_heads}]; got {heads}"
            )
        if self.rotation == "none" and (share, heads) != (1, None):
            raise ValueError(
                "rotation_share and rotation_heads say which part turns: they need a rotation, "
                f"{', '.join(ROTATIONS[1:])}"
            )
        assert self.hcm_dim is not None  # filled in above
        size = algebra.key_size(self.hcm_dim // self.num_heads)
        least = 2 if algebra.name == "circular_conv" else 1  # whose first phase never turns
        if share < 1 and self.turning(size)[1] < least:
            raise ValueError(
                f"rotation_share must let at least {least} of the {size} numbers of a head's key "
                f"turn, as {min(least / size, 1):g} does; got {share}"
            )

    def turning(self, key_size: int) -> tuple[int, int]:
        """How many heads turn and, of the ``key_size`` phases or signs of each, how many."""
        heads = self.num_heads if self.rotation_heads is None else self.rotation_heads
        return heads, round(self.rotation_share * key_size)

    @classmethod
    def from_preset(cls, name: str, **overrides: Any) -> "HAMTConfig":
        """The configuration called ``name`` in ``PRESETS``, with fields replaced by ``overrides``.

        Raises:
            ValueError: if there is no such preset.
        """
        if name not in PRESETS:
            raise ValueError(f"no preset {name!r}; there are {', '.join(PRESETS)}")
        return cls(**{**PRESETS[name], **overrides})


def usual_head_dim(hidden_dim: int) -> int:
    """Features of a head of attention: 64 as is usual, 32 in small models, to have several."""
    return 64 if hidden_dim >= 256 else 32


def check_head_dim(size: int, hidden_dim: int) -> None:
    """Refuse heads of attention with ``size`` features, if the width cannot be cut into such.

    Raises:
        ValueError: if ``size`` is odd, not positive, or does not divide ``hidden_dim``.
    """
    if size < 2 or size % 2 or hidden_dim % size:
        raise ValueError(
            f"attention_head_dim must be even and divide hidden_dim = {hidden_dim}; got {size}"
        )


# Named by the parameters they really have with GPT-2's vocabulary, tied embeddings included.
PRESETS: dict[str, dict[str, Any]] = {
    "17M": {"hidden_dim": 256, "num_layers": 4},
    "50M": {"hidden_dim": 448, "num_layers": 8},
    "100M": {"hidden_dim": 640, "num_layers": 10},
    "200M": {"hidden_dim": 896, "num_layers": 12},
}
