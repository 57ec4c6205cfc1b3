"""How far the form ``fla`` is from the chunked form in float64: outputs, state, every gradient.

Shape legend: B rows, N tokens, H heads, S slots, F features, K key size.
"""

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from copy import deepcopy
from dataclasses import dataclass, replace
from itertools import pairwise
from typing import Any
from unittest import mock

import torch
from torch import Tensor

from hamt import HAMTForCausalLM
from hamt.memory import FORMS, Gates, HolographicMemory, MemoryState

RULES = ("gated", "normalized", "convex", "delta")
DTYPES = ("float32", "float16", "bfloat16")
# Of the largest entry of each tensor. Sums of 64 gates are rounded as a whole: those at the floor,
# of which each adds 20 to them, leave fewer digits to the others.
TOLERANCES = {"float32": 4e-6, "float16": 4e-3, "bfloat16": 4e-2}
TOLERANCES_AT_FLOOR = {**TOLERANCES, "float32": 1e-4}
# On a GPU, products of float32 are those of TF32, which has the digits of float16.
TOLERANCES_TF32 = {**TOLERANCES, "float32": 4e-3}
# Gradients that are sums and differences of others, and may cancel: these are what they are
# measured by, where they are larger.
PARTS = {
    "gradient of rotation": "gradient of keys",
    "gradient of initial_phase": "gradient of keys",
    "gradient of log_forget": "gradient of write",
}


@dataclass(frozen=True)
class Case:
    """One memory, and one kind of text.

    Items, write and read weights and strengths have the ``dtype``, all else float32.
    ``documents`` are lengths of those of the first row, the first of which goes on from the state;
    the second row is one document, which does not. The first ``padding`` tokens of the last row are
    none. ``floor`` is the share of forget gates at and below the floor.
    """

    rule: str
    dtype: str = "float32"
    length: int = 65
    rows: int = 2
    heads: int = 2
    slots: int = 5
    features: int = 12
    binding_type: str = "phasor"
    documents: tuple[int, ...] = ()
    padding: int = 0
    floor: float = 0.0

    def __str__(self) -> str:
        words = [
            self.rule,
            self.dtype,
            "one token" if self.length == 1 else f"{self.length} tokens",
        ]
        words.append(f"{self.slots} × {self.features}")
        words += [f"{len(self.documents)} documents"] if len(self.documents) > 1 else []
        words += ["padded"] if self.padding else []
        words += [f"{self.floor:.0%} of gates at the floor"] if self.floor else []
        return ", ".join(words)

    def memory(self) -> HolographicMemory:
        """As the case wants it."""
        width = self.heads * self.features
        sizes = {"hcm_dim": width, "num_slots": self.slots, "num_heads": self.heads}
        return HolographicMemory(
            **sizes, binding_type=self.binding_type, write_rule=self.rule, decay_rate=0.01
        )

    def tolerance(self, device: str) -> float:
        """What the largest error may be, as a share of the largest entry."""
        if device != "cpu":
            return TOLERANCES_TF32[self.dtype]
        return (TOLERANCES_AT_FLOOR if self.floor else TOLERANCES)[self.dtype]


def packed(case: Case) -> Case:
    """With documents that are shorter and longer than a tile of the kernels, and padding."""
    first = case.length // 6
    return replace(case, documents=(first, 1, case.length - first - 1), padding=3)


def cases() -> list[Case]:
    """What is compared: small enough for an interpreter, with sizes that are no powers of two."""
    short = {"length": 33, "heads": 1}
    found = [packed(Case(rule, dtype, heads=1)) for rule in RULES[:3] for dtype in DTYPES]
    found.append(packed(Case("delta", heads=1)))
    found += [packed(Case("delta", dtype, **short)) for dtype in DTYPES[1:]]
    found += [
        Case("gated", length=63, binding_type="circular_conv"),
        Case("delta", length=63, rows=1, heads=1, binding_type="elementwise"),
        Case("gated", length=130, rows=1, heads=1, slots=1, features=2),
        Case("gated", length=17, slots=40, features=72),
        Case("delta", length=17, rows=1, slots=40, features=72),
    ]
    found += [
        Case(rule, rows=1, floor=share, **short)
        for rule in ("gated", "delta")
        for share in (0.2, 1)
    ]
    found += [Case(rule, dtype, length=1, documents=(1,)) for rule in RULES for dtype in DTYPES]
    return found


def cases_on_a_gpu() -> list[Case]:
    """The sizes of real models, and one below those of tensor cores: each size is compiled anew."""
    large = {"length": 1000, "rows": 4, "heads": 4, "slots": 16, "features": 80}
    found = [packed(Case(rule, dtype, **large)) for rule in RULES for dtype in DTYPES]
    found += [
        packed(Case(rule, floor=share, **large))
        for rule in ("gated", "delta")
        for share in (0.2, 1)
    ]
    found += [
        Case(rule, dtype, **{**large, "length": 1})
        for rule in ("gated", "delta")
        for dtype in DTYPES
    ]
    return [*found, packed(Case("gated", "bfloat16")), packed(Case("delta", "bfloat16"))]


def draw(case: Case, seed: int = 0) -> dict[str, Tensor]:
    """Arguments of the memory and a filled state, by name, on a CPU."""
    memory, generator = case.memory(), torch.Generator().manual_seed(seed)

    def normal(*shape: int) -> Tensor:
        return torch.randn(shape, generator=generator)

    tokens, algebra = (case.rows, case.length, case.heads), memory.algebra
    logits = normal(*tokens[:2], sum(memory.rule.logit_sizes(case.heads, case.slots)))
    # The first slot reaches over a few tokens, the last over a thousand.
    pace = torch.linspace(0, 7, case.slots).repeat(case.heads)
    logits[..., : len(pace)] += -pace if case.rule == "convex" else pace
    gates = memory.rule.gates(logits, case.heads)
    if gates.log_forget is not None and case.floor:
        low = torch.rand(gates.log_forget.shape, generator=generator) < case.floor
        gates = gates._replace(log_forget=gates.log_forget.where(~low, -20.0))
    leaves = {
        "items": normal(*tokens, case.features),
        "read": normal(*tokens, case.slots),
        "keys": algebra.key(2 * normal(*tokens, memory.key_size)),
        "unbinding_keys": algebra.key(2 * normal(*tokens, memory.key_size)),
        "rotation": algebra.key(normal(*tokens, memory.key_size)),
        "initial_slots": normal(case.rows, case.heads, case.slots, case.features),
        "initial_phase": algebra.key(normal(case.rows, case.heads, memory.key_size)),
        **{name: gate for name, gate in gates._asdict().items() if gate is not None},
    }
    narrow = dict.fromkeys(("items", "read", "write", "beta"), getattr(torch, case.dtype))
    return {name: x.to(narrow.get(name, torch.float32)) for name, x in leaves.items()}


def run(
    case: Case, form: str, leaves: dict[str, Tensor], gradients: bool = True
) -> dict[str, Tensor]:
    """Outputs, the state after them and the gradients of a sum of all, by name."""
    leaves = {name: x.detach().requires_grad_(gradients) for name, x in leaves.items()}
    gates = Gates(*(leaves.get(name) for name in Gates._fields))
    told: dict[str, Any] = {
        name: leaves[name] for name in ("items", "keys", "unbinding_keys", "rotation", "read")
    }
    shape, device = told["items"].shape[:2], told["items"].device
    if case.documents:
        told["documents"] = torch.ones(shape, dtype=torch.long, device=device)
        bounds = [0, *torch.tensor(case.documents).cumsum(0).tolist()]
        for number, (begin, end) in enumerate(pairwise(bounds)):
            told["documents"][0, begin:end] = number
    if case.padding:
        told["mask"] = torch.ones(shape, dtype=torch.bool, device=device)
        told["mask"][-1, : case.padding] = False
    state = MemoryState(leaves["initial_slots"], leaves["initial_phase"])
    output, state = case.memory()(**told, gates=gates, initial_state=state, form=form)
    found = {"output": output, "slots": state.slots}
    if not gradients:
        return found
    generator = torch.Generator().manual_seed(99)
    loss = sum((torch.randn(x.shape, generator=generator).to(x) * x).sum() for x in found.values())
    grads = torch.autograd.grad(loss, list(leaves.values()), materialize_grads=True)
    named = {f"gradient of {name}": grad for name, grad in zip(leaves, grads, strict=True)}
    return {name: x.detach() for name, x in (found | named).items()}


def errors(case: Case, device: str) -> dict[str, dict[str, float]]:
    """How far tensors are from the chunked form's in float64, as shares of their largest entries.

    One token is read without gradients, as in decoding.

    Returns:
        By form, ``fla`` and the chunked one with the case's own dtypes, and by the tensor's name.
    """
    leaves, gradients = draw(case), case.length > 1
    expected = run(case, "chunked", {name: x.double() for name, x in leaves.items()}, gradients)
    largest = {name: float(x.abs().max()) for name, x in expected.items()}
    for name in PARTS.keys() & largest.keys():
        largest[name] = max(largest[name], largest[PARTS[name]])
    leaves, found = {name: x.to(device) for name, x in leaves.items()}, {}
    for form in ("fla", "chunked"):
        actual = run(case, form, leaves, gradients)
        assert actual["output"].dtype == leaves["items"].dtype
        assert actual["slots"].dtype == torch.float32
        found[form] = {
            name: float((actual[name].cpu().double() - x).abs().max()) / largest[name]
            for name, x in expected.items()
        }
    return found


@contextmanager
def untuned() -> Iterator[None]:
    """Let kernels run in the first of their configurations: trying all of them takes minutes."""
    from triton.runtime.autotuner import Autotuner

    prune = Autotuner.prune_configs
    first = lambda self, kwargs: prune(self, kwargs)[:1]  # noqa: E731
    with mock.patch.object(Autotuner, "prune_configs", first):
        yield


@contextmanager
def only(form: str) -> Iterator[None]:
    """Let models compute their memories in one form."""
    with mock.patch.dict(FORMS, {form: FORMS[form]._replace(suits=lambda items: True)}, clear=True):
        yield


def model_errors(model: HAMTForCausalLM, length: int) -> dict[str, float]:
    """The same of a model's logits, loss and worst gradient of a parameter, in float32.

    ``model`` is on its device; it is left in evaluation mode and without gradients.
    """
    ids = torch.arange(length)[None] * 7 % model.config.vocab_size

    def record(model: HAMTForCausalLM, form: str) -> dict[str, Tensor]:
        told = ids.to(model.device)
        with only(form):
            outputs = model.eval()(told, labels=told)
        outputs.loss.backward()
        grads = {name: parameter.grad for name, parameter in model.named_parameters()}
        model.zero_grad()
        found = {"logits": outputs.logits, "loss": outputs.loss, **grads}
        return {name: x.detach().cpu().double() for name, x in found.items()}

    expected, actual = record(deepcopy(model).cpu().double(), "chunked"), record(model, "fla")
    shares = {
        name: float((actual[name] - x).abs().max() / x.abs().max()) for name, x in expected.items()
    }
    found = {name: shares.pop(name) for name in ("logits", "loss")}
    return {**found, "worst gradient": worst(shares)}


def worst(shares: Mapping[str, float]) -> float:
    """The largest; NaN if one is."""
    return float(torch.tensor(list(shares.values())).max())
