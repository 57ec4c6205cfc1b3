"""The step with what it shows of its memories: what a page needs to say where they read from.

Beside the outputs of ``hamt.export.step.Step`` there are, for each memory, with the symbols of
``hamt.analysis.contributions``,

    trace.layers.0.bound    x = (k ⊛ p) ⊛ v, what the token wrote, (B, H, F)
    trace.layers.0.sought   (u ⊛ p) ⊛ y / |y|², what it read, (B, H, F)
    trace.layers.0.read     r (B, H, S)
    trace.layers.0.write    w (B, H, S)
    trace.layers.0.keep     α (B, H, S)
    trace.layers.0.beta     β (B, H), under the delta rule
    trace.layers.0.mixing   T (B, H, S, S), where a boundary mixes slots; the identity elsewhere

From these, ``page/sources.js`` computes the shares of earlier tokens.

Shape legend: B batch, H heads, S slots, F features of an item.
"""

import math
from typing import Any

import torch
from torch import Tensor

from hamt.analysis.record import Trace, memory_layers, observe
from hamt.errors import UserError
from hamt.export.step import Step, Value
from hamt.memory.write_rules import Convex, Delta, Gated
from hamt.model import HAMTForCausalLM

RULES = (Gated, Convex, Delta)  # of which the page knows the adjoint
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
        self.traced = [value for index in self.memories for value in self._values(index)]

    def _values(self, index: int) -> list[Value]:
        mixer: Any = self.model.model.layers[index].mixer
        memory, rule = mixer.memory, mixer.memory.rule
        if type(rule) not in RULES:
            raise UserError(
                f"the page does not know the write rule {rule.name!r} of layer {index}: use "
                "--format onnx"
            )
        heads, slots = memory.num_heads, memory.num_slots
        shapes: dict[str, tuple[int, ...]] = {
            **dict.fromkeys(("bound", "sought"), (heads, memory.head_dim)),
            **dict.fromkeys(("read", "write", "keep"), (heads, slots)),
        }
        if type(rule) is Delta:
            shapes["beta"] = (heads,)
        if self._mixes(index):
            shapes["mixing"] = (heads, slots, slots)
        return [Value(f"trace.layers.{index}.{name}", shape) for name, shape in shapes.items()]

    def _mixes(self, index: int) -> bool:
        """Whether boundaries do anything to the slots of a memory but round them."""
        boundary: Any = self.model.model.layers[index].mixer.boundary
        empty = torch.zeros(1, *self.model.model.layers[index].mixer.state_shapes()["slots"])  # type: ignore[union-attr,operator]
        return boundary is not None and boundary.mixing(empty) is not None

    @property
    def outputs(self) -> list[Value]:
        """Those of the step, and the traces."""
        return [*super().outputs, *self.traced]

    def forward(self, input_ids: Tensor, num_tokens: Tensor, *state: Tensor) -> tuple[Tensor, ...]:
        """The outputs of the step, and the traces."""
        found: dict[int, Trace] = {}
        with observe(self.model, found.__setitem__):
            outputs = super().forward(input_ids, num_tokens, *state)
        crossing = (num_tokens + 1).remainder(self.every).eq(0)
        traces = {
            f"trace.layers.{index}.{name}": x
            for index in self.memories
            for name, x in _traces(found[index], crossing).items()
        }
        return *outputs, *(traces[each.name] for each in self.traced)

    def describe(self) -> dict[str, Any]:
        """That of the step, and under ``page`` what the page has to know."""
        config = self.model.config
        layers = []
        for index in self.memories:
            memory = self.model.model.layers[index].mixer.memory  # type: ignore[union-attr]
            layers.append({
                "name": f"layers.{index}",
                "heads": memory.num_heads,
                "slots": memory.num_slots,
                "features": memory.head_dim,
                "strength": type(memory.rule) is Delta,
                "mixes": self._mixes(index),
            })  # fmt: skip
        token = 4 * sum(math.prod(x.shape) for x in self.traced if not x.name.endswith("mixing"))
        page = {
            "layers": layers,
            "all_layers": config.num_layers,
            "window": max(LEAST_WINDOW, min(WINDOW, WINDOW_BYTES // token)),
            "read_before_write": config.read_before_write,
            "boundary_every": self.every if any(each["mixes"] for each in layers) else None,
            # Keys and values in float32, as the state is.
            "cache_bytes_per_token": 8 * config.num_layers * config.hidden_dim,
        }
        return {**super().describe(), "page": page}


def _traces(trace: Trace, crossing: Tensor) -> dict[str, Tensor]:
    """By name, of a run over one token; ``crossing`` (B,) tells where a boundary follows."""
    algebra = trace.memory.algebra
    square = trace.output.square().sum(dim=-1, keepdim=True)
    directions = trace.output / square.clamp(min=torch.finfo(square.dtype).tiny)
    assert trace.gates.log_forget is not None
    traces = {
        "bound": algebra.bind(trace.items, trace.keys),
        "sought": algebra.bind(algebra.lift(directions), trace.unbinding_keys),
        "read": trace.read,
        "write": trace.write,
        "keep": trace.gates.log_forget.exp(),
    }
    if trace.gates.beta is not None:
        traces["beta"] = trace.gates.beta
    traces = {name: x[:, 0] for name, x in traces.items()}
    if 1 in trace.crossings and (mixing := trace.crossings[1].mixing) is not None:
        identity = torch.eye(mixing.shape[-1], dtype=mixing.dtype, device=mixing.device)
        traces["mixing"] = mixing.where(crossing[:, None, None, None], identity)
    return traces
