"""HAMT as Transformers classes: a backbone, a causal language model, a classifier.

Shape legend: B batch, N tokens, d hidden_dim, V vocab_size.
"""

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers.modeling_layers import (
    GenericForQuestionAnswering,
    GenericForSequenceClassification,
    GenericForTokenClassification,
)
from transformers.modeling_outputs import BaseModelOutputWithPast, CausalLMOutputWithPast
from transformers.utils.generic import can_return_tuple, merge_with_config_defaults
from transformers.utils.output_capturing import capture_outputs

from hamt.base_model import HAMTPreTrainedModel
from hamt.batch import Batch, names_of_documents, padding_mask, rows_and_length
from hamt.block import HAMTBlock
from hamt.cache import OTHER_CACHE, HAMTCache, check_cache
from hamt.config import HAMTConfig
from hamt.continuation import HAMTGenerationMixin
from hamt.cross_entropy import IGNORE_INDEX, head_loss
from hamt.decoding import Decoder
from hamt.fingerprint import embedded
from hamt.identity import Origin
from hamt.mixers import State, Stateful
from hamt.parts import RMSNorm, embedding
from hamt.products import has_extra_behaviour, project
from hamt.registration import register


class _WithMemories:
    """What outputs have beside their tensors: ``outputs["hcm_state"]``, as the memory's slots."""

    past_key_values: Any

    @property
    def hcm_state(self) -> Tensor | None:
        """The slots of all memories after the last token, (layers, B, H, S, F).

        None without, and in converted models, whose layers have slots of several sizes.
        """
        states = self.past_key_values.states if self.past_key_values else []
        slots = [state["slots"] for state in states if state and "slots" in state]
        return torch.stack(slots) if slots else None

    def __getitem__(self, key):
        return self.hcm_state if key == "hcm_state" else super().__getitem__(key)  # type: ignore[misc]


@dataclass
class HAMTBackboneOutput(_WithMemories, BaseModelOutputWithPast):
    """``aux_loss`` is the mean auxiliary loss of the layers, in training if asked for."""

    aux_loss: Tensor | None = None


@dataclass
class HAMTCausalLMOutput(_WithMemories, CausalLMOutputWithPast):
    """``aux_loss`` as in ``HAMTBackboneOutput``, unweighted."""

    aux_loss: Tensor | None = None


class HAMTBackbone(HAMTPreTrainedModel):
    """Embedding, blocks and final norm, without a head; what ``AutoModel`` gives."""

    def __init__(self, config: HAMTConfig) -> None:
        super().__init__(config)
        config.validate_architecture()  # fields may have been set one by one since it was made
        # No padding_idx: padding is masked, and a tokenizer that pads with its end-of-text token
        # (GPT-2's) would leave that token without an embedding to learn.
        self.embed_tokens = embedding(config)
        self.layers = nn.ModuleList(HAMTBlock(config, mixer) for mixer in config.layer_mixers)
        self.norm = RMSNorm(config.hidden_dim, eps=config.rms_norm_eps)
        self.native: Decoder | None = None
        self.post_init()

    @property
    def stateful(self) -> list[Stateful]:
        """What carries the state of each layer: its mixer."""
        return [layer.mixer for layer in self.layers]  # type: ignore[misc]

    def mixer_summary(self) -> str:
        """The mixers of all layers, for people: how many there are of each kind."""
        kinds = Counter(layer.mixer.summary() for layer in self.layers)  # type: ignore
        return ", ".join(f"{count} × {kind}" for kind, count in kinds.items())

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
        cache, (rows, length) = past_key_values, rows_and_length(hidden_states)
        if cache is not None:
            check_cache(cache, self, rows)
        elif use_cache:
            cache = HAMTCache(len(self.layers))
        states = [None] * len(self.layers) if cache is None else cache.states
        past = None if cache is None else cache.past
        if seq_idx is None:
            seq_idx, past = names_of_documents(position_ids, cu_seq_lens_q, hidden_states, past)
        batch = Batch.of(padding_mask(attention_mask, length), seq_idx, past)
        aux_losses: list[Tensor] = []
        decoded = None if self.native is None else self.native.run(hidden_states, batch, states)
        if decoded is not None:
            hidden_states, new_states = decoded
        else:
            hidden_states, new_states, aux_losses = self.run_layers(hidden_states, batch, states)
        if cache is not None:
            read = embedded(hidden_states) if input_ids is None else input_ids
            cache.advance(new_states, batch.after(hidden_states, read, cache.past), length)
            if cache.origin is None or not cache.origin.is_of(self):
                cache.origin = Origin(self)
        return HAMTBackboneOutput(
            last_hidden_state=hidden_states,
            past_key_values=cache,
            aux_loss=torch.stack(aux_losses).mean() if aux_losses else None,
        )

    def run_layers(
        self, hidden_states: Tensor, batch: Batch, states: Sequence[State | None]
    ) -> tuple[Tensor, list[State], list[Tensor]]:
        """Embeddings (B, N, d) through all layers and the last norm.

        Returns:
            (B, N, d), the state of each layer after the last token, and auxiliary losses.
        """
        new_states: list[State] = []
        aux_losses: list[Tensor] = []
        for layer, state in zip(self.layers, states, strict=True):
            hidden_states, state, aux_loss = layer(hidden_states, batch, state)
            new_states.append(state)
            if aux_loss is not None:
                aux_losses.append(aux_loss)
        return self.norm(hidden_states), new_states, aux_losses


class HAMTForCausalLM(HAMTPreTrainedModel, HAMTGenerationMixin):
    """The language model: backbone and (tied) head.

    Examples:
        >>> config = HAMTConfig(hidden_dim=64, num_layers=2, vocab_size=100)
        >>> ids = torch.randint(100, (1, 8))
        >>> HAMTForCausalLM(config)(ids, labels=ids)["logits"].shape
        torch.Size([1, 8, 100])
    """

    _tied_weights_keys = {"lm_head.weight": "model.embed_tokens.weight"}  # noqa: RUF012

    def __init__(self, config: HAMTConfig) -> None:
        super().__init__(config)
        self.model = HAMTBackbone(config)
        self.lm_head = nn.Linear(config.hidden_dim, config.vocab_size, bias=False)
        self.post_init()

    def _prepare_cache_for_generation(self, generation_config, model_kwargs, *args):
        given, kind = model_kwargs.get("past_key_values"), generation_config.cache_implementation
        if given is not None and not isinstance(given, HAMTCache):
            raise ValueError(OTHER_CACHE.format(type(given).__name__))
        if kind not in (None, "dynamic"):
            raise ValueError(
                f"cache_implementation={kind!r} is a way to keep keys and values; HAMT has a state "
                "of constant size instead: leave it out"
            )
        super()._prepare_cache_for_generation(generation_config, model_kwargs, *args)

    @can_return_tuple
    def forward(
        self,
        input_ids: Tensor | None = None,
        attention_mask: Tensor | None = None,
        position_ids: Tensor | None = None,
        past_key_values: HAMTCache | None = None,
        inputs_embeds: Tensor | None = None,
        labels: Tensor | None = None,
        num_items_in_batch: Tensor | None = None,
        use_cache: bool | None = None,
        logits_to_keep: int | Tensor = 0,
        return_logits: bool = True,
        **kwargs,
    ) -> HAMTCausalLMOutput:
        """Predict the next token; the arguments of ``HAMTBackbone.forward`` and

        Args:
            labels: (B, N) tokens of which each is the target of the position before it; -100 where
                no loss is wanted.
            num_items_in_batch: what the summed loss is divided by; None is the number of targets.
            logits_to_keep: how many of the last positions get logits, or which; 0 is all.
            return_logits: False computes the loss a few tokens at a time, and no logits: of a large
                vocabulary they would take more memory than all the rest.
            kwargs: ``shift_labels`` (B, N), the targets of the positions themselves, beside
                ``labels`` or instead of them.

        Returns:
            ``loss`` in nats per token (with labels; the weighted ``aux_loss`` is part of it),
            ``logits`` (B, N, V), ``past_key_values``.
        """
        native = self.model.native
        others = (position_ids, inputs_embeds, labels)
        if (
            native is not None
            and not (kwargs or has_extra_behaviour(self.model, HAMTBackbone))
            and all(other is None for other in others)
            and (return_logits and isinstance(logits_to_keep, int) and logits_to_keep >= 0)
        ):
            logits = native.step(self, input_ids, past_key_values, attention_mask)
            if logits is not None:
                return HAMTCausalLMOutput(logits=logits, past_key_values=past_key_values)
        outputs = self.model(
            input_ids=input_ids,
            attention_mask=attention_mask,
            position_ids=position_ids,
            past_key_values=past_key_values,
            inputs_embeds=inputs_embeds,
            use_cache=use_cache,
            return_dict=True,  # whatever the configuration asks of the outermost model
            **kwargs,
        )
        logits, loss, hidden_states = None, None, outputs.last_hidden_state
        if return_logits:
            kept = (
                slice(-logits_to_keep, None) if isinstance(logits_to_keep, int) else logits_to_keep
            )
            seen = hidden_states[:, kept]
            logits = None if native is None else native.logits(self.lm_head, seen)
            logits = project(self.lm_head, seen) if logits is None else logits
        # Trainer takes every argument whose name has "label" in it for one that it must give.
        targets = kwargs.pop("shift_labels", None)
        if targets is None and labels is not None:
            targets = F.pad(labels[:, 1:], (0, 1), value=IGNORE_INDEX)
        if targets is not None:
            if logits is None:
                loss = head_loss(self.lm_head, hidden_states, targets, num_items_in_batch)
            else:
                loss = self.loss_function(
                    logits,
                    labels,
                    self.config.vocab_size,
                    num_items_in_batch=num_items_in_batch,
                    shift_labels=targets,
                    **kwargs,
                )
            if outputs.aux_loss is not None:
                # Of several batches that make up one step, each brings its share.
                asked = targets.ne(IGNORE_INDEX).sum()
                share = 1.0 if num_items_in_batch is None else asked / num_items_in_batch
                loss = loss + self.config.aux_loss_weight * share * outputs.aux_loss
        return HAMTCausalLMOutput(
            loss=loss,
            logits=logits,
            past_key_values=outputs.past_key_values,
            hidden_states=outputs.hidden_states,
            aux_loss=outputs.aux_loss,
        )


class HAMTForSequenceClassification(GenericForSequenceClassification, HAMTPreTrainedModel):
    """A linear classifier on the hidden state of the last token that is not padding."""


class HAMTForTokenClassification(GenericForTokenClassification, HAMTPreTrainedModel):
    """A linear classifier on the hidden state of every token, which has seen those before it."""


class HAMTForQuestionAnswering(GenericForQuestionAnswering, HAMTPreTrainedModel):
    """Where an answer begins and ends in a text: a logit of each for every token.

    A token has seen those before it alone: give the question first, then the text.
    """


HAMTModel = HAMTForCausalLM
"""Another name of ``HAMTForCausalLM``."""


register(
    HAMTConfig,
    HAMTBackbone,
    HAMTForCausalLM,
    HAMTForSequenceClassification,
    HAMTForTokenClassification,
    HAMTForQuestionAnswering,
)
