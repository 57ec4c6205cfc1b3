"""Libraries of vector symbolic architectures and of linear attention."""

import torch

from ecosystem_checks.base import check, close, needs
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


@check(GROUP, "gated linear attention of fla, its loop in Python")
def _gla() -> str:
    needs("fla", "fla-core")
    from fla.ops.gla.naive import naive_recurrent_gla

    from hamt.memory import HolographicMemory

    memory = HolographicMemory(16, num_slots=3, num_heads=2, binding_type="elementwise")
    raise NotImplementedError(naive_recurrent_gla, memory)
