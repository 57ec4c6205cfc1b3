"""Training a classifier on a trained language model, and what to hold its accuracy against."""

import tempfile
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np
import torch
from sklearn.dummy import DummyClassifier
from sklearn.feature_extraction.text import TfidfVectorizer
from sklearn.linear_model import LogisticRegression
from sklearn.metrics import accuracy_score, confusion_matrix, f1_score
from sklearn.pipeline import make_pipeline
from transformers import (
    AutoModelForSequenceClassification,
    DataCollatorWithPadding,
    PreTrainedModel,
    PreTrainedTokenizerBase,
    Trainer,
    TrainingArguments,
)

from hamt.data.tokenizer import start_token
from hamt.finetune.progress import show_progress
from hamt.finetune.rows import Labelled


class Scores(NamedTuple):
    """How labels were told: accuracy and its standard error √(p (1 - p) / n), and macro F1."""

    accuracy: float
    standard_error: float
    macro_f1: float

    def __str__(self) -> str:
        return (
            f"{self.accuracy:.1%} ± {self.standard_error:.1%} right, macro F1 {self.macro_f1:.3f}"
        )


@dataclass
class Training:
    """How a classifier is trained; see ``FinetuneOptions``."""

    epochs: float
    batch_size: int
    learning_rate: float
    weight_decay: float
    max_length: int
    seed: int


def scores(labels: Any, told: Any) -> Scores:
    """The scores of labels that were told, beside the right ones."""
    accuracy = float(accuracy_score(labels, told))
    error = (accuracy * (1 - accuracy) / len(labels)) ** 0.5
    return Scores(accuracy, error, float(f1_score(labels, told, average="macro")))


def baselines(rows: Labelled) -> dict[str, Scores]:
    """The scores of the most frequent label, and of words and pairs of words (TF-IDF).

    The latter are weighed by logistic regression. Both come from scikit-learn.
    """
    words = TfidfVectorizer(ngram_range=(1, 2), sublinear_tf=True, token_pattern=r"\w+|[^\w\s]")
    models = {
        "the most frequent label": DummyClassifier(strategy="most_frequent"),
        "TF-IDF, logistic regression": make_pipeline(words, LogisticRegression(max_iter=2000)),
    }
    found = {}
    for name, model in models.items():
        model.fit(rows.texts, rows.labels)
        found[name] = scores(rows.held_out_labels, model.predict(rows.held_out_texts))
    return found


def classifier(
    model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, names: Sequence[str]
) -> PreTrainedModel:
    """A classifier on the backbone of a causal language model, which is copied; its head is new.

    The tokenizer gets a token for padding if it has none.
    """
    if tokenizer.pad_token is None:
        tokenizer.pad_token = tokenizer.eos_token
    config = type(model.config).from_dict(model.config.to_dict())
    config.pad_token_id, config.num_labels = tokenizer.pad_token_id, len(names)
    config.id2label = dict(enumerate(names))
    config.label2id = {name: number for number, name in enumerate(names)}
    config.architectures = None
    made = AutoModelForSequenceClassification.from_config(config)
    body = getattr(model, model.base_model_prefix).state_dict()
    getattr(made, made.base_model_prefix).load_state_dict(body)
    return made


def encode(
    tokenizer: PreTrainedTokenizerBase, texts: Sequence[str], max_length: int
) -> list[dict[str, list[int]]]:
    """Token ids of texts, each after the token that starts one, cut at ``max_length``."""
    start = start_token(tokenizer)
    encoded = tokenizer(list(texts), add_special_tokens=False, verbose=False).input_ids
    return [{"input_ids": [start, *ids][:max_length]} for ids in encoded]


def train(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    rows: Labelled,
    options: Training,
    told: Callable[[float, Scores], object],
) -> tuple[Scores, np.ndarray]:
    """Train a classifier; ``told`` is called with the epochs so far and the held-out scores.

    Returns:
        The scores on the held-out texts after training, and their confusion matrix, the right
        label by row.
    """

    def data(texts: Sequence[str], labels: Sequence[int]) -> list[dict[str, Any]]:
        encoded = encode(tokenizer, texts, options.max_length)
        return [{**row, "labels": label} for row, label in zip(encoded, labels, strict=True)]

    def metrics(prediction: Any) -> dict[str, float]:
        return scores(prediction.label_ids, prediction.predictions.argmax(-1))._asdict()

    def evaluated(epoch: float, found: dict[str, float]) -> None:
        told(epoch, Scores(*(found[f"eval_{name}"] for name in Scores._fields)))

    arguments = TrainingArguments(
        output_dir=tempfile.gettempdir(),  # nothing is saved there; it would make a folder here
        num_train_epochs=options.epochs,
        per_device_train_batch_size=options.batch_size,
        per_device_eval_batch_size=options.batch_size,
        learning_rate=options.learning_rate,
        weight_decay=options.weight_decay,
        warmup_steps=0.1,
        eval_strategy="epoch",
        save_strategy="no",
        logging_strategy="no",
        report_to=[],
        seed=options.seed,
        train_sampling_strategy="group_by_length",
        disable_tqdm=True,
        use_cpu=not torch.cuda.is_available(),
    )
    held_out: Any = data(rows.held_out_texts, rows.held_out_labels)
    trainer = Trainer(
        model,
        arguments,
        data_collator=DataCollatorWithPadding(tokenizer),
        train_dataset=data(rows.texts, rows.labels),
        eval_dataset=held_out,
        compute_metrics=metrics,
    )
    show_progress(trainer, evaluated)
    trainer.train()
    found = trainer.predict(held_out)  # whose rows come in another order, by their lengths
    answers = np.asarray(found.predictions).argmax(-1)
    matrix = confusion_matrix(found.label_ids, answers, labels=range(len(rows.names)))
    return scores(found.label_ids, answers), matrix
