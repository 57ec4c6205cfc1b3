"""Weights in pieces, one in each process: FSDP2 (``torch.distributed.fsdp.fully_shard``).

Accelerate's configuration asks for it (``fsdp_version: 2``) and ``hamt.training.loop`` does it:
each block is gathered when it is computed, embeddings and head with the model. Weights are gathered
and gradients are summed in float32, so that mixed precision is that of one process
(``torch.autocast``): gates and decays need more digits than bfloat16 has.
"""

import os
from typing import Any

import torch
from accelerate import Accelerator
from accelerate.utils import FullyShardedDataParallelPlugin
from torch import nn
from torch.distributed.checkpoint.state_dict import (
    StateDictOptions,
    get_model_state_dict,
    set_model_state_dict,
)
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import CPUOffloadPolicy, FSDPModule, fully_shard
from torch.distributed.tensor import DTensor, distribute_tensor
from torch.optim import Optimizer
from transformers import PreTrainedModel

from hamt.block import HAMTBlock
from hamt.errors import UserError
from hamt.model import HAMTForCausalLM


def wants_shards() -> bool:
    """Whether Accelerate's configuration asks for FSDP."""
    return os.environ.get("ACCELERATE_USE_FSDP", "false").lower() == "true"


def check_plugin(mixed_precision: str) -> None:
    """Refuse what a configuration of Accelerate asks for and nobody does here.

    Raises:
        UserError: with what to change in it.
    """
    if os.environ.get("FSDP_VERSION", "1") != "2":
        raise UserError("of FSDP only the second version is supported: set fsdp_version: 2")
    if mixed_precision == "fp16":
        raise UserError("FSDP2 is not supported with --mixed_precision fp16: use bf16")
    plugin = FullyShardedDataParallelPlugin()
    if isinstance(plugin.cpu_offload, CPUOffloadPolicy):
        raise UserError("weights on the CPU are not supported: leave fsdp_offload_params out")
    if plugin.activation_checkpointing:
        raise UserError(
            "activations are computed twice by --gradient_checkpointing: leave "
            "fsdp_activation_checkpointing out"
        )
    # Otherwise Transformers would load checkpoints in the first process alone.
    os.environ["FSDP_CPU_RAM_EFFICIENT_LOADING"] = "false"


def shard(model: PreTrainedModel, accelerator: Accelerator) -> None:
    """Cut all weights into pieces, in place, where the configuration asks for it.

    Each process keeps its piece. All of them must hold the same weights before, and optimisers are
    made of the pieces. One process alone keeps all weights.
    """
    if not wants_shards() or accelerator.num_processes == 1:
        return
    reshard = FullyShardedDataParallelPlugin().reshard_after_forward
    mesh = init_device_mesh(accelerator.device.type, (accelerator.num_processes,))
    for module in model.modules():
        if isinstance(module, HAMTBlock):
            fully_shard(module, mesh=mesh, reshard_after_forward=reshard)
    fully_shard(model, mesh=mesh)


def is_sharded(model: nn.Module) -> bool:
    """Whether the weights are in pieces: then every forward pass is one of all processes."""
    return isinstance(model, FSDPModule)


def drop_gathered(model: nn.Module) -> None:
    """Go back to the pieces: after a forward pass without a backward one some are still whole."""
    for module in model.modules():
        if isinstance(module, FSDPModule):
            module.reshard()


def whole_model(model: HAMTForCausalLM) -> HAMTForCausalLM:
    """The model with all of its weights, on the CPU; all processes call this.

    Only the main process gets it: the others, and a model that is not in pieces, get what they
    gave.
    """
    if not is_sharded(model):
        return model
    options = StateDictOptions(full_state_dict=True, cpu_offload=True)
    weights = get_model_state_dict(model, options=options)
    if not weights:  # another process
        return model
    with torch.device("meta"):  # takes no memory, and no random numbers
        whole = HAMTForCausalLM(model.config)
    whole.load_state_dict(weights, assign=True)
    whole.tie_weights()
    return whole.eval()


def load_weights(model: nn.Module, weights: dict[str, Any]) -> None:
    """Load a whole state dict, which every process has, into a model that may be in pieces."""
    if is_sharded(model):
        set_model_state_dict(model, weights, options=StateDictOptions(full_state_dict=True))
    else:
        model.load_state_dict(weights)


def whole_tensors(content: Any, keep: bool) -> Any:
    """The same dictionaries and lists, with whole tensors for those in pieces; all call this.

    A process that is not to ``keep`` them has None in their places.
    """
    if isinstance(content, DTensor):
        full = content.full_tensor()
        return full.cpu() if keep else None
    if isinstance(content, dict):
        return {name: whole_tensors(value, keep) for name, value in content.items()}
    if isinstance(content, list | tuple):
        return type(content)(whole_tensors(value, keep) for value in content)
    return content


def load_optimizer(optimizer: Optimizer, state: dict[str, Any]) -> None:
    """Load the state of an optimiser; of weights in pieces each process takes its own.

    Its settings stay those that it was made with.
    """
    parameters = [p for group in optimizer.param_groups for p in group["params"]]
    for index, values in state["state"].items():
        parameter: torch.Tensor = parameters[index]
        if not isinstance(parameter, DTensor):
            continue
        for name, value in values.items():
            if value.shape == parameter.shape:
                value = value.to(parameter.device)
                mesh, placements = parameter.device_mesh, parameter.placements
                values[name] = distribute_tensor(value, mesh, placements, src_data_rank=None)
    settings = [{k: v for k, v in x.items() if k != "params"} for x in optimizer.param_groups]
    optimizer.load_state_dict(state)
    for group, own in zip(optimizer.param_groups, settings, strict=True):
        group.update(own)  # a run may go on with another weight decay
