"""Settings of the test run, and fixtures of several files."""

import pytest
import torch
from evaluation_inputs import WORDS
from hypothesis import settings
from transformers import GPT2Config, GPT2LMHeadModel, LlamaConfig, LlamaForCausalLM

import hamt.cpu.linear
from hamt import HAMTConfig, HAMTModel
from hamt.checkpoint import save_checkpoint
from hamt.data.tokenizer import train_tokenizer

# The same examples at every run, so that a red test is red again; CI machines are too uneven for a
# deadline in milliseconds.
settings.register_profile("hamt", derandomize=True, deadline=None, max_examples=60)
settings.load_profile("hamt")


@pytest.fixture(scope="session")
def tokenizer():
    return train_tokenizer([WORDS], 300)


@pytest.fixture(scope="session")
def folders(tokenizer, tmp_path_factory):
    """A HAMT checkpoint, and a Llama and a GPT-2 in folders of Transformers."""
    root = tmp_path_factory.mktemp("models")
    torch.manual_seed(0)
    config = {"vocab_size": 300, "hidden_dim": 32, "num_layers": 1, "max_position_embeddings": 16}
    save_checkpoint(root / "ours", HAMTModel(HAMTConfig(**config)), tokenizer)
    llama = LlamaForCausalLM(
        LlamaConfig(
            vocab_size=300, hidden_size=32, intermediate_size=32, num_hidden_layers=1,
            num_attention_heads=2, max_position_embeddings=64,
        )
    )  # fmt: skip
    gpt2 = GPT2LMHeadModel(
        GPT2Config(vocab_size=300, n_positions=64, n_embd=32, n_layer=1, n_head=2)
    )
    for name, model in (("llama", llama), ("gpt2-0.1", gpt2)):
        model.save_pretrained(root / name)
        tokenizer.save_pretrained(root / name)
    return root


@pytest.fixture
def layouts(monkeypatch):
    """Whether the matrix of each product was packed."""
    if None in (hamt.cpu.linear._PRODUCT, hamt.cpu.linear._PACK):
        pytest.skip("this PyTorch has no such operator")
    original, found = hamt.cpu.linear._PRODUCT, []

    def noted(inputs, weight, *others):
        found.append(weight.is_mkldnn)
        return original(inputs, weight, *others)

    monkeypatch.setattr(hamt.cpu.linear, "_PRODUCT", noted)
    return found
