"""The catalogue: every architecture that is compared, how it is built, matched in size and counted.

Two architectures are compared at an equal number of parameters (``with_parameters``) or at an equal
number of floats to remember with (``with_state``). Each entry of ``ARCHITECTURES`` names the size
that is free to make them equal.

*State* is counted one way everywhere: the floats that all layers carry from token to token for one
sequence, which are the recurrent state, the last inputs of short convolutions, and the phases of
position keys, and the keys and values of a window of attention. Those of attention over the whole
text are no such state: they grow with it.
"""

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
import yaml
from torch import nn
from transformers import PreTrainedModel

from hamt.baselines.rivals import gated_deltanet, gpt2, llama, mamba2, nearest_divisor
from hamt.baselines.transformer import transformer
from hamt.config import HAMTConfig, usual_head_dim
from hamt.model import HAMTForCausalLM
from hamt.utils import model_flops

STATE = (
    "State: floats that all layers carry from token to token for one sequence (recurrent state, "
    "last inputs of short convolutions, phases)."
)


@dataclass(frozen=True)
class Architecture:
    """One architecture.

    ``build`` makes a model from ``hidden_dim``, ``num_layers``, ``vocab_size``, ``context`` (the
    number of positions, where they are learned) and choices of its own, all keywords.
    """

    title: str  # what it is, for tables and help
    build: Callable[..., PreTrainedModel]
    model_type: str  # of the configurations of its models
    # The size that is free when parameters are matched, and linear in them; its step by hidden_dim.
    parameter_size: str = "mlp_width"
    parameter_step: Callable[[int], int] = lambda hidden_dim: 8
    # The size that is free when the state is matched, and linear in it; None if the state grows.
    state_size: str | None = None
    mixers_only: Mapping[str, Any] | None = None  # choices that leave the MLPs out, if it can
    state_floats: Callable[[Any], int | None] = lambda model: None  # None if the state grows
    # Operations per token of a forward pass over so many tokens; NaN if they are not known.
    flops: Callable[[Any, int], float] = lambda model, length: math.nan


# ------------------------------------------------------------------ HAMT and its transformer


class NoKeys(nn.Module):
    """Takes the place of a projection to keys: all phases are zero, and binding does nothing."""

    def __init__(self, size: int) -> None:
        super().__init__()
        self.size = size

    def forward(self, hidden_states: torch.Tensor) -> torch.Tensor:
        """(B, N, d) -> zeros (B, N, size)."""
        return hidden_states.new_zeros(*hidden_states.shape[:-1], self.size)


def hamt(*, keys: bool = True, common_direction: float = 0.0, **fields: Any) -> HAMTForCausalLM:
    """HAMT, and what ablations take away from it.

    Without ``keys`` nothing is bound: every key is the identity. ``common_direction`` is added at
    initialisation to all directions in which the delta rule writes, so that they start out alike.
    ``fields`` are those of ``HAMTConfig``; ``context`` stands for ``max_position_embeddings``.
    """
    model = HAMTForCausalLM(_config(**fields))
    for block in model.model.layers:
        mixer = block.mixer
        if not keys:
            mixer.key_proj = NoKeys(mixer.key_proj.out_features)
            mixer.retrieval.key_proj = NoKeys(mixer.retrieval.key_proj.out_features)
        if common_direction:
            sizes = model.config.num_heads, model.config.num_slots
            forget, write, *_ = mixer.gating.rule.logit_sizes(*sizes)
            with torch.no_grad():
                mixer.gating.bias[forget : forget + write] += common_direction
    return model


def _transformer(
    *, short_convolution: bool = False, core: str = "sdpa", **fields: Any
) -> HAMTForCausalLM:
    return transformer(_config(**fields), short_convolution=short_convolution, core=core)


def hybrid_mixers(num_layers: int) -> list[str]:
    """The mixers of a hybrid: a window in every third layer, or in the second of two.

    Raises:
        ValueError: if there is only one layer.
    """
    if num_layers < 2:
        raise ValueError(f"a hybrid needs two layers or more; got {num_layers}")
    every = min(num_layers, 3)
    return [
        "memory" if layer % every else "sliding_attention" for layer in range(1, num_layers + 1)
    ]


def _hybrid(*, mixers: list[str] | str | None = None, **fields: Any) -> HAMTForCausalLM:
    """HAMT with other mixers, those of ``hybrid_mixers`` if none are named.

    Heads of attention have as near to the usual number of features as the width allows.
    """
    given = {"hidden_dim", "num_layers"} & fields.keys()
    sizes = HAMTConfig(**{name: fields[name] for name in given})
    if mixers is None:
        mixers = hybrid_mixers(sizes.num_layers)
    if fields.get("attention_head_dim") is None:
        width = sizes.hidden_dim
        fields["attention_head_dim"] = nearest_divisor(width, usual_head_dim(width))
    return HAMTForCausalLM(_config(**fields, mixers=mixers))


def _config(*, context: int | None = None, **fields: Any) -> HAMTConfig:
    positions = {} if context is None else {"max_position_embeddings": context}
    return HAMTConfig(**{**positions, **fields})


def _mlp_step(hidden_dim: int) -> int:
    # Odd widths cost matrix products of some size up to a fifth of their speed.
    return 8 if hidden_dim >= 256 else 1


def _hamt_state(model: HAMTForCausalLM) -> int | None:
    mixers = model.model.stateful
    if any(0 in shape for mixer in mixers for shape in mixer.state_shapes().values()):
        return None  # a size of 0 grows with the text
    return sum(mixer.state_size() for mixer in mixers)


def _hamt_flops(model: HAMTForCausalLM, length: int) -> float:
    return sum(model_flops(model.config, length).values())


# ------------------------------------------------------------------ Transformers' classes


def _mamba2_state(model: PreTrainedModel) -> int:
    config = model.config
    width = config.expand * config.hidden_size
    tail = (config.conv_kernel - 1) * (width + 2 * config.n_groups * config.state_size)
    return config.num_hidden_layers * (width * config.state_size + tail)


def _gated_deltanet_state(model: PreTrainedModel) -> int:
    config = model.config
    keys = config.linear_num_key_heads * config.linear_key_head_dim
    values = config.linear_num_value_heads * config.linear_value_head_dim
    tail = (config.linear_conv_kernel_dim - 1) * (2 * keys + values)
    return config.num_hidden_layers * (values * config.linear_key_head_dim + tail)


_of_hamts_parts = partial(
    Architecture,
    model_type=HAMTConfig.model_type,
    parameter_size="intermediate_dim",
    parameter_step=_mlp_step,
    state_floats=_hamt_state,
    flops=_hamt_flops,
)

ARCHITECTURES: dict[str, Architecture] = {
    "hamt": _of_hamts_parts(
        title="HAMT",
        build=hamt,
        state_size="num_slots",
        mixers_only={"intermediate_dim": 0},
    ),
    "hybrid": _of_hamts_parts(
        title="HAMT with attention over a window (its keys and values are counted as state) in "
        "every third layer",
        build=_hybrid,
        state_size="num_slots",
        # A window that leaves room for a memory in the smallest states of ``hamt recall``.
        mixers_only={"intermediate_dim": 0, "sliding_window": 4},
    ),
    "gpt2": Architecture(
        title="GPT-2 (Transformers' class): learned positions",
        build=gpt2,
        model_type="gpt2",
    ),
    "llama": Architecture(
        title="Llama (Transformers' class): RoPE, RMSNorm, SwiGLU",
        build=llama,
        model_type="llama",
    ),
    "mamba2": Architecture(
        title="Mamba-2 (Transformers' class)",
        build=mamba2,
        model_type="mamba2",
        parameter_size="num_layers",
        parameter_step=lambda hidden_dim: 1,
        state_size="state_size",
        # Heads as wide as the model: more of the same state then tells keys apart, as recall needs.
        mixers_only={"expand": 1},
        state_floats=_mamba2_state,
    ),
    "gated-deltanet": Architecture(
        title="Gated DeltaNet (Transformers' class, as in Qwen3-Next)",
        build=gated_deltanet,
        model_type="qwen3_next",
        state_size="key_dim",
        mixers_only={"mlp_width": 0},
        state_floats=_gated_deltanet_state,
    ),
    "transformer": _of_hamts_parts(
        title="RoPE transformer of HAMT's parts",
        build=_transformer,
        mixers_only={"intermediate_dim": 0, "short_convolution": True},
    ),
}

# What HAMT is compared with at an equal number of parameters.
RIVALS = tuple(name for name in ARCHITECTURES if name != "hamt")
# What can stand without MLPs, so that only its mixers are compared.
MIXERS = tuple(name for name, entry in ARCHITECTURES.items() if entry.mixers_only is not None)


def with_parameters(kind: str, parameters: int, **sizes: Any) -> PreTrainedModel:
    """Build the model whose number of parameters comes nearest to ``parameters``.

    They count embeddings, and tied matrices once. ``sizes`` are ``hidden_dim`` and the other sizes
    and choices of the builder; the free size, if given, is replaced.

    Raises:
        ValueError: if there is no such architecture.
    """
    if kind not in ARCHITECTURES:
        raise ValueError(f"no architecture {kind!r}; there are {', '.join(ARCHITECTURES)}")
    architecture = ARCHITECTURES[kind]
    free, step = architecture.parameter_size, architecture.parameter_step(sizes["hidden_dim"])
    least, more = _meta_models(architecture, sizes, free, step)
    each = more.num_parameters() - least.num_parameters()
    steps = max(1 + round((parameters - least.num_parameters()) / each), 1)
    return architecture.build(**{**sizes, free: steps * step})


def _meta_models(
    architecture: Architecture, sizes: dict[str, Any], free: str, step: int = 1
) -> list[PreTrainedModel]:
    """Models without numbers, the free size one step and two: what is matched is linear in it."""
    with torch.device("meta"):
        return [architecture.build(**{**sizes, free: size}) for size in (step, 2 * step)]


def with_state(kind: str, state: int, *, num_layers: int, **sizes: Any) -> PreTrainedModel:
    """Build the model without MLPs whose layers carry nearest to ``state`` floats each.

    ``kind`` is one of ``MIXERS``; ``hamt:num_heads=1,rotation=none`` or ``hybrid:num_sinks=1`` also
    set fields of ``HAMTConfig``. The state of a transformer cannot be chosen. ``sizes`` are
    ``hidden_dim``, ``vocab_size``, and other choices of the builder.

    Raises:
        ValueError: if there is no such kind, or its smallest state is much larger.
    """
    kind, _, named = kind.partition(":")
    if kind not in MIXERS:
        raise ValueError(f"no model {kind!r}; there are {', '.join(MIXERS)}")
    architecture = ARCHITECTURES[kind]
    sizes = {**(architecture.mixers_only or {}), **sizes, "num_layers": num_layers}
    sizes |= _fields(kind, named)
    free = architecture.state_size
    if free is None:
        return architecture.build(**sizes)

    step = 2 if "hierarchical_memory" in str(sizes.get("mixers")) else 1  # half are slow slots
    models = _meta_models(architecture, sizes, free, step)
    least, more = (architecture.state_floats(model) or 0 for model in models)
    size = step * round(1 + (state * num_layers - least) / (more - least))
    if size < 1:
        raise ValueError(
            f"the smallest state of {kind} has {least // num_layers} floats a layer; got {state}"
        )
    return architecture.build(**{**sizes, free: size})


def _fields(kind: str, named: str) -> dict[str, Any]:
    """``num_heads=1,rotation=none`` as a dictionary."""
    pairs = [pair.partition("=") for pair in named.split(",") if pair]
    free = set(HAMTConfig.__annotations__) - {"num_slots", "hidden_dim", "num_layers", "vocab_size"}
    if unknown := [
        name for name, _, _ in pairs if kind not in ("hamt", "hybrid") or name not in free
    ]:
        raise ValueError(
            f"{kind} has no field {', '.join(unknown)} to choose: after hamt: and hybrid: stand "
            "fields of HAMTConfig, except the sizes, and num_slots, which follows from the state "
            "size"
        )
    return {name: yaml.safe_load(value) for name, _, value in pairs}


def state_floats(model: PreTrainedModel) -> int | None:
    """The floats of a model's state (see the top of this module); None if it grows with the text.

    Raises:
        ValueError: for an architecture that is not in the catalogue.
    """
    if isinstance(model, HAMTForCausalLM):  # of whatever layers, also converted
        return _hamt_state(model)
    for architecture in ARCHITECTURES.values():
        if architecture.model_type == model.config.model_type:
            return architecture.state_floats(model)
    raise ValueError(f"the state of a {model.config.model_type} model is not known")


def carries_state(model: PreTrainedModel) -> bool:
    """Whether a model is of HAMT's class, and has a state of fixed size to carry over any text."""
    return isinstance(model, HAMTForCausalLM) and state_floats(model) is not None


def flops_per_token(kind: str, model: PreTrainedModel, length: int) -> float:
    """Operations per token of a forward pass over ``length`` tokens; NaN if they are not known."""
    return ARCHITECTURES[kind].flops(model, length)


def non_embedding_parameters(model: PreTrainedModel) -> int:
    """Parameters of the blocks and the final norm, without embedding and head."""
    ends = (model.get_input_embeddings(), model.get_output_embeddings())
    # A set has tied matrices once.
    outside = {p for end in ends if end is not None for p in end.parameters()}
    return model.num_parameters() - sum(p.numel() for p in outside)


def full_name(kind: str, choices: Mapping[str, Any] | None = None) -> str:
    """What an architecture is, for tables; of some also how these choices build it."""
    text = ARCHITECTURES[kind].title
    if kind == "transformer":
        which = "with" if (choices or {}).get("short_convolution") else "without"
        text += f", {which} HAMT's short convolution"
    if kind == "hybrid":
        window = (choices or {}).get("sliding_window", HAMTConfig.sliding_window)
        text += f", of {window} tokens where no sliding_window is named"
    return text
