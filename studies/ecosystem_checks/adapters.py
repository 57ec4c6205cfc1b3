"""PEFT: which parts its methods find, that they train, are merged, saved and loaded."""

import tempfile
from typing import Any

import torch

from ecosystem_checks.base import (
    GREEDY,
    check,
    close,
    equal,
    greedy,
    needs,
    random_ids,
    refused,
    tiny_model,
)

GROUP = "PEFT"
IDS = random_ids(2, 12)
MERGED: dict[str, dict[str, Any]] = {  # methods whose adapters can become part of the weights
    "LoraConfig": {},
    "AdaLoraConfig": {"total_step": 100},
    "BOFTConfig": {},
    "FourierFTConfig": {},
    "HRAConfig": {},
    "IA3Config": {},
    "LoHaConfig": {},
    "LoKrConfig": {},
    "MissConfig": {},
    "OFTConfig": {},
    "RandLoraConfig": {},
    "RoadConfig": {},
    "VeraConfig": {},
    "LNTuningConfig": {},
    "TrainableTokensConfig": {"token_indices": [1, 2, 3]},
}
VARIANTS: dict[str, dict[str, Any]] = {
    "LoRA on all linear maps": {"target_modules": "all-linear"},
    "DoRA": {"use_dora": True},
    "rsLoRA": {"use_rslora": True},
}


def adapted(method: str, **options: Any) -> Any:
    """A tiny model with adapters that PEFT places by itself."""
    needs("peft")
    import peft

    config = getattr(peft, method)(task_type="CAUSAL_LM", **options)
    return peft.get_peft_model(tiny_model(hidden_dim=64), config)


def train(model: Any, steps: int = 3) -> tuple[float, float]:
    """The losses before and after some steps, in which every weight that trains has a gradient."""
    parameters = [p for p in model.parameters() if p.requires_grad]
    optimiser = torch.optim.AdamW(parameters, lr=2e-2)
    losses = []
    for _ in range(steps + 1):
        loss = model(input_ids=IDS, labels=IDS).loss
        loss.backward()
        assert all(p.grad is not None for p in parameters)
        optimiser.step()
        optimiser.zero_grad()
        losses.append(loss.item())
    assert losses[-1] < losses[0], losses
    return losses[0], losses[-1]


def _merged(method: str, **options: Any) -> str:
    model = adapted(method, **options)
    count = sum(p.numel() for p in model.parameters() if p.requires_grad)
    before, after = train(model)
    model.eval()
    wanted = model(input_ids=IDS).logits.detach()
    with tempfile.TemporaryDirectory() as folder:
        import peft

        model.save_pretrained(folder)
        again = peft.PeftModel.from_pretrained(tiny_model(hidden_dim=64), folder).eval()
        close(again(input_ids=IDS).logits.detach(), wanted)
    written = model.generate(input_ids=IDS, max_new_tokens=3, **GREEDY)
    equal(written, greedy(model, IDS, 3), "tokens")
    off = close(model.merge_and_unload()(IDS).logits.detach(), wanted, 1e-4)
    return f"loss {before:.3f} to {after:.3f} with {count:,} parameters; merged: {off}"


for _method, _options in MERGED.items():
    check(GROUP, _method.removesuffix("Config"))(
        lambda method=_method, options=_options: _merged(method, **options)
    )
for _name, _options in VARIANTS.items():
    check(GROUP, _name)(lambda options=_options: _merged("LoraConfig", **options))


@check(GROUP, "LoRA finds its maps by itself")
def _found() -> str:
    names = adapted("LoraConfig").targeted_module_names
    maps = {"item_proj", "key_proj", "retrieval.key_proj", "output_proj"}
    assert {name.split("mixer.")[1] for name in names} == maps, names
    return f"{len(names)} maps of 2 layers: {', '.join(sorted(maps))}"


PROMPTS = {"PromptTuningConfig": "prompt tuning", "PromptEncoderConfig": "P-tuning"}


def _prompt(method: str) -> str:
    model = adapted(method, num_virtual_tokens=4)
    train(model)
    model.eval()
    written = model.generate(input_ids=IDS, max_new_tokens=3, **GREEDY)
    return equal(written, greedy(model, IDS, 3), "tokens")


for _method, _name in PROMPTS.items():
    check(GROUP, _name)(lambda method=_method: _prompt(method))


@check(GROUP, "two adapters, each switched on and off")
def _two() -> str:
    import peft

    model = adapted("LoraConfig")
    plain = tiny_model(hidden_dim=64)(IDS).logits.detach()
    model.add_adapter("second", peft.LoraConfig(task_type="CAUSAL_LM"))
    train(model)
    first = model(input_ids=IDS).logits.detach()
    model.set_adapter("second")
    said = close(model(input_ids=IDS).logits.detach(), plain)  # which was not trained
    with model.disable_adapter():
        close(model(input_ids=IDS).logits.detach(), plain)
    model.set_adapter("default")
    close(model(input_ids=IDS).logits.detach(), first)
    return said


@check(GROUP, "Transformers' own add_adapter")
def _own() -> str:
    needs("peft")
    import peft

    model = tiny_model(hidden_dim=64)
    model.add_adapter(peft.LoraConfig(task_type="CAUSAL_LM", r=2))
    train(model)
    return "the loss falls"


@check(GROUP, "modules_to_save: the head beside the adapters")
def _head() -> str:
    import peft

    from hamt import HAMTForSequenceClassification

    needs("peft")
    config = tiny_model(hidden_dim=64).config
    config.pad_token_id, config.num_labels = 0, 2
    model = peft.get_peft_model(
        HAMTForSequenceClassification(config), peft.LoraConfig(task_type="SEQ_CLS")
    )
    trained = {name for name, p in model.named_parameters() if p.requires_grad}
    assert any("score" in name for name in trained)
    return f"{len(trained)} matrices train, the head's among them"


@check(GROUP, "prefix tuning")
def _prefix() -> str:
    model = adapted("PrefixTuningConfig", num_virtual_tokens=4)
    return refused(lambda: model(input_ids=IDS), "must be a HAMTCache")


@check(GROUP, "LLaMA-Adapter")
def _adaption() -> str:
    return refused(
        lambda: adapted("AdaptionPromptConfig", adapter_len=4, adapter_layers=1), "Unsupported"
    )
