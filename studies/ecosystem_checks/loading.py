"""Saving, loading and changing models with Transformers; the Auto classes."""

import copy
import json
import tempfile
from pathlib import Path
from typing import Any

import torch
import transformers
from transformers import AutoConfig, AutoModel, AutoModelForCausalLM

import hamt
from ecosystem_checks.base import (
    check,
    close,
    packaged,
    random_ids,
    refused,
    tiny_config,
    tiny_model,
    tokenizer,
)
from hamt.checkpoint import PRETRAINED

GROUP = "Transformers: models and files"
IDS = random_ids(2, 20)


def logits(model: Any, ids: torch.Tensor = IDS) -> torch.Tensor:
    """Logits, without their graph."""
    return model(ids).logits.detach()


def loaded_again(model: Any, kind: Any = AutoModelForCausalLM, **options: Any) -> Any:
    """A model that was saved and loaded."""
    with tempfile.TemporaryDirectory() as folder:
        model.save_pretrained(folder, **options)
        return kind.from_pretrained(folder).eval()


@check(GROUP, "save_pretrained and AutoModelForCausalLM")
def _saved() -> str:
    model = tiny_model()
    return close(logits(loaded_again(model)), logits(model), 0)


@check(GROUP, "weights in several files")
def _sharded() -> str:
    model = tiny_model()
    return close(logits(loaded_again(model, max_shard_size="20KB")), logits(model), 0)


@check(GROUP, "AutoModel gives the backbone")
def _backbone() -> str:
    model = tiny_model()
    found = loaded_again(model, AutoModel)(IDS).last_hidden_state
    return close(found.detach(), model.model(IDS).last_hidden_state.detach(), 0)


HEADS = ("SequenceClassification", "TokenClassification", "QuestionAnswering")


def _head(kind: str) -> str:
    auto = getattr(transformers, f"AutoModelFor{kind}")
    made = auto.from_config(tiny_config(pad_token_id=0))
    assert type(made) is getattr(hamt, f"HAMTFor{kind}") is getattr(transformers, f"HAMTFor{kind}")
    again, outputs = loaded_again(made, auto), made.eval()(IDS)
    return close(again(IDS)[0].detach(), outputs[0].detach(), 0)


for _kind in HEADS:
    check(GROUP, f"AutoModelFor{_kind}")(lambda kind=_kind: _head(kind))


@check(GROUP, "standard names in config.json")
def _names() -> str:
    config = json.loads((PRETRAINED / "config.json").read_text(encoding="utf-8"))
    model = packaged()
    with tempfile.TemporaryDirectory() as folder:
        model.save_pretrained(folder)
        saved = json.loads((Path(folder) / "config.json").read_text(encoding="utf-8"))
    pairs = type(model.config).attribute_map
    assert all(saved[alias] == saved[own] == config[own] for alias, own in pairs.items())
    return ", ".join(pairs)


@check(GROUP, "from_pretrained with other fields, by either name")
def _fields() -> str:
    sizes = [
        AutoConfig.from_pretrained(PRETRAINED, **{name: 3}).num_hidden_layers
        for name in ("num_layers", "num_hidden_layers")
    ]
    assert sizes == [3, 3]
    return "3 layers"


@check(GROUP, "two names with two values")
def _conflict() -> str:
    return refused(lambda: hamt.HAMTConfig(num_layers=3, num_hidden_layers=2), "leave")


@check(GROUP, "a field that does not exist is kept, one of another type refused")
def _typed() -> str:
    assert hamt.HAMTConfig(my_note="x").my_note == "x"
    return refused(lambda: hamt.HAMTConfig(num_layers="three"), "num_layers")


@check(GROUP, "dtype='bfloat16'")
def _bfloat16() -> str:
    model = AutoModelForCausalLM.from_pretrained(PRETRAINED, dtype="bfloat16").eval()
    assert {p.dtype for p in model.parameters()} == {torch.bfloat16}
    return close(logits(model), logits(packaged()), 0.05)


@check(GROUP, "device_map='auto', low_cpu_mem_usage")
def _device_map() -> str:
    model = AutoModelForCausalLM.from_pretrained(PRETRAINED, device_map="auto").eval()
    return close(logits(model), logits(packaged()), 0)


@check(GROUP, "attn_implementation='sdpa'")
def _attention() -> str:
    return refused(
        lambda: AutoModelForCausalLM.from_pretrained(PRETRAINED, attn_implementation="sdpa"),
        "leave it out",
    )


@check(GROUP, "weights of another size")
def _other_weights() -> str:
    return refused(
        lambda: hamt.HAMTForCausalLM.from_pretrained(PRETRAINED, num_layers=6),
        "weights are missing",
    )


@check(GROUP, "resize_token_embeddings")
def _resized() -> str:
    model, wanted = tiny_model(), logits(tiny_model())
    model.resize_token_embeddings(120)
    assert model.config.vocab_size == 120
    assert model.lm_head.weight.data_ptr() == model.model.embed_tokens.weight.data_ptr()
    return close(logits(model)[..., :97], wanted)


@check(GROUP, "tied weights are stored once")
def _tied() -> str:
    model = tiny_model()
    with tempfile.TemporaryDirectory() as folder:
        model.save_pretrained(folder)
        size = (Path(folder) / "model.safetensors").stat().st_size
    stored = 4 * sum(p.numel() for p in model.parameters())
    assert stored <= size < stored + 20_000
    return f"{size:,} bytes for {stored:,} of weights"


@check(GROUP, "copy.deepcopy of a model")
def _copied() -> str:
    model = tiny_model()
    return close(logits(copy.deepcopy(model)), logits(model), 0)


@check(GROUP, "output_hidden_states, return_dict=False, logits_to_keep")
def _outputs() -> str:
    model = tiny_model()
    outputs = model(IDS, output_hidden_states=True)
    assert len(outputs.hidden_states) == 3
    close(model(IDS, return_dict=False)[0].detach(), outputs.logits.detach(), 0)
    return close(logits_kept(model), outputs.logits[:, -2:].detach())


def logits_kept(model: Any) -> torch.Tensor:
    """Logits of the last two positions."""
    return model(IDS, logits_to_keep=2).logits.detach()


@check(GROUP, "activation checkpointing changes no gradient")
def _checkpointing() -> str:
    found = []
    for recompute in (False, True):
        model = tiny_model().train()
        if recompute:
            model.gradient_checkpointing_enable()
        model(IDS, labels=IDS).loss.backward()
        found.append(model.model.embed_tokens.weight.grad)
    return close(found[1], found[0])


@check(GROUP, "a tokenizer that is saved and loaded")
def _tokenizer() -> str:
    text = "Fellow citizens — 1,000 dollars"
    with tempfile.TemporaryDirectory() as folder:
        tokenizer().save_pretrained(folder)
        again = transformers.AutoTokenizer.from_pretrained(folder)
    ids = again(text).input_ids
    assert ids == tokenizer()(text).input_ids
    assert again.decode(ids) == text
    return f"{len(ids)} tokens, and the text again"
