"""What two processes make of one model: ``test_sharding`` starts them, and compares."""

import os
import shutil
import sys
from collections import Counter
from pathlib import Path
from unittest import mock

import torch
import torch.distributed as dist
from accelerate.state import AcceleratorState
from torch.distributed.tensor import DTensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from training_inputs import command

from hamt import HAMTConfig, HAMTForCausalLM
from hamt.cli import main
from hamt.data.blocks import next_token_batch
from hamt.training.accelerator import make_accelerator
from hamt.training.loop import Listener, LoopOptions, Trainer
from hamt.training.sharding import is_sharded, wants_shards, whole_model, whole_tensors

# As Accelerate's launcher sets them for a configuration with ``fsdp_version: 2``.
FSDP2 = {
    "ACCELERATE_USE_FSDP": "true",
    "FSDP_VERSION": "2",
    "FSDP_CPU_RAM_EFFICIENT_LOADING": "true",
    "FSDP_AUTO_WRAP_POLICY": "TRANSFORMER_BASED_WRAP",
}
STEPS = 2
IDS = torch.randint(40, (4, 25), generator=torch.Generator().manual_seed(0))
# Options of the model and of the loop, by what is compared.
CASES = {
    "adamw": {"optimizer": "adamw"},
    "muon": {},
    "untied": {"optimizer": "adamw", "tie_word_embeddings": False},
    "micro-batches": {"optimizer": "adamw", "micro_batches": 2},
    "activations twice": {"optimizer": "adamw", "gradient_checkpointing": True},
    "bf16": {"optimizer": "adamw", "mixed_precision": "bf16"},
    "carried state": {"optimizer": "adamw", "carry_state": True},
}
# Of these DDP has its own ways; the others are about weights in pieces.
WHOLE = ("adamw", "micro-batches", "bf16")
# The recipe of 100M parameters, made small enough for a test; what is left is its own.
RECIPE = {
    "hidden_dim": 32, "num_layers": 2, "vocab_size": 300, "tokenizer": "none", "max_length": 32,
    "batch_size": 4, "micro_batches": 1, "num_steps": 4, "compile_model": False, "log_interval": 1,
    "save_interval": 2, "eval_interval": 2, "keep_checkpoints": 2,
}  # fmt: skip


class Notes(Listener):
    """Losses and gradient norms of all steps."""

    def __init__(self):
        self.pairs = []

    def logged(self, record):
        self.pairs.append((record["loss"], record["gradient_norm"]))


def train_rows(rows, *, gradient_checkpointing=False, mixed_precision="no", **options):
    """Train a model on the same rows for some steps: the trainer, and losses and norms."""
    names = LoopOptions.__dataclass_fields__.keys() & options.keys()
    loop = {name: options.pop(name) for name in names}
    torch.manual_seed(0)
    sizes = {"hidden_dim": 32, "num_layers": 2, "vocab_size": 40}
    model = HAMTForCausalLM(HAMTConfig(**sizes, **options))
    if gradient_checkpointing:
        model.activation_checkpointing_enable()
    trainer = Trainer(
        model,
        lambda: None,
        LoopOptions(num_steps=STEPS, learning_rate=1e-2, log_interval=1, **loop),
        accelerator=make_accelerator(mixed_precision, on_cpu=True),
        listeners=[notes := Notes()],
    )
    trainer.train(iter([next_token_batch(rows)] * STEPS))
    return trainer, notes.pairs


def mine():
    """The rows of this process."""
    return IDS[2 * dist.get_rank() :][:2]


class Collectives(TorchDispatchMode):
    """How often each collective is called, and the bytes of its whole tensors.

    Not ``CommDebugMode``: its hooks on all modules let the head make all logits.
    """

    def __init__(self):
        super().__init__()
        self.calls, self.bytes = Counter(), Counter()

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        if DTensor in types:  # then what it does is seen
            return NotImplemented
        kind, name = func.name().split("::")
        if "c10d" in kind:
            tensors = [x for x in tree_leaves(args) if isinstance(x, torch.Tensor)]
            self.calls[name] += 1
            self.bytes[name] += max((x.nbytes for x in tensors), default=0)
        return func(*args, **(kwargs or {}))


def communication():
    """The collectives of one forward and backward pass, and those of the step of Muon after it."""
    trainer, _ = train_rows(mine())
    batch = next_token_batch(mine())
    with Collectives() as passes:
        outputs = trainer.called_model.train()(**batch, labels=batch["shift_labels"])
        outputs.loss.backward()
    with Collectives() as muon:
        trainer.optimizers[0].step()
    return [(dict(found.calls), dict(found.bytes)) for found in (passes, muon)]


def checks(folder):
    """Write ``<case>.pt`` for each case."""
    for name in CASES if wants_shards() else WHOLE:
        options = CASES[name]
        trainer, pairs = train_rows(mine(), **options)
        for each in (trainer.model, *trainer.model.model.layers):
            assert is_sharded(each) == wants_shards()
        model, main_process = whole_model(trainer.model), dist.get_rank() == 0
        states = whole_tensors([each.state_dict() for each in trainer.optimizers], main_process)
        if main_process:
            found = {"pairs": pairs, "weights": model.state_dict(), "optimizers": states}
            torch.save(found, folder / f"{name}.pt")
    found = communication()
    if dist.get_rank() == 0:
        torch.save(found, folder / "communication.pt")


def in_pieces(arguments):
    """Run a command: were the models that it saved in pieces?"""
    seen = set()

    def noting(model):
        seen.add(is_sharded(model))
        return whole_model(model)

    with mock.patch("hamt.training.run.whole_model", noting):
        assert main(arguments) == 0
    return seen


def recipe(text, folder):
    """``hamt train`` of the recipe, and once more from its checkpoint in the middle."""
    arguments = ["train", "100M", *command(data=text, output_dir=folder, **RECIPE)[1:]]
    assert in_pieces(arguments) == {wants_shards()}
    dist.barrier()
    if dist.get_rank() == 0:
        shutil.copytree(folder, f"{folder}-before")
        shutil.rmtree(folder / "checkpoints" / "step_4")
    dist.barrier()
    assert in_pieces([*arguments, "--resume"]) == {wants_shards()}
    dist.barrier()


def run(text, folder):
    """All of it without and with FSDP2."""
    for name, environment in (("ddp", {}), ("fsdp2", FSDP2)):
        AcceleratorState._reset_state()
        with mock.patch.dict(os.environ, environment):
            (folder / name).mkdir(exist_ok=True)
            checks(folder / name)
            recipe(text, folder / f"run-{name}")


if __name__ == "__main__":
    make_accelerator(on_cpu=True)
    run(sys.argv[1], Path(sys.argv[2]))
