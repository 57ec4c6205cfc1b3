"""How ``generate`` continues a state: ``model.generate(new_ids, past_key_values=state)``.

The ids may be those that come after what the state has read, or the whole text from its beginning,
as Transformers expects it: the state knows the two apart by a fingerprint of what it has read. What
cannot be told apart is refused. Without any ids the text goes on from its last token, which is the
first of the sequences that are returned.

``all_new=True`` says that they are new, whatever they begin with.

A state of one row continues any number of prompts. ``generate`` updates a state in place, unless
it needs more rows than the state has: then it works on a copy. If it does not come to its end, the
state is as it was.

Shape legend: B batch, N tokens.
"""

from contextlib import nullcontext
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor
from transformers import GenerationConfig
from transformers.generation import GenerationMixin, StoppingCriteriaList

from hamt.batch import Past
from hamt.cache import HAMTCache
from hamt.fingerprint import OPENING, fingerprint


class HAMTGenerationMixin(GenerationMixin):
    """``generate`` on states. Hooks of Transformers that are private have a leading underscore."""

    model: Any  # the backbone, which HAMTForCausalLM brings

    def generate(self, *args, **kwargs):
        """As in Transformers; a state that is given is updated, or stays as it was on an error."""
        state, native = kwargs.get("past_key_values"), self.model.native
        with nullcontext() if native is None else native.looked_at_once():
            if not isinstance(state, HAMTCache):
                return super().generate(*args, **kwargs)  # type: ignore[misc]
            before = state.fork()
            try:
                return super().generate(*args, **kwargs)  # type: ignore[misc]
            except BaseException:  # Ctrl-C, too
                state.become(before)
                raise

    def _maybe_initialize_input_ids_for_generation(self, inputs, bos_token_id, model_kwargs):
        state = model_kwargs.get("past_key_values")
        told = model_kwargs.get("inputs_embeds") is None and isinstance(state, HAMTCache)
        if told and state.has_previous_state() and (inputs is None or not inputs.shape[-1]):
            if (ids := state.unread) is None:
                if _has_unread(state.past):
                    raise ValueError(
                        "some rows of the state have ended, others have not: give ids, or choose "
                        "those that have not with HAMTCache.batch_select_indices"
                    )
                raise ValueError(
                    "the state has read its last token: give at least one for what comes after it"
                )
            model_kwargs["goes_on"] = True
            return ids
        return super()._maybe_initialize_input_ids_for_generation(  # type: ignore[misc]
            inputs, bos_token_id, model_kwargs
        )

    def _prepare_cache_for_generation(self, generation_config, model_kwargs, *args):
        state = model_kwargs.get("past_key_values")
        if state is None:
            if generation_config.use_cache:  # HAMT's state is the only cache it has
                model_kwargs["past_key_values"] = HAMTCache(len(self.model.layers))
            return
        if generation_config.use_cache is False:
            raise ValueError("a state is not used with use_cache=False: leave one of them out")
        super()._prepare_cache_for_generation(  # type: ignore[misc]
            generation_config, model_kwargs, *args
        )
        if not isinstance(state, HAMTCache):
            return
        told, (_, prompts, *_) = generation_config, args
        copies = max(told.num_beams or 1, told.num_return_sequences or 1)
        if state.batch_size == 1:
            copies *= prompts
        if copies > 1:
            state = state.fork()  # the caller's keeps its rows
            state.batch_repeat_interleave(copies)
            model_kwargs["past_key_values"] = state

    def _prefill(self, input_ids, generation_config, model_kwargs, *args, **kwargs):
        state, ids = model_kwargs.get("past_key_values"), input_ids
        model_kwargs["position_ids"] = None  # positions live in the state
        if isinstance(state, HAMTCache) and state.has_previous_state():
            if model_kwargs.get("inputs_embeds") is not None:
                raise ValueError(
                    "generate continues a state with token ids: give embeddings to the model "
                    "itself, as model(inputs_embeds=..., past_key_values=state)"
                )
            mask, columns = _given_mask(ids, state, generation_config, model_kwargs)
            ids, mask = self._new_tokens(state, ids, mask, columns)
            # A mask that covers more than the ids tells Transformers that all of them are new.
            before = state.get_seq_length() if generation_config.prefill_chunk_size else 1
            generation_config._mask_length = -1
            model_kwargs["attention_mask"] = (
                None if mask.all() else torch.cat((mask.new_ones(len(mask), before), mask), dim=1)
            )
        for name in ("goes_on", "all_new"):
            model_kwargs.pop(name, None)
        return super()._prefill(  # type: ignore[misc]
            ids, generation_config, model_kwargs, *args, **kwargs
        )

    def prepare_inputs_for_generation(  # type: ignore[override]
        self, input_ids, inputs_embeds=None, all_new=None, ends=None, **kwargs
    ):
        """As in Transformers; a row that has ended reads no padding into its state."""
        # ``generate`` looks in this signature for the arguments that it takes.
        inputs = super().prepare_inputs_for_generation(  # type: ignore[misc]
            input_ids, inputs_embeds=inputs_embeds, **kwargs
        )
        if ends is not None and kwargs.get("past_key_values") is not None:
            running = ends.running(input_ids)
            if not running.all():
                inputs["attention_mask"] = running.long()[:, None]
        return {**inputs, "position_ids": None}

    def _sample(  # type: ignore[override]
        self, input_ids, logits_processor, stopping_criteria, generation_config, **kwargs
    ):
        state = kwargs.get("past_key_values")
        ends = _Ends(stopping_criteria, input_ids)
        if len(input_ids) > 1:  # a single row ends when all do
            kwargs["ends"] = stopping_criteria = ends
        output = super()._sample(  # type: ignore[misc]
            input_ids, logits_processor, stopping_criteria, generation_config, **kwargs
        )
        if state is not None:
            sequences = output if isinstance(output, Tensor) else output.sequences
            _note_unread(state, sequences, ends.running(sequences))
        return output

    def _beam_search(  # type: ignore[override]
        self, input_ids, logits_processor, stopping_criteria, generation_config, **kwargs
    ):
        state, length = kwargs.get("past_key_values"), input_ids.shape[1]
        before = None if state is None else state.fork()
        mask, columns = _given_mask(input_ids, before, generation_config, kwargs)
        output = super()._beam_search(  # type: ignore[misc]
            input_ids, logits_processor, stopping_criteria, generation_config, **kwargs
        )
        if isinstance(output, Tensor) or before is None:
            return output
        # The state has followed the beams that were still running, not those that are returned.
        output.past_key_values = None
        if kwargs.get("inputs_embeds") is None:
            sequences, returned = output.sequences, generation_config.num_return_sequences
            rows = torch.arange(len(sequences), device=sequences.device) // returned
            rows = rows * generation_config.num_beams
            before.batch_select_indices(rows)
            ids, mask = self._new_tokens(before, input_ids[rows], mask[rows], columns)
            indices: Any = output.beam_indices
            written = indices.ge(0)  # what comes after them is padding
            new = sequences[:, length:-1].where(written[:, :-1], 0)  # Transformers pads with -1
            self.model(
                input_ids=torch.cat((ids, new), dim=1),
                attention_mask=torch.cat((mask, written[:, :-1].to(mask.dtype)), dim=1),
                past_key_values=before,
            )
            _note_unread(before, sequences, written[:, -1])
            output.past_key_values = before
        return output

    def _new_tokens(
        self, state: HAMTCache, ids: Tensor, mask: Tensor, columns: int
    ) -> tuple[Tensor, Tensor]:
        """Of the given ids (B, N) those that the state has not read, and their mask.

        Args:
            state: what has been read; if its last written token was not, it is read now.
            ids: the ids given.
            mask: (B, N), zero for padding.
            columns: how many tokens the caller's mask covers, N or more.

        Raises:
            ValueError: if ids and state do not fit together.
        """
        past, seen, length = state.past, state.get_seq_length(), ids.shape[1]
        if past is None or len(past.num_tokens) != len(ids):
            return ids, mask  # nothing is read yet, or the model refuses the rows
        unread = _has_unread(past)
        if columns != length:
            if columns - length not in {seen, seen + unread}:
                raise ValueError(
                    f"attention_mask covers {columns} tokens, but the state has read {seen} and "
                    f"{length} are given: make it {length} long, or {seen + length}"
                )
            unread = unread and columns - length > seen
        elif _repeats(past, ids, mask):
            rest = mask * (mask.cumsum(dim=1) > past.num_tokens[:, None])
            if not rest.any(dim=1).all():
                raise ValueError(
                    "the state has already read these ids: give those that come after them"
                )
            start = int(rest.any(dim=0).byte().argmax())
            return ids[:, start:], rest[:, start:]
        if unread:
            assert past.unread is not None
            real = past.unread.ge(0)
            self.model(
                input_ids=past.unread.clamp(min=0)[:, None],
                attention_mask=real.long()[:, None],
                past_key_values=state,
            )
        return ids, mask


class _Ends(StoppingCriteriaList):
    """Stopping criteria that note how long each row of ids (B, N) was when it ended."""

    def __init__(self, criteria: StoppingCriteriaList, ids: Tensor) -> None:
        super().__init__(criteria)
        self.lengths = torch.full((len(ids),), 2**62, device=ids.device)

    def __call__(self, input_ids: Tensor, scores: Any, **kwargs: Any) -> Any:
        ended = super().__call__(input_ids, scores, **kwargs)
        self.lengths = self.lengths.clamp(max=input_ids.shape[1]).where(ended, self.lengths)
        return ended

    def running(self, ids: Tensor) -> Tensor:
        """(B,) whether the last one of ids (B, N) is a row's own, and not padding after its end."""
        return self.lengths >= ids.shape[1]


def _given_mask(
    ids: Tensor, state: HAMTCache | None, generation_config: GenerationConfig, model_kwargs: dict
) -> tuple[Tensor, int]:
    """The caller's mask of these ids (B, N), and how many tokens it covers."""
    mask, length = model_kwargs.get("attention_mask"), ids.shape[1]
    # Transformers drops a mask without zeros and notes its length.
    columns = getattr(generation_config, "_mask_length", length) if mask is None else mask.shape[1]
    mask = torch.ones_like(ids) if mask is None else mask[:, -length:]
    if state is not None and model_kwargs.get("goes_on"):
        mask = torch.ones_like(ids)  # Transformers takes one that is the padding token for padding
        columns = length + state.get_seq_length()
    elif state is not None and model_kwargs.get("all_new"):
        columns = length + state.get_seq_length() + _has_unread(state.past)
    return mask, columns


def _has_unread(past: Past | None) -> bool:
    return past is not None and past.unread is not None and bool(past.unread.ge(0).any())


def _repeats(past: Past, ids: Tensor, mask: Tensor) -> bool:
    """Whether each row of ids (B, N) begins with all that the state has read.

    Raises:
        ValueError: if some rows do and others do not, or one begins like it and then differs.
    """
    count = mask.cumsum(dim=1)
    found = []
    for limit, known in ((past.num_tokens, past.fingerprint), (OPENING, past.opening)):
        limit = past.num_tokens.clamp(max=limit)
        enough = count[:, -1] >= limit
        read = fingerprint(ids, mask * (count <= limit[:, None]))
        found.append(enough & read.eq(read + 1 if known is None else known))
    whole, opening = found
    if whole.all():
        return True
    if (whole & past.num_tokens.gt(0)).any() or (opening & past.num_tokens.ge(OPENING)).any():
        raise ValueError(
            "these ids begin as what the state has read, and then differ or do so in some rows "
            "only: give just the ids that come after it (with all_new=True, if they are meant to "
            "begin alike)"
        )
    return False


def _note_unread(state: HAMTCache, sequences: Tensor, running: Tensor) -> None:
    """Let the state know the token that was written last: it has not been read."""
    if state.past is not None:
        state.past = replace(state.past, unread=sequences[:, -1].where(running, -1))
