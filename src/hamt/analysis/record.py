"""What the memories of a model do with a text, recorded without changing it.

Layers of attention are recorded beside them (``hamt.analysis.attention``).

Shape legend: B batch, N tokens, H heads, S slots, F features of an item, K key size, d hidden_dim,
D = H · F hcm_dim.
"""

from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from functools import partial
from itertools import accumulate
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from hamt.analysis.attention import (
    AttentionTrace,
    attention_layers,
    check_one_document,
    joined_attention,
    observe_attention,
)
from hamt.cache import HAMTCache
from hamt.layers import HAMTLayer
from hamt.memory import Gates, HolographicMemory, MemoryState, Tokens
from hamt.memory.forms import positions_of
from hamt.model import HAMTForCausalLM
from hamt.rerouting import rerouted

SEGMENT = 1024  # tokens of a long text that are read at a time


class Crossing(NamedTuple):
    """What happened at a boundary (``hamt.boundaries``): slots were ``mixing`` times the slots.

    ``mixing`` (B, H, S, S), None if they were only rounded; ``after`` (B, H, S, F), the slots
    then, rounded if the model rounds.
    """

    mixing: Tensor | None
    after: Tensor


class Trace(NamedTuple):
    """One run of one memory over N tokens of one document.

    Symbols are those of equations (1) to (4) in ``hamt.memory.holographic``.
    """

    memory: HolographicMemory
    items: Tensor  # v, lifted, (B, N, H, F)
    keys: Tensor  # k ⊛ p, the binding keys with their positions, (B, N, H, K)
    unbinding_keys: Tensor  # u ⊛ p, (B, N, H, K)
    gates: Gates  # as the recurrence uses them: (B, N, H, S), β (B, N, H)
    read: Tensor  # r, (B, N, H, S)
    before: MemoryState
    after: MemoryState
    output: Tensor  # y, (B, N, H, F)
    # Mean size of the rotation over the tokens, (H, K): radians, or the share of signs that flip.
    turn: Tensor | None = None
    gate: Tensor | None = None  # the output gate SiLU(W_g x), (B, N, D)
    crossings: dict[int, Crossing] = {}  # noqa: RUF012 by the number of tokens before the boundary

    @property
    def write(self) -> Tensor:
        """The write gates w, (B, N, H, S)."""
        return self.gates.write

    def states(self, ends: Iterable[int]) -> Iterator[Tensor]:
        """The slots (B, H, S, F) after the first n tokens, for each n of ``ends``, which rise."""
        state, begin = MemoryState(self.before.slots), 0  # positions are in the keys
        sequences = (self.items, self.keys, self.unbinding_keys, self.read)
        for end in ends:
            for stop in (*(n for n in sorted(self.crossings) if begin < n < end), end):
                if stop > begin:
                    part = slice(begin, stop)
                    items, keys, unbinding_keys, read = (x[:, part] for x in sequences)
                    tokens = Tokens(items, keys, unbinding_keys, read, self.gates.tokens(part))
                    _, state = self.memory.run(tokens, state)
                    begin = stop
                    if stop in self.crossings:
                        state = MemoryState(self.crossings[stop].after)
            yield state.slots


@dataclass
class Recording:
    """What was recorded of a text: traces by layer, and what enters the last norm, (B, N, d)."""

    traces: dict[int, Trace]  # of memories
    final: Tensor
    attention: dict[int, AttentionTrace] = field(default_factory=dict)

    def layers(self) -> list[int]:
        """All that were recorded, in order."""
        return sorted({*self.traces, *self.attention})

    def trace(self, layer: int) -> Trace | AttentionTrace:
        """That of a layer, whatever its mixer is."""
        return self.traces[layer] if layer in self.traces else self.attention[layer]


@contextmanager
def observe(
    model: HAMTForCausalLM,
    observer: Callable[[int, Trace], None],
    layers: Sequence[int] | None = None,
) -> Iterator[None]:
    """Within this context, tell of every run of some memories, in the order of layers.

    What is observed is what is computed: results do not change. A run must be over one document
    without padding. ``observer`` is called with the index of a layer and the trace of its run;
    ``layers`` are indices, None for all.
    """
    with ExitStack() as stack:
        memories = memory_layers(model)
        for index in memories if layers is None else layers:
            if index not in memories:
                raise ValueError(f"layer {index} has no memory to look into; {memories} have one")
            _observe(model.model.layers[index].mixer, partial(observer, index), stack)
        yield


def memory_layers(model: HAMTForCausalLM) -> list[int]:
    """Indices of the layers whose mixer is a memory."""
    return [i for i, block in enumerate(model.model.layers) if isinstance(block.mixer, HAMTLayer)]


def _observe(mixer: HAMTLayer, observer: Callable[[Trace], None], stack: ExitStack) -> None:
    memory, pending = mixer.memory, []  # traces of segments, from boundary to boundary
    gates: list[Tensor] = []

    def run(*tensors: Any, **options: Any) -> tuple[Tensor, MemoryState]:
        output, state = memory(*tensors, **options)
        pending.append(_trace(memory, tensors, options, output, state))
        return output, state

    def crossed(module: Any, inputs: tuple[Tensor], output: Tensor) -> None:
        crossing = Crossing(module.mixing(*inputs), output)
        length = pending[-1].items.shape[1]
        after = pending[-1].after._replace(slots=output)
        pending[-1] = pending[-1]._replace(crossings={length: crossing}, after=after)

    def gated(module: torch.nn.Module, inputs: Any, output: Tensor) -> None:
        gates.append(F.silu(output))

    def done(module: torch.nn.Module, inputs: Any, output: Any) -> None:
        trace = _joined(pending)
        observer(trace._replace(gate=gates.pop()) if gates else trace)
        pending.clear()

    if mixer.boundary is not None:
        stack.enter_context(mixer.boundary.register_forward_hook(crossed))
    stack.enter_context(rerouted(mixer, run))
    stack.enter_context(mixer.register_forward_hook(done))
    if mixer.gate_proj is not None:
        stack.enter_context(mixer.gate_proj.register_forward_hook(gated))


def _trace(
    memory: HolographicMemory, tensors: Any, options: Any, output: Tensor, after: MemoryState
) -> Trace:
    items, keys, unbinding_keys, gates, read = tensors
    check_one_document(options["mask"], options["documents"])
    algebra, rotation, turn = memory.algebra, options["rotation"], None
    wide = torch.promote_types(items.dtype, torch.float32)
    before = options["initial_state"] or memory.initial_state(len(items), wide, items.device)
    gates = memory.rule.complete(gates, wide).map(lambda gate: gate.to(wide))
    items, read = algebra.lift(items).to(wide), read.to(wide)
    if rotation is not None:
        size = rotation.abs() if algebra.has_phase else rotation < 0
        turn = size.to(wide).mean(dim=(0, 1)).expand(memory.num_heads, -1)
        tokens = Tokens(items, keys, unbinding_keys, read, gates, rotation)
        positions, _ = positions_of(algebra, tokens, before)
        assert positions is not None
        keys, unbinding_keys = (algebra.compose(key, positions) for key in (keys, unbinding_keys))
    return Trace(memory, items, keys, unbinding_keys, gates, read, before, after, output, turn)


@torch.no_grad()
def read_text(
    model: HAMTForCausalLM,
    input_ids: Tensor,
    cache: HAMTCache | None = None,
    segment: int = SEGMENT,
) -> Iterator[Tensor]:
    """Read texts (B, N) without padding in segments, the state carried; of no tokens nothing.

    ``cache`` is the state to go on from and is updated; None starts with an empty memory.

    Yields:
        What enters the last norm, (B, ``segment`` or fewer, d).
    """
    cache = HAMTCache(len(model.model.layers)) if cache is None else cache
    entering: list[Tensor] = []

    def enters(module: torch.nn.Module, inputs: Any) -> None:
        entering.append(inputs[0])

    with model.model.norm.register_forward_pre_hook(enters):
        for part in input_ids.to(model.device).split(segment, dim=1) if input_ids.shape[1] else ():
            model.model(part, past_key_values=cache)
            yield entering.pop()


@torch.no_grad()
def record(
    model: HAMTForCausalLM,
    input_ids: Tensor,
    layers: Sequence[int] | None = None,
    cache: HAMTCache | None = None,
    segment: int = SEGMENT,
) -> Recording:
    """Record everything that mixers are given and give back while texts (B, N) are read.

    The model is in evaluation mode and is not changed; for ``cache`` see ``read_text``. ``layers``
    are indices, None for all: a memory takes some 16 N · (D + H · S) bytes. ``segment``, the tokens
    that are read at a time, changes nothing but the memory that is needed.

    Raises:
        ValueError: if the text is empty.
    """
    if input_ids.ndim != 2 or not input_ids.numel():
        shape = tuple(input_ids.shape)
        raise ValueError(f"input_ids must be (batch, tokens), at least one token; got {shape}")
    traces: dict[int, list[Trace]] = {}
    attention: dict[int, list[AttentionTrace]] = {}
    attending = [i for i in attention_layers(model) if layers is None or i in layers]
    others = None if layers is None else [index for index in layers if index not in attending]
    with (
        observe(model, lambda index, trace: traces.setdefault(index, []).append(trace), others),
        observe_attention(
            model, lambda index, trace: attention.setdefault(index, []).append(trace), attending
        ),
    ):
        final = torch.cat(list(read_text(model, input_ids, cache, segment)), dim=1)
    return Recording(
        {index: _joined(parts) for index, parts in traces.items()},
        final,
        {index: joined_attention(parts) for index, parts in attention.items()},
    )


def mean_turn(turns: Sequence[Tensor | None], lengths: Sequence[int]) -> Tensor | None:
    """The mean over all tokens of texts, from the mean rotation (H, K) of each, if there is one."""
    weighted = [n * turn for n, turn in zip(lengths, turns, strict=True) if turn is not None]
    return torch.stack(weighted).sum(dim=0) / sum(lengths) if weighted else None


def _joined(parts: Sequence[Trace]) -> Trace:
    """One trace of several that follow each other."""
    if len(parts) == 1:
        return parts[0]

    def joined(tensors: Sequence[Tensor | None]) -> Any:
        return None if tensors[0] is None else torch.cat(tensors, dim=1)  # type: ignore[arg-type]

    starts = accumulate((part.items.shape[1] for part in parts), initial=0)
    sequences = ("items", "keys", "unbinding_keys", "read", "output", "gate")
    return parts[0]._replace(
        gates=Gates(*map(joined, zip(*(part.gates for part in parts), strict=True))),
        after=parts[-1].after,
        crossings={
            start + n: crossing
            for start, part in zip(starts, parts, strict=False)
            for n, crossing in part.crossings.items()
        },
        turn=mean_turn([part.turn for part in parts], [part.items.shape[1] for part in parts]),
        **{name: joined([getattr(part, name) for part in parts]) for name in sequences},
    )
