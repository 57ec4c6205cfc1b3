"""A whole run: from options to a trained model, with all that tells how it went."""

import json
import os
from collections.abc import Collection, Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import torch
from rich.console import Console
from tqdm import tqdm
from transformers import PreTrainedTokenizerBase
from transformers.utils import logging

from hamt.checkpoint import save_checkpoint, save_pt
from hamt.data.tokens import TokenisedCorpus
from hamt.errors import UserError, reason
from hamt.files import existing, write_file
from hamt.model import HAMTForCausalLM
from hamt.output import ELSEWHERE, Output, claim
from hamt.training.accelerator import make_accelerator
from hamt.training.card import model_card
from hamt.training.checkpoints import (
    check_space,
    find_states,
    load_state,
    remove_run,
    resumable,
    save_state,
)
from hamt.training.divergence import DivergenceError
from hamt.training.estimate import disk_bytes, peak_tokens_per_second, print_estimate
from hamt.training.fidelity import Fidelity, fidelity
from hamt.training.held_out import Loss, every_for, held_out_loss
from hamt.training.loop import Listener, Trainer, TrainingResult
from hamt.training.ngrams import ngram_losses
from hamt.training.options import TrainOptions
from hamt.training.plan import Plan, check_options, make_plan
from hamt.training.record import RECORD, training_info
from hamt.training.sharding import whole_model
from hamt.training.tracking import check_loggers, watchers
from hamt.visualization import save_figure, training_curves

# What a run writes into its folder, as regular expressions.
WRITTEN = (
    *(r"README\.md", r"training_info\.json", r"log\.jsonl", r"loss_curve\.png"),
    *(r"(generation_)?config\.json", r"model.*\.safetensors(\.index\.json)?"),
    *(r"(tokenizer|tokenizer_config|special_tokens_map|added_tokens|vocab)\.json", r"merges\.txt"),
    r"chat_template\.jinja",
    *(r"checkpoints/(best|epoch_\d+)\.pt", r"checkpoints/step_\d+", r"trouble_step_\d+\.pt"),
)


QUICK = "hamt_quick_*steps.pt"  # what hamt quick-train writes beside
ASKED = 1024  # held-out tokens at most, of which memories are asked for the items


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


@contextmanager
def run_folder(
    options: TrainOptions,
    command: str = "train",
    names: Collection[str] = WRITTEN,
    adopt: bool | None = None,
) -> Iterator[Output]:
    """The folder of a run, claimed by the main process, which alone writes there.

    A dry run only reads it. ``adopt`` is that of ``claim``; None is whether it holds checkpoints
    that ``hamt train`` goes on from.

    Raises:
        UserError: see ``claim``.
    """
    check_options(options)
    folder = Path(options.output_dir)
    if adopt is None:
        adopt = bool(find_states(folder / "checkpoints")) and not any(folder.glob(QUICK))
    if options.dry_run:
        if not os.access(existing(folder), os.W_OK):
            raise UserError(f"cannot write to {folder}: {ELSEWHERE}")
        yield Output(folder, command)
    elif make_accelerator(options.mixed_precision).is_main_process:
        with claim(folder, command, names, adopt=adopt) as output:
            yield output
    else:
        yield Output(folder, command)


def train_model(
    options: TrainOptions, console: Console, output: Output | None = None
) -> FinishedRun | None:
    """Train as the options say, and write everything to ``output_dir``.

    The folder gets the model and its tokenizer, ``training_info.json``, ``log.jsonl`` and
    ``loss_curve.png``. Its subfolder ``checkpoints/`` gets ``best.pt``, ``epoch_<n>.pt`` and
    ``step_<n>/``, from which ``resume`` goes on.

    Args:
        options: what to train, and how.
        console: where it says how it goes.
        output: the folder, if it is claimed already (``run_folder``).

    Returns:
        The finished run. None in all processes but the main one, and None with ``dry_run``, which
        only says what the run would cost.

    Raises:
        UserError: for whatever only the user can mend.
    """
    logging.disable_progress_bar()  # of Transformers, for files of a few MB
    with run_folder(options) if output is None else nullcontext(output) as output:
        _check_folder(options, output, console)
        plan = make_plan(options)
        is_main = plan.accelerator.is_main_process
        console = console if is_main else Console(quiet=True)
        _introduce(plan, console)
        check_loggers(options)
        check_space(output.folder, disk_bytes(plan))
        if options.dry_run:
            print_estimate(plan, console)
            return None
        run = _begin(plan, output, console)
    return run if is_main else None


def _begin(plan: Plan, output: Output, console: Console) -> FinishedRun:
    """Make the trainer, bring it to where the run was, and train."""
    options, is_main = plan.options, plan.accelerator.is_main_process
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
            if not options.resume:
                remove_run(output)
            for listener in watchers(plan, trainer.result.steps, output, console):
                trainer.listeners.append(listener)
        trainer.listeners.append(_Saver(plan, trainer.result, output))
        return _train(plan, trainer, output, console)
    except OSError as error:
        further = ", then --resume goes on from the last checkpoint" if resumable(output) else ""
        raise UserError(
            f"{options.output_dir} cannot be written ({reason(error)}): free space{further}"
        ) from error
    finally:
        for listener in trainer.listeners:
            listener.close()


def _train(plan: Plan, trainer: Trainer[Loss], output: Output, console: Console) -> FinishedRun:
    first = trainer.result.steps
    loader = plan.batches.loader(first, plan.loop.num_steps, plan.options.num_workers)
    try:
        result = trainer.train(loader, plan.batches.begins)
    except DivergenceError as trouble:
        raise UserError(_keep_batch(trouble, plan, output)) from trouble
    if result.steps > first:
        # Also at the end: a run of more steps can go on from there.
        save_state(plan, trainer, output)
    return _finish(plan, trainer, output, console)


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


def compare_with_ngrams(run: FinishedRun, output: Output) -> tuple[float, float]:
    """Losses of a unigram and a bigram model on the run's text, in nats per token.

    They are added to ``training_info.json``, too.
    """
    corpus, vocab_size = run.corpus, run.model.config.vocab_size
    unigram, bigram = ngram_losses(corpus.train.ids, corpus.held_out.ids, vocab_size)
    info = json.loads((output.folder / RECORD).read_text(encoding="utf-8"))
    output.write_json(RECORD, {**info, "unigram_loss": unigram, "bigram_loss": bigram})
    return unigram, bigram


def held_out_fidelity(run: FinishedRun) -> Fidelity | None:
    """How well the memories give held-out items back; None for a model without a memory."""
    ids = torch.tensor(run.corpus.held_out.ids[:ASKED].astype(int))
    return fidelity(run.model, ids[None])


class _Saver(Listener[Loss]):
    """Writes checkpoints when they are due.

    ``result`` is how far the run has come already: its losses were those of models that are saved.
    """

    def __init__(self, plan: Plan, result: TrainingResult[Loss], output: Output) -> None:
        self.plan, self.output = plan, output
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
            save_state(self.plan, trainer, self.output)

    def _save_model(self, name: str) -> None:
        model = whole_model(self.plan.model)
        if self.plan.accelerator.is_main_process:
            write = partial(save_pt, model=model, tokenizer=self.plan.tokenizer)
            self.output.write_file(f"checkpoints/{name}", write)


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


def _check_folder(options: TrainOptions, output: Output, console: Console) -> None:
    """Raise a UserError where a run would be begun over another, or resumed where there is none.

    Of a dry run only the latter is refused; else it says what would be in the way.
    """
    folder = output.folder / "checkpoints"
    states, trouble = find_states(folder), ""
    if options.resume and not states:
        raise UserError(
            f"nothing to resume in {folder}: leave --resume out, or give the run's --output_dir"
        )
    if not options.resume and not options.overwrite and (states or output.holds_something):
        ways = "go on with it by --resume, begin" if states else "begin"
        trouble = f"{output.folder} holds a run: {ways} anew by --overwrite, or {ELSEWHERE}"
    if options.dry_run:
        try:
            output.check_names(WRITTEN, adopt=bool(states))
        except UserError as error:
            trouble = str(error)
    elif trouble:
        raise UserError(trouble)
    if trouble:
        console.print(f"without --dry_run this is refused: {trouble}")


def _keep_batch(trouble: DivergenceError, plan: Plan, output: Output) -> str:
    """Save the batch that made trouble, and say what the user can do."""
    name, accelerator = f"trouble_step_{trouble.step}", plan.accelerator
    write = partial(torch.save, trouble.batch)
    if accelerator.is_main_process:
        path = output.write_file(f"{name}.pt", write)
    else:
        path = output.folder / f"{name}_process_{accelerator.process_index}.pt"
        write_file(path, write)
    told = f"{trouble}; its batch is in {path}"
    if not resumable(output):
        return f"{told}. hamt train has options for that: --learning_rate, --skip_trouble"
    states = find_states(plan.checkpoints)
    further = f"; --resume goes on from {states[-1].name}" if states else ""
    return f"{told}. Lower --learning_rate, or leave such steps out with --skip_trouble{further}"


def _finish(plan: Plan, trainer: Trainer[Loss], output: Output, console: Console) -> FinishedRun:
    """Measure the model on all of the held-out text, and write the model and what tells of it."""
    result = trainer.result
    dtype, final = getattr(torch, plan.options.save_dtype), None
    if not result.interrupted:
        # The model is measured with the weights that are saved, rounded to their dtype.
        for parameter in plan.model.parameters():
            parameter.data.copy_(parameter.data.to(dtype))
        with tqdm.external_write_mode():  # above the progress bar
            if result.out_of_time:
                limit = f"{plan.options.max_minutes:g} minutes are over (--max_minutes)"
                console.print(f"{limit}: {result.steps:,} of {plan.loop.num_steps:,} steps")
            if result.skipped:
                console.print(f"{result.skipped:,} of {result.steps:,} steps were left out")
            console.print("measuring the loss on all of the held-out text")
        final = _measure(plan, whole=True)
    model = whole_model(plan.model)
    if plan.accelerator.is_main_process:
        output.write(
            lambda fresh: save_checkpoint(fresh, model, plan.tokenizer, dtype),
        )
        output.write_json(RECORD, training_info(plan, result, final))
        output.write_text("README.md", model_card(plan, result, final))
        held_out = [(step, loss.nats_per_token) for step, loss in result.held_out]
        curves = training_curves(result.train_losses, held_out)
        output.write_file("loss_curve.png", lambda file: save_figure(file, curves))
    if final is None:
        further = "the same command with --resume goes on; " if resumable(output) else ""
        console.print(
            f"stopped after {result.steps:,} steps; {further}all is in {plan.options.output_dir}"
        )
    plan.accelerator.wait_for_everyone()
    return FinishedRun(model, plan.tokenizer, plan.corpus, result, final)
