"""What every write rule answers.

Shape legend: ... any leading dimensions, B batch, N tokens, H heads, S slots, F features of an
item; T tiles, C tokens of a tile.
"""

from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor

# The initial logit of a write gate, 0.12. Under the delta rule every write erases: at 0.5, nothing
# is left after a few dozen tokens of an item that might be asked for, and recall is learned late
# (docs/LOG.md).
INITIAL_WRITE_LOGIT = -2.0


class Gates(NamedTuple):
    """The gates of every token.

    ``write`` w (..., H, S); ``log_forget`` log α ≤ 0 (..., H, S), None where the rule derives it
    from w; ``beta`` β in [0, 1] (..., H), the strength of a correction, None where a rule has none.
    """

    write: Tensor
    log_forget: Tensor | None = None
    beta: Tensor | None = None

    def map(self, function: Callable[[Tensor], Tensor]) -> "Gates":
        """The gates with ``function`` applied to each that is there."""
        return Gates(*(None if gate is None else function(gate) for gate in self))  # type: ignore[arg-type]

    def tokens(self, index: slice | list[int]) -> "Gates":
        """The gates of these tokens, of gates (B, N, ...)."""
        return self.map(lambda gate: gate[:, index])

    def masked(self, mask: Tensor) -> "Gates":
        """Gates of zero where ``mask`` (B, N) is false: these tokens neither write nor forget."""
        return self.map(
            lambda gate: gate.where(mask.bool().view(*mask.shape, *[1] * (gate.ndim - 2)), 0)
        )


class WriteRule:
    """One way to write to the slots.

    A rule without ``tiles`` runs in the loop alone. ``decay_rate`` λ is the share that is forgotten
    at every token, for rules that forget at a fixed pace.
    """

    name: str
    operations = 6  # of a turn, for each number of the state: decay, write and read it

    def __init__(self, decay_rate: float = 0.001) -> None:
        self.decay_rate = decay_rate

    def logit_sizes(self, heads: int, slots: int) -> tuple[int, ...]:
        """How many logits each gate is made from."""
        raise NotImplementedError

    def initial_logits(self, forget: Tensor, heads: int, constant: bool) -> Tensor:
        """The biases of a gating network at initialisation.

        Args:
            forget: (H · S,) logits of 1 - α at the initial half-life of each slot.
            heads: H.
            constant: whether the gates do not depend on the token.
        """
        raise NotImplementedError

    def gates(self, logits: Tensor, heads: int) -> Gates:
        """Gates from the logits (..., sum of ``logit_sizes``) of a gating network."""
        raise NotImplementedError

    def open_gates(self, slots: Tensor) -> Gates:
        """Gates that write an item whole to all slots (..., H, S) and forget nothing."""
        return Gates(torch.ones_like(slots), torch.zeros_like(slots))

    def complete(self, gates: Gates, dtype: torch.dtype) -> Gates:
        """The gates as the recurrence uses them: none missing, in ``dtype``, log α floored.

        Raises:
            ValueError: if a gate is missing, or given although the rule has none of its kind.
        """
        if gates.log_forget is None:
            raise ValueError(
                f"the {self.name} write rule needs log_forget, the log of the forget gates"
            )
        if gates.beta is not None:
            raise ValueError(NO_BETA)
        return gates._replace(log_forget=floored(gates.log_forget, dtype))

    def turn(self, slots: Tensor, bound: Tensor, gates: Gates) -> Tensor:
        """One token: M (B, H, S, F), x (B, H, F) and its gates -> M after it."""
        raise NotImplementedError

    def tiles(
        self,
        bound: Tensor,
        gates: Gates,
        read: Tensor,
        slots: Tensor,
        documents: Tensor | None,
        ends: Tensor | None,
    ) -> tuple[Tensor, Tensor]:
        """All tiles of the chunked form.

        Args:
            bound: x, (B, H, T, C, F).
            gates: complete; w and log α (B, H, T, C, S), β (B, H, T, C, 1).
            read: r, (B, H, T, C, S).
            slots: M before the first tile, (B, H, S, F).
            documents: (B, 1, T, C) document of each token, or None.
            ends: (B, 1, T + 1) document of ``slots`` and of each tile's last token, or None.

        Returns:
            Σ_s r[s] M[s] (B, H, T, C, F), and M after the last tile.
        """
        raise NotImplementedError

    def states(self, bound: Tensor, gates: Gates, slots: Tensor) -> Tensor:
        """M after each tile of one document, (B, H, T, S, F); arguments as for ``tiles``.

        Raises:
            NotImplementedError: for a rule that has no faster way than ``turn``.
        """
        raise NotImplementedError

    def has_tiles(self) -> bool:
        """Whether ``tiles`` is written, and is that of the ``turn`` that the rule has."""
        return self._has("tiles")

    def has_states(self) -> bool:
        """The same of ``states``."""
        return self._has("states")

    def _has(self, name: str) -> bool:
        wrote = next(each for each in type(self).__mro__ if {"turn", name} & vars(each).keys())
        return wrote is not WriteRule and name in vars(wrote)

    def adjoint(self, weight: Tensor, gates: Gates) -> tuple[Tensor, Tensor]:
        """One turn backwards, with the gates held fixed.

        Args:
            weight: (..., H, S), what each slot counts after the turn.
            gates: of the turn, complete.

        Returns:
            What the bound item of the turn counts (..., H), and each slot before it (..., H, S).
        """
        raise NotImplementedError

    def kept(self, gates: Gates) -> Tensor:
        """The share of its content that a slot keeps at each token, (..., H, S)."""
        assert gates.log_forget is not None
        return gates.log_forget.exp()

    def strength(self, gates: Gates) -> Tensor:
        """How much of an item is offered to the slots at each token, (..., H)."""
        return torch.ones_like(gates.write[..., 0])


NO_BETA = "the delta write rule needs beta, its strength; no other rule takes it"


def floored(log_forget: Tensor, dtype: torch.dtype) -> Tensor:
    """log α in ``dtype``, no lower than what its sums can hold beside others."""
    return log_forget.to(dtype).clamp(min=-40.0 if dtype == torch.float64 else -20.0)


def split_heads(logits: Tensor, sizes: tuple[int, ...], heads: int) -> list[Tensor]:
    """Logits (..., sum of sizes) -> one tensor (..., H, size / H) for each gate."""
    return [part.unflatten(-1, (heads, -1)) for part in logits.split(sizes, dim=-1)]
