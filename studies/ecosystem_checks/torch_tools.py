"""What PyTorch has for every module: optimisers, averages, hooks, threads, workers."""

import io
import os
import tempfile
import threading
from pathlib import Path
from typing import Any
from unittest import mock

import torch
from torch import Tensor, nn
from torch.nn.utils import parametrize, prune

from ecosystem_checks.base import GREEDY, check, close, equal, random_ids, tiny_model

GROUP = "PyTorch"
IDS = random_ids(2, 20)


def logits(model: Any) -> Tensor:
    """Logits, without their graph."""
    return model(IDS).logits.detach()


def _learns(make: Any) -> str:
    model = tiny_model().train()
    optimiser, found = make(model), []
    for _ in range(6):
        loss = model(IDS, labels=IDS).loss
        loss.backward()
        optimiser.step()
        optimiser.zero_grad()
        found.append(loss.item())
    assert found[-1] < found[0] - 0.05, found
    return f"loss {found[0]:.2f} to {found[-1]:.2f} in 6 steps"


OPTIMISERS = {
    "AdamW, fused": lambda m: torch.optim.AdamW(m.parameters(), lr=1e-2, fused=True),
    "SGD with momentum": lambda m: torch.optim.SGD(m.parameters(), lr=0.1, momentum=0.5),
    "Adafactor": lambda m: torch.optim.Adafactor(m.parameters(), lr=0.1),
    "Muon, of what is a matrix": lambda m: torch.optim.Muon(
        [p for p in m.parameters() if p.ndim == 2], lr=0.02
    ),
}
for _name, _make in OPTIMISERS.items():
    check(GROUP, f"torch.optim: {_name}")(lambda make=_make: _learns(make))


@check(GROUP, "AveragedModel (exponential moving average of weights)")
def _averaged() -> str:
    model = tiny_model()
    average = torch.optim.swa_utils.AveragedModel(
        model, multi_avg_fn=torch.optim.swa_utils.get_ema_multi_avg_fn(0.5)
    )
    average.update_parameters(model)
    wanted = model.lm_head.weight.detach().clone()
    with torch.no_grad():
        model.lm_head.weight.add_(1)
    average.update_parameters(model)
    assert average.module.lm_head.weight is average.module.model.embed_tokens.weight
    return close(average.module.lm_head.weight.detach(), wanted + 0.5)


@check(GROUP, "torch.save of weights, torch.load(weights_only=True)")
def _weights() -> str:
    model, file = tiny_model(), io.BytesIO()
    torch.save(model.state_dict(), file)
    file.seek(0)
    again = tiny_model()
    nn.init.zeros_(again.lm_head.weight)
    again.load_state_dict(torch.load(file, weights_only=True))
    return close(logits(again), logits(model), 0)


@check(GROUP, "torch.save of a whole model")
def _whole() -> str:
    model, file = tiny_model(), io.BytesIO()
    torch.save(model, file)
    file.seek(0)
    return close(logits(torch.load(file, weights_only=False)), logits(model), 0)


@check(GROUP, "inference_mode, and training afterwards")
def _inference() -> str:
    model = tiny_model()
    with torch.inference_mode():
        found = model(IDS).logits.clone()
    model.train()(IDS, labels=IDS).loss.backward()
    assert model.lm_head.weight.grad.abs().sum() > 0
    return close(found, logits(model.eval()))


@check(GROUP, "two threads generate with one model at once")
def _threads() -> str:
    model, prompts = tiny_model(), [random_ids(1, 12, seed=seed) for seed in range(4)]
    wanted = [model.generate(ids, max_new_tokens=8, **GREEDY) for ids in prompts]
    found: list[Any] = [None] * len(prompts)

    def write(number: int) -> None:
        found[number] = model.generate(prompts[number], max_new_tokens=8, **GREEDY)

    threads = [threading.Thread(target=write, args=(number,)) for number in range(len(prompts))]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    return equal(torch.cat(found), torch.cat(wanted), "tokens")


@check(GROUP, "DataLoader with two workers")
def _workers() -> str:
    loader = torch.utils.data.DataLoader(IDS.tolist(), num_workers=2, collate_fn=torch.tensor)
    model = tiny_model()
    with torch.no_grad():
        found = torch.cat([model(batch).logits for batch in loader])
    return close(found, logits(model))


@check(GROUP, "forward hooks and torch.nn.utils.parametrize")
def _hooks() -> str:
    model, seen = tiny_model(), []
    wanted = logits(model)
    model.model.layers[0].mlp.register_forward_hook(lambda *call: seen.append(call[2].shape))

    class Doubled(nn.Module):
        def forward(self, weight: Tensor) -> Tensor:
            return 2 * weight

    part = model.model.layers[1].mixer.item_proj
    parametrize.register_parametrization(part, "weight", Doubled())
    changed = logits(model)
    assert seen
    assert not torch.allclose(changed, wanted)
    parametrize.remove_parametrizations(part, "weight", leave_parametrized=False)
    return close(logits(model), wanted)


@check(GROUP, "torch.nn.utils.prune")
def _pruned() -> str:
    model, other = tiny_model(), tiny_model()
    part = model.model.layers[0].mlp.up_proj
    prune.l1_unstructured(part, "weight", amount=0.5)
    with torch.no_grad():
        other.model.layers[0].mlp.up_proj.weight.mul_(part.weight_mask)
    share = float((part.weight == 0).float().mean())
    return f"{share:.0%} are zero; {close(logits(model), logits(other))}"


@check(GROUP, "functional_call with other weights")
def _functional() -> str:
    model, other = tiny_model(), tiny_model()
    with torch.no_grad():
        for weight in other.parameters():
            weight.add_(0.01)
    found = torch.func.functional_call(model, dict(other.named_parameters()), (IDS,))
    return close(found.logits.detach(), logits(other))


@check(GROUP, "torch.profiler")
def _profiled() -> str:
    with torch.profiler.profile() as profile:
        tiny_model()(IDS)
    names = {event.key for event in profile.key_averages()}
    assert "aten::embedding" in names
    return f"{len(names)} kinds of operation"


@check(GROUP, "torch.use_deterministic_algorithms: the same gradients twice")
def _deterministic() -> str:
    found = []
    torch.use_deterministic_algorithms(True)
    try:
        for _ in range(2):
            model = tiny_model().train()
            model(IDS, labels=IDS).loss.backward()
            found.append(model.lm_head.weight.grad)
    finally:
        torch.use_deterministic_algorithms(False)
    return close(found[1], found[0], 0)


@check(GROUP, "TensorBoard: the losses that Trainer had")
def _tensorboard() -> str:
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
    from transformers import Trainer, TrainingArguments

    rows = [{"input_ids": row, "labels": row} for row in IDS.tolist()]
    with tempfile.TemporaryDirectory() as folder:
        told = {"logging_steps": 1, "max_steps": 3, "use_cpu": True, "save_strategy": "no"}
        arguments = TrainingArguments(folder, report_to="tensorboard", **told)
        trainer = Trainer(tiny_model(), arguments, train_dataset=rows)
        with mock.patch.dict(os.environ, TENSORBOARD_LOGGING_DIR=folder):
            trainer.train()
        (file,) = Path(folder).rglob("events*")
        events = EventAccumulator(str(file)).Reload().Scalars("train/loss")
    wanted = [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]
    return close([event.value for event in events], wanted, 1e-3)
