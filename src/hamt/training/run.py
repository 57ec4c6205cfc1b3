"""A whole run: from options to a trained model, with all that tells how it went."""

import json
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path

import torch
from rich.console import Console
from transformers import PreTrainedTokenizerBase
from transformers.utils import logging

from hamt.checkpoint import save_checkpoint, save_pt
from hamt.data.tokens import TokenisedCorpus
from hamt.environment import environment
from hamt.errors import UserError, reason
from hamt.files import write_file, write_json
from hamt.model import HAMTForCausalLM
from hamt.peak_memory import process_peak_memory
from hamt.training.card import write_card
from hamt.training.checkpoints import (
    check_space,
    clear_remains,
    find_states,
    load_state,
    save_state,
)
from hamt.training.divergence import DivergenceError
from hamt.training.estimate import disk_bytes, peak_tokens_per_second, print_estimate
from hamt.training.held_out import Loss, every_for, held_out_loss
from hamt.training.loop import Listener, Trainer, TrainingResult
from hamt.training.ngrams import ngram_losses
from hamt.training.options import TrainOptions
from hamt.training.plan import Plan, make_plan
from hamt.training.tracking import check_loggers, watchers
from hamt.visualization import save_figure, training_curves

# What a run writes into its folder. A folder that holds one of these belongs to somebody.
WRITTEN = ("config.json", "README.md", "training_info.json", "log.jsonl", "checkpoints")


@dataclass
class FinishedRun:
    """A run that is over: its model in evaluation mode, and what was measured.

    ``final`` is the loss on all of the held-out text; None if the run was interrupted.
    """

    model: HAMTForCausalLM
    tokenizer: PreTrainedTokenizerBase
    corpus: TokenisedCorpus
    result: TrainingResult[Loss]
    final: Loss | None


def train_model(options: TrainOptions, console: Console) -> FinishedRun | None:
    """Train as the options say, and write everything to ``output_dir``.

    The folder gets the model and its tokenizer, ``training_info.json``, ``log.jsonl`` and
    ``loss_curve.png``. Its subfolder ``checkpoints/`` gets ``best.pt``, ``epoch_<n>.pt`` and
    ``step_<n>/``, from which ``resume`` goes on.

    Returns:
        The finished run. None in all processes but the main one, and None with ``dry_run``, which
        only says what the run would cost.

    Raises:
        UserError: for whatever only the user can mend.
    """
    logging.disable_progress_bar()  # of Transformers, for files of a few MB
    plan = make_plan(options)
    is_main = plan.accelerator.is_main_process
    console = console if is_main else Console(quiet=True)
    _introduce(plan, console)
    _check_folder(plan)
    check_loggers(options)
    check_space(Path(options.output_dir), disk_bytes(plan))
    if options.dry_run:
        print_estimate(plan, console)
        return None
    trainer = Trainer(
        plan.model,
        partial(_measure, plan),
        plan.loop,
        accelerator=plan.accelerator,
        compiled=torch.compile(plan.model) if options.compile_model else None,
        peak_tokens_per_second=peak_tokens_per_second(plan) if is_main else None,
    )
    if options.resume:
        load_state(plan, trainer)
        console.print(f"going on after step {trainer.result.steps:,}")
        if trainer.result.steps >= plan.loop.num_steps:
            console.print("nothing is left to do: for more, give more --epochs or --num_steps")
    try:
        if is_main:
            for listener in watchers(plan, trainer.result.steps, console):
                trainer.listeners.append(listener)
            clear_remains(plan.checkpoints, everything=not options.resume)
        trainer.listeners.append(_Saver(plan, trainer.result))
        run = _train(plan, trainer, console)
    except OSError as error:
        raise UserError(
            f"{options.output_dir} cannot be written ({reason(error)}): free space, then --resume "
            "goes on from the last checkpoint"
        ) from error
    finally:
        for listener in trainer.listeners:
            listener.close()
    return run if is_main else None


def _train(plan: Plan, trainer: Trainer[Loss], console: Console) -> FinishedRun:
    first = trainer.result.steps
    loader = plan.batches.loader(first, plan.loop.num_steps, plan.options.num_workers)
    try:
        result = trainer.train(loader, plan.batches.begins)
    except DivergenceError as trouble:
        raise UserError(_keep_batch(trouble, plan)) from trouble
    if result.steps > first:
        # Also at the end: a run of more steps can go on from there.
        save_state(plan, trainer)
    return _finish(plan, trainer, console)


def _measure(plan: Plan, whole: bool = False) -> Loss:
    """The loss of a sample of the held-out text, or of the whole."""
    length, held_out = plan.options.max_length, plan.corpus.held_out
    return held_out_loss(
        plan.model,
        held_out,
        length,
        every=1 if whole else every_for(held_out, length),
        documents_flow=plan.batches.documents_flow,
        accelerator=plan.accelerator,
    )


def compare_with_ngrams(run: FinishedRun, output_dir: str) -> tuple[float, float]:
    """Losses of a unigram and a bigram model on the run's text, in nats per token.

    They are added to ``training_info.json``, too.
    """
    corpus, vocab_size = run.corpus, run.model.config.vocab_size
    unigram, bigram = ngram_losses(corpus.train.ids, corpus.held_out.ids, vocab_size)
    path = Path(output_dir) / "training_info.json"
    info = json.loads(path.read_text(encoding="utf-8"))
    write_json(path, {**info, "unigram_loss": unigram, "bigram_loss": bigram})
    return unigram, bigram


class _Saver(Listener[Loss]):
    """Writes checkpoints when they are due.

    ``result`` is how far the run has come already: its losses were those of models that are saved.
    """

    def __init__(self, plan: Plan, result: TrainingResult[Loss]) -> None:
        self.plan = plan
        losses = (loss.nats_per_token for step, loss in result.held_out if step)
        self.lowest_loss = min(losses, default=float("inf"))
        short = max(plan.loop.num_steps // 10, 1)
        self.interval = plan.options.save_interval or min(500, short)

    def evaluated(self, step: int, measured: Loss) -> None:
        # The first loss is that of a model that has not been trained.
        if step and measured.nats_per_token < self.lowest_loss:
            self.lowest_loss = measured.nats_per_token
            self._save_model("best.pt")

    def stepped(self, trainer: Trainer[Loss]) -> None:
        step, epoch = trainer.result.steps, self.plan.batches.steps_per_epoch
        if step % epoch == 0:
            self._save_model(f"epoch_{step // epoch}.pt")
        if step % self.interval == 0 and step < self.plan.loop.num_steps:
            save_state(self.plan, trainer)

    def _save_model(self, name: str) -> None:
        if self.plan.accelerator.is_main_process:
            save_pt(self.plan.checkpoints / name, self.plan.model, self.plan.tokenizer)


def _introduce(plan: Plan, console: Console) -> None:
    corpus, mixers = plan.corpus, plan.model.model.mixer_summary()
    tokens = (len(corpus.train), len(corpus.held_out), len(plan.tokenizer))
    epochs = plan.loop.num_steps / plan.batches.steps_per_epoch
    lines = {
        corpus.name: "{:,} tokens to train on, {:,} held out; vocabulary {:,}".format(*tokens),
        "model": f"{plan.model.num_parameters():,} parameters, {mixers}",
        "run": f"{plan.loop.num_steps:,} steps of {plan.tokens_per_step:,} tokens, "
        f"{epochs:.2f} epochs",
    }
    for name, text in lines.items():
        console.print(name, style="bold", end="")
        console.print(f": {text}")


def _check_folder(plan: Plan) -> None:
    """Raise a UserError where a run would be begun over another, or resumed where there is none."""
    options, states = plan.options, find_states(plan.checkpoints)
    if options.resume and not states:
        raise UserError(
            f"nothing to resume in {plan.checkpoints}: "
            "leave --resume out, or give the run's --output_dir"
        )
    written = [name for name in WRITTEN if (Path(options.output_dir) / name).exists()]
    if not options.resume and not options.overwrite and (states or written):
        ways = "go on with it by --resume, begin" if states else "begin"
        raise UserError(
            f"{options.output_dir} holds {'a run' if states else written[0]}: "
            f"{ways} anew by --overwrite, or choose another --output_dir"
        )


def _keep_batch(trouble: DivergenceError, plan: Plan) -> str:
    """Save the batch that made trouble, and say what the user can do."""
    name, accelerator = f"trouble_step_{trouble.step}", plan.accelerator
    if accelerator.num_processes > 1:
        name += f"_process_{accelerator.process_index}"
    path = Path(plan.options.output_dir) / f"{name}.pt"
    write_file(path, lambda file: torch.save(trouble.batch, file))
    states = find_states(plan.checkpoints)
    further = f"; --resume goes on from {states[-1].name}" if states else ""
    return (
        f"{trouble}; its batch is in {path}. Lower --learning_rate, or leave such steps out with "
        f"--skip_trouble{further}"
    )


def _finish(plan: Plan, trainer: Trainer[Loss], console: Console) -> FinishedRun:
    """Measure the model on all of the held-out text, and write the model and what tells of it."""
    folder, result = Path(plan.options.output_dir), trainer.result
    dtype, final = getattr(torch, plan.options.save_dtype), None
    if not result.interrupted:
        # The model is measured with the weights that are saved, rounded to their dtype.
        for parameter in plan.model.parameters():
            parameter.data.copy_(parameter.data.to(dtype))
        final = _measure(plan, whole=True)
    if plan.accelerator.is_main_process:
        save_checkpoint(folder, plan.model, plan.tokenizer, dtype)
        write_json(folder / "training_info.json", training_info(plan, result, final))
        write_card(plan, result, final)
        held_out = [(step, loss.nats_per_token) for step, loss in result.held_out]
        save_figure(folder / "loss_curve.png", training_curves(result.train_losses, held_out))
    if final is None:
        console.print(
            f"stopped after {result.steps:,} steps; the same command with --resume goes on; "
            f"all is in {plan.options.output_dir}"
        )
    plan.accelerator.wait_for_everyone()
    return FinishedRun(plan.model, plan.tokenizer, plan.corpus, result, final)


def training_info(plan: Plan, result: TrainingResult[Loss], final: Loss | None) -> dict:
    """What ``training_info.json`` holds: what was done, with what, and what came of it."""
    here = environment()
    return {
        "finished": not result.interrupted,
        "options": asdict(plan.options),
        "paths": plan.options.paths(),
        "corpus": plan.corpus.name,
        "data_fingerprint": plan.corpus.fingerprint,
        "train_tokens": len(plan.corpus.train),
        "held_out_tokens": len(plan.corpus.held_out),
        "num_parameters": plan.model.num_parameters(),
        "held_out_loss": None if final is None else final._asdict(),
        **asdict(result),
        "tokens_per_second": result.tokens_per_second,
        "peak_memory_bytes": process_peak_memory(),
        "date": here["date"],
        "commit": here["commit"],
        "config": plan.model.config.to_dict(),
        "versions": {name: here[name] for name in ("hamt", "torch", "transformers", "python")},
    }
