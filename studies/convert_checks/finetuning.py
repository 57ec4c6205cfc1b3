"""Models trained further on a text, by Transformers' own Trainer, and scored on another."""

import tempfile
import time
from collections.abc import Sequence
from typing import Any

import torch
from transformers import Trainer, TrainingArguments

from convert_checks.models import Named, fingerprint, texts
from convert_checks.rows import Rows
from hamt.measure.perplexity import score_documents

ROW = 1024  # tokens of a row, and of a block that is scored


def measure_finetuning(rows: Rows, models: Sequence[Named], options: Any) -> None:
    """A row for each model: bits per byte of a text, before and after training on another.

    All weights of a model are trained, on the same rows in the same order.
    """
    tokenizer = models[0].tokenizer
    # The training text of WikiText-2 that is at hand has a mark in the place of rare words, the one
    # that is scored has the words.
    learned = [text.replace("<unk> ", "") for text in texts(options.finetune_text, tokenizer, 0)]
    scored = texts(options.finetune_scored, tokenizer, options.tokens)
    for each in models:
        place = {"part": "finetune", "model": each.name}
        settings = {"steps": options.finetune_steps, "rate": options.finetune_learning_rate}
        settings |= {"text": fingerprint(learned), "scored": fingerprint(scored)}
        settings |= {"seed": options.seed, "weights": each.weights, "device": options.device}
        if rows.done(place, settings) is None:
            begun, model = time.perf_counter(), each.fresh()
            found = {"before": bits_per_byte(model, tokenizer, scored)}
            train(model, drawn(tokenizer, learned, options), options)
            found |= {"after": bits_per_byte(model, tokenizer, scored)}
            found["tokens"] = options.finetune_steps * ROW
            rows.add(place, settings, found, begun)


def bits_per_byte(model: Any, tokenizer: Any, documents: Sequence[str]) -> float:
    """Of documents, in blocks of ``ROW`` tokens."""
    return score_documents(model, tokenizer, documents, context=ROW, batch_size=1).bits_per_byte


def drawn(tokenizer: Any, documents: Sequence[str], options: Any) -> list[dict[str, torch.Tensor]]:
    """As many rows as steps, from random places of a text."""
    ids = tokenizer("\n".join(documents), add_special_tokens=False, verbose=False).input_ids
    length = min(ROW, len(ids))
    generator = torch.Generator().manual_seed(options.seed)
    count = options.finetune_steps
    starts = torch.randint(len(ids) - length + 1, (count,), generator=generator).tolist()
    row = [torch.tensor(ids[start : start + length]) for start in starts]
    return [{"input_ids": each, "labels": each} for each in row]


def train(model: Any, rows: Sequence[dict[str, torch.Tensor]], options: Any) -> None:
    """One pass over rows, one row a step, in bfloat16 by autocast."""
    with tempfile.TemporaryDirectory() as folder:
        told = TrainingArguments(
            output_dir=folder,
            max_steps=len(rows),
            per_device_train_batch_size=1,
            learning_rate=options.finetune_learning_rate,
            warmup_steps=len(rows) // 10,
            bf16=True,
            use_cpu=options.device == "cpu",
            seed=options.seed,
            logging_steps=10,
            disable_tqdm=True,
            save_strategy="no",
            report_to="none",
        )
        Trainer(model, told, train_dataset=list(rows)).train()  # type: ignore[arg-type]
