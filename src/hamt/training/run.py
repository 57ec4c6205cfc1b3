"""A whole run: from options to a trained checkpoint, and everything that tells how it went."""

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
from hamt.training.estimate import (
    disk_bytes,
    peak_flops,
    print_estimate,
    training_flops,
)
from hamt.training.held_out import Loss, held_out_loss
from hamt.training.loop import Listener, Trainer, TrainingResult
from hamt.training.ngrams import ngram_losses
from hamt.training.options import TrainOptions
from hamt.training.plan import Plan, make_plan
from hamt.training.tracking import HeldOutLines, ProgressBar, check_trackers, trackers
from hamt.visualization import save_figure, training_curves

# What a run writes beside its model; a folder that holds one is somebody's.
WRITTEN = ("config.json", "README.md", "training_info.json", "log.jsonl", "checkpoints")
# While training, a sample of about this many blocks is enough; the whole is scored at the end.
SAMPLE = 16


@dataclass
class Run:
    """A finished run: the model in evaluation mode, its tokenizer, and what was measured."""

    model: HAMTForCausalLM
    tokenizer: PreTrainedTokenizerBase
    corpus: TokenisedCorpus
    result: TrainingResult[Loss]
    final: Loss | None


def train_model(options: TrainOptions, console: Console) -> Run | None:
    """Train as the options say, and write everything to ``output_dir``.

    The folder gets the model and its tokenizer, ``training_info.json``, ``log.jsonl`` and
    ``loss_curve.png``; ``checkpoints/`` in it gets ``best.pt``, ``epoch_<n>.pt`` and ``step_<n>/``,
    which ``resume`` goes on from. With ``dry_run`` it says what the run would cost, and returns
    None, as it does in all processes but the main one.

    Raises:
        UserError: for anything the user can mend.
    """
    logging.disable_progress_bar()  # of Transformers, for files of a few MB
    plan = make_plan(options)
    main = plan.accelerator.is_main_process
    if not main:
        console = Console(quiet=True)
    _introduce(plan, console)
    _check_folder(plan)
    check_trackers(options)
    check_space(options.output_dir, disk_bytes(plan))
    if options.dry_run:
        print_estimate(plan, console)
        return None
    recorder = _Recorder(plan, console)
    trainer = Trainer(
        plan.model,
        partial(_measure, plan, SAMPLE),
        plan.loop,
        accelerator=plan.accelerator,
        run=torch.compile(plan.model) if options.compile_model else None,
        listeners=[recorder],
    )
    if options.resume:
        load_state(find_states(plan.states)[-1], trainer, plan.identity)
        console.print(f"going on after step {trainer.result.steps:,}")
        if trainer.result.steps >= plan.loop.num_steps:
            console.print("nothing is left to do: for more, give more --epochs or --num_steps")
    try:
        if main:
            recorder.open(trainer.result)
            clear_remains(plan.states, everything=not options.resume)
        run = _train(plan, trainer, console)
    except OSError as error:
        raise UserError(
            f"{options.output_dir} cannot be written ({reason(error)}): free space, then --resume "
            "goes on from the last checkpoint"
        ) from error
    finally:
        recorder.close()
    return run if main else None


def _train(plan: Plan, trainer: Trainer[Loss], console: Console) -> Run:
    begin = trainer.result.steps
    loader = plan.batches.loader(begin, plan.loop.num_steps, plan.options.num_workers)
    try:
        result = trainer.train(loader, plan.batches.begins)
    except DivergenceError as trouble:
        raise UserError(_keep_batch(trouble, plan)) from trouble
    if result.steps > begin:
        # A finished run can be gone on with, too: with more steps.
        _save_state(plan, trainer)
    return _finish(plan, trainer, console)


def _save_state(plan: Plan, trainer: Trainer[Loss]) -> None:
    save_state(plan.states, trainer, plan.tokenizer, plan.identity, plan.options.keep_checkpoints)


def _measure(plan: Plan, sample: int | None) -> Loss:
    """The loss of a sample of about so many blocks of the held-out text, or of all of it."""
    length, held_out = plan.options.max_length, plan.corpus.held_out
    every = 1 if sample is None else max(len(held_out) // length // sample, 1)
    return held_out_loss(
        plan.model,
        held_out,
        length,
        every=every,
        apart=plan.batches.apart,
        accelerator=plan.accelerator,
    )


def compare_with_ngrams(run: Run, output_dir: str) -> tuple[float, float]:
    """Losses of a unigram and a bigram model on the same text; added to ``training_info.json``, too."""
    unigram, bigram = ngram_losses(
        run.corpus.train.ids, run.corpus.held_out.ids, run.model.config.vocab_size
    )
    path = Path(output_dir) / "training_info.json"
    info = json.loads(path.read_text(encoding="utf-8"))
    write_json(path, {**info, "unigram_loss": unigram, "bigram_loss": bigram})
    return unigram, bigram


class _Recorder(Listener[Loss]):
    """Reports, logs and saves, at the steps that ask for it."""

    def __init__(self, plan: Plan, console: Console) -> None:
        self.plan, self.console, self.options = plan, console, plan.options
        self.listeners: list[Listener[Loss]] = []
        self.best = float("inf")
        self.flops = self.peak = 0.0

    def open(self, result: TrainingResult[Loss]) -> None:
        """Begin, or go on where ``result`` ends."""
        step = result.steps
        self.best = min(
            (loss.nats_per_token for at, loss in result.held_out if at), default=self.best
        )
        plan = self.plan
        self.flops, self.peak = training_flops(plan.model), peak_flops(plan.accelerator)
        bar = ProgressBar(plan.loop.num_steps, step)
        self.listeners = [*trackers(self.options, step), HeldOutLines(self.console), bar]

    def close(self) -> None:
        """Leave everything written."""
        for listener in self.listeners:
            listener.close()

    def logged(self, record: dict) -> None:
        """Pass it on, with the share of the machine's operations that training uses."""
        if self.peak:
            processes = self.plan.accelerator.num_processes
            used = record["tokens_per_second"] * self.flops / (self.peak * processes)
            record = {**record, "flop_utilization": used}
        for listener in self.listeners:
            listener.logged(record)

    def evaluated(self, step: int, measured: Loss) -> None:
        """Report, and keep the best model."""
        for listener in self.listeners:
            listener.evaluated(step, measured)
        if step and measured.nats_per_token < self.best:
            self.best = measured.nats_per_token
            self._save("best.pt")

    def stepped(self, trainer: Trainer[Loss]) -> None:
        """Save what is due."""
        for listener in self.listeners:
            listener.stepped(trainer)
        step, epoch = trainer.result.steps, self.plan.batches.steps_per_epoch
        if step % epoch == 0:
            self._save(f"epoch_{step // epoch}.pt")
        steps = self.plan.loop.num_steps
        interval = self.options.save_interval or min(500, max(steps // 10, 1))
        if step % interval == 0 and step < steps:
            _save_state(self.plan, trainer)

    def _save(self, name: str) -> None:
        if self.plan.accelerator.is_main_process:
            save_pt(self.plan.states / name, self.plan.model, self.plan.tokenizer)


def _introduce(plan: Plan, console: Console) -> None:
    corpus, memory = plan.corpus, plan.model.model.layers[0].mixer.memory
    console.print(
        f"[bold]{corpus.name}[/]: {len(corpus.train):,} tokens to train on, "
        f"{len(corpus.held_out):,} held out; vocabulary {len(plan.tokenizer):,}"
    )
    console.print(f"[bold]model[/]: {plan.model.num_parameters():,} parameters, {memory}")
    console.print(
        f"[bold]run[/]: {plan.loop.num_steps:,} steps of {plan.tokens_per_step:,} tokens, "
        f"{plan.loop.num_steps / plan.batches.steps_per_epoch:.2f} epochs"
    )


def _check_folder(plan: Plan) -> None:
    options, states = plan.options, plan.states
    found = find_states(states)
    if options.resume and not found:
        raise UserError(
            f"nothing to resume in {states}: leave --resume out, or give the run's --output_dir"
        )
    there = [name for name in WRITTEN if (Path(options.output_dir) / name).exists()]
    if not options.resume and not options.overwrite and (found or there):
        ways = "go on with it by --resume, begin" if found else "begin"
        raise UserError(
            f"{options.output_dir} holds {'a run' if found else there[0]}: {ways} anew by --overwrite, "
            "or choose another --output_dir"
        )


def _keep_batch(trouble: DivergenceError, plan: Plan) -> str:
    process = (
        f"_process_{plan.accelerator.process_index}" if plan.accelerator.num_processes > 1 else ""
    )
    path = Path(plan.options.output_dir) / f"trouble_step_{trouble.step}{process}.pt"
    write_file(path, lambda file: torch.save(trouble.batch, file))
    kept = find_states(plan.states)
    further = f"; --resume goes on from {kept[-1].name}" if kept else ""
    return (
        f"{trouble}; its batch is in {path}. Lower --learning_rate, or leave such steps out with "
        f"--skip_trouble{further}"
    )


def _finish(plan: Plan, trainer: Trainer[Loss], console: Console) -> Run:
    options, result = plan.options, trainer.result
    dtype, final = getattr(torch, options.save_dtype), None
    if not result.interrupted:
        # What is measured is what is saved.
        for parameter in plan.model.parameters():
            parameter.data.copy_(parameter.data.to(dtype))
        final = _measure(plan, sample=None)
    if plan.accelerator.is_main_process:
        save_checkpoint(options.output_dir, plan.model, plan.tokenizer, dtype)
        write_json(
            Path(options.output_dir) / "training_info.json", training_info(plan, result, final)
        )
        write_card(plan, result, final)
        held_out = [(step, loss.nats_per_token) for step, loss in result.held_out]
        curves = training_curves(result.train_losses, held_out)
        save_figure(Path(options.output_dir) / "loss_curve.png", curves)
    if final is None:
        console.print(
            f"stopped after {result.steps:,} steps; the same command with --resume goes on; "
            f"all is in {options.output_dir}"
        )
    plan.accelerator.wait_for_everyone()
    return Run(plan.model, plan.tokenizer, plan.corpus, result, final)


def training_info(plan: Plan, result: TrainingResult[Loss], final: Loss | None) -> dict:
    """What was done, with what, and what came out: ``training_info.json``."""
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
