"""Checkpoints to resume a run from, bit for bit on a CPU.

``<folder>/step_<n>/`` holds the model as a folder of Transformers, its weights in the dtype that
they are trained in, and ``training_state.pt``: plain data, read with ``weights_only=True``. A
folder gets its name only when all of it is on the disk, and older ones are removed only then. So
there is a whole checkpoint at every moment, whatever ends the run.
"""

import logging
import shutil
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
from accelerate.utils import gather_object
from torch import nn

from hamt.cache import HAMTCache
from hamt.errors import UserError, reason
from hamt.files import existing
from hamt.loading import pretrained_model
from hamt.model import HAMTForCausalLM
from hamt.output import Output, damaged
from hamt.training.held_out import Loss
from hamt.training.loop import Trainer, TrainingResult
from hamt.training.plan import Plan
from hamt.training.sharding import load_optimizer, load_weights, whole_model, whole_tensors

STATE = "training_state.pt"
logger = logging.getLogger(__name__)
SAVED = {"identity", "optimizers", "scaler", "result", "recent", "losses", "processes"}


def save_state(plan: Plan, trainer: Trainer[Loss], output: Output) -> None:
    """Write ``step_<n>``, then remove all checkpoints but the last ones, which are to be kept.

    All processes call this, each with its own ``trainer``; the main one writes.

    Raises:
        UserError: if it cannot be written; those that are there stay.
    """
    folder, result, scaler = plan.checkpoints, trainer.result, trainer.accelerator.scaler
    is_main, processes = (
        trainer.accelerator.is_main_process,
        gather_object([_process_state(trainer)]),
    )
    states = [each.state_dict() for each in trainer.optimizers]
    model, states = whole_model(plan.model), whole_tensors(states, keep=is_main)
    if not is_main:
        return
    target = folder / f"step_{result.steps}"
    if target in find_states(folder):
        return  # at the end of a run whose last step was one to save, too
    held_out = [(step, tuple(loss)) for step, loss in result.held_out]
    state = {
        "identity": plan.identity,
        "optimizers": states,
        "scaler": scaler.state_dict() if scaler else None,
        "result": asdict(result) | {"held_out": held_out},
        "recent": list(trainer.recent),
        "recent_aux": list(trainer.recent_aux),
        "losses": list(trainer.spikes.losses),
        "processes": processes,
    }

    def write(fresh: Path) -> None:
        model.save_pretrained(fresh)
        plan.tokenizer.save_pretrained(fresh)
        torch.save(state, fresh / STATE)

    try:
        output.new_folder(f"checkpoints/{target.name}", write)
        logger.debug("wrote %s", target)
    except OSError as error:
        further = ", then --resume goes on from the one before" if resumable(output) else ""
        raise UserError(
            f"no checkpoint could be written at step {result.steps} ({reason(error)}): "
            f"free space in {folder}{further}"
        ) from error
    for stale in find_states(folder)[: -plan.options.keep_checkpoints]:
        output.remove(f"checkpoints/{stale.name}")


def resumable(output: Output) -> bool:
    """Whether the command that writes there has ``--resume``."""
    return output.command == "train"


def find_states(folder: Path) -> list[Path]:
    """The checkpoints in ``folder``, oldest first; copies under other names are not among them."""
    named = {path.name.removeprefix("step_"): path for path in folder.glob("step_*")}
    steps = (step for step, path in named.items() if step.isdecimal() and (path / STATE).is_file())
    return [named[step] for step in sorted(steps, key=int)]


def remove_run(output: Output) -> None:
    """Remove what a run has written that is begun anew: nothing shall tell of another one."""
    for pattern in ("checkpoints/*", "*"):
        for path in output.folder.glob(pattern):
            if path.name != "checkpoints":
                output.remove(path.relative_to(output.folder).as_posix())


def load_state(plan: Plan, trainer: Trainer[Loss]) -> None:
    """Bring a trainer to where the run was that wrote the last checkpoint.

    Raises:
        UserError: if the checkpoint is damaged or cannot be read, or another run wrote it: with
            what differs.
    """
    *others, path = find_states(plan.checkpoints)
    logger.debug("resuming from %s", path)
    further = "--resume takes the one before" if others else "begin anew"
    try:
        if file := damaged(path):
            raise ValueError(f"{file.name} is missing or damaged")
        state = torch.load(path / STATE, map_location="cpu", weights_only=True)
        # A second model for a moment: Transformers knows in how many files it has written the
        # weights, and which of them are tied.
        saved_model = pretrained_model(
            HAMTForCausalLM, str(path), dtype=trainer.model.dtype, local_files_only=True
        )
        if not isinstance(state, dict) or not state.keys() >= SAVED:
            raise ValueError(f"{STATE} holds something else")
        if not all_finite(state["optimizers"]):
            raise ValueError("its optimiser holds NaN or infinity")
    except Exception as error:  # whatever it trips over
        raise UserError(
            f"{path} cannot be read ({reason(error)}): remove it and {further}"
        ) from error
    _check_identity(plan, path, state)
    try:
        _restore(trainer, saved_model, state)
    except Exception as error:  # parts of it are not what this version writes
        raise UserError(
            f"{path} is of another version of HAMT ({reason(error)}): begin anew by --overwrite"
        ) from error


def _restore(trainer: Trainer[Loss], saved_model: nn.Module, state: dict[str, Any]) -> None:
    load_weights(trainer.model, saved_model.state_dict())
    for optimizer, saved in zip(trainer.optimizers, state["optimizers"], strict=True):
        load_optimizer(optimizer, saved)
    if trainer.accelerator.scaler and state["scaler"]:
        trainer.accelerator.scaler.load_state_dict(state["scaler"])
    result = state["result"]
    result["held_out"] = [(step, Loss(*loss)) for step, loss in result["held_out"]]
    trainer.result = TrainingResult(**{**result, "interrupted": False, "out_of_time": False})
    if not isinstance(trainer.result.steps, int):
        raise TypeError(f"{trainer.result.steps!r} steps")
    trainer.recent = [tuple(pair) for pair in state["recent"]]
    trainer.recent_aux = list(state.get("recent_aux", ()))
    trainer.spikes.losses.extend(state["losses"])
    _restore_process(trainer, state["processes"][trainer.accelerator.process_index])


def all_finite(content: Any) -> bool:
    """Whether no tensor within dictionaries and sequences holds an infinity or a NaN."""
    if isinstance(content, torch.Tensor):
        return bool(content.isfinite().all())
    if isinstance(content, dict):
        content = content.values()
    elif not isinstance(content, (list, tuple)):
        return True
    return all(map(all_finite, content))


def _check_identity(plan: Plan, path: Path, state: dict[str, Any]) -> None:
    identity, processes = state["identity"], state["processes"]
    if not isinstance(identity, dict) or not isinstance(processes, list):
        raise UserError(f"{path / STATE} holds something else: begin anew by --overwrite")
    for name, wanted in plan.identity.items():
        if name == "text" and name not in identity:
            continue  # an older run noted path and date of its text, from which nothing can be told
        saved = identity.get(name)
        if saved == wanted:
            continue
        other, same = f"{name} {saved!r}, this one has {wanted!r}", "the same"
        if name == "text":
            other = "another text or tokenizer, or an earlier HAMT, which held out other documents"
            same = "the options it had (training_info.json, or the recipe)"
        raise UserError(
            f"the run in {path} had {other}: resume with {same}, or start in another --output_dir"
        )
    before, now = len(processes), plan.accelerator.num_processes
    if before != now:
        raise UserError(
            f"the run in {path} had {before} processes, this one has {now}: resume with as many"
        )


def _process_state(trainer: Trainer[Any]) -> dict[str, Any]:
    """What each process has of its own: random numbers, and the states of its rows."""
    state: dict[str, Any] = {"cpu": torch.get_rng_state()}
    if torch.cuda.is_available():
        state["cuda"] = torch.cuda.get_rng_state()
    state["carried"] = [None if cache is None else cache.to_tensors() for cache in trainer.carried]
    return state


def _restore_process(trainer: Trainer[Any], state: dict[str, Any]) -> None:
    torch.set_rng_state(state["cpu"])
    if "cuda" in state and torch.cuda.is_available():
        torch.cuda.set_rng_state(state["cuda"])
    device = trainer.accelerator.device
    trainer.carried = [
        None if saved is None else HAMTCache.from_tensors(saved, device)
        for saved in state["carried"]
    ]


def check_space(
    folder: Path, num_bytes: int, mend: str = "free space, or choose another --output_dir"
) -> None:
    """Refuse to begin a run whose checkpoints, of ``num_bytes`` at most, the disk cannot hold.

    Raises:
        UserError: with what is needed, what there is, and ``mend``, what the user can do.
    """
    free = shutil.disk_usage(existing(folder)).free
    # What the run has written before it was resumed is replaced, or stays and is not written again.
    written = (path for path in folder.glob("checkpoints/**/*") if path.is_file())
    num_bytes -= sum(path.stat().st_size for path in written)
    if free < num_bytes:
        raise UserError(
            f"{folder} has {free / 2**30:.1f} GiB free, the checkpoints of this run need "
            f"{num_bytes / 2**30:.1f}: {mend}"
        )
