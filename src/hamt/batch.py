"""What holds for all layers in one forward pass: padding, packed documents, what was read before.

Shape legend: B batch, N tokens.
"""

from dataclasses import dataclass, field, fields
from typing import Any

import torch
from torch import Tensor

from hamt.fingerprint import OPENING, fingerprint
from hamt.memory import UNNAMED, number_documents


@dataclass
class Batch:
    """What holds for all layers in one forward pass over N tokens.

    Args:
        mask: (B, N), true for real tokens, false for padding; None if all are real.
        documents: (B, N) numbers of documents packed in a row, 0 for the one that the state belongs
            to, none of which comes again (``number_documents``); None if each row is one document.
        num_tokens: (B,) real tokens of the state's document before these; None is 0.
        last_name: (B,) name of the last token's document, None if documents have no names.
        shared: what a mixer works out once for all layers of its kind.
    """

    mask: Tensor | None = None
    documents: Tensor | None = None
    num_tokens: Tensor | None = None
    last_name: Tensor | None = None
    shared: dict[Any, Any] = field(default_factory=dict)

    @classmethod
    def of(
        cls,
        attention_mask: Tensor | None = None,
        seq_idx: Tensor | None = None,
        past: "Past | None" = None,
    ) -> "Batch":
        """From a mask (B, N), zero for padding, and names of documents (B, N)."""
        mask = None if attention_mask is None else attention_mask.ne(0)
        num_tokens = None if past is None else past.num_tokens
        if seq_idx is None:
            return cls(mask, num_tokens=num_tokens)
        if not seq_idx.shape[1]:
            return cls(mask, None, num_tokens, None if past is None else past.seq_idx)
        if mask is not None:
            seq_idx = _fill_padding(seq_idx, mask, past)
        documents = number_documents(seq_idx, None if past is None else past.seq_idx)
        # A copy: the caller may write into its names, or have very many of them.
        return cls(mask, documents, num_tokens, seq_idx[:, -1].clone())

    def to(self, device: torch.device, **options: Any) -> "Batch":
        """The same on another device, as Accelerate moves the arguments of a layer."""

        def moved(x: Tensor | None) -> Tensor | None:
            return None if x is None else x.to(device, **options)

        return Batch(
            moved(self.mask),
            moved(self.documents),
            moved(self.num_tokens),
            moved(self.last_name),
        )

    def positions(self, inputs: Tensor) -> Tensor:
        """Real tokens of its document before each token of (B, N, ...): (1 or B, N)."""
        batch, length = inputs.shape[:2]
        before = None if self.num_tokens is None else self.num_tokens[:, None]
        if self.mask is None and self.documents is None:
            count = torch.arange(length, device=inputs.device)[None]
            return count if before is None else count + before
        real = inputs.new_ones(batch, length, dtype=torch.bool) if self.mask is None else self.mask
        count = real.long().cumsum(dim=1) - real.long()
        if self.documents is None:
            return count if before is None else count + before
        starts = self.documents.diff(dim=1, prepend=self.documents[:, :1]).ne(0)
        index = torch.arange(length, device=inputs.device)
        first = torch.where(starts, index, 0).cummax(dim=1).values
        count = count - count.gather(1, first)
        return count if before is None else count + before * self.documents.eq(0)

    def after(
        self, inputs: Tensor, ids: Tensor | None = None, before: "Past | None" = None
    ) -> "Past":
        """What has been read after the tokens ``ids`` (B, N), which came as (B, N, ...)."""
        if inputs.shape[1] == 0:
            nothing = torch.zeros(inputs.shape[0], dtype=torch.long, device=inputs.device)
            return before or Past(nothing if self.num_tokens is None else self.num_tokens)
        plain = self.mask is None and self.documents is None
        if plain and inputs.shape[1] == 1 and not (ids is None or before is None):
            return self._after_one(ids, before)
        positions = self.positions(inputs)
        real = 1 if self.mask is None else self.mask[:, -1]
        num_tokens = positions[:, -1].expand(inputs.shape[0]) + real
        if ids is None:
            return Past(num_tokens, self.last_name)
        last, fresh = self.mask, None
        if self.documents is not None:  # what came before the last document is not in the state
            of_last = self.documents.eq(self.documents[:, -1:])
            last = of_last if last is None else last & of_last
            fresh = self.documents[:, -1].ne(0)
        first = positions < OPENING
        first = first.expand(ids.shape) if last is None else first & last
        read = []
        for name, mask in (("fingerprint", last), ("opening", first)):
            known = None if before is None else getattr(before, name)
            if known is not None and fresh is not None:
                known = known.masked_fill(fresh, 0)
            read.append(fingerprint(ids, mask, known))
        return Past(num_tokens, self.last_name, *read)

    def _after_one(self, ids: Tensor, before: "Past") -> "Past":
        """``after`` for a decoding step, of which all of that would be a few per cent."""
        num_tokens = before.num_tokens if self.num_tokens is None else self.num_tokens
        longer = fingerprint(ids, None, before.fingerprint)
        opening = fingerprint(ids, None, before.opening)
        known = 0 if before.opening is None else before.opening
        opening = opening.where(num_tokens < OPENING, known)
        return Past(num_tokens + 1, self.last_name, longer, opening)


@dataclass(frozen=True)
class Past:
    """What each row has read of the document that its state belongs to; forks share it.

    Args:
        num_tokens: (B,) real tokens.
        seq_idx: (B,) name of the document, or None if documents were never told apart.
        fingerprint: (B,) of all real tokens, see ``hamt.fingerprint``; None if it is not known.
        opening: (B,) fingerprint of the first ``OPENING`` of them.
        unread: (B,) the token that ``generate`` wrote last and has not read, -1 where there is
            none; or None.
    """

    num_tokens: Tensor
    seq_idx: Tensor | None = None
    fingerprint: Tensor | None = None
    opening: Tensor | None = None
    unread: Tensor | None = None

    def tensors(self) -> dict[str, Tensor]:
        """What is known, by name."""
        found = {field.name: getattr(self, field.name) for field in fields(self)}
        return {name: tensor for name, tensor in found.items() if tensor is not None}

    @classmethod
    def of(cls, tensors: dict[str, Tensor]) -> "Past":
        """From what ``tensors`` gave; other names are left out.

        Raises:
            ValueError: if the number of tokens is missing.
        """
        names = {field.name for field in fields(cls)}
        if "num_tokens" not in tensors:
            raise ValueError("not a whole HAMT state: save it again")
        return cls(**{name: tensor for name, tensor in tensors.items() if name in names})


def take(x: Tensor, index: Tensor) -> Tensor:
    """Tokens ``index`` (B, n) of (1 or B, N, ...): -> (B, n, ...)."""
    x = x.expand(index.shape[0], *x.shape[1:])
    return x.gather(1, index.view(*index.shape, *[1] * (x.ndim - 2)).expand(-1, -1, *x.shape[2:]))


def rows_and_length(hidden_states: Tensor) -> tuple[int, int]:
    """B and N of (B, N, d).

    Raises:
        ValueError: for a text of any length that is exported: its tiles are counted in Python.
    """
    rows, length = hidden_states.shape[:2]
    if torch.compiler.is_exporting() and isinstance(length, torch.SymInt):
        raise ValueError(
            "a HAMT cannot be exported for texts of any length: export the step of one token with "
            "its state (hamt export), or a text of fixed length"
        )
    return rows, length


def padding_mask(attention_mask: Tensor | None, length: int) -> Tensor | None:
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


def names_of_documents(
    position_ids: Tensor | None,
    cu_seq_lens: Tensor | None,
    hidden_states: Tensor,
    past: Past | None,
) -> tuple[Tensor | None, Past | None]:
    """Names of documents (B, N) as the flattening collators tell them, or None for one document.

    The past is named document 0 if it has no name, so that another document can begin after it.
    """
    batch, length = hidden_states.shape[:2]
    before = None if past is None else past.seq_idx
    if cu_seq_lens is None and position_ids is None:
        return None if before is None else before[:, None].expand(-1, length), past
    if cu_seq_lens is not None:
        index = torch.arange(length, device=hidden_states.device)
        documents = torch.searchsorted(cu_seq_lens.to(index), index, right=True).expand(batch, -1)
    else:
        assert position_ids is not None
        documents = position_ids.eq(0).cumsum(dim=1).expand(batch, -1)
    if past is None:
        return documents, None
    before = torch.zeros_like(past.num_tokens) if before is None else before
    before = before.masked_fill(before.eq(UNNAMED), 0)
    return documents + before[:, None], Past(past.num_tokens, before)


def _fill_padding(seq_idx: Tensor, real: Tensor, past: Past | None) -> Tensor:
    """Let padding join the document of the last real token before it, or of the first one.

    A row without any real token stays in the document that it has read, also if that has no name.
    """
    index = torch.arange(real.shape[1], device=real.device)
    before = index.where(real, -1).cummax(dim=1).values
    first = real.byte().argmax(dim=1, keepdim=True)
    filled = seq_idx.gather(1, before.where(before >= 0, first))
    if past is None:
        return filled
    unread = ~real.any(dim=1, keepdim=True)
    if past.seq_idx is None:
        return filled.long().masked_fill(unread, UNNAMED)
    return past.seq_idx[:, None].where(unread, filled)
