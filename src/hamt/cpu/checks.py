"""What compiled code may be given: it trusts sizes and types.

Shape legend: that of ``hamt.cpu.fused``.
"""

import torch
from torch import Tensor, nn
from torch.autograd import forward_ad

TYPES = (torch.float32, torch.float64)


def is_plain(x: Tensor) -> bool:
    """Whether a tensor is just numbers in this machine's memory, of whatever type."""
    return (
        x.is_cpu
        and type(x) in (Tensor, nn.Parameter)
        and x.layout is torch.strided
        and not x.is_nested
    )


def is_transformed() -> bool:
    """Whether functions are transformed here: that wants operators which PyTorch knows."""
    return torch._C._are_functorch_transforms_active() or forward_ad._current_level >= 0


def check_devices(x: Tensor, *others: Tensor | None) -> None:
    """Refuse tensors of the meta device among others: PyTorch would have nothing computed."""
    if any(tensor is not None and tensor.device != x.device for tensor in others):
        raise ValueError("all tensors must be on one device")


def check_fit(x: Tensor, w: Tensor, phases: bool, chunk: int, **others: Tensor | None) -> None:
    """Refuse arguments, by their names in ``hamt.cpu.fused``, that do not fit ``x`` and ``w``.

    Both operators ask this first, also where ``torch.ops.hamt`` is called by hand.

    Raises:
        ValueError: with the name of the argument.
    """
    if x.ndim != 4 or w.ndim != 4 or x.shape[3] % 2 or x.dtype not in TYPES:
        raise ValueError(
            "x must be (B, N, H, F), F even, in float32 or float64, and w (B, N, H, S); got "
            f"{tuple(x.shape)} in {x.dtype} and {tuple(w.shape)}"
        )
    batch, length, heads, features = x.shape
    rows, slots = x.shape[:3], w.shape[3]
    keys, gates = (*rows, features // 2 if phases else features), (*rows, slots)
    shapes: dict[str, tuple[int, ...]] = {
        "w": gates,
        "r": gates,
        "log_forget": gates,
        "k": keys,
        "u": keys,
        "beta": rows,
        "reset": rows[:2],
        "y": x.shape,
        "memory": (batch, heads, slots, features),
        "checkpoints": (batch, heads, -(-length // chunk), slots, features),
    }
    p = others["p"]
    if p is not None:
        if not phases or p.ndim != 4:
            raise ValueError("p must be phases (1 or B, N, 1 or H, K), or None")
        one_row, one_head = p.shape[0] == 1, p.shape[2] == 1
        shapes["p"] = (1 if one_row else batch, length, 1 if one_head else heads, keys[3])
    device, dtypes = x.device, {"reset": torch.bool}
    for name, tensor in (("w", w), *others.items()):
        if tensor is not None and (
            tensor.shape != shapes[name]
            or tensor.dtype is not dtypes.get(name, x.dtype)
            or tensor.device != device
        ):
            raise ValueError(
                f"{name} must be {shapes[name]} in {dtypes.get(name, x.dtype)} on {device}; got "
                f"{tuple(tensor.shape)} in {tensor.dtype} on {tensor.device}"
            )
