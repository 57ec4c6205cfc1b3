"""A Llama in a GGUF file: read back by Transformers, and by llama.cpp where that is installed."""

from contextlib import closing
from types import SimpleNamespace

import pytest
import torch
from transformers import (
    AutoModelForCausalLM,
    LlamaConfig,
    LlamaForCausalLM,
    Trainer,
    TrainingArguments,
)

gguf = pytest.importorskip("gguf")
from hamt.baselines import loading  # noqa: E402
from hamt.baselines.gguf_file import write_gguf  # noqa: E402
from hamt.baselines.rivals import llama  # noqa: E402

SIZES = {"hidden_dim": 64, "num_layers": 2, "vocab_size": 96, "context": 256}


def random_llama(mlp_width=96, **sizes):
    """A Llama of the catalogue; its norms are no ones, so that a file without them is noticed."""
    torch.manual_seed(0)
    model = llama(**{**SIZES, **sizes}, mlp_width=mlp_width)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if name.endswith("norm.weight"):
                parameter.uniform_(0.5, 2.0)
    return model.eval()


def other_llama():
    """One whose queries share keys, with a head of its own, and other rotations and norms."""
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=96, hidden_size=64, intermediate_size=96, num_hidden_layers=2, head_dim=8,
        num_attention_heads=4, num_key_value_heads=2, rms_norm_eps=1e-3, initializer_range=0.1,
        rope_parameters={"rope_type": "default", "rope_theta": 500.0}, tie_word_embeddings=False,
    )  # fmt: skip
    return LlamaForCausalLM(config).eval()


def off(logits, expected):
    """How far logits are from others, as a share of the spread of these."""
    return float((logits - expected).std() / expected.std())


def tokens(rows, length):
    return torch.randint(96, (rows, length), generator=torch.Generator().manual_seed(1))


@torch.no_grad()
def test_transformers_reads_the_same_model(tmp_path):
    for model in (random_llama(), other_llama()):
        write_gguf(model, tmp_path / "model.gguf")
        read = AutoModelForCausalLM.from_pretrained(tmp_path, gguf_file="model.gguf")
        ids = tokens(2, 40)
        assert torch.allclose(read(ids).logits, model(ids).logits, atol=1e-5)


@pytest.mark.parametrize("weights", ["F32", "Q8_0"])
def test_what_was_read_can_be_trained_and_saved(tmp_path, monkeypatch, weights):
    model, path = random_llama(), tmp_path / "model.gguf"
    write_gguf(model, path, weights)
    tokenizer = SimpleNamespace(vocab_size=96)  # the file has none
    monkeypatch.setattr(loading, "pretrained_tokenizer", lambda *_, **__: tokenizer)
    read = loading.load_any_model(str(path)).model
    read.save_pretrained(tmp_path / "saved")
    ids = tokens(2, 40)
    again = LlamaForCausalLM.from_pretrained(tmp_path / "saved").eval()
    assert torch.equal(again(ids).logits, read(ids).logits)
    options = TrainingArguments(tmp_path / "trained", max_steps=1, use_cpu=True, report_to="none")
    rows = [{"input_ids": row, "labels": row} for row in ids]
    Trainer(read, options, train_dataset=rows).train()


@torch.no_grad()
def test_eight_bits_are_nearly_the_same_and_rows_that_do_not_fit_have_sixteen(tmp_path):
    model, path = random_llama(mlp_width=40), tmp_path / "model.gguf"
    write_gguf(model, path, "Q8_0")
    kinds = {tensor.name: tensor.tensor_type.name for tensor in gguf.GGUFReader(path).tensors}
    assert kinds["token_embd.weight"] == kinds["blk.1.ffn_up.weight"] == "Q8_0"
    assert kinds["blk.1.ffn_down.weight"] == "F16"
    assert kinds["blk.0.attn_norm.weight"] == "F32"
    read = AutoModelForCausalLM.from_pretrained(
        tmp_path, gguf_file="model.gguf", dtype=torch.float32
    )
    ids = tokens(2, 40)
    assert 1e-3 < off(read(ids).logits, model(ids).logits) < 0.1


def test_what_cannot_be_written_is_refused(tmp_path):
    with pytest.raises(ValueError, match="weights must be one of F32, Q8_0; got 'Q4'"):
        write_gguf(random_llama(), tmp_path / "model.gguf", "Q4")
    model = random_llama()
    model.config.rope_parameters = {"rope_type": "linear", "factor": 2.0, "rope_theta": 1e4}
    with pytest.raises(ValueError, match="positions are scaled"):
        write_gguf(model, tmp_path / "model.gguf")
    assert not list(tmp_path.iterdir())


# ------------------------------------------------------------------ llama.cpp


@pytest.fixture(scope="module")
def llama_cpp():
    pytest.importorskip("llama_cpp")
    from hamt.baselines.llama_cpp import LlamaCpp

    return LlamaCpp


@pytest.mark.parametrize(("weights", "far"), [("F32", 4e-3), ("Q8_0", 0.1)])
@pytest.mark.parametrize("flash_attention", [True, False])
@torch.no_grad()
def test_llama_cpp_computes_the_same_logits(tmp_path, llama_cpp, weights, far, flash_attention):
    """Nearly: its cache has 16 bits."""
    for model in (random_llama(), other_llama()):
        write_gguf(model, tmp_path / "model.gguf", weights)
        ids = tokens(2, 40)
        expected = model(ids).logits
        with closing(llama_cpp(tmp_path / "model.gguf", 2, 41, flash_attention)) as rival:
            prompt = rival.reading(ids[:, :30], 0)
            for _ in range(2):  # a call can be repeated
                prompt()
                assert off(rival.logits(), expected[:, 29]) < far
            for position in range(30, 40):
                rival.reading(ids[:, position : position + 1], position)()
                assert off(rival.logits(), expected[:, position]) < far


@pytest.mark.parametrize("flash_attention", [True, False])
@torch.no_grad()
def test_llama_cpp_goes_on_from_a_cache_that_was_filled(tmp_path, llama_cpp, flash_attention):
    """In one layer keys and values depend on a token and its place: to copy them is to read."""
    model = random_llama(num_layers=1)
    write_gguf(model, tmp_path / "model.gguf")
    piece, token = tokens(1, 16), torch.tensor([[3], [4]])
    for length in (10, 16, 32, 40):
        with closing(llama_cpp(tmp_path / "model.gguf", 2, length + 1, flash_attention)) as rival:
            rival.fill(piece, length)
            numbers = 2 * 64 * length * 2  # keys and values of two rows
            assert 2 * numbers <= rival.cache_bytes() < 2 * numbers + 3000
            rival.reading(token, length)()
            found = rival.logits()
        text = piece.repeat(2, 3)[:, :length]
        expected = model(torch.cat([text, token], dim=1)).logits[:, -1]
        assert off(found, expected) < 4e-3


def test_llama_cpp_says_what_it_cannot_do(tmp_path, llama_cpp):
    (tmp_path / "no.gguf").write_bytes(b"nothing")
    with pytest.raises(RuntimeError, match="cannot read"):
        llama_cpp(tmp_path / "no.gguf", 1, 8)
    write_gguf(random_llama(), tmp_path / "model.gguf")
    with closing(llama_cpp(tmp_path / "model.gguf", 1, 256)) as rival:
        with pytest.raises(RuntimeError, match=r"could not read 1 tokens \(.*-1"):
            rival.reading(torch.tensor([[96]]), 0)()
        with pytest.raises(RuntimeError, match="could not set"):
            rival.set_state(0, bytes(64))
