"""Weights in fewer bits: that every linear map is replaced, and what is lost by it."""

import copy
from typing import Any

import torch
from torch import nn
from transformers import AutoModelForCausalLM, BitsAndBytesConfig, FineGrainedFP8Config

from ecosystem_checks.base import check, close, needs, packaged, refused, tokenizer
from hamt.checkpoint import PRETRAINED

GROUP = "Quantisation"
TEXT = "The Constitution of the United States gives the Congress power to raise armies"


def loss(model: Any) -> float:
    """Of some words, in nats per token."""
    ids = tokenizer()(TEXT, return_tensors="pt").input_ids
    return float(model(ids, labels=ids).loss)


def maps(model: Any) -> set[str]:
    """Names of all linear maps."""
    return {name for name, module in model.named_modules() if type(module) is nn.Linear}


def compared(model: Any, replaced: set[str], tolerance: float = 0.05) -> str:
    """Refuse a model of which a map was left out, or that has become much worse."""
    wanted, before = maps(packaged()), loss(packaged())
    assert wanted <= replaced, f"left out: {sorted(wanted - replaced)}"
    close(after := loss(model), before, tolerance)
    return f"{len(wanted)} maps of {len(wanted)}; loss {before:.3f}, then {after:.3f}"


@check(GROUP, "torch.ao.quantization.quantize_dynamic, int8")
def _dynamic() -> str:
    model = packaged()
    small = torch.ao.quantization.quantize_dynamic(model, {nn.Linear}, torch.qint8)
    replaced = {
        name
        for name, module in small.named_modules()
        if type(module).__module__.startswith("torch.ao.nn.quantized.dynamic")
    }
    small.generate(tokenizer()(TEXT, return_tensors="pt").input_ids, max_new_tokens=2)
    return compared(small, replaced)


@check(GROUP, "bfloat16 and float16 weights")
def _half() -> str:
    wanted, told = loss(packaged()), []
    for dtype in (torch.bfloat16, torch.float16):
        close(found := loss(packaged().to(dtype)), wanted, 0.02)
        told.append(f"{found:.3f}")
    return f"loss {wanted:.3f}, then {' and '.join(told)}"


@check(GROUP, "autocast to bfloat16: the state stays in float32")
def _autocast() -> str:
    model, ids = packaged(), tokenizer()(TEXT, return_tensors="pt").input_ids
    with torch.autocast("cpu", torch.bfloat16):
        outputs = model(ids, use_cache=True)
    assert outputs.hcm_state.dtype == torch.float32
    return close(outputs.logits.float().detach(), model(ids).logits.detach(), 0.05)


@check(GROUP, "torchao, int8 weights")
def _torchao() -> str:
    needs("torchao")
    from torchao.quantization import Int8WeightOnlyConfig, quantize_

    model, wide = packaged(), copy.deepcopy(packaged())
    quantize_(model, Int8WeightOnlyConfig())
    weights = dict(wide.named_parameters())
    changed = {
        name
        for name in maps(model)
        if type(model.get_submodule(name).weight) is not type(weights.get(f"{name}.weight"))
    }
    return compared(model, changed | {"lm_head"})


def _by_transformers(config: Any, module: str, kind: str) -> str:
    needs(module)
    model = AutoModelForCausalLM.from_pretrained(PRETRAINED, quantization_config=config)
    replaced = {name for name, each in model.named_modules() if kind in type(each).__name__}
    return compared(model, replaced | {"lm_head"}, 0.1)


@check(GROUP, "bitsandbytes, 8 bits")
def _eight() -> str:
    return _by_transformers(BitsAndBytesConfig(load_in_8bit=True), "bitsandbytes", "Linear8bit")


@check(GROUP, "bitsandbytes, 4 bits")
def _four() -> str:
    return _by_transformers(BitsAndBytesConfig(load_in_4bit=True), "bitsandbytes", "Linear4bit")


@check(GROUP, "bitsandbytes that is not installed")
def _missing() -> str:
    config = BitsAndBytesConfig(load_in_8bit=True)
    try:
        needs("bitsandbytes")
    except Exception:
        return refused(
            lambda: AutoModelForCausalLM.from_pretrained(PRETRAINED, quantization_config=config),
            "requires bitsandbytes",
        )
    return "it is installed"


@check(GROUP, "fine-grained FP8 without a GPU")
def _fp8() -> str:
    return refused(
        lambda: AutoModelForCausalLM.from_pretrained(
            PRETRAINED, quantization_config=FineGrainedFP8Config()
        ),
        "GPU",
    )
