"""HAMT as Transformers classes: a backbone, a causal language model, a classifier.

Shape legend: B batch, N tokens, d hidden_dim, V vocab_size.
"""

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import (
    AutoConfig,
    AutoModel,
    AutoModelForCausalLM,
    AutoModelForSequenceClassification,
)
from transformers import initialization as init
from transformers.generation import GenerationMixin
from transformers.modeling_layers import (
    GenericForSequenceClassification,
    GradientCheckpointingLayer,
)
from transformers.modeling_outputs import BaseModelOutputWithPast, CausalLMOutputWithPast
from transformers.modeling_utils import PreTrainedModel
from transformers.utils.generic import can_return_tuple, merge_with_config_defaults
from transformers.utils.output_capturing import capture_outputs

from hamt.cache import HAMTCache
from hamt.config import HAMTConfig
from hamt.convolution import ShortConvolution
from hamt.cpu.linear import Linear, linear_together, matrices
from hamt.cross_entropy import IGNORE_INDEX, next_token_loss
from hamt.layers import (
    GatingNetwork,
    HAMTLayer,
    LayerState,
    ResidualLinear,
    RetrievalHead,
    RMSNorm,
    Rotation,
)


@dataclass
class HAMTBackboneOutput(BaseModelOutputWithPast):
    """``aux_loss`` is the mean auxiliary loss of the layers, in training with ``use_auxiliary_loss``."""

    aux_loss: Tensor | None = None


@dataclass
class HAMTCausalLMOutput(CausalLMOutputWithPast):
    """``aux_loss`` as in ``HAMTBackboneOutput``, unweighted."""

    aux_loss: Tensor | None = None


class HAMTMLP(nn.Module):
    """SwiGLU (Shazeer 2020, arXiv 2002.05202): (B, N, d) -> (B, N, d)."""

    def __init__(self, config: HAMTConfig) -> None:
        super().__init__()
        assert config.intermediate_dim is not None  # HAMTConfig fills it in
        self.gate_proj = Linear(config.hidden_dim, config.intermediate_dim, bias=False)
        self.up_proj = Linear(config.hidden_dim, config.intermediate_dim, bias=False)
        self.down_proj = ResidualLinear(config.intermediate_dim, config.hidden_dim, bias=False)

    def same_input(self) -> list[Tensor]:
        """The matrices that are multiplied with what comes in: ``hamt.cpu.linear.SameInput``."""
        return matrices(self.gate_proj, self.up_proj)

    def forward(self, hidden_states: Tensor) -> Tensor:
        """Transform each token by itself."""
        products = linear_together(hidden_states, self.same_input)
        gate, up = products or (self.gate_proj(hidden_states), self.up_proj(hidden_states))
        return self.down_proj(F.silu(gate) * up)


class HAMTBlock(GradientCheckpointingLayer):
    """Pre-norm residual block: memory, then MLP. The state goes in and out as a value."""

    def __init__(self, config: HAMTConfig) -> None:
        super().__init__()
        self.mixer_norm = RMSNorm(config.hidden_dim, eps=config.rms_norm_eps)
        self.mixer = HAMTLayer(config)
        has_mlp = config.intermediate_dim != 0
        self.mlp_norm = RMSNorm(config.hidden_dim, eps=config.rms_norm_eps) if has_mlp else None
        self.mlp = HAMTMLP(config) if has_mlp else None
        self.dropout = nn.Dropout(config.dropout)

    def forward(
        self,
        hidden_states: Tensor,
        attention_mask: Tensor | None = None,
        seq_idx: Tensor | None = None,
        state: LayerState | None = None,
    ) -> tuple[Tensor, LayerState, Tensor | None]:
        """Return hidden states (B, N, d), the state after the last token, and the auxiliary loss."""
        mixed, state, aux_loss = self.mixer(
            self.mixer_norm(hidden_states), attention_mask, seq_idx, state
        )
        hidden_states = hidden_states + self.dropout(mixed)
        if self.mlp is not None and self.mlp_norm is not None:
            hidden_states = hidden_states + self.dropout(self.mlp(self.mlp_norm(hidden_states)))
        return hidden_states, state, aux_loss


class HAMTPreTrainedModel(PreTrainedModel):
    """Initialisation, loading and saving shared by all HAMT models."""

    config_class = HAMTConfig
    config: HAMTConfig
    base_model_prefix = "model"
    supports_gradient_checkpointing = True
    _is_stateful = True
    _no_split_modules = ["HAMTBlock"]  # noqa: RUF012
    _skip_keys_device_placement = ["past_key_values"]  # noqa: RUF012
    _can_record_outputs = {"hidden_states": HAMTBlock}  # noqa: RUF012

    @torch.no_grad()
    def _init_weights(self, module: nn.Module) -> None:
        # Only modules with parameters of their own come here: Transformers skips others in code not
        # its own.
        if isinstance(module, nn.Linear):
            # Variance-preserving at any width, where the usual 0.02 would make small models deaf;
            # into the residual stream so that its scale stays constant (Radford et al. 2019).
            depth = 2 * self.config.num_layers if isinstance(module, ResidualLinear) else 1
            init.normal_(module.weight, std=(depth * module.in_features) ** -0.5)
            if module.bias is not None:
                init.zeros_(module.bias)
        elif isinstance(module, RetrievalHead):
            # Reading all slots from the start; without it training starts far more slowly.
            init.ones_(module.read_bias)
        elif isinstance(module, GatingNetwork):
            init.copy_(module.bias, module.initial_bias())
            if module.weight is not None:
                init.normal_(module.weight, std=module.weight.shape[1] ** -0.5)
        elif isinstance(module, Rotation):
            if module.weight is not None:
                init.zeros_(module.weight)
        elif isinstance(module, ShortConvolution):
            # The token itself, with a little of its past.
            init.normal_(module.weight, std=0.1)
            init.ones_(module.weight[-1])
        else:
            super()._init_weights(module)


class HAMTBackbone(HAMTPreTrainedModel):
    """Embedding, blocks and final norm, without a head; what ``AutoModel`` gives."""

    def __init__(self, config: HAMTConfig) -> None:
        super().__init__(config)
        # No padding_idx: padding is masked, and a tokenizer that pads with its end-of-text token
        # (GPT-2's) would leave that token without an embedding to learn.
        self.embed_tokens = nn.Embedding(config.vocab_size, config.hidden_dim)
        self.layers = nn.ModuleList(HAMTBlock(config) for _ in range(config.num_layers))
        self.norm = RMSNorm(config.hidden_dim, eps=config.rms_norm_eps)
        self.post_init()

    @merge_with_config_defaults
    @capture_outputs
    def forward(
        self,
        input_ids: Tensor | None = None,
        attention_mask: Tensor | None = None,
        position_ids: Tensor | None = None,
        past_key_values: HAMTCache | None = None,
        inputs_embeds: Tensor | None = None,
        use_cache: bool | None = None,
        seq_idx: Tensor | None = None,
        cu_seq_lens_q: Tensor | None = None,
        **kwargs,
    ) -> HAMTBackboneOutput:
        """Read a batch of sequences, or continue one.

        Args:
            input_ids: (B, N) tokens; or give
            inputs_embeds: (B, N, d).
            attention_mask: (B, N) or (B, seen + N), zero for padding.
            position_ids: (B, N); only used to see where packed documents start, at position 0.
            past_key_values: the state to continue from; it is updated.
            use_cache: return the state even if none was given.
            seq_idx: (B, N) document of each token; packed documents do not see each other.
            cu_seq_lens_q: boundaries of the documents packed in the one row, instead of
                ``seq_idx``.

        Returns:
            ``last_hidden_state`` (B, N, d), ``past_key_values`` and what else was asked for.
        """
        if (input_ids is None) == (inputs_embeds is None):
            raise ValueError("give exactly one of input_ids and inputs_embeds")
        hidden_states = self.embed_tokens(input_ids) if inputs_embeds is None else inputs_embeds
        cache = past_key_values
        if cache is not None and not isinstance(cache, HAMTCache):
            raise ValueError(f"past_key_values must be a HAMTCache; got {type(cache).__name__}")
        if cache is None and use_cache:
            cache = HAMTCache(len(self.layers))
        if cache is not None and len(cache.layers) != len(self.layers):
            raise ValueError(
                f"this state has {len(cache.layers)} layers, the model {len(self.layers)}: "
                "it comes from another model"
            )
        states = [None] * len(self.layers) if cache is None else cache.states
        mask = _padding(attention_mask, hidden_states.shape[1])
        if seq_idx is None:
            if position_ids is not None or cu_seq_lens_q is not None:
                states = [_in_a_document(state) for state in states]
            seq_idx = _documents(position_ids, cu_seq_lens_q, hidden_states, states[0])
        new_states, aux_losses = [], []
        for layer, state in zip(self.layers, states, strict=True):
            hidden_states, state, aux_loss = layer(
                hidden_states, attention_mask=mask, seq_idx=seq_idx, state=state
            )
            new_states.append(state)
            aux_losses.append(aux_loss)
        if cache is not None:
            cache.advance(new_states, hidden_states.shape[1])
        return HAMTBackboneOutput(
            last_hidden_state=self.norm(hidden_states),
            past_key_values=cache,
            aux_loss=None if aux_losses[0] is None else torch.stack(aux_losses).mean(),
        )


class HAMTForCausalLM(HAMTPreTrainedModel, GenerationMixin):
    """The language model: backbone and (tied) head.

    Example:
        >>> config = HAMTConfig(hidden_dim=64, num_layers=2, vocab_size=100)
        >>> ids = torch.randint(100, (1, 8))
        >>> HAMTForCausalLM(config)(ids, labels=ids)["logits"].shape
        torch.Size([1, 8, 100])
    """

    _tied_weights_keys = {"lm_head.weight": "model.embed_tokens.weight"}  # noqa: RUF012

    def __init__(self, config: HAMTConfig) -> None:
        super().__init__(config)
        self.model = HAMTBackbone(config)
        self.lm_head = Linear(config.hidden_dim, config.vocab_size, bias=False)
        self.post_init()

    @can_return_tuple
    def forward(
        self,
        input_ids: Tensor | None = None,
        attention_mask: Tensor | None = None,
        position_ids: Tensor | None = None,
        past_key_values: HAMTCache | None = None,
        inputs_embeds: Tensor | None = None,
        labels: Tensor | None = None,
        use_cache: bool | None = None,
        logits_to_keep: int | Tensor = 0,
        return_logits: bool = True,
        **kwargs,
    ) -> HAMTCausalLMOutput:
        """Predict the next token; the arguments of ``HAMTBackbone.forward`` and

        Args:
            labels: (B, N) targets, shifted inside, -100 where no loss is wanted.
            logits_to_keep: how many of the last positions get logits, or which; 0 is all.
            return_logits: False computes the loss a few tokens at a time, and no logits: of a large
                vocabulary they would take more memory than all the rest.

        Returns:
            ``loss`` in nats per token (with labels; the weighted ``aux_loss`` is part of it),
            ``logits`` (B, N, V), ``past_key_values``.
        """
        outputs = self.model(
            input_ids=input_ids,
            attention_mask=attention_mask,
            position_ids=position_ids,
            past_key_values=past_key_values,
            inputs_embeds=inputs_embeds,
            use_cache=use_cache,
            **kwargs,
        )
        logits, loss, hidden_states = None, None, outputs.last_hidden_state
        if return_logits:
            kept = (
                slice(-logits_to_keep, None) if isinstance(logits_to_keep, int) else logits_to_keep
            )
            logits = self.lm_head(hidden_states[:, kept])
        if labels is not None:
            shifted, total = kwargs.get("shift_labels"), kwargs.get("num_items_in_batch")
            if logits is None:
                targets = (
                    F.pad(labels[:, 1:], (0, 1), value=IGNORE_INDEX) if shifted is None else shifted
                )
                loss = next_token_loss(hidden_states, self.lm_head.weight, targets, total)
            else:
                loss = self.loss_function(
                    logits=logits, labels=labels, vocab_size=self.config.vocab_size, **kwargs
                )
            if outputs.aux_loss is not None:
                # Of several batches that make up one step, each brings its share.
                asked = labels if shifted is None else shifted
                share = 1.0 if total is None else asked.ne(IGNORE_INDEX).sum() / total
                loss = loss + self.config.aux_loss_weight * share * outputs.aux_loss
        return HAMTCausalLMOutput(
            loss=loss,
            logits=logits,
            past_key_values=outputs.past_key_values,
            hidden_states=outputs.hidden_states,
            aux_loss=outputs.aux_loss,
        )

    def _prepare_cache_for_generation(self, generation_config, model_kwargs, *args):
        # A private hook of generate: HAMT's state is the only cache it has.
        if generation_config.use_cache and model_kwargs.get("past_key_values") is None:
            model_kwargs["past_key_values"] = HAMTCache(self.config.num_layers)

    def prepare_inputs_for_generation(self, input_ids, inputs_embeds=None, **kwargs):  # type: ignore[override]
        """Positions live in the state; position_ids would only be searched for packed documents."""
        # ``generate`` looks for ``inputs_embeds`` in this signature.
        inputs = super().prepare_inputs_for_generation(  # type: ignore[misc]
            input_ids, inputs_embeds=inputs_embeds, **kwargs
        )
        return {**inputs, "position_ids": None}


class HAMTForSequenceClassification(GenericForSequenceClassification, HAMTPreTrainedModel):
    """A linear classifier on the hidden state of the last token that is not padding."""


HAMTModel = HAMTForCausalLM


def _padding(attention_mask: Tensor | None, length: int) -> Tensor | None:
    """The mask of these ``length`` tokens, (B, N), or None where nothing is padding."""
    if attention_mask is None:
        return None
    if attention_mask.ndim != 2 or attention_mask.shape[1] < length:
        raise ValueError(
            f"attention_mask must be (batch, tokens) and cover the {length} tokens of the input; "
            f"got {tuple(attention_mask.shape)}. Packed documents are told apart by seq_idx"
        )
    mask = attention_mask[:, -length:]
    # Reading values would break a graph.
    return None if not torch.compiler.is_compiling() and mask.ne(0).all() else mask


def _in_a_document(state: LayerState | None) -> LayerState | None:
    """The same state, named as document 0 if it has no name, so that another document can begin."""
    if state is None or state.memory.seq_idx is not None:
        return state
    return state._replace(memory=state.memory._replace(seq_idx=torch.zeros_like(state.position)))


def _documents(
    position_ids: Tensor | None,
    cu_seq_lens: Tensor | None,
    hidden_states: Tensor,
    state: LayerState | None,
) -> Tensor | None:
    """Document of each token (B, N) as the flattening collators tell it, or None for one document."""
    batch, length = hidden_states.shape[:2]
    before = None if state is None else state.memory.seq_idx
    if cu_seq_lens is not None:
        index = torch.arange(length, device=hidden_states.device)
        documents = torch.searchsorted(cu_seq_lens.to(index), index, right=True).expand(batch, -1)
    elif position_ids is not None:
        documents = position_ids.eq(0).cumsum(dim=1).expand(batch, -1)
    else:
        return None if before is None else before[:, None].expand(-1, length)
    return documents if before is None else documents + before[:, None]


AutoConfig.register("hamt", HAMTConfig)
AutoModel.register(HAMTConfig, HAMTBackbone)
AutoModelForCausalLM.register(HAMTConfig, HAMTForCausalLM)
AutoModelForSequenceClassification.register(HAMTConfig, HAMTForSequenceClassification)
