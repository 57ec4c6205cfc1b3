"""From options to a trained checkpoint: the run behind ``hamt demo`` and ``hamt quick-train``."""

import platform
from dataclasses import asdict, dataclass
from pathlib import Path

import torch
import transformers
from rich.console import Console
from tqdm import tqdm
from transformers import PreTrainedTokenizerBase

import hamt
from hamt.checkpoint import save_checkpoint
from hamt.config import HAMTConfig
from hamt.data.blocks import encode, next_token_batch, shuffled_blocks
from hamt.data.corpus import load_corpus
from hamt.data.tokenizer import load_tokenizer, train_tokenizer
from hamt.errors import UserError
from hamt.evaluation.loss import Loss, held_out_loss
from hamt.evaluation.ngrams import ngram_losses
from hamt.files import write_folder, write_json
from hamt.model import HAMTForCausalLM
from hamt.training.loop import TrainingResult, seed_everything, train


@dataclass
class Run:
    """A finished run: the model in evaluation mode, its tokenizer, and what was measured."""

    model: HAMTForCausalLM
    tokenizer: PreTrainedTokenizerBase
    result: TrainingResult
    unigram: float
    bigram: float
    final: Loss | None


def build_config(**fields) -> HAMTConfig:
    """A configuration from options.

    Raises:
        UserError: if it cannot be built, with what would be right.
    """
    try:
        return HAMTConfig(**fields)
    except Exception as error:  # ValueError, or what Transformers' type checks raise
        raise UserError(str(error).splitlines()[-1].strip()) from error


def check_writable(folder: str) -> None:
    """Make ``folder`` now, before compute is spent.

    Raises:
        UserError: if nothing can be written there.
    """
    try:
        write_folder(folder, lambda target: None)
    except OSError as error:
        raise UserError(
            f"cannot write to {folder} ({error.strerror}); choose another --output_dir"
        ) from error


def train_on_corpus(
    console: Console,
    *,
    data: str,
    tokenizer_name: str | None,
    vocab_size: int,
    architecture: dict,
    output_dir: str,
    max_length: int,
    batch_size: int,
    num_steps: int,
    learning_rate: float,
    seed: int,
    max_seconds: float = float("inf"),
    log_interval: int = 10,
    eval_interval: int = 100,
) -> Run:
    """Train a model on a corpus and save it with its tokenizer and ``training_info.json``.

    Raises:
        UserError: for anything the user can mend: text, sizes, folders.
    """
    for name, value in (("num_steps", num_steps), ("batch_size", batch_size), ("max_length", max_length)):
        if value < 1:
            raise UserError(f"--{name} must be at least 1; got {value}")
    generator = seed_everything(seed)
    corpus = load_corpus(data)
    # Before the tokenizer is trained: a wrong size should not cost a minute.
    build_config(**architecture, vocab_size=vocab_size)
    check_writable(output_dir)
    tokenizer = (
        load_tokenizer(tokenizer_name) if tokenizer_name else train_tokenizer(corpus.train, vocab_size)
    )
    config = build_config(
        **architecture,
        vocab_size=len(tokenizer),
        max_position_embeddings=max_length,
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
    )
    train_stream, held_out_stream = encode(corpus.train, tokenizer), encode(corpus.held_out, tokenizer)
    if len(held_out_stream) < 2:
        raise UserError(f"{data} is too short to hold any of it out: give more text")
    batches = shuffled_blocks(train_stream, max_length, batch_size, generator)
    unigram, bigram = ngram_losses(train_stream, held_out_stream, len(tokenizer))
    model = HAMTForCausalLM(config)
    console.print(
        f"[bold]{corpus.name}[/]: {len(train_stream):,} tokens to train on, "
        f"{len(held_out_stream):,} held out; vocabulary {len(tokenizer):,}"
    )
    console.print(
        f"[bold]model[/]: {model.num_parameters():,} parameters, {model.model.layers[0].mixer.memory}"
    )

    # While training, a sample of about 16 blocks is enough; the whole is scored at the end.
    sparse = max(len(held_out_stream) // max_length // 16, 1)
    num_bytes = sum(len(text.encode()) for text in corpus.held_out)

    def evaluate(every: int = sparse) -> Loss:
        return held_out_loss(model, held_out_stream, num_bytes, max_length, every)

    def report(step: int, loss: Loss) -> None:
        with tqdm.external_write_mode():  # a line of its own above the progress bar
            console.print(
                f"step {step:5d}   held-out loss {loss.nats_per_token:.3f} nats/token, "
                f"{loss.bits_per_byte:.3f} bits/byte"
            )

    result = train(
        model,
        map(next_token_batch, batches),
        evaluate,
        num_steps=num_steps,
        learning_rate=learning_rate,
        max_seconds=max_seconds,
        log_interval=log_interval,
        eval_interval=eval_interval,
        on_evaluation=report,
    )
    save_checkpoint(output_dir, model, tokenizer)
    final = None if result.interrupted else evaluate(every=1)
    run = Run(model, tokenizer, result, unigram, bigram, final)
    info = {
        "corpus": corpus.name,
        "options": {
            "data": data,
            "max_length": max_length,
            "batch_size": batch_size,
            "num_steps": num_steps,
            "learning_rate": learning_rate,
            "seed": seed,
        },
        "train_tokens": len(train_stream),
        "held_out_tokens": len(held_out_stream),
    }
    write_json(Path(output_dir) / "training_info.json", {**info, **_measured(run)})
    if final is None:
        console.print(f"stopped after {result.steps} steps; the checkpoint is in {output_dir}")
    return run


def _measured(run: Run) -> dict:
    """The part of ``training_info.json`` that says what came out, and with what."""
    return {
        "finished": not run.result.interrupted,
        "num_parameters": run.model.num_parameters(),
        "held_out_loss": None if run.final is None else run.final._asdict(),
        "unigram_loss": run.unigram,
        "bigram_loss": run.bigram,
        **asdict(run.result),
        "tokens_per_second": run.result.tokens_per_second,
        "config": run.model.config.to_dict(),
        "versions": {
            "hamt": hamt.__version__,
            "torch": torch.__version__,
            "transformers": transformers.__version__,
            "python": platform.python_version(),
        },
    }
