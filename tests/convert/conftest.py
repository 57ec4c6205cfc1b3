"""A tiny transformer, a text, and what the command makes of them."""

import pytest
import torch
from command_inputs import TEXT
from conversion_inputs import convert
from transformers import LlamaConfig, LlamaForCausalLM


@pytest.fixture(scope="package")
def teacher(tokenizer, tmp_path_factory):
    """A transformer that looks far back: without training, its scores are large."""
    folder = tmp_path_factory.mktemp("teacher") / "llama"
    torch.manual_seed(0)
    sizes = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4}
    sizes |= {"num_key_value_heads": 2, "intermediate_size": 48, "vocab_size": 300}
    config = LlamaConfig(**sizes, initializer_range=0.2, tie_word_embeddings=True)
    LlamaForCausalLM(config).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return str(folder)


@pytest.fixture(scope="package")
def data(tmp_path_factory):
    path = tmp_path_factory.mktemp("data") / "lines.txt"
    path.write_text(TEXT[:20000], encoding="utf-8")
    return str(path)


@pytest.fixture(scope="package")
def converted(teacher, data, tmp_path_factory):
    folder = tmp_path_factory.mktemp("converted") / "whole"
    assert convert(teacher, data, folder) == 0
    return folder
