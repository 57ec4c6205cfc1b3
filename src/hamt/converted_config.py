"""The configuration of a transformer whose attention was taken over by window and memory."""

from typing import Any

import torch
from transformers import AutoConfig, PreTrainedConfig
from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS

from hamt.adapters import tell_peft
from hamt.config_values import MAX_LAYERS
from hamt.window_and_memory.sizes import Sizes

# Models whose attention is queries, keys and values with rotary positions in a softmax, no more.
KNOWN = ("llama", "mistral", "qwen2", "qwen3", "gemma3_text")
_SLIDING = "sliding_attention"  # a kind of layer, as Transformers calls it
# Fields of Gemma 3's configuration that make more of attention, or of the head.
_BEYOND = ("attn_logit_softcapping", "final_logit_softcapping", "use_bidirectional_attention")
_TOKENS = ("bos_token_id", "eos_token_id", "pad_token_id")
# Of a file or a classifier, and not of the model: how weights were kept, and names of labels.
_OF_A_FILE = (
    *("id2label", "label2id", "quantization_config", "architectures", "dtype", "torch_dtype"),
    "transformers_version",
)
# What decides, beside weights, layers and reach, what a model makes of a text.
_TELLING = (
    *("model_type", "hidden_act", "rms_norm_eps", "num_attention_heads", "rope_parameters"),
    *("hidden_activation", "query_pre_attn_scalar", "layer_types", "sliding_window"),
)


class ConvertedConfig(PreTrainedConfig):
    """A configuration of Transformers, and the sizes of window and memory in each layer.

    Args:
        transformer: the fields of the transformer's own configuration, with its ``model_type``.
        layers: W, Z, S, E and C of each layer (``hamt.window_and_memory.sizes.Sizes``).
        reach: tokens; what is further away is seen as if it were so far away.
    """

    model_type = "hamt_converted"
    has_no_defaults_at_init = True

    def __init__(
        self,
        transformer: dict[str, Any] | None = None,
        layers: list[list[int]] | None = None,
        reach: int = 2048,
        **options: Any,
    ) -> None:
        self.transformer = {} if transformer is None else dict(transformer)
        for name in _OF_A_FILE:
            self.transformer.pop(name, None)
        self.reach = reach
        inner = self.transformer_config() if self.transformer else None
        own_windows = self.own_windows() if self.transformer else []
        usual = [list(Sizes().fitted(own)) for own in own_windows]
        self.layers = usual if layers is None else layers
        if inner is not None:
            for name in _TOKENS:
                options.setdefault(name, getattr(inner, name, None))
            options.setdefault("tie_word_embeddings", inner.tie_word_embeddings)
        self.use_cache, self.aux_loss_weight = True, 0.0
        super().__init__(**options)
        if inner is not None:
            self._take(inner)
            self.validate_architecture()

    def __setattr__(self, name: str, value: Any) -> None:
        """A model whose embedding is resized sets ``vocab_size``: that of the transformer, too."""
        if name == "vocab_size" and getattr(self, "transformer", None):
            self.transformer = {**self.transformer, name: value}
        super().__setattr__(name, value)

    def to_dict(self) -> dict[str, Any]:
        """As in Transformers, which PEFT asks before it looks up what of a model it adapts."""
        tell_peft(self.model_type, "llama")
        return super().to_dict()

    def identifying(self) -> dict[str, Any]:
        """What decides, beside its weights, what the model makes of a text (``hamt.identity``)."""
        inner = self.transformer_config()
        telling = {name: getattr(inner, name, None) for name in _TELLING}
        return {**telling, "layers": self.layers, "reach": self.reach}

    def _take(self, inner: PreTrainedConfig) -> None:
        """What other code reads of a configuration, by the names of Transformers and of HAMT."""
        self.vocab_size, self.hidden_size = inner.vocab_size, inner.hidden_size
        self.num_hidden_layers, self.num_layers = (inner.num_hidden_layers,) * 2
        self.num_attention_heads, self.hidden_dim = inner.num_attention_heads, inner.hidden_size
        self.max_position_embeddings = inner.max_position_embeddings

    def transformer_config(self) -> PreTrainedConfig:
        """The transformer's own configuration.

        Raises:
            ValueError: if it is of a kind whose attention cannot be taken over.
        """
        fields = dict(self.transformer)
        kind = fields.pop("model_type", None)
        if kind not in KNOWN:
            raise ValueError(f"only models of {', '.join(KNOWN)} can be converted; this is {kind}")
        if (count := fields.get("num_hidden_layers", 0)) > MAX_LAYERS:  # some make a list of them
            raise ValueError(f"num_hidden_layers must be at most {MAX_LAYERS}; got {count}")
        for name in _BEYOND:
            if fields.get(name):
                raise ValueError(f"attention with {name} cannot be taken over")
        return AutoConfig.for_model(kind, **fields)

    @property
    def sizes(self) -> list[Sizes]:
        """Window and memory of each layer."""
        return [Sizes(*layer) for layer in self.layers]

    def validate_architecture(self) -> None:
        """Refuse sizes that do not fit together.

        Raises:
            ValueError: with what would be right.
        """
        if not isinstance(self.layers, list) or len(self.layers) != self.num_layers:
            raise ValueError(f"layers must be a list of {self.num_layers}, one for each layer")
        fields = Sizes._fields
        if any(not isinstance(x, list) or len(x) != len(fields) for x in self.layers):
            raise ValueError(f"each of layers must have {', '.join(fields)}")
        for layer, (sizes, own) in enumerate(zip(self.sizes, self.own_windows(), strict=True)):
            sizes.check()
            if own is not None and sizes.window > (most := sizes.whole(own)):
                raise ValueError(
                    f"window must be at most {most} in layer {layer}, whose attention sees {own}"
                )
        if type(self.reach) is not int or self.reach < 1:
            raise ValueError(f"reach must be a whole number of at least 1; got {self.reach!r}")

    def own_windows(self) -> list[int | None]:
        """How many tokens the transformer's attention sees in each layer, itself among them.

        None is all of them.
        """
        inner: Any = self.transformer_config()
        window = getattr(inner, "sliding_window", None)
        kinds = getattr(inner, "layer_types", None) or [_SLIDING] * inner.num_hidden_layers
        return [window if kind == _SLIDING else None for kind in kinds]

    def frequencies(self) -> list[torch.Tensor]:
        """(D / 2,) for each layer: the angles by which one position turns pairs of features.

        Raises:
            ValueError: if they depend on the length of the text, or some features do not turn.
        """
        inner: Any = self.transformer_config()
        told = inner.rope_parameters
        if "rope_type" in told:  # for all layers
            return [_frequencies(inner, told)] * inner.num_hidden_layers
        by_kind = {kind: _frequencies(inner, told[kind], kind) for kind in set(inner.layer_types)}
        return [by_kind[kind] for kind in inner.layer_types]


def _frequencies(inner: Any, told: dict[str, Any], layer_type: str | None = None) -> torch.Tensor:
    kind = told["rope_type"]
    if kind in ("dynamic", "longrope") or told.get("partial_rotary_factor", 1.0) != 1.0:
        raise ValueError(f"rotary positions of the kind {kind!r} cannot be taken over")
    half = head_dim_of(inner) // 2
    with torch.device("cpu"):  # whatever the model is made on
        if kind != "default":
            named = {} if layer_type is None else {"layer_type": layer_type}
            return ROPE_INIT_FUNCTIONS[kind](inner, torch.device("cpu"), **named)[0].double()
        power = torch.arange(half, dtype=torch.float64) / half
        return told["rope_theta"] ** -power


def head_dim_of(inner: Any) -> int:
    """D of a configuration of Transformers."""
    return getattr(inner, "head_dim", None) or inner.hidden_size // inner.num_attention_heads
