"""Training a rival as a HAMT checkpoint was trained.

Text, tokenizer, tokens, schedule and number of parameters are the same.
"""

import json
import math
import re
from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

from rich.console import Console
from transformers import PreTrainedModel

from hamt.baselines.catalogue import ARCHITECTURES, RIVALS, with_parameters
from hamt.checkpoint import PRETRAINED
from hamt.config import HAMTConfig
from hamt.data.loader import Batches
from hamt.environment import environment
from hamt.errors import UserError, user_errors
from hamt.files import json_object, user_cache, write_json
from hamt.output import Output, claim
from hamt.training.checkpoints import check_space
from hamt.training.divergence import DivergenceError
from hamt.training.held_out import Loss, every_for, held_out_loss
from hamt.training.loop import Trainer, TrainingResult, seed_everything
from hamt.training.options import TrainOptions
from hamt.training.plan import Plan, make_plan
from hamt.training.record import OWN, RECORD, Record, read_record
from hamt.training.run import WRITTEN
from hamt.training.tracking import HeldOutLines, ProgressBar

INFO = "rival.json"
OF_HAMTS_PARTS = [
    kind for kind in RIVALS if ARCHITECTURES[kind].model_type == HAMTConfig.model_type
]


@dataclass(frozen=True)
class TrainedRival:
    """A rival trained at one learning rate.

    ``trouble`` says what ended a training before its time; then there is no model.
    """

    kind: str
    folder: Path
    learning_rate: float
    steps: int
    tokens: int
    own_rate: bool  # whether the checkpoint was trained at this learning rate
    held_out_loss: float | None  # on all of the held-out text, in nats per token
    trouble: str | None
    choices: dict[str, Any]  # how it is built, beside its sizes
    lacks: list[str]  # what the checkpoint was trained with and it was not


def read_run(checkpoint: Path) -> Record:
    """Read the record of the run that a checkpoint comes from.

    Raises:
        UserError: if there is none, or it is not what a run writes.
    """
    record = checkpoint / RECORD
    if not record.is_file():
        raise UserError(
            f"--rivals needs {record}, which hamt train writes beside its model: give such a folder"
        )
    return read_record(record)


def rivals_folder(checkpoint: Path) -> Path:
    """Where rivals are kept: beside the checkpoint, or in the user's cache for HAMT's own model."""
    if checkpoint.resolve() != PRETRAINED.resolve():
        return checkpoint / "rivals"
    return user_cache("rivals of HAMT's own model") / "rivals" / PRETRAINED.name


def train_rivals(
    kind: str, checkpoint: Path, console: Console, learning_rates: Sequence[float] = ()
) -> list[TrainedRival]:
    """Train a rival at each of these learning rates, or find it trained; see ``train_rival``.

    The one with the lowest held-out loss comes first. Without ``learning_rates`` there is one, at
    the learning rate of the checkpoint.
    """
    rates = dict.fromkeys(learning_rates or [read_run(checkpoint).options.learning_rate])
    trained = [train_rival(kind, checkpoint, console, rate) for rate in rates]
    return sorted(trained, key=lambda x: math.inf if x.held_out_loss is None else x.held_out_loss)


def train_rival(
    kind: str, checkpoint: Path, console: Console, learning_rate: float
) -> TrainedRival:
    """Train a rival of a checkpoint, or find it trained: a folder below ``rivals_folder``.

    The rival has as many parameters as the model of the checkpoint. All options of the training but
    the learning rate are those in ``training_info.json``. Documents of a batch see each other, even
    if they did not in the training of the checkpoint: most rivals cannot tell them apart.

    Raises:
        UserError: if there is no such rival, if it cannot have the width of the model, if there is
            no record of the run, if it was begun from another model or stopped before its end, if
            its text is not there any more, or if the folder cannot be written.
    """
    if kind not in RIVALS:
        raise UserError(f"no rival {kind}; there are {', '.join(RIVALS)}")
    run = read_run(checkpoint)
    if run.options.init_from is not None:
        raise UserError(
            f"{checkpoint} was begun from another model (--init_from), of which there is no rival: "
            "give a checkpoint that was trained from nothing"
        )
    if not run.finished:
        raise UserError(
            f"the training of {checkpoint} was stopped, and that of a rival would come to its end: "
            "train it to its end first"
        )
    folder = rivals_folder(checkpoint) / kind
    if learning_rate != run.options.learning_rate:
        folder = folder.parent / f"learning_rate_{learning_rate:g}" / kind
    options = replace(run.options, learning_rate=learning_rate)
    described = {"kind": kind, "steps": run.steps, "fingerprint": run.fingerprint}
    described["options"] = asdict(options)
    if kind in OF_HAMTS_PARTS:
        described["choices"] = _choices(kind, _config_of(checkpoint))
    info = _read_info(folder, described)
    if info is None:
        mend = "set XDG_CACHE_HOME to another"
        if folder.is_relative_to(checkpoint):
            mend = "copy the checkpoint to a folder of yours"
        names, known = (*WRITTEN, re.escape(INFO)), (folder / INFO).is_file()
        with claim(folder, "compare", names, adopt=known, mend=mend) as output:
            told = f"training: {kind} at the learning rate {learning_rate:g} ({folder})"
            console.print(told)
            plan = _plan(run, options, checkpoint, console)
            info = _train(plan, output, described, console)
    own_rate, trouble = learning_rate == run.options.learning_rate, info["trouble"]
    loss = None if trouble else info["held_out_loss"]["nats_per_token"]
    built = info.get("choices", {}), info.get("lacks", [])
    return TrainedRival(
        kind, folder, learning_rate, run.steps, info["tokens"], own_rate, loss, trouble, *built
    )


def _config_of(checkpoint: Path) -> HAMTConfig:
    config, _ = HAMTConfig.get_config_dict(str(checkpoint))
    return HAMTConfig(**{k: v for k, v in config.items() if k in HAMTConfig.__annotations__})


def _choices(kind: str, config: HAMTConfig) -> dict[str, Any]:
    """What a rival of HAMT's parts takes over from the checkpoint: all that is not its size."""
    own = {"hidden_dim", "num_layers", "vocab_size", "intermediate_dim", "mixers"}
    own |= {"max_position_embeddings", "bos_token_id", "eos_token_id", "pad_token_id"}
    usual = HAMTConfig()
    names = HAMTConfig.__annotations__.keys() - own
    choices = {
        name: value
        for name in sorted(names)
        if (value := getattr(config, name)) != getattr(usual, name)
    }
    if kind == "transformer":
        choices["short_convolution"] = config.conv_kernel_size > 1
    return choices


def _plan(run: Record, options: TrainOptions, checkpoint: Path, console: Console) -> Plan:
    """Plan the run of the checkpoint once more, on the same text.

    Raises:
        UserError: if the text is not there any more, or has changed.
    """
    changes: dict[str, Any] = {"overwrite": True}
    changes |= {name: path for name, path in (run.paths or {}).items() if Path(path).exists()}
    with TemporaryDirectory() as scratch:  # a plan asks for a folder of its own
        plan = make_plan(replace(options, output_dir=scratch, **changes))
    if plan.corpus.fingerprint == run.fingerprint:
        return plan
    # Records without paths are of versions that knew a text by its path and date.
    if run.paths is not None or (len(plan.corpus.train), len(plan.corpus.held_out)) != run.tokens:
        raise UserError(
            f"{options.data} has changed since {checkpoint} was trained on it: train again first"
        )
    console.print(
        f"{options.data} is taken for the text of {checkpoint}: it has as many tokens, and the "
        "record of the training says no more"
    )
    return plan


def _train(
    plan: Plan, output: Output, described: dict[str, Any], console: Console
) -> dict[str, Any]:
    """Train a rival, write its folder, and return what its ``rival.json`` says."""
    held_out, length, steps = plan.corpus.held_out, plan.options.max_length, described["steps"]
    model = _build(described["kind"], plan, described.get("choices", {}))
    check_space(output.folder, 4 * model.num_parameters(), mend="free space first")
    every = every_for(held_out, length)
    carries_none: dict[str, Any] = {"carry_state": False, "tbptt_segments": 1}
    # As many tokens of a step, read at once: no state is carried.
    rows = plan.options.batch_size * plan.options.tbptt_segments
    shape: dict[str, Any] = {"length": length, "batch_size": rows, "seed": plan.options.seed}
    batches = Batches(plan.corpus.train, order="shuffled", documents_flow=True, **shape)
    bar, trouble = ProgressBar(steps), None
    trainer = Trainer(
        model,
        lambda: held_out_loss(model, held_out, length, every=every),
        replace(plan.loop, num_steps=steps, max_seconds=math.inf, **carries_none),
        accelerator=plan.accelerator,
        listeners=[HeldOutLines(console), bar],
    )
    try:
        result: TrainingResult[Loss] = trainer.train(batches.loader(0, steps))
    except DivergenceError as error:
        result, trouble = trainer.result, str(error)
    finally:
        bar.close()
    if result.interrupted:
        raise KeyboardInterrupt
    info = {
        **described,
        "seconds": result.seconds,
        "tokens": result.tokens,
        "trouble": trouble,
        "lacks": _lacks(described["kind"], plan.model.config),
        "held_out_loss": None if trouble else held_out_loss(model, held_out, length)._asdict(),
        "environment": environment(),
    }

    def write(target: Path) -> None:
        if not trouble:
            model.save_pretrained(target)
            plan.tokenizer.save_pretrained(target)
        write_json(target / INFO, info)

    output.write(write)
    return info


def _lacks(kind: str, config: HAMTConfig) -> list[str]:
    """What the classes of Transformers are built without."""
    if kind in OF_HAMTS_PARTS:
        return []
    found = {"dropout": (config.dropout, 0.0)}
    found["embedding_multiplier"] = (config.embedding_multiplier, 1.0)
    return [f"{name} {value:g}" for name, (value, usual) in found.items() if value != usual]


def _build(kind: str, plan: Plan, choices: dict[str, Any]) -> PreTrainedModel:
    seed_everything(plan.options.seed)
    names = ("hidden_dim", "num_layers", "vocab_size")
    sizes = {name: getattr(plan.model.config, name) for name in names}
    with user_errors():
        parameters, context = plan.model.num_parameters(), plan.options.max_length
        return with_parameters(kind, parameters, **sizes, **choices, context=context)


def _read_info(folder: Path, described: dict[str, Any]) -> dict[str, Any] | None:
    """What ``rival.json`` says, if it is of the described training and has its result."""
    info = json_object(folder / INFO)
    wanted, there = json.loads(
        json.dumps([described, {name: info.get(name) for name in described}])
    )
    for each in (wanted, there):
        if isinstance(each["options"], dict):
            each["options"] = {k: v for k, v in each["options"].items() if k not in OWN}
    return info if wanted == there and "held_out_loss" in info else None
