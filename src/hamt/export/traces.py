"""The step with what it shows of its memories: what a page needs to say where they read from.

Beside the outputs of ``hamt.export.step.Step`` there is one more, ``trace`` (B, n). It holds, of
each memory, with the symbols of ``hamt.analysis.contributions``,

    bound    x = (k ⊛ p) ⊛ v, what the token wrote, (H, F)
    sought   (u ⊛ p) ⊛ y / |y|², what it read, (H, F)
    read     r (H, S)
    write    w (H, S)
    keep     α (H, S)
    beta     β (H,), under the delta rule
    mixing   T (H, S, S), where a boundary mixes slots; the identity elsewhere

one behind the other, those of ``mixing`` behind all else. It is one tensor since each that comes
out of a browser's runtime takes a time of its own. ``page/sources.js`` computes the shares of
earlier tokens from it; where each part begins stands in ``step.json``.

Shape legend: B batch, H heads, S slots, F features of an item.
"""

import math
from collections.abc import Iterator
from itertools import accumulate
from typing import Any

import torch
from torch import Tensor

from hamt.analysis.record import Trace, memory_layers, observe
from hamt.errors import UserError
from hamt.export.step import Step, Value
from hamt.memory.write_rules import Convex, Delta, Gated, Normalized
from hamt.model import HAMTForCausalLM

RULES = (Gated, Normalized, Convex, Delta)  # of which the page knows the adjoint
# Of a page: it looks back over so many tokens, fewer where they would take more memory than this.
WINDOW, LEAST_WINDOW, WINDOW_BYTES = 512, 16, 64 * 2**20


class TracedStep(Step):
    """As ``Step``, with traces behind the other outputs.

    Raises:
        UserError: as ``Step``, if no layer is a memory, or one has a write rule of the user's own.
    """

    def __init__(self, model: HAMTForCausalLM) -> None:
        super().__init__(model)
        self.memories = memory_layers(model)
        if not self.memories:
            raise UserError(
                "the page shows where memories read from, and this model has none: use --format "
                "onnx"
            )
        self.every = model.config.boundary_every
        parts = {(index, name): x for index in self.memories for name, x in self._parts(index)}
        # Matrices last (``sorted`` keeps the order of equals).
        self.parts = dict(sorted(parts.items(), key=lambda part: part[0][1] == "mixing"))

    def _parts(self, index: int) -> Iterator[tuple[str, tuple[int, ...]]]:
        """Names and shapes of what is told of a memory."""
        mixer: Any = self.model.model.layers[index].mixer
        memory, rule = mixer.memory, mixer.memory.rule
        if type(rule) not in RULES:
            raise UserError(
                f"the page does not know the write rule {rule.name!r} of layer {index}: use "
                "--format onnx"
            )
        heads, slots = memory.num_heads, memory.num_slots
        yield from dict.fromkeys(("bound", "sought"), (heads, memory.head_dim)).items()
        yield from dict.fromkeys(("read", "write", "keep"), (heads, slots)).items()
        if type(rule) is Delta:
            yield "beta", (heads,)
        if self._mixes(index):
            yield "mixing", (heads, slots, slots)

    def _mixes(self, index: int) -> bool:
        """Whether boundaries do anything to the slots of a memory but round them."""
        boundary: Any = self.model.model.layers[index].mixer.boundary
        empty = torch.zeros(1, *self.model.model.layers[index].mixer.state_shapes()["slots"])
        return boundary is not None and boundary.mixing(empty) is not None

    @property
    def outputs(self) -> list[Value]:
        """Those of the step, and the trace."""
        size = sum(math.prod(shape) for shape in self.parts.values())
        return [*super().outputs, Value("trace", (size,))]

    def forward(self, input_ids: Tensor, num_tokens: Tensor, *state: Tensor) -> tuple[Tensor, ...]:
        """The outputs of the step, and the trace."""
        found: dict[int, Trace] = {}
        with observe(self.model, found.__setitem__):
            outputs = super().forward(input_ids, num_tokens, *state)
        crossing = (num_tokens + 1).remainder(self.every).eq(0)
        told = {index: _told(trace, crossing) for index, trace in found.items()}
        return *outputs, torch.cat([told[i][name].flatten(1) for i, name in self.parts], dim=1)

    def describe(self) -> dict[str, Any]:
        """That of the step, and under ``page`` what the page has to know."""
        config = self.model.config
        starts = accumulate((math.prod(shape) for shape in self.parts.values()), initial=0)
        at = dict(zip(self.parts, starts, strict=False))
        layers = []
        for index in self.memories:
            memory = self.model.model.layers[index].mixer.memory
            layers.append({
                "layer": index,
                "heads": memory.num_heads,
                "slots": memory.num_slots,
                "features": memory.head_dim,
                "at": {name: start for (owner, name), start in at.items() if owner == index},
            })  # fmt: skip
        kept = sum(math.prod(shape) for (_, name), shape in self.parts.items() if name != "mixing")
        matrices = sum(math.prod(shape) for shape in self.parts.values()) - kept
        most = WINDOW_BYTES // (4 * (kept + math.ceil(matrices / self.every)))
        window = max(LEAST_WINDOW, min(WINDOW, most))
        page = {
            "layers": layers,
            "all_layers": config.num_layers,
            "kept": kept,
            "window": window,
            "window_bytes": 4 * (window * kept + math.ceil(window / self.every) * matrices),
            "read_before_write": config.read_before_write,
            "boundary_every": self.every if matrices else None,
            # Keys and values in float32, as the state is.
            "cache_bytes_per_token": 8 * config.num_layers * config.hidden_dim,
        }
        return {**super().describe(), "page": page}


def _told(trace: Trace, crossing: Tensor) -> dict[str, Tensor]:
    """By name, of a run over one token; ``crossing`` (B,) tells where a boundary follows."""
    algebra = trace.memory.algebra
    square = trace.output.square().sum(dim=-1, keepdim=True)
    directions = trace.output / square.clamp(min=torch.finfo(square.dtype).tiny)
    assert trace.gates.log_forget is not None
    told = {
        "bound": algebra.bind(trace.items, trace.keys),
        "sought": algebra.bind(algebra.lift(directions), trace.unbinding_keys),
        "read": trace.read,
        "write": trace.write,
        "keep": trace.gates.log_forget.exp(),
    }
    if trace.gates.beta is not None:
        told["beta"] = trace.gates.beta
    told = {name: x[:, 0] for name, x in told.items()}
    # In eager mode there is a crossing only where a boundary follows; a graph always has one.
    identity = torch.eye(trace.read.shape[-1], dtype=square.dtype, device=square.device)
    told["mixing"] = identity.expand(*trace.read[:, 0].shape, -1)
    if 1 in trace.crossings and (mixing := trace.crossings[1].mixing) is not None:
        told["mixing"] = mixing.where(crossing[:, None, None, None], identity)
    return told
