"""The model that comes with the package: small, as good as its card says, and there at once."""

import json
import re

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from hamt.checkpoint import PRETRAINED, load_checkpoint
from hamt.cli import main
from hamt.data.corpus import load_corpus
from hamt.data.tokens import tokenise
from hamt.training.held_out import held_out_loss


def test_it_is_small():
    assert (PRETRAINED / "model.safetensors").stat().st_size <= 3e6


@pytest.mark.slow
def test_it_loses_what_its_card_says(tmp_path):
    model, tokenizer = load_checkpoint(PRETRAINED)
    info = json.loads((PRETRAINED / "training_info.json").read_text(encoding="utf-8"))
    corpus = tokenise(load_corpus(info["options"]["data"]), tokenizer, tmp_path)
    assert corpus.fingerprint == info["data_fingerprint"]
    length = info["options"]["max_length"]
    nats, bits = held_out_loss(model, corpus.held_out, length, documents_flow=False)
    card = (PRETRAINED / "README.md").read_text(encoding="utf-8")
    told = re.search(r"held-out loss \| ([\d.]+) nats/token, ([\d.]+) bits/byte", card)
    assert nats == pytest.approx(float(told[1]), abs=0.001)
    assert bits == pytest.approx(float(told[2]), abs=0.001)


def test_it_computes_in_float32_also_for_transformers():
    model = AutoModelForCausalLM.from_pretrained(PRETRAINED)
    assert {p.dtype for p in model.parameters()} == {torch.float32}
    assert model.lm_head.weight is model.model.embed_tokens.weight
    tokenizer = AutoTokenizer.from_pretrained(PRETRAINED)
    ids = tokenizer("The Congress of the United", return_tensors="pt")
    assert tokenizer.decode(model(**ids).logits[0, -1].argmax()) == " States"


def test_it_writes_without_being_asked_for(capsys):
    assert main(["generate", "Fellow citizens", "--max_new_tokens", "20", "--seed", "0"]) == 0
    out = capsys.readouterr().out
    assert out.startswith("Fellow citizens")
    assert len(out) > 40
