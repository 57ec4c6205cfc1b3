"""States of converted models: kept in files, with fewer bits, and refused by other models."""

import subprocess
import sys

import pytest
import torch
from converted_inputs import SEVERAL, SIZES, convert, tiny_converted, tiny_transformer
from model_inputs import random_ids

from hamt import HAMTCache
from hamt.converted_model import ConvertedForCausalLM
from hamt.identity import identity

IDS, MORE = random_ids(2, 60), random_ids(2, 9, seed=3)
OTHER = "made by another model, or with other weights"


def read(model: ConvertedForCausalLM) -> HAMTCache:
    with torch.no_grad():
        return model(IDS, use_cache=True).past_key_values


@pytest.fixture(scope="module")
def long_read():
    """A model and its state after thousands of tokens, which its slots have added up."""
    sizes = SIZES._replace(num_slots=64)
    model = tiny_converted(sizes=[sizes, sizes, sizes._replace(num_exact=4, block=16)])
    with torch.no_grad():
        for layer in model.model.layers:
            layer.self_attn.window_and_memory.slots.log_half_life.fill_(9.0)
        return model, model(random_ids(1, 4000), use_cache=True).past_key_values


@pytest.mark.parametrize(("precision", "off"), [("float32", 0), ("bfloat16", 0.03), ("int8", 0.06)])
def test_a_state_is_kept_with_fewer_bits(precision, off, long_read, tmp_path):
    """The counts of slots stay what they are."""
    model, cache = long_read
    cache.save(tmp_path / "state", precision)
    loaded = HAMTCache.load(tmp_path / "state")
    least, most = {"float32": (0.9, 1.3), "bfloat16": (0.5, 0.9), "int8": (0.25, 0.7)}[precision]
    size = (tmp_path / "state").stat().st_size
    assert least * cache.nbytes < size < most * cache.nbytes + 2500
    for state, found in zip(cache.states, loaded.states, strict=True):
        for name in ("slot_counts", "exact_ages", "exact_salience"):
            assert name not in state or torch.equal(found[name], state[name])
    with torch.no_grad():
        expected = model(MORE[:1], past_key_values=cache.fork()).logits
        found = model(MORE[:1], past_key_values=loaded).logits
    assert (found - expected).abs().max() <= off * expected.abs().max()


def other_weights(name: str) -> ConvertedForCausalLM:
    model = tiny_converted(sizes=SEVERAL)
    with torch.no_grad():
        model.get_parameter(f"model.body.{name}").add_(0.1)
    return model


@pytest.mark.parametrize("other", [
    lambda: tiny_converted(sizes=SEVERAL, seed=1),
    lambda: tiny_converted(sizes=SEVERAL, reach=13),
    lambda: tiny_converted(sizes=[SIZES._replace(window=20), *SEVERAL[1:]]),
    lambda: tiny_converted(sizes=[SIZES._replace(block=8), *SEVERAL[1:]]),
    lambda: tiny_converted(sizes=SEVERAL, rms_norm_eps=1e-5),
    lambda: tiny_converted(sizes=SEVERAL, hidden_act="gelu"),
    lambda: tiny_converted("mistral", sizes=SEVERAL),
    lambda: tiny_converted(
        sizes=SEVERAL, rope_parameters={"rope_type": "default", "rope_theta": 9e3}
    ),
    lambda: other_weights("layers.1.mlp.up_proj.weight"),
    lambda: other_weights("layers.0.self_attn.window_and_memory.slots.address"),
    lambda: other_weights("embed_tokens.weight"),
], ids=["seed", "reach", "window", "block", "norm", "activation", "kind", "positions", "weights",
        "slots", "embedding"])  # fmt: skip
def test_another_model_has_another_name_and_refuses_the_state(other, tmp_path):
    model, other = tiny_converted(sizes=SEVERAL), other()
    assert identity(other.model) != identity(model.model)
    read(model).save(tmp_path / "state")
    with pytest.raises(ValueError, match=OTHER):
        other(MORE, past_key_values=HAMTCache.load(tmp_path / "state"))


@pytest.mark.parametrize("how", ["made again", "loaded", "bfloat16", "longer", "training"])
def test_the_same_model_has_the_same_name(how, tmp_path):
    model = tiny_converted(sizes=SEVERAL)
    read(model).save(tmp_path / "state")
    if how == "longer":
        again = convert(tiny_transformer(max_position_embeddings=512), SEVERAL)
    elif how == "made again":
        again = tiny_converted(sizes=SEVERAL)
    else:
        model.save_pretrained(tmp_path)
        dtype = torch.bfloat16 if how == "bfloat16" else None
        again = ConvertedForCausalLM.from_pretrained(tmp_path, dtype=dtype)
        again.train(how == "training")
    state = HAMTCache.load(tmp_path / "state")
    again(MORE, past_key_values=state)
    assert state.get_seq_length() == 69


PROGRAM = """
import sys, torch, hamt
from transformers import AutoModelForCausalLM
model = AutoModelForCausalLM.from_pretrained(sys.argv[1])
state = hamt.HAMTCache.load(sys.argv[1] + "/state")
ids = torch.tensor([[5, 6, 7]] * 2)
written = model.generate(ids, past_key_values=state, max_new_tokens=12, do_sample=False)
print(written.tolist())
"""


@pytest.mark.slow
def test_another_process_goes_on(tmp_path):
    model = tiny_converted(sizes=SEVERAL)
    model.save_pretrained(tmp_path)
    state = read(model)
    state.save(tmp_path / "state")
    command = [sys.executable, "-c", PROGRAM, str(tmp_path)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=120, check=True)
    told = {"max_new_tokens": 12, "do_sample": False}
    ids = torch.tensor([[5, 6, 7]] * 2)
    expected = model.generate(ids, past_key_values=state, **told)
    assert done.stdout.splitlines()[-1] == str(expected.tolist())


def test_rows_are_chosen_repeated_and_joined():
    model = tiny_converted(sizes=SEVERAL)
    state = read(model)
    with torch.no_grad():
        expected = model(MORE, past_key_values=state.fork()).logits
        for change, rows in (
            (lambda x: x.batch_select_indices(torch.tensor([1, 0])), [1, 0]),
            (lambda x: x.batch_repeat_interleave(2), [0, 0, 1, 1]),
            (lambda x: x.become(HAMTCache.concatenate([x.row(1), x.row(0)])), [1, 0]),
        ):
            fork = state.fork()
            change(fork)
            found = model(MORE[rows], past_key_values=fork).logits
            assert torch.allclose(found, expected[rows], atol=1e-4)
