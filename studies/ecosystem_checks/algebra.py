"""Libraries of vector symbolic architectures and of linear attention."""

import importlib.util
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ecosystem_checks.base import Skipped, check, close, needs
from hamt.memory import Gates, HolographicMemory
from hamt.memory.algebra import ALGEBRAS

GROUP = "torchhd and flash-linear-attention"
KINDS = {"elementwise": "MAP", "circular_conv": "HRR", "phasor": "FHRR"}


def _bind(name: str) -> str:
    needs("torchhd", "torch-hd")
    from hamt.memory.torchhd_tensors import item_from_torchhd, item_to_torchhd, key_to_torchhd

    algebra = ALGEBRAS[name]
    item, key = torch.randn(4, 64).double(), algebra.random_keys(4, algebra.key_size(64)).double()
    bound = item_to_torchhd(algebra, item).bind(key_to_torchhd(algebra, key))
    wanted = algebra.lower(algebra.bind(algebra.lift(item), key))
    return close(item_from_torchhd(bound)[1], wanted, 1e-9)


def _back(name: str) -> str:
    needs("torchhd", "torch-hd")
    from hamt.memory.torchhd_tensors import key_from_torchhd, key_to_torchhd

    algebra = ALGEBRAS[name]
    key = algebra.random_keys(4, algebra.key_size(64)).double()
    return close(key_from_torchhd(key_to_torchhd(algebra, key))[1], algebra.wrap(key), 1e-9)


for _name, _kind in KINDS.items():
    check(GROUP, f"torchhd's {_kind} binds as {_name} does")(lambda name=_name: _bind(name))
    check(GROUP, f"keys of {_name} to torchhd's {_kind} and back")(lambda name=_name: _back(name))


def naive(rule: str) -> Any:
    """A loop of flash-linear-attention, from its file: its package imports Triton."""
    needs("fla", "fla-core")
    package: Any = importlib.util.find_spec("fla")
    path = Path(package.submodule_search_locations[0], "ops", rule, "naive.py")
    spec: Any = importlib.util.spec_from_file_location(f"naive_{rule}", path)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def random_tokens(*sizes: int) -> list[Tensor]:
    """Standard normal tensors (B, N, H, size), one for each size."""
    return [torch.randn(2, 50, 2, size) for size in sizes]


def attended(rule: str, gates: Gates, read: Tensor, items: Tensor) -> Tensor:
    """What a memory reads whose keys are all one: linear attention, in the chunked form."""
    memory = HolographicMemory(
        items.shape[-1] * 2, num_slots=3, num_heads=2, binding_type="elementwise", write_rule=rule
    )
    ones = torch.ones_like(items)
    return memory(items, ones, ones, gates, read)[0]


@check(GROUP, "gated linear attention of fla, its loop in Python")
def _gla() -> str:
    read, write, forget, items = random_tokens(3, 3, 3, 8)
    forget, loop = -forget.abs(), naive("gla").naive_recurrent_gla
    wanted, _ = loop(q=read * 3**0.5, k=write, v=items, gk=forget)  # it scales by K^-0.5
    found = attended("gated", Gates(write, log_forget=forget), read, items)
    return close(found.reshape(wanted.shape), wanted)


@check(GROUP, "delta rule of fla, its loop in Python")
def _delta() -> str:
    read, write, items, beta = random_tokens(3, 3, 8, 1)
    write, beta = torch.nn.functional.normalize(write, dim=-1), beta[..., 0].sigmoid()
    in_heads = (x.transpose(1, 2) for x in (read * 3**0.5, write, items, beta))
    wanted, _ = naive("delta_rule").delta_rule_recurrence(*in_heads)
    gates = Gates(write, log_forget=torch.zeros_like(write), beta=beta)
    found = attended("delta", gates, read, items)
    return close(found, wanted.transpose(1, 2))


@check(GROUP, "kernels of fla", slow=True)
def _kernels() -> str:
    needs("fla", "fla-core")
    needs("triton")
    from fla.ops.gla import fused_recurrent_gla

    if not torch.cuda.is_available():
        raise Skipped("needs a GPU")
    read, write, forget, items = (x.cuda() for x in random_tokens(3, 3, 3, 8))
    wanted, _ = fused_recurrent_gla(read, write, items, -forget.abs(), scale=1.0)
    found = attended("gated", Gates(write, log_forget=-forget.abs()), read, items)
    return close(found.cpu(), wanted.cpu())
