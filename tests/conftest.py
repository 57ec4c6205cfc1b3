"""Settings of the test run, and fixtures of several files."""

import os
import shutil
import signal

import pytest
import torch
from command_inputs import TEXT
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

# Tests load onnxruntime themselves, too: it is to report nothing to its makers.
os.environ.setdefault("ORT_DISABLE_TELEMETRY", "1")


@pytest.fixture(scope="session")
def tokenizer():
    return train_tokenizer([WORDS], 300)


@pytest.fixture(scope="session")
def text(tmp_path_factory):
    """The path of a text that can be learnt."""
    path = tmp_path_factory.mktemp("text") / "lines.txt"
    path.write_text(TEXT, encoding="utf-8")
    return str(path)


@pytest.fixture(scope="session")
def folders(tokenizer, tmp_path_factory):
    """A HAMT checkpoint, and a Llama and a GPT-2 in folders of Transformers."""
    root = tmp_path_factory.mktemp("models")
    torch.manual_seed(0)
    config = {"vocab_size": 300, "hidden_dim": 32, "num_layers": 1, "max_position_embeddings": 16}
    save_checkpoint(root / "ours", HAMTModel(HAMTConfig(**config)), tokenizer)
    sizes = {"hidden_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2}
    sizes |= {"vocab_size": 300, "max_position_embeddings": 64}
    llama = LlamaForCausalLM(LlamaConfig(**sizes, intermediate_size=32))
    gpt2 = GPT2LMHeadModel(GPT2Config(**sizes))
    for name, model in (("llama", llama), ("gpt2-0.1", gpt2)):
        model.save_pretrained(root / name)
        tokenizer.save_pretrained(root / name)
    return root


@pytest.fixture(scope="module")
def chromium():
    """A headless browser; tests are skipped where there is none."""
    sync_api = pytest.importorskip("playwright.sync_api")
    names = ("chromium", "chromium-browser", "google-chrome")
    path = next(filter(None, map(shutil.which, names)), None)
    if path is None:
        assert "HAMT_TEST_BROWSER" not in os.environ, "there is no Chromium"
        pytest.skip("no Chromium here: apt install chromium")
    with sync_api.sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=path, args=["--no-sandbox"])
        yield browser
        browser.close()


@pytest.fixture
def hears_ctrl_c():
    """This process, which a shell may have started in the background, to ignore Ctrl-C."""
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    yield
    signal.signal(signal.SIGINT, before)


@pytest.fixture
def noted_products(monkeypatch):
    """Let a function note something of every call of oneDNN's operator; the notes as a list."""
    if None in (hamt.cpu.linear._PRODUCT, hamt.cpu.linear._PACK):
        pytest.skip("this PyTorch has no such operator")
    original, notes = hamt.cpu.linear._PRODUCT, []

    def begin(note):
        def noted(inputs, weight, bias, *others):
            notes.append(note(inputs, weight, bias))
            return original(inputs, weight, bias, *others)

        monkeypatch.setattr(hamt.cpu.linear, "_PRODUCT", noted)
        return notes

    return begin


@pytest.fixture
def layouts(noted_products):
    """Whether the matrix of each product was packed."""
    return noted_products(lambda inputs, weight, bias: weight.is_mkldnn)
