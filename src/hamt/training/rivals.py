"""A rival trained as a HAMT checkpoint was: the same text, tokenizer, tokens, schedule and size."""

import json
from collections.abc import Iterable
from dataclasses import asdict, fields, replace
from pathlib import Path
from tempfile import TemporaryDirectory

from hamt.data.loader import Batches
from hamt.environment import environment
from hamt.errors import UserError
from hamt.evaluation.loss import Loss, held_out_loss
from hamt.evaluation.rivals import RIVALS, rival
from hamt.files import write_folder, write_json
from hamt.training.loop import Listener, Trainer, seed_everything
from hamt.training.options import TrainOptions
from hamt.training.plan import make_plan

SAMPLE = 16  # blocks of the held-out text that are scored while training
INFO = "rival.json"


def read_run(checkpoint: Path) -> tuple[TrainOptions, int, str]:
    """Options, steps and tokens (their fingerprint) of the run that a checkpoint came out of.

    Raises:
        UserError: if its record is not there.
    """
    record = checkpoint / "training_info.json"
    try:
        info = json.loads(record.read_text(encoding="utf-8"))
        names = {field.name for field in fields(TrainOptions)}
        options = {name: value for name, value in info["options"].items() if name in names}
        return TrainOptions(**options), int(info["steps"]), info["data_fingerprint"]
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise UserError(
            f"--rivals needs {record}, which hamt train writes beside its model: give such a folder"
        ) from error


def train_rival(kind: str, checkpoint: Path, listeners: Iterable[Listener[Loss]] = ()) -> Path:
    """Train it, or find it trained: a Transformers folder in ``checkpoint/rivals/kind``.

    It has as many parameters as the checkpoint's model, and its learning rate. The options of the run are
    read from ``training_info.json``. Where documents did not see each other in HAMT's batches they do here,
    since no rival tells them apart.

    Raises:
        UserError: if there is no such rival, no record of the run, or its text is not there any more.
    """
    if kind not in RIVALS:
        raise UserError(f"no rival {kind}; there are {', '.join(RIVALS)}")
    options, steps, fingerprint = read_run(checkpoint)
    folder = checkpoint / "rivals" / kind
    described = {"kind": kind, "steps": steps, "options": asdict(options), "fingerprint": fingerprint}
    if _described(folder) == json.loads(json.dumps(described)):
        return folder
    with TemporaryDirectory() as scratch:  # the plan asks for a folder of its own
        plan = make_plan(replace(options, output_dir=scratch, resume=False, overwrite=True))
    if plan.corpus.fingerprint != fingerprint:
        raise UserError(f"{options.data} has changed since {checkpoint} was trained on it: train again first")
    seed_everything(options.seed)
    model = rival(
        kind,
        hidden_dim=plan.model.config.hidden_dim,
        num_layers=plan.model.config.num_layers,
        vocab_size=plan.model.config.vocab_size,
        context=options.max_length,
        parameters=plan.model.num_parameters(),
    )
    batches = Batches(
        plan.corpus.train,
        length=options.max_length,
        batch_size=options.batch_size * options.tbptt_segments,  # as many tokens: it has no state to carry
        order="shuffled",
        apart=False,
        seed=options.seed,
    )
    held_out = plan.corpus.held_out
    every = max(len(held_out) // options.max_length // SAMPLE, 1)
    loop = replace(plan.loop, num_steps=steps, carry_state=False, segments=1, max_seconds=float("inf"))
    trainer = Trainer(
        model,
        lambda: held_out_loss(model, held_out, options.max_length, every=every),
        loop,
        accelerator=plan.accelerator,
        listeners=listeners,
    )
    result = trainer.train(batches.loader(0, steps))
    if result.interrupted:
        raise KeyboardInterrupt
    found = {"seconds": result.seconds, "tokens": result.tokens, "environment": environment()}

    def write(target: Path) -> None:
        model.save_pretrained(target)
        plan.tokenizer.save_pretrained(target)
        write_json(target / INFO, {**described, **found})

    write_folder(folder, write)
    return folder


def _described(folder: Path) -> dict | None:
    try:
        info = json.loads((folder / INFO).read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return None
    return {name: info.get(name) for name in ("kind", "steps", "options", "fingerprint")}
