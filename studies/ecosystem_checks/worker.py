"""Two processes that train and save one model: ``processes`` starts them."""

import json
import sys
import tempfile
import traceback
from collections.abc import Callable
from typing import Any

import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from accelerate import Accelerator
from torch.distributed.checkpoint.state_dict import get_model_state_dict, set_model_state_dict
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import FullyShardedDataParallel, fully_shard
from torch.distributed.fsdp.wrap import ModuleWrapPolicy
from torch.distributed.tensor import DTensor
from torch.nn.parallel import DistributedDataParallel
from transformers import Trainer, TrainingArguments

from ecosystem_checks.base import close, random_ids, tiny_model
from hamt.model import HAMTBlock

IDS = random_ids(2, 20)


def mine() -> torch.Tensor:
    """The row of this process."""
    return IDS[dist.get_rank()][None]


def whole(x: torch.Tensor) -> torch.Tensor:
    """A tensor that may be in pieces, together."""
    return x.full_tensor() if isinstance(x, DTensor) else x


def wanted() -> torch.Tensor:
    """The gradient of one process that has all rows."""
    model = tiny_model().train()
    model(IDS, labels=IDS).loss.backward()
    return model.lm_head.weight.grad


def sharded() -> Any:
    """The model in pieces, by FSDP2."""
    mesh, model = init_device_mesh("cpu", (dist.get_world_size(),)), tiny_model().train()
    for block in model.model.layers:
        fully_shard(block, mesh=mesh)
    fully_shard(model, mesh=mesh)
    return model


def ddp() -> str:
    """Gradients are the mean of both rows."""
    model = DistributedDataParallel(tiny_model().train())
    model(mine(), labels=mine()).loss.backward()
    return close(model.module.lm_head.weight.grad, wanted())


def fsdp1() -> str:
    """The same with ``FullyShardedDataParallel``: the loss after a step."""
    policy = ModuleWrapPolicy({HAMTBlock})
    model: Any = FullyShardedDataParallel(
        tiny_model().train(),
        auto_wrap_policy=policy,
        device_id=torch.device("cpu"),
        use_orig_params=True,
    )
    return _after_a_step(model)


def fsdp2() -> str:
    """The same with ``fully_shard``: gradients."""
    model = sharded()
    model(mine(), labels=mine()).loss.backward()
    return close(whole(model.lm_head.weight.grad), wanted())


def _after_a_step(model: Any) -> str:
    one = tiny_model().train()
    losses = []
    for each, ids in ((one, IDS), (model, mine())):
        optimiser = torch.optim.SGD(each.parameters(), lr=0.1)
        for _ in range(2):
            loss = each(ids, labels=ids).loss
            optimiser.zero_grad()
            loss.backward()
            optimiser.step()
        losses.append(loss.detach().clone())
    dist.all_reduce(losses[1])  # the sum: gloo has no mean
    return close(losses[1] / dist.get_world_size(), losses[0])


def dcp_saved() -> str:
    """A sharded model is saved by both, and read by one that is not sharded."""
    model, other = sharded(), tiny_model()
    with torch.no_grad():
        for weight in model.parameters():
            weight.mul_(1.5)
    folders = [tempfile.mkdtemp()] if dist.get_rank() == 0 else [None]
    dist.broadcast_object_list(folders)
    dcp.save(get_model_state_dict(model), checkpoint_id=folders[0])
    state = get_model_state_dict(other)
    dcp.load(state, checkpoint_id=folders[0])
    set_model_state_dict(other, state)
    weights = tiny_model().state_dict()
    for name, weight in other.state_dict().items():
        close(weight, 1.5 * weights[name])
    return f"{len(weights)} tensors"


def accelerate() -> str:
    """``Accelerator.prepare`` and ``accelerator.backward``."""
    accelerator = Accelerator(cpu=True)
    assert accelerator.num_processes == 2
    model = accelerator.prepare(tiny_model().train())
    accelerator.backward(model(mine(), labels=mine()).loss)
    return close(accelerator.unwrap_model(model).lm_head.weight.grad, wanted())


def trainer() -> str:
    """Two steps of Trainer, rows divided among the processes."""
    rows = [{"input_ids": row, "labels": row} for row in IDS.tolist()]
    with tempfile.TemporaryDirectory() as folder:
        told: dict[str, Any] = {"use_cpu": True, "report_to": [], "save_strategy": "no"}
        told |= {"max_steps": 2, "logging_steps": 1, "per_device_train_batch_size": 1}
        told |= {"disable_tqdm": True, "learning_rate": 0.1, "optim": "sgd", "max_grad_norm": 0.0}
        told |= {"lr_scheduler_type": "constant", "weight_decay": 0.0}
        made = Trainer(tiny_model(), TrainingArguments(folder, **told), train_dataset=rows)
        assert made.args.world_size == 2
        made.train()
    one = tiny_model().train()
    for _ in range(2):
        one.zero_grad()
        one(IDS, labels=IDS).loss.backward()
        torch.optim.SGD(one.parameters(), lr=0.1).step()
    return close(made.model.lm_head.weight.detach(), one.lm_head.weight.detach(), 1e-4)


CHECKS: dict[str, Callable[[], str]] = {
    "DistributedDataParallel": ddp,
    "FullyShardedDataParallel (FSDP1)": fsdp1,
    "fully_shard (FSDP2)": fsdp2,
    "distributed checkpoint: saved in pieces, read whole": dcp_saved,
    "Accelerator": accelerate,
    "Trainer": trainer,
}


def main(path: str) -> None:
    """Run all checks and write how each ended."""
    dist.init_process_group("gloo")
    found = {}
    for name, run in CHECKS.items():
        try:
            found[name] = ["works", run()]
        except Exception as error:
            traceback.print_exc()
            found[name] = ["FAILED", f"{type(error).__name__}: {error}"]
    if dist.get_rank() == 0:
        with open(path, "w", encoding="utf-8") as file:
            json.dump(found, file)
    dist.destroy_process_group()


if __name__ == "__main__":
    main(sys.argv[1])
