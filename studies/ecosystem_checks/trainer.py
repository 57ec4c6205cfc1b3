"""Transformers' Trainer: losses, batches, what is packed, resumed and saved."""

import copy
import tempfile
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from transformers import (
    DataCollatorForLanguageModeling,
    DataCollatorWithFlattening,
    EarlyStoppingCallback,
    Trainer,
    TrainingArguments,
    default_data_collator,
)

from ecosystem_checks.base import check, close, packaged, random_ids, tiny_model, tokenizer
from hamt import HAMTForSequenceClassification

GROUP = "Transformers: Trainer"
ROWS = [{"input_ids": row, "labels": row} for row in random_ids(8, 16).tolist()]


def trainer(model: Any, folder: str, collator: Any = default_data_collator, **options: Any) -> Any:
    """A trainer of three steps over the same rows."""
    told: dict[str, Any] = {"max_steps": 3, "logging_steps": 1, "save_strategy": "no"}
    told |= {"report_to": [], "use_cpu": True, "disable_tqdm": True, "learning_rate": 1e-2}
    told |= {"lr_scheduler_type": "constant", "per_device_train_batch_size": 4, "seed": 0}
    data = options.pop("data", ROWS)
    callbacks = options.pop("callbacks", None)
    arguments = TrainingArguments(output_dir=folder, **told | options)
    return Trainer(
        model, arguments, collator, train_dataset=data, eval_dataset=data, callbacks=callbacks
    )


def trained(model: Any = None, **options: Any) -> tuple[Any, list[float]]:
    """A model after three steps, and the loss of each."""
    model = tiny_model() if model is None else model
    with tempfile.TemporaryDirectory() as folder:
        made = trainer(model, folder, **options)
        made.train()
        return model, [entry["loss"] for entry in made.state.log_history if "loss" in entry]


def weights(model: Any) -> Tensor:
    """All weights in one row."""
    return torch.cat([p.detach().flatten() for p in model.parameters()])


def evaluated(**options: Any) -> float:
    """The loss that evaluate() tells of a tiny model."""
    with tempfile.TemporaryDirectory() as folder:
        return trainer(tiny_model(), folder, **options).evaluate()["eval_loss"]


@check(GROUP, "evaluate() is the mean loss of the tokens that follow")
def _evaluate() -> str:
    ids = random_ids(8, 16)
    logits = tiny_model()(ids).logits[:, :-1].flatten(0, 1)
    return close(evaluated(), F.cross_entropy(logits, ids[:, 1:].flatten()).item())


@check(GROUP, "label_smoothing_factor")
def _smoothing() -> str:
    ids = random_ids(8, 16)
    logits = tiny_model()(ids).logits[:, :-1].flatten(0, 1)
    wanted = F.cross_entropy(logits, ids[:, 1:].flatten(), label_smoothing=0.1).item()
    return close(evaluated(label_smoothing_factor=0.1), wanted)


@check(GROUP, "train() lowers the loss")
def _train() -> str:
    losses = trained(max_steps=10)[1]
    assert losses[-1] < losses[0] - 0.5, losses
    return f"{losses[0]:.2f} to {losses[-1]:.2f} in 10 steps"


@check(GROUP, "gradient_accumulation_steps is a larger batch, with padding too")
def _accumulation() -> str:
    rows = [
        {"input_ids": row["input_ids"], "labels": row["labels"][:-cut] + [-100] * cut}
        for cut, row in enumerate(ROWS, start=1)
    ]
    told: dict[str, Any] = {"optim": "sgd", "max_grad_norm": 0.0, "data": rows, "max_steps": 2}
    large, _ = trained(per_device_train_batch_size=4, **told)
    small, _ = trained(per_device_train_batch_size=1, gradient_accumulation_steps=4, **told)
    assert not torch.equal(weights(large), weights(tiny_model()))
    return close(weights(small), weights(large))


@check(GROUP, "DataCollatorWithFlattening: documents in one row do not see each other")
def _flattening() -> str:
    told = {"optim": "sgd", "max_grad_norm": 0.0}
    packed, _ = trained(collator=DataCollatorWithFlattening(), **told)
    alone, _ = trained(**told)
    return close(weights(packed), weights(alone))


@check(GROUP, "DataCollatorForLanguageModeling")
def _collator() -> str:
    texts = ["The Congress", "Fellow citizens of the Senate"]
    rows = [{"input_ids": tokenizer()(text).input_ids} for text in texts]
    # Padded on the left, the first word would be a target, too, of the padding before it.
    right = copy.deepcopy(tokenizer())
    right.padding_side = "right"
    collator = DataCollatorForLanguageModeling(right, mlm=False)
    model = packaged()
    with tempfile.TemporaryDirectory() as folder:
        made = trainer(model, folder, collator, data=rows, per_device_eval_batch_size=2)
        found = made.evaluate()["eval_loss"]
    losses, counts = [], []
    for row in rows:
        ids = torch.tensor([row["input_ids"]])
        losses.append(model(ids, labels=ids).loss.item() * (ids.shape[1] - 1))
        counts.append(ids.shape[1] - 1)
    return close(found, sum(losses) / sum(counts))


@check(GROUP, "a run that is resumed ends where it would have ended")
def _resumed() -> str:
    whole, _ = trained(max_steps=4)
    with tempfile.TemporaryDirectory() as folder:
        told = {"save_strategy": "steps", "save_steps": 2, "max_steps": 4}
        trainer(tiny_model(), folder, **told).train()
        model = tiny_model(1)
        trainer(model, folder, **told).train(str(Path(folder) / "checkpoint-2"))
    return close(weights(model), weights(whole))


@check(GROUP, "bf16")
def _bfloat16() -> str:
    losses = trained(bf16=True)[1]
    return close(losses, trained()[1], 0.05)


@check(GROUP, "activation checkpointing")
def _checkpointing() -> str:
    return close(weights(trained(activation_checkpointing=True)[0]), weights(trained()[0]))


@check(GROUP, "predict() returns logits and no state")
def _predict() -> str:
    with tempfile.TemporaryDirectory() as folder:
        found = trainer(tiny_model(), folder).predict(ROWS).predictions
    return close(found, tiny_model()(random_ids(8, 16)).logits.detach())


@check(GROUP, "load_best_model_at_end, early stopping")
def _best() -> str:
    told: dict[str, Any] = {"eval_strategy": "steps", "eval_steps": 1, "save_strategy": "steps"}
    told |= {"save_steps": 1, "load_best_model_at_end": True, "learning_rate": 3.0}
    with tempfile.TemporaryDirectory() as folder:
        stop = EarlyStoppingCallback(early_stopping_patience=1)
        made = trainer(tiny_model(), folder, max_steps=6, callbacks=[stop], **told)
        made.train()
        best = made.state.best_metric
        assert made.state.global_step < 6
        return close(made.evaluate()["eval_loss"], best)


@check(GROUP, "NEFTune, weight decay, cosine schedule, gradient clipping")
def _options() -> str:
    losses = trained(
        neftune_noise_alpha=5.0, weight_decay=0.1, lr_scheduler_type="cosine", max_steps=8
    )[1]
    assert losses[-1] < losses[0], losses
    return f"{losses[0]:.2f} to {losses[-1]:.2f} in 8 steps"


@check(GROUP, "adamw_torch, adafactor, rmsprop")
def _optimisers() -> str:
    told = {}
    for name in ("adamw_torch", "adafactor", "rmsprop"):
        losses = trained(optim=name, max_steps=6)[1]
        assert losses[-1] < losses[0], (name, losses)
        told[name] = losses[-1]
    return ", ".join(f"{name} {loss:.2f}" for name, loss in told.items())


@check(GROUP, "a classifier")
def _classifier() -> str:
    torch.manual_seed(0)
    config = tiny_model().config
    config.pad_token_id, config.num_labels = 0, 2
    rows = [
        {"input_ids": [3 + label, *row["input_ids"][:7]], "labels": label}
        for row in ROWS
        for label in (0, 1)
    ]
    model = HAMTForSequenceClassification(config)
    _, losses = trained(model, data=rows, max_steps=30, per_device_train_batch_size=8)
    assert losses[-1] < 0.1, losses[-1]
    return f"{losses[0]:.2f} to {losses[-1]:.3f} in 30 steps"
