"""What training costs on GPUs that are not here: operations, memory, communication, time.

Operations follow from ``hamt.utils.model_flops``, parameters and activations from the model itself
on the meta device, which has shapes and no numbers; communication from what DDP and FSDP2
exchange. Only ``DEVICES`` comes from data sheets, and only ``Assumptions`` is assumed.

Shape legend: B rows and N tokens of a micro-batch in one process, d hidden_dim, V vocabulary.
"""

from dataclasses import dataclass
from functools import cache
from typing import Any

import torch
from torch import Tensor

from hamt.config import HAMTConfig
from hamt.model import HAMTForCausalLM
from hamt.training.estimate import training_flops
from hamt.training.memory import GRADIENT, OPTIMIZER, WEIGHT, training_bytes


@dataclass(frozen=True)
class Device:
    """Figures of a GPU and of the machine around it, from the vendor's data sheets.

    ``source`` names them. Rates are a second and in one direction: that of NVLink is half of what
    the sheets add up. Operations are dense: half of what the sheet of H100 says with sparsity.
    """

    flops: float  # dense matrix products in bfloat16
    memory: float  # bytes
    bandwidth: float  # bytes from and to this memory
    link: float  # bytes to the other GPUs of the machine
    network: float  # bytes to other machines, for each GPU
    source: str


GPUS_OF_A_MACHINE = 8
DEVICES = {
    "A100": Device(
        312e12, 80e9, 2039e9, 300e9, 25e9, "NVIDIA A100 80GB SXM and DGX A100 data sheets"
    ),
    "H100": Device(989e12, 80e9, 3350e9, 450e9, 50e9, "NVIDIA H100 SXM and DGX H100 data sheets"),
}


@dataclass(frozen=True)
class Assumptions:
    """What cannot be counted here, and is chosen."""

    share_of_peak: float = 0.4  # of the operations a second that matrix products reach
    tokens_per_parameter: float = 20  # about compute-optimal: Hoffmann et al. 2022, 2203.15556
    micro_batch: int = 8192  # tokens of a forward pass in one process, at most


@dataclass(frozen=True)
class Size:
    """A model, and the batches that it is trained on."""

    hidden_dim: int
    num_layers: int
    length: int  # tokens of a row
    batch: int  # tokens of a step, over all processes: assumed

    @property
    def fields(self) -> dict[str, Any]:
        """What the model's configuration is made of."""
        sizes = {"hidden_dim": self.hidden_dim, "num_layers": self.num_layers}
        return {**sizes, "max_position_embeddings": self.length}


SIZES = {
    "100M": Size(640, 10, length=1024, batch=2**17),  # those of configs/100M.yaml
    "1B": Size(2048, 14, length=2048, batch=2**20),
    "7B": Size(4096, 25, length=2048, batch=2**22),
}


def stored_bytes(model: HAMTForCausalLM, rows: int, length: int) -> int:
    """Bytes that a forward pass over (B, N) tokens keeps for the backward pass, weights aside.

    They are counted while the model runs, which may be on the meta device.
    """
    kept = {parameter.untyped_storage()._cdata for parameter in model.parameters()}
    found: dict[int, torch.UntypedStorage] = {}  # holds them, so that no address comes again

    def keep(tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        if storage._cdata not in kept:
            found[storage._cdata] = storage
        return tensor

    ids = torch.zeros(rows, length, dtype=torch.long, device=model.device)
    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        loss = model(ids, labels=ids, return_logits=False).loss
    assert loss is not None
    return sum(storage.nbytes() for storage in found.values())


@dataclass(frozen=True)
class Activations:
    """Bytes of a micro-batch in float32: of each block, and of all that is no block."""

    block: int  # all that the backward pass of a block needs
    checkpoint: int  # what is kept of a block if it is computed twice
    rest: int
    head_gradient: int  # of the head, which is there before the backward pass begins

    def stored(self, num_layers: int, *, twice: bool) -> int:
        """Bytes at the end of the forward pass; ``twice`` computes the blocks twice."""
        return self.rest + num_layers * (self.checkpoint if twice else self.block)

    def peak(self, num_layers: int, gradients: float, *, twice: bool, before: float = 0) -> float:
        """The most bytes of activations and gradients in a step.

        Activations are most before the backward pass (of blocks that are computed twice one is then
        whole), and gradients at its end.

        Args:
            num_layers: how many blocks there are.
            gradients: bytes of all of them.
            twice: the blocks are computed twice.
            before: bytes of the gradients that the micro-batch before has left.
        """
        begin = self.stored(num_layers, twice=twice) + (self.block if twice else 0)
        return max(before + begin + self.head_gradient, gradients + self.block)


@dataclass(frozen=True)
class Weights:
    """Parameters of a model, by what FSDP2 gathers at a time."""

    total: int
    block: int
    root: int  # embedding, head and last norm

    @classmethod
    def of(cls, model: HAMTForCausalLM) -> "Weights":
        """Count them; a model on the meta device has the same."""
        total = model.num_parameters()
        (block,) = {
            sum(p.numel() for p in layer.parameters()) for layer in model.model.layers
        }  # of one size
        return cls(total, block, total - block * len(model.model.layers))


@cache
def counted(size: Size) -> tuple[Weights, float, int]:
    """Parameters, operations of training on a token, and bytes of all that is trained."""
    with torch.device("meta"):
        model = HAMTForCausalLM(HAMTConfig(**size.fields))
    return Weights.of(model), training_flops(model), training_bytes(model)


@cache
def held_activations(size: Size, rows: int) -> Activations:
    """``activations`` of so many rows."""
    return activations(size.fields, rows, size.length)


def activations(fields: dict[str, Any], rows: int, length: int) -> Activations:
    """Count the activations of a model of these fields, from models of one and of two blocks."""
    counts = {}
    for twice in (False, True):
        for num_layers in (1, 2):
            with torch.device("meta"):
                model = HAMTForCausalLM(HAMTConfig(**{**fields, "num_layers": num_layers})).train()
            if twice:
                model.activation_checkpointing_enable()
            counts[twice, num_layers] = stored_bytes(model, rows, length)
    block = counts[False, 2] - counts[False, 1]
    return Activations(
        block=block,
        checkpoint=counts[True, 2] - counts[True, 1],
        rest=counts[False, 1] - block,
        head_gradient=model.lm_head.weight.numel() * GRADIENT,
    )


def ddp_bytes(weights: Weights) -> int:
    """Bytes of gradients that DDP sums over all processes in a step (all-reduce)."""
    return weights.total * GRADIENT


def fsdp2_bytes(weights: Weights, micro_batches: int = 1) -> tuple[int, int]:
    """Bytes that FSDP2 gathers (all-gather) and sums (reduce-scatter) in a step, as whole tensors.

    Blocks are gathered for the forward and for the backward pass, the rest once for both. Each
    micro-batch does it anew.
    """
    gathered = (2 * weights.total - weights.root) * WEIGHT
    return micro_batches * gathered, micro_batches * weights.total * GRADIENT


def sent_bytes(kind: str, weights: Weights, processes: int, micro_batches: int = 1) -> float:
    """Bytes that each process sends in a step, in rings: the least that is possible.

    A ring sends (n − 1)/n of a tensor to gather or to scatter it, and twice that to reduce it for
    all.
    """
    share = (processes - 1) / processes
    if kind == "DDP":
        return 2 * share * ddp_bytes(weights)
    return share * sum(fsdp2_bytes(weights, micro_batches))


def state_bytes(kind: str, weights: Weights, processes: int) -> float:
    """Bytes of weights and optimiser in each process, without gradients.

    With FSDP2 these are pieces, and beside them the root and two blocks are whole while one of both
    is computed and the other gathered.
    """
    piece = weights.total * (WEIGHT + OPTIMIZER)
    if kind == "DDP":
        return piece
    return piece / processes + (weights.root + 2 * weights.block) * WEIGHT


def gradient_bytes(kind: str, weights: Weights, processes: int) -> tuple[float, float]:
    """Bytes of all gradients of a process: after a backward pass, and most at its end.

    DDP has a second copy of them, in the buckets that are exchanged; FSDP2 keeps pieces, and has
    those of the root and of a block whole before they are summed.
    """
    if kind == "DDP":
        kept = (2 if processes > 1 else 1) * weights.total * GRADIENT
        return kept, kept
    pieces = weights.total * GRADIENT / processes
    return pieces, pieces + (weights.root + weights.block) * GRADIENT


def cost(
    size: Size, kind: str, processes: int, device: Device, assumed: Assumptions
) -> dict[str, Any]:
    """What a step, and training on ``tokens_per_parameter`` tokens a parameter, cost.

    Returns:
        ``state_bytes`` (weights, optimiser, gradients) and ``peak_bytes`` of a process, the latter
        also for blocks that are computed twice; ``sent_bytes`` of a process in a step; seconds of a
        step for operations, for communication and for the memory's bandwidth; ``step_s``, the
        largest of them, as if all three went on at once; ``tokens_per_s`` and ``days``. Blocks are
        computed ``twice`` where the memory asks for it; where even that does not fit, the last
        three are None.
    """
    weights, operations, trained = counted(size)
    layers = size.num_layers
    micro_batch = min(size.batch // processes, assumed.micro_batch)
    micro_batches = size.batch // processes // micro_batch
    held = held_activations(size, micro_batch // size.length)
    state = state_bytes(kind, weights, processes)
    kept, gradients = gradient_bytes(kind, weights, processes)
    before = kept if micro_batches > 1 else 0
    peaks = [
        state + held.peak(layers, gradients, twice=twice, before=before) for twice in (False, True)
    ]
    fits = [peak <= device.memory for peak in peaks]
    twice = not fits[0]
    # Blocks that are computed twice take their forward pass once more; the head is not among them.
    blocks = operations / 3 - 2 * held.head_gradient / GRADIENT
    again = operations + blocks if twice else operations
    compute = again * size.batch / (processes * device.flops * assumed.share_of_peak)
    sent = sent_bytes(kind, weights, processes, micro_batches)
    rate = device.link if processes <= GPUS_OF_A_MACHINE else device.network
    # Activations are written and read at least once, and so are gradients, weights and states.
    own = trained / (1 if kind == "DDP" else processes)
    moved = 2 * (micro_batches * held.stored(layers, twice=twice) + own)
    seconds = {
        "compute_s": compute,
        "communication_s": sent / rate,
        "memory_s": moved / device.bandwidth,
    }
    step = max(seconds.values()) if any(fits) else None
    tokens = assumed.tokens_per_parameter * weights.total
    return {
        "parameters": weights.total,
        "operations_per_token": operations,
        "micro_batches": micro_batches,
        "state_bytes": state + kept,
        "peak_bytes": peaks[0],
        "peak_bytes_twice": peaks[1],
        "twice": twice,
        "sent_bytes": sent,
        **seconds,
        "step_s": step,
        "tokens": tokens,
        "tokens_per_s": step and size.batch / step,
        "days": step and tokens / size.batch * step / 86400,
    }
