"""Device, precision and processes of a run."""

from datetime import timedelta

import torch
from accelerate import Accelerator
from accelerate.state import AcceleratorState
from accelerate.utils import InitProcessGroupKwargs, broadcast

from hamt.errors import UserError
from hamt.training.sharding import check_plugin, wants_shards


def make_accelerator(mixed_precision: str = "no", *, on_cpu: bool = False) -> Accelerator:
    """An accelerator of this precision and device, whatever this process has used before.

    ``mixed_precision`` is no, bf16 or fp16; ``on_cpu`` uses the CPU even if there is a GPU.

    Raises:
        UserError: if this machine does not have the precision.
    """
    on_cpu = on_cpu or not (torch.cuda.is_available() or torch.backends.mps.is_available())
    if on_cpu and mixed_precision == "fp16":
        raise UserError("--mixed_precision fp16 needs a GPU: bf16 also works on a CPU")
    if wants_shards():
        check_plugin(mixed_precision)
    # All accelerators of a process share one state, in which the first one fixes device and
    # precision: a second one with another precision is refused, or would silently get the first
    # one's device.
    if AcceleratorState._shared_state:
        state = AcceleratorState()
        moves = (state.device.type == "cpu") != on_cpu and state.num_processes == 1
        if moves or state.mixed_precision != mixed_precision:
            AcceleratorState._reset_state(reset_partial_state=moves)
    # The other processes wait while the main one tokenises the text, which may take hours.
    patience = InitProcessGroupKwargs(timeout=timedelta(hours=12))
    try:
        return Accelerator(mixed_precision=mixed_precision, cpu=on_cpu, kwargs_handlers=[patience])
    except ValueError as error:
        raise UserError(f"no --mixed_precision {mixed_precision} here: {error}") from error


def of_main_process(accelerator: Accelerator, seconds: float) -> float:
    """The time that the main process has measured, so that all processes go by the same."""
    if accelerator.num_processes == 1:
        return seconds
    return broadcast(torch.tensor(seconds, device=accelerator.device)).item()


def in_any_process(accelerator: Accelerator, flag: bool) -> bool:
    """Whether the flag is set in any process, so that all processes do the same."""
    if accelerator.num_processes == 1:
        return flag
    here = torch.tensor(float(flag), device=accelerator.device)
    return bool(accelerator.reduce(here, "sum").item() > 0)
