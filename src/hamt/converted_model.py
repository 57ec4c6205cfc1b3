"""A transformer of Transformers whose attention was taken over by window and memory.

Its own code runs, but for what attention computes of queries, keys and values: that is asked of
``hamt.window_and_memory``. Its weights have their own names.

Shape legend: B batch, N tokens, d hidden_size, H query heads, G key-value heads, D head features.
"""

from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import AutoModel
from transformers.masking_utils import ALL_MASK_ATTENTION_FUNCTIONS
from transformers.modeling_layers import GenericForSequenceClassification
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

from hamt.base_model import HAMTPreTrainedModel
from hamt.batch import Batch
from hamt.converted_config import ConvertedConfig, head_dim_of
from hamt.mixers import State, Stateful
from hamt.model import HAMTBackbone, HAMTForCausalLM
from hamt.registration import register
from hamt.window_and_memory.mixer import WindowAndMemory
from hamt.window_and_memory.runs import sees

ATTENTION = "hamt_window_and_memory"


@dataclass
class Pass:
    """What attention is told in one forward pass, and the states that it leaves, by layer.

    ``instead`` is called in the place of window and memory, if there is one: with the attention
    module, queries (B, N, H, D), keys and values (B, N, G, D), and what q · k is multiplied with;
    it gives (B, N, H, D).
    """

    batch: Batch = field(default_factory=Batch)
    before: Sequence[State | None] = ()
    after: dict[int, State] = field(default_factory=dict)
    instead: Callable[[Any, Tensor, Tensor, Tensor, float], Tensor] | None = None


def attention(
    module: Any,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    scaling: float | None = None,
    hamt_pass: Pass | None = None,
    **others: Any,
) -> tuple[Tensor, None]:
    """What Transformers calls for (B, H, N, D) and twice (B, G, N, D): -> (B, N, H, D).

    Queries and keys have no rotary position: the model is told that all tokens stand at position 0.

    Raises:
        ValueError: if the transformer inside a converted model is called by itself.
    """
    if hamt_pass is None:
        raise ValueError("the layers of a converted model run by it alone: call the model itself")
    told, index = hamt_pass, module.layer_idx
    queries, keys, values = (x.transpose(1, 2) for x in (query, key, value))
    scale = module.head_dim**-0.5 if scaling is None else scaling
    if told.instead is not None:
        return told.instead(module, queries, keys, values, scale), None
    taker: WindowAndMemory = module.window_and_memory
    before = told.before[index] if told.before else None
    mixed, told.after[index] = taker(queries, keys, values, told.batch, before, scale)
    return mixed, None


def full_attention(
    module: Any, queries: Tensor, keys: Tensor, values: Tensor, scale: float
) -> Tensor:
    """``Pass.instead`` with which the model is the transformer that it was."""
    taker: WindowAndMemory = module.window_and_memory
    places = torch.arange(queries.shape[1], device=queries.device)[:, None]
    queries, keys = taker.turn(queries, places), taker.turn(keys, places)
    queries, keys, values = (x.transpose(1, 2) for x in (queries, keys, values))
    seen = None if taker.own_window is None else sees(places - places[:, 0], taker.own_window)
    mixed = F.scaled_dot_product_attention(
        queries, keys, values, seen, is_causal=seen is None, scale=scale, enable_gqa=True
    )
    return mixed.transpose(1, 2)


ALL_ATTENTION_FUNCTIONS.register(ATTENTION, attention)
ALL_MASK_ATTENTION_FUNCTIONS.register(ATTENTION, lambda *arguments, **options: None)


def take_over(body: nn.Module, config: ConvertedConfig) -> None:
    """Let window and memory do what attention does in a headless model of Transformers."""
    inner: Any = body.config
    heads, groups, width = inner.num_attention_heads, inner.num_key_value_heads, head_dim_of(inner)
    told = config.sizes, config.frequencies(), config.own_windows()
    horizon = inner.max_position_embeddings  # further away the transformer itself has never looked
    for layer, sizes, frequencies, own in zip(body.layers, *told, strict=True):  # type: ignore[arg-type]
        taker = WindowAndMemory(
            heads, groups, width, sizes, frequencies, config.reach, own, horizon
        )
        layer.self_attn.window_and_memory = taker.to(layer.self_attn.o_proj.weight.device)
    inner._attn_implementation = ATTENTION


class ConvertedPreTrainedModel(HAMTPreTrainedModel):
    """What all converted models share."""

    config_class = ConvertedConfig  # type: ignore[assignment]
    config: ConvertedConfig  # type: ignore[assignment]
    _no_split_modules = None  # type: ignore[assignment]
    # Sums over thousands of tokens, and biases beside which what they tell apart is small.
    _keep_in_fp32_modules_strict = {"slots", "salience"}  # noqa: RUF012
    _can_record_outputs = {}  # noqa: RUF012

    def get_input_embeddings(self):
        """The transformer's."""
        backbone: Any = self.base_model
        return backbone.get_input_embeddings()

    def set_input_embeddings(self, value):
        """The transformer's."""
        backbone: Any = self.base_model
        backbone.set_input_embeddings(value)

    def set_attn_implementation(self, attn_implementation, *arguments, **options):
        """Nothing for ``"eager"``: window and memory stay what computes attention.

        Raises:
            ValueError: for anything else.
        """
        self.get_correct_attn_implementation(attn_implementation)

    def fuse_projections(self, weights: torch.dtype = torch.float32) -> int:
        """Nothing, as of a second copy of its weights a converted model decodes no faster.

        Raises:
            ValueError: if ``weights`` are not float32.
        """
        if weights != torch.float32:
            raise ValueError(f"a converted model cannot decode with {weights} weights")
        return 0


class ConvertedBackbone(ConvertedPreTrainedModel, HAMTBackbone):
    """The transformer without its head; what ``AutoModel`` gives."""

    def __init__(self, config: ConvertedConfig) -> None:
        HAMTPreTrainedModel.__init__(self, config)
        config.validate_architecture()
        self.body = AutoModel.from_config(config.transformer_config())
        take_over(self.body, config)
        self.native = None
        self.post_init()

    @property
    def embed_tokens(self) -> nn.Embedding:  # type: ignore[override]
        """The transformer's embedding."""
        return self.body.get_input_embeddings()

    @property
    def layers(self) -> nn.ModuleList:  # type: ignore[override]
        """The transformer's layers."""
        return self.body.layers

    @property
    def stateful(self) -> list[Stateful]:
        """What carries the state of each layer: its window and memory."""
        return [layer.self_attn.window_and_memory for layer in self.layers]  # type: ignore[misc,union-attr]

    def get_input_embeddings(self):
        """The transformer's."""
        return self.body.get_input_embeddings()

    def set_input_embeddings(self, value):
        """The transformer's."""
        self.body.set_input_embeddings(value)
        self.body.config.vocab_size = len(value.weight)

    def forward(self, *arguments: Any, output_hidden_states: bool | None = None, **options: Any):
        """As ``HAMTBackbone.forward``.

        With ``output_hidden_states`` also the ``hidden_states`` (B, N, d) before each layer and
        after the last norm.
        """
        wanted = output_hidden_states
        if self.config.output_hidden_states if wanted is None else wanted:
            before: list[Tensor] = []
            hooks = [
                layer.register_forward_pre_hook(lambda _, inputs: before.append(inputs[0]))
                for layer in self.layers
            ]
            whole, options["return_dict"] = options.get("return_dict", True), True
            try:
                outputs = super().forward(*arguments, **options)
            finally:
                for hook in hooks:
                    hook.remove()
            outputs.hidden_states = (*before, outputs.last_hidden_state)
            return outputs if whole is not False else outputs.to_tuple()
        return super().forward(*arguments, **options)

    def mixer_summary(self) -> str:
        """Window and memory of all layers, for people."""
        return ", ".join(
            f"{count} × window of {sizes.window}, {sizes.num_sinks} sinks, {sizes.num_exact} exact "
            f"entries and {sizes.num_slots} slots"
            for sizes, count in Counter(self.config.sizes).items()
        )

    def run_layers(
        self, hidden_states: Tensor, batch: Batch, states: Sequence[State | None]
    ) -> tuple[Tensor, list[State], list[Tensor]]:
        """As ``HAMTBackbone.run_layers``, by the transformer's own code."""
        told = Pass(batch, states)
        hidden_states = self.run_body(hidden_states, told)
        return hidden_states, [told.after[index] for index in range(len(states))], []

    def run_body(self, hidden_states: Tensor, told: Pass) -> Tensor:
        """Embeddings (B, N, d) through all layers and the last norm."""
        # Window and memory turn queries and keys by themselves.
        places = torch.zeros(
            1, hidden_states.shape[1], dtype=torch.long, device=hidden_states.device
        )
        outputs = self.body(
            inputs_embeds=hidden_states, position_ids=places, use_cache=False, hamt_pass=told
        )
        return outputs.last_hidden_state


class ConvertedForCausalLM(ConvertedPreTrainedModel, HAMTForCausalLM):
    """The language model: the transformer with its head."""

    _tied_weights_keys = {"lm_head.weight": "model.body.embed_tokens.weight"}  # noqa: RUF012

    def __init__(self, config: ConvertedConfig) -> None:
        HAMTPreTrainedModel.__init__(self, config)
        self.model = ConvertedBackbone(config)
        self.lm_head = nn.Linear(config.hidden_size, config.vocab_size, bias=False)
        self.post_init()


class ConvertedForSequenceClassification(
    GenericForSequenceClassification, ConvertedPreTrainedModel
):
    """A linear classifier on the hidden state of the last token that is not padding."""


register(
    ConvertedConfig, ConvertedBackbone, ConvertedForCausalLM, ConvertedForSequenceClassification
)
