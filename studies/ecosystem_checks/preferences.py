"""TRL: its trainers, each given the path of a checkpoint."""

import math
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch

from ecosystem_checks.base import check, close, needs, packaged, tokenizer
from hamt import HAMTForSequenceClassification
from hamt.checkpoint import PRETRAINED

GROUP = "TRL, from a path"
PAIRS = [
    {"prompt": "The Congress of", "chosen": " the United States", "rejected": " a distant sea"},
    {"prompt": "Our army and", "chosen": " our navy", "rejected": " green ideas"},
]
TOLD: dict[str, Any] = {"max_steps": 3, "logging_steps": 1, "per_device_train_batch_size": 2}
TOLD |= {"report_to": [], "use_cpu": True, "disable_tqdm": True, "save_strategy": "no"}
TOLD |= {"learning_rate": 1e-4, "lr_scheduler_type": "constant", "bf16": False}
TOLD |= {"gradient_checkpointing": False, "seed": 0}


@contextmanager
def checkpoint(kind: Any = None) -> Iterator[str]:
    """The path of a folder with the packaged model, or with a head of another kind on it."""
    with tempfile.TemporaryDirectory() as folder:
        model, path = packaged(), Path(folder) / "model"
        if kind is not None:
            model = kind.from_pretrained(PRETRAINED, num_labels=1)
        model.save_pretrained(path)
        tokenizer().save_pretrained(path)
        yield str(path)


def trained(name: str, rows: list[dict], kind: Any = None, **options: Any) -> tuple[Any, list]:
    """A trainer of TRL after three steps, and what it told of each."""
    needs("trl")
    import datasets
    import trl

    given = options.pop("given", {})
    with checkpoint(kind) as path:
        config = getattr(trl, f"{name}Config")(output_dir=f"{path}/out", **TOLD | options)
        trainer = getattr(trl, f"{name}Trainer")(
            path, args=config, train_dataset=datasets.Dataset.from_list(rows), **given
        )
        trainer.train()
    return trainer, [entry for entry in trainer.state.log_history if "loss" in entry]


def losses(log: list) -> list[float]:
    """The loss of each step."""
    return [entry["loss"] for entry in log]


def ends(text: str) -> torch.Tensor:
    """A text's tokens and the one that ends it."""
    return torch.tensor([[*tokenizer()(text).input_ids, tokenizer().eos_token_id]])


@check(GROUP, "SFT: the loss is the model's own", slow=True)
def _sft() -> str:
    texts = [pair["prompt"] + pair["chosen"] for pair in PAIRS]
    trainer, log = trained("SFT", [{"text": text} for text in texts])
    assert type(trainer.model).__name__ == "HAMTForCausalLM"
    model, total, count = packaged(), 0.0, 0
    for text in texts:
        ids = ends(text)
        total += model(ids, labels=ids).loss.item() * (ids.shape[1] - 1)
        count += ids.shape[1] - 1
    assert losses(log)[-1] < losses(log)[0]
    return close(losses(log)[0], total / count, 1e-3)


@check(GROUP, "SFT with packing: documents do not see each other", slow=True)
def _packed() -> str:
    texts = [pair["prompt"] + pair["chosen"] for pair in PAIRS]
    told = {"packing": True, "max_length": 32, "packing_strategy": "bfd"}
    _, log = trained("SFT", [{"text": text} for text in texts], **told, padding_free=True)
    _, alone = trained("SFT", [{"text": text} for text in texts])
    return close(losses(log)[0], losses(alone)[0], 1e-3)


@check(GROUP, "DPO: the loss begins at ln 2 and falls", slow=True)
def _dpo() -> str:
    _, log = trained("DPO", PAIRS, learning_rate=1e-3)
    found = losses(log)
    assert found[-1] < found[0] - 0.01, found
    return f"{found[0]:.3f} to {found[-1]:.3f}; {close(found[0], math.log(2), 1e-3)}"


@check(GROUP, "KTO: the loss begins at 1/2", slow=True)
def _kto() -> str:
    rows = [
        {"prompt": pair["prompt"], "completion": pair[word], "label": word == "chosen"}
        for pair in PAIRS
        for word in ("chosen", "rejected")
    ]
    _, log = trained("KTO", rows, learning_rate=1e-3, per_device_train_batch_size=4)
    found = losses(log)
    return f"{found[0]:.3f} to {found[-1]:.3f}; {close(found[0], 0.5, 1e-3)}"


@check(GROUP, "Reward: the loss falls", slow=True)
def _reward() -> str:
    trainer, log = trained("Reward", PAIRS, kind=HAMTForSequenceClassification)
    found = losses(log)
    assert type(trainer.model) is HAMTForSequenceClassification
    assert found[-1] < found[0], found
    return f"{found[0]:.3f} to {found[-1]:.3f}"


def length(completions: list[str], **_: Any) -> list[float]:
    """A reward: short texts."""
    return [-float(len(text)) for text in completions]


def _writing(name: str) -> str:
    prompts = [{"prompt": pair["prompt"]} for pair in PAIRS]
    told = {"num_generations": 2, "max_completion_length": 8, "beta": 0.01}
    trainer, log = trained(name, prompts, given={"reward_funcs": length}, **told)
    assert all(math.isfinite(each) for each in losses(log))
    rewards = [entry["reward"] for entry in log]
    assert all(reward < 0 for reward in rewards)
    weights = packaged().state_dict()
    assert any(not torch.equal(x, weights[name]) for name, x in trainer.model.state_dict().items())
    return f"3 steps, rewards {', '.join(f'{reward:.1f}' for reward in rewards)}"


for _name in ("GRPO", "RLOO"):
    check(GROUP, f"{_name}: texts are written, rewarded, learnt from", slow=True)(
        lambda name=_name: _writing(name)
    )
