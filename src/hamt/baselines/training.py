"""Rivals trained as a HAMT checkpoint was: the same text, tokenizer, tokens, schedule and size."""

import json
import math
from collections.abc import Sequence
from dataclasses import asdict, dataclass, fields, replace
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any, NamedTuple

from rich.console import Console

from hamt.baselines.catalogue import RIVALS, with_parameters
from hamt.checkpoint import PRETRAINED
from hamt.data.loader import Batches
from hamt.environment import environment
from hamt.errors import UserError
from hamt.files import check_writable, user_cache, write_folder, write_json
from hamt.training.checkpoints import check_space
from hamt.training.divergence import DivergenceError
from hamt.training.held_out import Loss, held_out_loss
from hamt.training.loop import Trainer, TrainingResult, seed_everything
from hamt.training.options import TrainOptions
from hamt.training.plan import Plan, make_plan
from hamt.training.tracking import HeldOutLines, ProgressBar

SAMPLE = 16  # blocks of the held-out text that are scored while training
INFO = "rival.json"


class Record(NamedTuple):
    """What ``training_info.json`` tells of a run; ``paths`` of the files it read, which old ones lack."""

    options: TrainOptions
    steps: int
    fingerprint: str
    tokens: tuple[int, int]  # to train on, and held out
    paths: dict[str, str] | None


@dataclass(frozen=True)
class TrainedRival:
    """A rival at one learning rate; ``trouble`` is what ended its training, of which nothing is kept then.

    ``held_out_loss`` is that of all of the held-out text, in nats per token.
    """

    kind: str
    folder: Path
    learning_rate: float
    steps: int
    tokens: int
    own_rate: bool  # is it that of the checkpoint?
    held_out_loss: float | None
    trouble: str | None


def read_run(checkpoint: Path) -> Record:
    """What is known of the run that a checkpoint came out of.

    Raises:
        UserError: if its record is not there.
    """
    record = checkpoint / "training_info.json"
    try:
        info = json.loads(record.read_text(encoding="utf-8"))
        names = {field.name for field in fields(TrainOptions)}
        options = {name: value for name, value in info["options"].items() if name in names}
        tokens = (int(info["train_tokens"]), int(info["held_out_tokens"]))
        return Record(
            TrainOptions(**options),
            int(info["steps"]),
            info["data_fingerprint"],
            tokens,
            info.get("paths"),
        )
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise UserError(
            f"--rivals needs {record}, which hamt train writes beside its model: give such a folder"
        ) from error


def rivals_folder(checkpoint: Path) -> Path:
    """Where rivals are kept: beside the checkpoint; those of the model in HAMT in the user's cache."""
    if checkpoint.resolve() != PRETRAINED.resolve():
        return checkpoint / "rivals"
    try:
        return user_cache() / "rivals" / PRETRAINED.name
    except RuntimeError as error:  # there is no home
        raise UserError("rivals of the model in HAMT have no place: set XDG_CACHE_HOME") from error


def train_rivals(
    kind: str, checkpoint: Path, console: Console, learning_rates: Sequence[float] = ()
) -> list[TrainedRival]:
    """Train a rival at each of these rates, or find it trained; the one with the lowest loss comes first.

    See ``train_rival``. Without rates it is the checkpoint's own.
    """
    rates = dict.fromkeys(learning_rates or [read_run(checkpoint).options.learning_rate])
    trained = [train_rival(kind, checkpoint, console, rate) for rate in rates]
    return sorted(
        trained, key=lambda one: math.inf if one.held_out_loss is None else one.held_out_loss
    )


def train_rival(
    kind: str, checkpoint: Path, console: Console, learning_rate: float
) -> TrainedRival:
    """Train it, or find it trained: a Transformers folder in ``rivals_folder``.

    It has as many parameters as the checkpoint's model. The options of the run are read from
    ``training_info.json``, all but the learning rate. Where documents did not see each other in
    HAMT's batches they do here, since no rival tells them apart.

    Raises:
        UserError: if there is no such rival, no record of the run, its text is not there any more,
            or the folder cannot be written.
    """
    if kind not in RIVALS:
        raise UserError(f"no rival {kind}; there are {', '.join(RIVALS)}")
    run = read_run(checkpoint)
    folder = rivals_folder(checkpoint) / kind
    if learning_rate != run.options.learning_rate:
        folder = folder.parent / f"learning_rate_{learning_rate:g}" / kind
    options = replace(run.options, learning_rate=learning_rate)
    described = {
        "kind": kind,
        "steps": run.steps,
        "options": asdict(options),
        "fingerprint": run.fingerprint,
    }
    found = _found(folder, described)
    if found is None:
        beside = folder.is_relative_to(checkpoint)
        mend = (
            "copy the checkpoint to a folder of yours"
            if beside
            else "set XDG_CACHE_HOME to another"
        )
        check_writable(str(folder), make=True, mend=mend)
        console.print(
            f"training: {kind} at the learning rate {learning_rate:g} ({folder})", markup=False
        )
        plan = _plan(run, options, checkpoint, console)
        found = _train(kind, plan, run.steps, folder, described, console)
    return TrainedRival(
        kind=kind,
        folder=folder,
        learning_rate=learning_rate,
        steps=run.steps,
        tokens=found["tokens"],
        own_rate=learning_rate == run.options.learning_rate,
        held_out_loss=None if found["trouble"] else found["held_out_loss"]["nats_per_token"],
        trouble=found["trouble"],
    )


def _plan(run: Record, options: TrainOptions, checkpoint: Path, console: Console) -> Plan:
    """The run once more, on the same text."""
    paths: dict[str, Any] = {
        name: path for name, path in (run.paths or {}).items() if Path(path).exists()
    }
    with TemporaryDirectory() as scratch:  # the plan asks for a folder of its own
        plan = make_plan(
            replace(options, output_dir=scratch, resume=False, overwrite=True, **paths)
        )
    if plan.corpus.fingerprint == run.fingerprint:
        return plan
    # Records without paths come from versions that told a text by its path and date.
    if run.paths is not None or (len(plan.corpus.train), len(plan.corpus.held_out)) != run.tokens:
        raise UserError(
            f"{options.data} has changed since {checkpoint} was trained on it: train again first"
        )
    console.print(
        f"{options.data} is taken for the text of {checkpoint}: it has as many tokens, and no more was noted",
        markup=False,
    )
    return plan


def _train(
    kind: str, plan: Plan, steps: int, folder: Path, described: dict[str, Any], console: Console
) -> dict[str, Any]:
    """Train, write the folder, and return what its ``rival.json`` says."""
    options = plan.options
    seed_everything(options.seed)
    model = with_parameters(
        kind,
        plan.model.num_parameters(),
        hidden_dim=plan.model.config.hidden_dim,
        num_layers=plan.model.config.num_layers,
        vocab_size=plan.model.config.vocab_size,
        context=options.max_length,
    )
    check_space(folder, 4 * model.num_parameters(), mend="free space first")
    batches = Batches(
        plan.corpus.train,
        length=options.max_length,
        batch_size=options.batch_size
        * options.tbptt_segments,  # as many tokens: it has no state to carry
        order="shuffled",
        documents_flow=True,
        seed=options.seed,
    )
    held_out = plan.corpus.held_out
    every = max(len(held_out) // options.max_length // SAMPLE, 1)
    loop = replace(
        plan.loop, num_steps=steps, carry_state=False, tbptt_segments=1, max_seconds=float("inf")
    )
    bar = ProgressBar(steps)
    trainer = Trainer(
        model,
        lambda: held_out_loss(model, held_out, options.max_length, every=every),
        loop,
        accelerator=plan.accelerator,
        listeners=[HeldOutLines(console), bar],
    )
    trouble = None
    try:
        result: TrainingResult[Loss] = trainer.train(batches.loader(0, steps))
    except DivergenceError as error:
        result, trouble = trainer.result, str(error)
    finally:
        bar.close()
    if result.interrupted:
        raise KeyboardInterrupt
    found = {
        **described,
        "seconds": result.seconds,
        "tokens": result.tokens,
        "trouble": trouble,
        "held_out_loss": None
        if trouble
        else held_out_loss(model, held_out, options.max_length)._asdict(),
        "environment": environment(),
    }

    def write(target: Path) -> None:
        if not trouble:
            model.save_pretrained(target)
            plan.tokenizer.save_pretrained(target)
        write_json(target / INFO, found)

    write_folder(folder, write)
    return found


def _found(folder: Path, described: dict[str, Any]) -> dict[str, Any] | None:
    """What ``rival.json`` says, if it is of this training and tells how well it went."""
    try:
        info = json.loads((folder / INFO).read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return None
    same = {name: info.get(name) for name in described} == json.loads(json.dumps(described))
    return info if same and "held_out_loss" in info else None
