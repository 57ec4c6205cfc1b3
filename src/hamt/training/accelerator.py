"""Device, precision and processes of a run."""

from datetime import timedelta

import torch
from accelerate import Accelerator
from accelerate.state import AcceleratorState
from accelerate.utils import InitProcessGroupKwargs

from hamt.errors import UserError


def make_accelerator(mixed_precision: str = "no", *, on_cpu: bool = False) -> Accelerator:
    """An accelerator of this precision and device, whatever earlier runs of the process had.

    Args:
        mixed_precision: no, bf16 or fp16.
        on_cpu: even if there is a GPU.

    Raises:
        UserError: if this machine does not have the precision.
    """
    on_cpu = on_cpu or not (torch.cuda.is_available() or torch.backends.mps.is_available())
    if on_cpu and mixed_precision == "fp16":
        raise UserError("--mixed_precision fp16 needs a GPU: bf16 also works on a CPU")
    # Accelerate has one state for the process: a second precision is refused, and none given is the
    # first's, as is the device.
    if AcceleratorState._shared_state:
        state = AcceleratorState()
        moves = (state.device.type == "cpu") != on_cpu and state.num_processes == 1
        if moves or state.mixed_precision != mixed_precision:
            AcceleratorState._reset_state(reset_partial_state=moves)
    # The others wait while the main process tokenises.
    patience = InitProcessGroupKwargs(timeout=timedelta(hours=12))
    try:
        return Accelerator(mixed_precision=mixed_precision, cpu=on_cpu, kwargs_handlers=[patience])
    except ValueError as error:
        raise UserError(f"no --mixed_precision {mixed_precision} here: {error}") from error
