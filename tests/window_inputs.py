"""Window and memory as a loop over tokens, written from the definition, and inputs for it.

Shape legend: B batch, N tokens, H query heads, G key-value heads, D features of a head.
"""

import math

import torch
from torch import Tensor

from hamt.batch import Batch, Past
from hamt.window_and_memory.exact import STEP
from hamt.window_and_memory.mixer import WindowAndMemory
from hamt.window_and_memory.sizes import Sizes

HEADS, GROUPS, WIDTH = 4, 2, 8
REPEATS = HEADS // GROUPS
# Of one of the layers here: a key and a value, and the positions that they are seen from.
Entry = tuple[Tensor, Tensor, int]


def taker(
    sizes: Sizes, reach: int = 2000, dtype: torch.dtype = torch.float64, seed: int = 0
) -> WindowAndMemory:
    """With loud random weights, and slots that forget within some tens of tokens."""
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        frequencies = 100.0 ** -(torch.arange(WIDTH // 2) / (WIDTH // 2))
        mixer = WindowAndMemory(HEADS, GROUPS, WIDTH, sizes, frequencies, reach, horizon=25)
        with torch.no_grad():
            for weight in (*mixer.parameters(), *mixer.buffers()):
                weight.add_(0.3 * torch.randn_like(weight))
            if mixer.slots is not None:
                mixer.slots.log_half_life.copy_(3.0 + torch.rand(GROUPS, sizes.num_slots))
    return mixer.to(dtype)


def random_heads(rows: int, length: int, dtype: torch.dtype = torch.float64) -> list[Tensor]:
    """Queries (B, N, H, D), and keys and values (B, N, G, D)."""
    generator = torch.Generator().manual_seed(0)
    return [
        torch.randn(rows, length, heads, WIDTH, generator=generator, dtype=torch.float64).to(dtype)
        for heads in (HEADS, GROUPS, GROUPS)
    ]


class Loop:
    """What a mixer makes of one document, token by token; its attributes are the state.

    ``slots`` (G, S, F) and, for each key-value head, ``held``: positions of exact entries.
    """

    def __init__(self, mixer: WindowAndMemory, like: Tensor) -> None:
        self.mixer, sizes = mixer, mixer.sizes
        self.slots = like.new_zeros(GROUPS, sizes.num_slots, 2 * WIDTH + 4)
        self.held: list[list[int]] = [[] for _ in range(GROUPS)]
        self.left = 0  # tokens that have left the window

    def run(self, queries: Tensor, keys: Tensor, values: Tensor) -> Tensor:
        """(N, H, D), (N, G, D), (N, G, D) -> (N, H, D)."""
        sizes, outputs = self.mixer.sizes, []
        self.plain, self.values = keys, values
        self.keys = torch.stack([self.turn(key, t) for t, key in enumerate(keys)])
        for t in range(len(queries)):
            asked = self.turn(queries[t], t)
            outputs.append(torch.stack([self.attend(asked[h], h, t) for h in range(HEADS)]))
            if (t + 1) % sizes.block == 0 and t + 1 >= sizes.window:
                self.boundary(t + 1 - sizes.window)
        return torch.stack(outputs)

    def turn(self, x: Tensor, angle: Tensor | float) -> Tensor:
        """Pairs of features (f, f + D / 2), as complex numbers, by the angles of a position."""
        first, second = x.chunk(2, dim=-1)
        by = torch.as_tensor(angle, dtype=torch.float64) * self.mixer.frequencies
        turned = torch.complex(first, second) * torch.exp(1j * by)
        return torch.cat((turned.real, turned.imag), dim=-1)

    def attend(self, query: Tensor, head: int, t: int) -> Tensor:
        """What one query (D,) gets."""
        mixer, group = self.mixer, head // REPEATS
        begun = t - t % mixer.sizes.block
        scores, seen = [], []
        for j in range(self.left, t + 1):
            scores.append(query @ self.keys[j, group] / WIDTH**0.5)
            seen.append(self.values[j, group])
        kept = list(range(mixer.sizes.num_sinks)) if self.left else []
        for j in (*kept, *self.held[group]):
            key = self.turn(self.keys[j, group], max(0, begun - j - mixer.reach))
            scores.append(query @ key / WIDTH**0.5)
            seen.append(self.values[j, group])
        for slot in self.slots[group]:
            key, value, mass, place, square = slot.split((WIDTH, WIDTH, 1, 1, 2))
            if mass > 1e-6:
                variance = (square / mass - bands(key / mass)) / (WIDTH / 2)
                key = key / mass * mixer.slots.key_gain[group]
                key = self.turn(key, (begun - place / mass - mixer.reach).clamp(min=0))
                spread = mixer.slots.spread[head] * bands(query) * variance.clamp(min=0)
                added = mass[0].log() + mixer.slots.offset[head] + spread.sum() / (2 * WIDTH)
                scores.append(query @ key / WIDTH**0.5 + added)
                seen.append(value / mass)
        weights = torch.stack(scores).softmax(dim=0)
        return weights @ torch.stack(seen)

    def boundary(self, first: int) -> None:
        """The tokens from ``first`` on leave the window, those of one block."""
        sizes = self.mixer.sizes
        self.left, slots = first + sizes.block, []
        for group in range(GROUPS):
            leaving = [j for j in range(first, self.left) if j >= sizes.num_sinks]
            if sizes.num_exact:
                leaving = self.choose(group, leaving)
            slots.append(self.written(group, leaving))
        self.slots = torch.stack(slots) if sizes.num_slots else self.slots

    def choose(self, group: int, leaving: list[int]) -> list[int]:
        """Hold the E tokens of the largest salience; the rest is to be written.

        Before the salience counts whether a token is within the horizon.
        """
        candidates = [*self.held[group], *leaving]
        read = self.left + self.mixer.sizes.window - self.mixer.sizes.block
        horizon = self.mixer.salience.horizon or math.inf

        def worth(j: int) -> tuple[bool, float]:
            return read - j <= horizon, self.salience(group, j)

        order = sorted(candidates, key=worth, reverse=True)
        self.held[group] = order[: self.mixer.sizes.num_exact]
        return sorted(order[self.mixer.sizes.num_exact :])

    def aged_slots(self, boundary: int) -> Tensor:
        """``slots`` with the ages of tokens, at a boundary, in the place of their positions."""
        slots = self.slots.clone()
        slots[..., -3] = boundary * slots[..., -4] - slots[..., -3]
        return slots

    def salience(self, group: int, j: int) -> float:
        """How much a token is worth holding, by its key without rotary position."""
        worth = float(self.plain[j, group].detach() @ self.mixer.salience.weight[group].detach())
        return round(worth / STEP) * STEP

    def written(self, group: int, tokens: list[int]) -> Tensor:
        """The slots (S, F) after some of the C tokens of a block, which all take their time."""
        found = self.slots[group]
        if self.mixer.slots is None:
            return found
        block, memory = self.mixer.sizes.block, self.mixer.slots
        keep = 2.0 ** -(1 / memory.log_half_life[group].exp())[:, None]
        for _ in range(block - len(tokens)):
            found = found * keep
        for j in tokens:
            key = self.plain[j, group]
            write = (memory.address[group] @ key + memory.address_bias[group]).softmax(dim=0)
            write = write * (memory.strength[group] @ key).exp()
            one = torch.ones(1, dtype=key.dtype)
            counts = torch.cat((one, j * one, bands(self.keys[j, group])))
            item = torch.cat((self.keys[j, group], self.values[j, group], counts))
            found = found * keep + write[:, None] * item
        return found


def bands(x: Tensor) -> Tensor:
    """The squares of pairs of features (f, f + D / 2) that turn fast, and of those that do not."""
    pairs = x.square().view(2, -1).sum(dim=0)
    return pairs.view(2, -1).sum(dim=1)


def slots_of(state: dict[str, Tensor]) -> Tensor:
    """(B, G, S, F) of a state that was returned."""
    counts = state["slot_counts"].unflatten(-1, (-1, 4))
    return torch.cat((state["slot_keys"], state["slot_values"], counts), dim=-1)


def one_by_one(mixer: WindowAndMemory, heads: list[Tensor]) -> Tensor:
    """Rows (B, N, ., D), each a document of its own, by the loop: (B, N, H, D)."""
    rows = zip(*heads, strict=True)
    return torch.stack([Loop(mixer, heads[0]).run(*row) for row in rows])


def pieces(
    mixer: WindowAndMemory, heads: list[Tensor], cuts: tuple[int, ...], **told: Tensor
) -> tuple[Tensor, dict[str, Tensor]]:
    """Rows read in pieces, what was read carried along: outputs, and the state after the last."""
    outputs, state, past = [], None, None
    bounds = zip((0, *cuts), (*cuts, heads[0].shape[1]), strict=True)
    for start, end in bounds:
        part = {name: x[:, start:end] for name, x in told.items()}
        batch = Batch.of(part.get("mask"), part.get("names"), past)
        output, state = mixer(*(x[:, start:end] for x in heads), batch, state)
        past: Past | None = batch.after(heads[0][:, start:end])
        outputs.append(output)
    return torch.cat(outputs, dim=1), state
