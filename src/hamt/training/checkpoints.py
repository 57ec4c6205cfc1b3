"""Checkpoints to resume a run from, bit for bit on a CPU.

``<folder>/step_<n>/`` holds a model folder of Transformers and ``training_state.pt``: plain data,
read with ``weights_only=True``. A folder gets its name when all of it is on the disk; only then are
older ones removed. So there is a whole one at every moment, whatever kills the run.
"""

import os
import shutil
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
from accelerate.utils import gather_object
from transformers import PreTrainedTokenizerBase

from hamt.cache import HAMTCache
from hamt.errors import UserError, reason
from hamt.files import WRITING, existing, new_folder
from hamt.training.held_out import Loss
from hamt.training.loop import Trainer, TrainingResult

STATE = "training_state.pt"


def save_state(
    folder: str | os.PathLike[str],
    trainer: Trainer[Loss],
    tokenizer: PreTrainedTokenizerBase,
    identity: dict[str, Any],
    keep: int = 1,
) -> None:
    """Write ``step_<n>`` and leave the ``keep`` latest. All processes call it; the main one writes.

    ``identity`` is what has to be the same for a resumed run to go on as it would have.

    Raises:
        UserError: if it cannot be written; those there are stay.
    """
    folder, step = Path(folder), trainer.result.steps
    ranks = gather_object([_of_process(trainer)])
    if not trainer.accelerator.is_main_process:
        return
    target = folder / f"step_{step}"
    if target in find_states(folder):
        return  # written when this step was done
    state = {
        "identity": identity,
        "model": trainer.model.state_dict(),
        "optimizers": [optimizer.state_dict() for optimizer in trainer.optimizers],
        "scaler": trainer.accelerator.scaler.state_dict() if trainer.accelerator.scaler else None,
        "result": asdict(trainer.result)
        | {"held_out": [(n, tuple(m)) for n, m in trainer.result.held_out]},
        "recent": list(trainer.recent),
        "losses": list(trainer.spikes.losses),
        "processes": ranks,
    }

    def write(fresh: Path) -> None:
        trainer.model.save_pretrained(fresh)
        tokenizer.save_pretrained(fresh)
        torch.save(state, fresh / STATE)

    try:
        new_folder(target, write)
    except OSError as error:
        raise UserError(
            f"no checkpoint could be written at step {step} ({reason(error)}): free space in {folder}, then "
            "--resume goes on from the one before"
        ) from error
    for stale in find_states(folder)[:-keep]:
        shutil.rmtree(stale)


def find_states(folder: str | os.PathLike[str]) -> list[Path]:
    """The whole checkpoints in ``folder``, oldest first."""
    # A user's copy of one has another name, and is left alone.
    named = (
        path for path in Path(folder).glob("step_*") if path.name.removeprefix("step_").isdecimal()
    )
    found = [path for path in named if (path / STATE).is_file()]
    return sorted(found, key=lambda path: int(path.name.removeprefix("step_")))


def clear_remains(folder: str | os.PathLike[str], everything: bool = False) -> None:
    """Remove what a run left that died while it wrote; ``everything`` removes its checkpoints, too."""
    folder = Path(folder)
    for path in (
        *folder.glob(".step_*"),
        *folder.glob(f"{WRITING}*"),
        *folder.parent.glob(f"{WRITING}*"),
    ):
        shutil.rmtree(path, ignore_errors=True)
    if everything:
        for path in find_states(folder):
            shutil.rmtree(path)
        for path in (folder / "best.pt", *folder.glob("epoch_*.pt")):
            path.unlink(missing_ok=True)


def load_state(
    path: str | os.PathLike[str], trainer: Trainer[Loss], identity: dict[str, Any]
) -> None:
    """Bring a trainer to where the run was that wrote ``path``.

    Raises:
        UserError: if the run was another, with what differs.
    """
    try:
        state = torch.load(Path(path) / STATE, map_location="cpu", weights_only=True)
    except Exception as error:  # whatever it trips over
        before = (
            "--resume takes the one before"
            if len(find_states(Path(path).parent)) > 1
            else "begin anew"
        )
        raise UserError(
            f"{path} cannot be read ({reason(error)}): remove it and {before}"
        ) from error
    for name, wanted in identity.items():
        if name == "text" and name not in state["identity"]:
            continue  # an older run noted path and date of its text, from which nothing can be told
        there = state["identity"].get(name)
        if there != wanted and name == "text":
            raise UserError(
                f"the run in {path} had another text or tokenizer: resume with the options it had "
                "(training_info.json, or the recipe), or start in another --output_dir"
            )
        if there != wanted:
            raise UserError(
                f"the run in {path} had {name} {there!r}, this one has {wanted!r}: "
                "resume with the same, or start in another --output_dir"
            )
    processes = state["processes"]
    if len(processes) != trainer.accelerator.num_processes:
        raise UserError(
            f"the run in {path} had {len(processes)} processes, this one has "
            f"{trainer.accelerator.num_processes}: resume with as many"
        )
    trainer.model.load_state_dict(state["model"])
    for optimizer, saved in zip(trainer.optimizers, state["optimizers"], strict=True):
        optimizer.load_state_dict(saved)
    if trainer.accelerator.scaler and state["scaler"]:
        trainer.accelerator.scaler.load_state_dict(state["scaler"])
    result = state["result"]
    result["held_out"] = [(n, Loss(*measured)) for n, measured in result["held_out"]]
    result["train_losses"] = [(n, loss) for n, loss in result["train_losses"]]
    trainer.result = TrainingResult(**{**result, "interrupted": False, "out_of_time": False})
    trainer.recent = [tuple(pair) for pair in state["recent"]]
    trainer.spikes.losses.extend(state["losses"])
    _to_process(trainer, processes[trainer.accelerator.process_index])


def check_space(
    folder: str | os.PathLike[str],
    num_bytes: int,
    mend: str = "free space, or choose another --output_dir",
) -> None:
    """Refuse a run whose checkpoints the disk cannot hold; ``mend``: what the user is told to do.

    Raises:
        UserError: with what is needed and what there is.
    """
    free = shutil.disk_usage(existing(folder)).free
    # What an earlier part of the run has written makes room for what replaces it, or is already
    # there.
    num_bytes -= sum(
        path.stat().st_size for path in Path(folder).glob("checkpoints/**/*") if path.is_file()
    )
    if free < num_bytes:
        raise UserError(
            f"{folder} has {free / 2**30:.1f} GiB free, the checkpoints of this run need "
            f"{num_bytes / 2**30:.1f}: {mend}"
        )


def _of_process(trainer: Trainer[Any]) -> dict[str, Any]:
    """What each process has of its own: random numbers, and the states of its rows."""
    state: dict[str, Any] = {"cpu": torch.get_rng_state()}
    if torch.cuda.is_available():
        state["cuda"] = torch.cuda.get_rng_state()
    state["carried"] = [None if cache is None else cache.to_tensors() for cache in trainer.carried]
    return state


def _to_process(trainer: Trainer[Any], state: dict[str, Any]) -> None:
    torch.set_rng_state(state["cpu"])
    if "cuda" in state and torch.cuda.is_available():
        torch.cuda.set_rng_state(state["cuda"])
    device = trainer.accelerator.device
    trainer.carried = [
        None if saved is None else HAMTCache.from_tensors(saved, device)
        for saved in state["carried"]
    ]
