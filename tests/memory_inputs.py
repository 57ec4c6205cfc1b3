"""Random inputs for a holographic memory, runs that record every gradient, and their comparison.

Shape legend as in ``hamt.memory``: B batch, N tokens, H heads, S slots, F features, K
key size.
"""

import math
from collections.abc import Callable
from dataclasses import dataclass
from itertools import pairwise

import pytest
import torch
from torch import Tensor

from hamt.cpu import fused
from hamt.cpu.fused import fused_available
from hamt.memory import FORMS, Gates, HolographicMemory, MemoryState, number_documents

HEADS, SLOTS, HEAD_DIM = 2, 3, 4
Leaves = dict[str, Tensor]
Run = Callable[[Leaves], tuple[Tensor, MemoryState]]

FUSED = fused_available(torch.empty(0))
needs_fused = pytest.mark.skipif(not FUSED, reason="no C++ compiler")
marks = {"fused": needs_fused}
# All but that for GPUs, which is not for float64: tests/gpu has its tests.
FORMS_HERE = [form for form in FORMS if form != "fla"]
every_form = pytest.mark.parametrize(
    "form", [pytest.param(form, marks=marks.get(form, ())) for form in FORMS_HERE]
)
# The forms of this machine that have to equal the loop.
PARALLEL_FORMS = [form for form in FORMS_HERE if form != "recurrent" and (FUSED or form != "fused")]


@dataclass(frozen=True)
class Case:
    """One kind of memory; ``rotates`` gives every token its own rotation."""

    binding_type: str
    write_rule: str = "gated"
    rotates: bool = False
    heads: int = HEADS
    slots: int = SLOTS
    head_dim: int = HEAD_DIM

    def __str__(self) -> str:
        return f"{self.binding_type}-{self.write_rule}" + ("-rotates" if self.rotates else "")

    def memory(self, chunk_size: int = 16, decay_rate: float = 0.001) -> HolographicMemory:
        hcm_dim = self.heads * self.head_dim
        sizes = {"hcm_dim": hcm_dim, "num_slots": self.slots, "num_heads": self.heads}
        options = {"binding_type": self.binding_type, "write_rule": self.write_rule}
        return HolographicMemory(**sizes, **options, decay_rate=decay_rate, chunk_size=chunk_size)


CASES = [
    Case(binding_type, write_rule, rotates)
    for binding_type in ("elementwise", "circular_conv", "phasor")
    for write_rule in ("gated", "convex", "delta")
    for rotates in (False, True)
]
ROTATING_CASES = [case for case in CASES if case.rotates]
# A constant rotation needs phases: signs that alternate are no position code.
PHASE_CASES = [case for case in ROTATING_CASES if case.binding_type != "elementwise"]
# All that a case can have at once; the cases left out are special cases of these.
FULL_CASES = ROTATING_CASES


def random_inputs(
    case: Case, length: int, batch: int = 2, dtype: torch.dtype = torch.float64, seed: int = 0
) -> Leaves:
    """Arguments of the memory, and a filled initial state, under the names of the memory.

    The slots forget at different paces: slot 0 reaches over a thousand tokens, the last over a few.
    """
    generator = torch.Generator().manual_seed(seed)
    memory = case.memory()

    def normal(*shape: int) -> Tensor:
        return torch.randn(shape, generator=generator, dtype=torch.float64)

    tokens, slots = (batch, length, case.heads), case.slots
    pace = torch.linspace(-7, 0, slots)  # logit of the share a slot forgets at a token
    forget = torch.sigmoid(normal(*tokens, slots) + pace)
    inputs = {
        "items": normal(*tokens, memory.head_dim),
        "keys": memory.algebra.key(2 * normal(*tokens, memory.key_size)),
        "unbinding_keys": memory.algebra.key(2 * normal(*tokens, memory.key_size)),
        "read": normal(*tokens, slots),
        "initial_memory": normal(batch, case.heads, slots, memory.head_dim),
    }
    if case.write_rule == "convex":
        inputs["write"] = forget
    else:
        inputs["write"] = normal(*tokens, slots)
        inputs["log_forget"] = torch.log1p(-forget)
    if case.write_rule == "delta":
        inputs["write"] = torch.nn.functional.normalize(inputs["write"], dim=-1)
        inputs["beta"] = torch.sigmoid(normal(*tokens))
    if case.rotates:
        inputs["rotation"] = memory.algebra.key(normal(*tokens, memory.key_size))
        inputs["initial_phase"] = memory.algebra.key(normal(batch, case.heads, memory.key_size))
    return {name: value.to(dtype) for name, value in inputs.items()}


def initial_state(leaves: Leaves) -> MemoryState:
    return MemoryState(leaves["initial_memory"], leaves.get("initial_phase"))


def sequences_of(leaves: Leaves, part: slice | Tensor = slice(None)) -> Leaves:
    """The leaves that have a token dimension, cut to the tokens ``part``."""
    return {name: x[:, part] for name, x in leaves.items() if not name.startswith("initial_")}


def tokens_of(leaves: Leaves, part: slice | Tensor = slice(None)) -> dict:
    """The arguments of the memory that have a token dimension, cut to the tokens ``part``."""
    return as_arguments(sequences_of(leaves, part))


def as_arguments(leaves: Leaves) -> dict:
    """Gates together, as the memory takes them."""
    gates = Gates(leaves["write"], leaves.get("log_forget"), leaves.get("beta"))
    others = {name: x for name, x in leaves.items() if name not in Gates._fields}
    return {**others, "gates": gates}


def documents_of(seq_idx: Tensor | None, state_seq_idx: Tensor | None) -> Tensor | None:
    return None if seq_idx is None else number_documents(seq_idx, state_seq_idx)


# ------------------------------------------------------------------ ways to run one sequence


def whole(
    memory: HolographicMemory,
    form: str,
    seq_idx: Tensor | None = None,
    state_seq_idx: Tensor | None = None,
    **arguments,
) -> Run:
    documents = documents_of(seq_idx, state_seq_idx)

    def run(leaves: Leaves) -> tuple[Tensor, MemoryState]:
        told = {"initial_state": initial_state(leaves), "documents": documents, "form": form}
        return memory(**tokens_of(leaves), **told, **arguments)

    return run


def stepwise(memory: HolographicMemory) -> Run:
    """Token by token through ``step``: the fastest form of one token there is here."""
    renamed = {"items": "item", "keys": "key", "unbinding_keys": "unbinding_key"}

    def run(leaves: Leaves) -> tuple[Tensor, MemoryState]:
        state, outputs = initial_state(leaves), []
        sequences = {
            renamed.get(name, name): x.unbind(1) for name, x in sequences_of(leaves).items()
        }
        for t in range(leaves["items"].shape[1]):
            token = as_arguments({name: x[t] for name, x in sequences.items()})
            output, state = memory.step(**token, state=state)
            outputs.append(output)
        return torch.stack(outputs, dim=1), state

    return run


def segmented(
    memory: HolographicMemory,
    form: str,
    cuts: list[int],
    seq_idx: Tensor | None = None,
    state_seq_idx: Tensor | None = None,
) -> Run:
    """Segment after segment, with the state carried over; ``cuts`` are where segments begin."""

    def run(leaves: Leaves) -> tuple[Tensor, MemoryState]:
        state, outputs, before = initial_state(leaves), [], state_seq_idx
        bounds = [0, *cuts, leaves["items"].shape[1]]
        for start, end in pairwise(bounds):
            names = None if seq_idx is None else seq_idx[:, start:end]
            part = tokens_of(leaves, slice(start, end))
            documents = documents_of(names, before)
            output, state = memory(**part, initial_state=state, documents=documents, form=form)
            outputs.append(output)
            before = None if names is None else names[:, -1]
        return torch.cat(outputs, dim=1), state

    return run


def separate_documents(
    memory: HolographicMemory, seq_idx: Tensor, state_seq_idx: Tensor | None
) -> Run:
    """Every document of every row in a run of its own, by the recurrence without ``seq_idx``."""

    def run(leaves: Leaves) -> tuple[Tensor, MemoryState]:
        rows, states = [], []
        for b, row in enumerate(seq_idx):
            own = {name: x[b : b + 1] for name, x in leaves.items()}
            continues = state_seq_idx is None or bool(state_seq_idx[b] == row[0])
            outputs, start = [], 0
            for size in torch.unique_consecutive(row, return_counts=True)[1].tolist():
                state = initial_state(own) if continues and start == 0 else None
                part = tokens_of(own, slice(start, start + size))
                output, state = memory(**part, initial_state=state, form="recurrent")
                outputs.append(output)
                start += size
            rows.append(torch.cat(outputs, dim=1))
            states.append(state)
        keys = [state.position_key for state in states if state.position_key is not None]
        slots = torch.cat([state.slots for state in states])
        return torch.cat(rows), MemoryState(slots, torch.cat(keys) if keys else None)

    return run


# ------------------------------------------------------------------ record and compare


def record_calls(monkeypatch: pytest.MonkeyPatch) -> list[tuple[str, list, list]]:
    """Name, sizes and outputs of every call into the library of the fused form, from now on."""
    seen, call = [], fused._call

    def spy(name, dtype, sizes, inputs, outputs):
        seen.append((name, sizes, outputs))
        call(name, dtype, sizes, inputs, outputs)

    monkeypatch.setattr(fused, "_call", spy)
    return seen


def record(run: Run, inputs: Leaves, autocast: bool = False) -> Leaves:
    """Output, final state, and the gradient of a random projection of both to every input."""
    leaves = {name: x.detach().clone().requires_grad_() for name, x in inputs.items()}
    with torch.autocast("cpu", dtype=torch.bfloat16, enabled=autocast):
        output, state = run(leaves)
    seen = {"output": output, "memory": state.slots}
    if state.position_key is not None:
        seen["phase"] = state.position_key
        assert seen["phase"].abs().max() <= math.pi * (1 + 1e-6), "the phase is not wrapped"
    generator = torch.Generator().manual_seed(99)
    loss = 0
    for x in seen.values():
        loss = loss + (torch.randn(x.shape, generator=generator).to(x.dtype) * x).sum()
    gradients = torch.autograd.grad(loss, list(leaves.values()), materialize_grads=True)
    named = {f"gradient of {name}": g for name, g in zip(leaves, gradients, strict=True)}
    return {name: x.detach() for name, x in (seen | named).items()}


def assert_same(actual: Leaves, expected: Leaves, tolerance: float) -> None:
    """Equal within ``tolerance`` of the largest entry of each tensor; phases modulo 2π."""
    assert actual.keys() == expected.keys()
    for name, want in expected.items():
        got = actual[name]
        assert got.shape == want.shape, name
        difference, scale = got.double() - want.double(), want.double().abs().max()
        if name == "phase":
            difference, scale = (
                torch.remainder(difference + math.pi, 2 * math.pi) - math.pi,
                math.pi,
            )
        worst = difference.abs().max()
        assert worst <= tolerance * scale, f"{name}: off by {worst:.1e}, largest entry {scale:.1e}"


# ------------------------------------------------------------------ binding, written a second time


def natural_bind(binding_type: str, item: Tensor, key: Tensor) -> Tensor:
    """k ⊛ v in the space of the items, from the textbook's formula, without code of ``hamt``."""
    if binding_type == "elementwise":
        return item * key
    if binding_type == "phasor":
        product = torch.complex(*item.chunk(2, dim=-1)) * torch.exp(1j * key)
        return torch.cat((product.real, product.imag), dim=-1)
    vector = hrr_key_vector(key)
    size = item.shape[-1]
    # y[n] = Σ_m h[m] x[(n - m) mod F], term by term.
    return sum(vector[..., m : m + 1] * torch.roll(item, m, dims=-1) for m in range(size))


def hrr_key_vector(phases: Tensor) -> Tensor:
    """The real vector with unit spectrum of these phases: DC and Nyquist coefficients are 1."""
    size = 2 * phases.shape[-1]
    one = torch.ones_like(phases[..., :1])
    spectrum = torch.cat((one + 0j, torch.exp(1j * phases[..., 1:]), one + 0j), dim=-1)
    return torch.fft.irfft(spectrum, n=size)


def natural_unbind(binding_type: str, bound: Tensor, key: Tensor) -> Tensor:
    """Bind with the conjugate key; a bipolar key is its own conjugate."""
    return natural_bind(binding_type, bound, key if binding_type == "elementwise" else -key)
