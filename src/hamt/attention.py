"""Causal softmax attention as a token mixer: the transformer that HAMT is compared with.

``Attention`` is what all mixers of softmax attention share, ``FullAttention`` the one that sees all
earlier tokens; ``hamt.sliding_attention`` has the one that sees a window.

Shape legend: B batch, N new tokens, n tokens read before, d hidden_dim, H heads, F features of a
head.
"""

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from hamt.batch import Batch
from hamt.config import HAMTConfig, usual_head_dim
from hamt.convolution import ConvolvedMixer
from hamt.mixers import State
from hamt.parts import residual_linear
from hamt.products import FusedLinear, multiply_as_one, plain_weights, project


class Attention(ConvolvedMixer):
    """Projections to queries, keys and values, and one out of what is mixed, without biases."""

    def __init__(self, config: HAMTConfig) -> None:
        super().__init__(config)
        width, self.head_dim = config.hidden_dim, head_dim_of(config)
        self.num_heads = width // self.head_dim
        # Each is a matrix of its own to the optimiser.
        self.query_proj = nn.Linear(width, width, bias=False)
        self.key_proj = nn.Linear(width, width, bias=False)
        self.value_proj = nn.Linear(width, width, bias=False)
        self.output_proj = residual_linear(width, width)
        self.fused: FusedLinear | None = None

    def fusable_weights(self) -> list[Tensor]:
        """Matrices for what the short convolution gives."""
        return plain_weights(self.query_proj, self.key_proj, self.value_proj)

    def summary(self) -> str:
        """Its heads."""
        return f"{type(self).__name__}({self.num_heads} heads × {self.head_dim})"

    def attend(self, queries: Tensor, keys: Tensor, values: Tensor, mask: Tensor | None) -> Tensor:
        """(B, H, N, F), twice (B, H, n + N, F), (B or 1, 1, N, n + N) or None -> (B, H, N, F).

        Scores are divided by the root of ``head_dim``, however wide the queries are. Without a mask
        there are as many queries as keys, each sees those up to its own, or there is one query,
        which sees all.
        """
        causal = mask is None and queries.shape[2] > 1
        scale = self.head_dim**-0.5
        return F.scaled_dot_product_attention(
            queries, keys, values, mask, is_causal=causal, scale=scale
        )

    def project_tokens(self, hidden_states: Tensor) -> tuple[Tensor, ...]:
        """Queries, keys and values, (B, N, H, F) each."""
        products, weights = None, self.fusable_weights()
        if self.fused is not None:
            products = self.fused(hidden_states, weights)
        products = products or multiply_as_one(hidden_states, weights)
        if not products:
            maps = (self.query_proj, self.key_proj, self.value_proj)
            products = tuple(project(each, hidden_states) for each in maps)
        return tuple(x.unflatten(-1, (self.num_heads, -1)) for x in products)

    def rotary(self, positions: Tensor) -> tuple[Tensor, Tensor]:
        """cos and signed sin (1 or B, N, 1, F) of the angles at ``positions`` (1 or B, N).

        Angles are float64: in float32 they would be off by 0.03 rad at a million tokens.
        """
        base, half = float(self.config.rotation_base), self.head_dim // 2
        power = torch.arange(half, device=positions.device, dtype=torch.float64) / half
        angle = positions[..., None, None] * base**-power
        cos, sin = angle.cos(), angle.sin()
        return torch.cat((cos, cos), dim=-1), torch.cat((-sin, sin), dim=-1)

    @classmethod
    def operations_seeing(cls, config: HAMTConfig, seen: float) -> dict[str, float]:
        """Operations of a token that sees ``seen`` tokens: projections 8 d², attention 4 d seen."""
        d = config.hidden_dim
        convolution = 2 * d * config.conv_kernel_size * (config.conv_kernel_size > 1)
        softmax = 4 * (d // head_dim_of(config)) * seen
        return {
            "projections": 8.0 * d * d,
            "attention": 4.0 * d * seen,
            "elementwise": float(6 * d + softmax + convolution),
        }


class FullAttention(Attention):
    """Attention over all earlier tokens (Vaswani et al. 2017), rotary positions (Su et al. 2021,
    arXiv 2104.09864), and the short convolution of the memory in front, if ``conv_kernel_size`` is
    above 1.

    Its state has the ``keys`` and ``values`` of all tokens read, and grows with them; ``visible``
    says which of them belong to the document at hand, if not all do.
    """

    layer_type = "full_attention"

    def state_shapes(self) -> dict[str, tuple[int, ...]]:
        """``keys`` and ``values`` (n, H, F), ``visible`` (n,), ``conv`` the convolution's tail."""
        return {
            "keys": (0, self.num_heads, self.head_dim),
            "values": (0, self.num_heads, self.head_dim),
            "visible": (0,),
            **super().state_shapes(),
        }

    def empty_state(
        self, rows: int, dtype: torch.dtype = torch.float32, device: torch.device | None = None
    ) -> State:
        """A state before the first token: nothing, and none of it visible."""
        state = super().empty_state(rows, dtype, device)
        return {**state, "visible": state["visible"].bool()}

    def forward(
        self, hidden_states: Tensor, batch: Batch | None = None, state: State | None = None
    ) -> tuple[Tensor, State, Tensor | None]:
        """Mix a sequence, or continue one from ``state``; see ``Mixer.forward``.

        Raises:
            ValueError: if ``state`` is another model's.
        """
        batch = batch or Batch()
        before: State = state or {}
        if state is not None:
            self.check_state(state)
        hidden_states, new_state = self.convolve(hidden_states, batch, before)
        queries, keys, values = self.project_tokens(hidden_states)
        cos, sin = (x.to(queries.dtype) for x in self._tables(batch, hidden_states))
        queries, keys = rotate(queries, cos, sin), rotate(keys, cos, sin)
        if "keys" in before:
            keys = torch.cat((before["keys"].to(keys.dtype), keys), dim=1)
            values = torch.cat((before["values"].to(values.dtype), values), dim=1)
        new_state |= {"keys": keys, "values": values}
        past = keys.shape[1] - hidden_states.shape[1]
        mask = self._mask(batch, before.get("visible"), hidden_states, past, new_state)
        queries, keys, values = (x.transpose(1, 2) for x in (queries, keys, values))
        mixed = self.attend(queries, keys, values, mask)
        return project(self.output_proj, mixed.transpose(1, 2).flatten(-2)), new_state, None

    def _tables(self, batch: Batch, inputs: Tensor) -> tuple[Tensor, Tensor]:
        """cos and signed sin of all positions, the same in all layers."""
        tables = batch.shared.get(FullAttention)
        if tables is None:
            tables = batch.shared[FullAttention] = self.rotary(batch.positions(inputs))
        return tables

    def _mask(
        self, batch: Batch, visible: Tensor | None, inputs: Tensor, past: int, new_state: State
    ) -> Tensor | None:
        """Which keys each query sees, (B, 1, N, n + N), or None where the causal order says it all.

        Puts into ``new_state`` what the next tokens will see.
        """
        rows, length = inputs.shape[:2]
        told = visible is not None or batch.mask is not None or batch.documents is not None
        if not told and (past == 0 or length == 1):
            return None
        index = torch.arange(past + length, device=inputs.device)
        sees = (index <= index[past:, None])[None]
        if not told:
            return sees[:, None]
        if visible is None:
            visible = inputs.new_ones(rows, past, dtype=torch.bool)
        real = batch.mask
        if real is None:
            real = inputs.new_ones(rows, length, dtype=torch.bool)
        numbers = torch.zeros_like(visible, dtype=torch.long)
        documents = batch.documents
        if documents is None:
            documents = torch.zeros_like(real, dtype=torch.long)
        numbers, there = torch.cat((numbers, documents), dim=1), torch.cat((visible, real), dim=1)
        new_state["visible"] = there & numbers.eq(numbers[:, -1:])
        same = numbers[:, None, :] == documents[:, :, None]
        # Padding sees itself: a softmax over nothing would be NaN.
        itself = index == index[past:, None]
        return (sees & same & there[:, None, :] | itself)[:, None]

    @classmethod
    def operations(cls, config: HAMTConfig, length: int) -> dict[str, float]:
        """As ``operations_seeing`` the causal half, (N + 1) / 2 tokens."""
        return cls.operations_seeing(config, (length + 1) / 2)


def head_dim_of(config: HAMTConfig) -> int:
    """F as the configuration has it."""
    return config.attention_head_dim or usual_head_dim(config.hidden_dim)


def rotate(heads: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Turn feature pairs (f, f + F/2) of (B, N, H, F) by the angles of cos and signed sin."""
    return heads * cos + heads.roll(heads.shape[-1] // 2, dims=-1) * sin
