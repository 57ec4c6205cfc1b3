"""A fine-tuning from rows to a folder: what is printed, and what is written."""

import json
import shlex
from pathlib import Path
from typing import Any

import numpy as np
from datasets import Dataset, DatasetDict
from rich.console import Console
from rich.table import Column, Table
from transformers import PreTrainedModel, PreTrainedTokenizerBase, set_seed
from transformers.utils import logging

from hamt.baselines.loading import load_any_model
from hamt.console import PlainConsole
from hamt.environment import environment
from hamt.errors import UserError, reason
from hamt.finetune.adapters import lora
from hamt.finetune.chat import MESSAGES, check_conversations, train_chat
from hamt.finetune.classify import Scores, Training, baselines, classifier, train
from hamt.finetune.options import FinetuneOptions
from hamt.finetune.rows import Labelled, apart, labelled, load_rows
from hamt.output import ELSEWHERE, Output

SHOWN = 8  # labels that a line and a table have room for


def finetune(options: FinetuneOptions, source: str, output: Output) -> None:
    """Train as the options say on the rows of ``source``; write the model and what it has learnt.

    Raises:
        UserError: for whatever only the user can mend.
    """
    if output.holds_something and not options.overwrite:
        raise UserError(
            f"{output.folder} holds a model that was fine-tuned: replace it by --overwrite, or "
            f"{ELSEWHERE}"
        )
    logging.disable_progress_bar()  # of Transformers, for files of a few MB
    found, console = load_rows(source, options.held_out), PlainConsole()
    if MESSAGES in found["train"].column_names:
        if options.text_column or options.label_column is not None:
            raise UserError("conversations have no columns of texts and labels: leave them out")
        check_conversations(found)
        if "held_out" not in found:
            found = _hold_out(found["train"], source, options.seed)
        _chat(options, found, output, console)
    else:
        columns = (options.text_column, options.label_column)
        _classify(options, labelled(found, source, *columns, options.seed), output, console)


def _hold_out(rows: Dataset, source: str, seed: int) -> DatasetDict:
    found = apart([json.dumps(messages) for messages in rows[MESSAGES]], seed)
    if found is None:
        raise UserError(
            f"{source} has one conversation alone: give --held_out, or more conversations"
        )
    parts = zip(("train", "held_out"), found, strict=True)
    return DatasetDict({name: rows.select(places) for name, places in parts})


def _classify(options: FinetuneOptions, found: Labelled, output: Output, console: Console) -> None:
    causal, tokenizer, name = load_any_model(options.checkpoint, options.trust_remote_code)
    more = ", ..." if len(found.names) > SHOWN else ""
    console.print(
        f"{options.data}: {len(found.texts):,} rows to train on, {len(found.held_out_texts):,} "
        f"held out; {len(found.names)} labels ({', '.join(found.names[:SHOWN])}{more})"
    )
    set_seed(options.seed)
    model = classifier(causal, tokenizer, found.names)
    console.print(f"{name}: {model.num_parameters():,} parameters")
    trained = _with_adapters(model, options.lora_rank)

    def tell(epochs: float, scores: Scores) -> None:
        console.print(f"epoch {epochs:4.1f}   held out: {scores}")

    scores, matrix = train(trained, tokenizer, found, _training(options), tell)
    model = trained.merge_and_unload() if options.lora_rank else trained
    _write(options, model, tokenizer, output)
    rows: dict[str, Scores] = {}
    if not options.skip_baselines:
        try:
            rows = baselines(found)
        except ValueError as error:  # of texts without any word
            console.print(f"no baselines: {reason(error)}")
    rows[name] = scores
    results = {
        "task": "classification",
        "labels": found.names,
        "rows": {"train": len(found.texts), "held_out": len(found.held_out_texts)},
        "scores": {kind: each._asdict() for kind, each in rows.items()},
        "confusion": matrix.tolist(),
    }
    _record(options, results, output)
    console.print(_table(rows))
    if len(found.names) <= SHOWN:
        console.print(_confusion(found.names, matrix))
    console.print(
        f"all is in {options.output_dir}; in Python: pipeline('text-classification', ...)"
    )


def _chat(options: FinetuneOptions, found: DatasetDict, output: Output, console: Console) -> None:
    causal, tokenizer, name = load_any_model(options.checkpoint, options.trust_remote_code)
    sizes = {split: len(part) for split, part in found.items()}
    console.print(
        f"{options.data}: {sizes['train']:,} conversations to train on, "
        f"{sizes['held_out']:,} held out"
    )
    console.print(f"{name}: {causal.num_parameters():,} parameters")
    set_seed(options.seed)

    def tell(epochs: float, loss: float) -> None:
        console.print(f"epoch {epochs:4.1f}   held-out loss {loss:.3f} nats/token")

    model, losses = train_chat(
        causal, tokenizer, found, _training(options), tell, options.lora_rank
    )
    results = {"task": "chat", "rows": sizes, "losses": losses._asdict()}
    _write(options, model, tokenizer, output)
    _record(options, results, output)
    console.print(
        f"held-out loss {losses.before:.3f} before, {losses.after:.3f} nats/token after; "
        f"all is in {options.output_dir}"
    )
    console.print(f"try: {shlex.join(['hamt', 'chat', '--checkpoint', options.output_dir])}")


def _training(options: FinetuneOptions) -> Training:
    names = Training.__dataclass_fields__
    return Training(**{name: getattr(options, name) for name in names})


def _with_adapters(model: PreTrainedModel, rank: int) -> Any:
    """Adapters of PEFT where a rank asks for them; the head is trained as a whole."""
    if (adapter := lora("SEQ_CLS", rank)) is None:
        return model
    from peft import get_peft_model

    try:
        return get_peft_model(model, adapter)
    except ValueError as error:  # PEFT knows no maps of this kind of model
        raise UserError(f"PEFT cannot adapt this model: {reason(error)}") from error


def _write(
    options: FinetuneOptions,
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    output: Output,
) -> None:
    def save(folder: Path) -> None:
        model.save_pretrained(folder)
        tokenizer.save_pretrained(folder)

    output.replace_all(save)


def _record(options: FinetuneOptions, results: dict[str, Any], output: Output) -> None:
    told = {"environment": environment(), "options": vars(options), **results}
    output.write_json("finetune_results.json", told)


def _table(rows: dict[str, Scores]) -> Table:
    table = Table("model", *(Column(name, justify="right") for name in ("right", "macro F1")))
    for name, scores in rows.items():
        right = f"{scores.accuracy:.1%} ± {scores.standard_error:.1%}"
        table.add_row(name, right, f"{scores.macro_f1:.3f}")
    return table


def _confusion(names: list[str], matrix: np.ndarray) -> Table:
    columns = (Column(f"told {name}", justify="right") for name in names)
    table = Table("right label", *columns)
    for name, counts in zip(names, matrix.tolist(), strict=True):
        table.add_row(name, *map(str, counts))
    return table
