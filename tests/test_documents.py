"""What the user's documents promise of the library beside its commands."""

import logging
import runpy
import sys
from pathlib import Path

import pytest
import torch
from command_inputs import fails, words

from hamt import HAMTConfig, HAMTModel
from hamt.checkpoint import load_checkpoint
from hamt.cli import main

ROOT = Path(__file__).parents[1]
SIZES = {"hidden_dim": 32, "num_layers": 2, "vocab_size": 50, "hcm_dim": 64, "num_slots": 8}


def test_the_norms_of_the_memory_can_be_printed():
    model = HAMTModel(HAMTConfig(**SIZES, num_heads=4)).eval()
    ids = torch.randint(50, (3, 9))
    outputs = model(ids, labels=ids)
    norms = torch.norm(outputs["hcm_state"], dim=-1)
    assert norms.shape == (2, 3, 4, 8)
    assert norms.min() > 0
    for layer, state in enumerate(outputs.past_key_values.states):
        assert torch.equal(outputs.hcm_state[layer], state["slots"])
    assert torch.equal(model.model(ids)["hcm_state"], outputs.hcm_state)
    assert torch.equal(outputs["loss"], outputs[0])
    assert list(outputs) == ["loss", "logits", "past_key_values"]
    assert model(ids, use_cache=False).hcm_state is None


def test_mixers_without_slots_leave_the_norms_of_the_others():
    mixers = ["full_attention", "memory"]
    model = HAMTModel(HAMTConfig(**SIZES, mixers=mixers))
    assert model(torch.randint(50, (1, 4)))["hcm_state"].shape[0] == 1
    model = HAMTModel(HAMTConfig(**SIZES, mixers="full_attention"))
    assert model(torch.randint(50, (1, 4)))["hcm_state"] is None


def test_a_configuration_may_ask_for_tuples():
    model, ids = HAMTModel(HAMTConfig(**SIZES, return_dict=False)).eval(), torch.arange(4)[None]
    loss, logits, _ = model(ids, labels=ids)
    assert loss == model(ids, labels=ids, return_dict=True).loss
    assert logits.shape == (1, 4, 50)


@pytest.mark.parametrize("decay", [0.5, 0.0001])
def test_decay_rate_is_the_share_that_passive_memory_loses(decay):
    config = HAMTConfig(**SIZES, write_rule="convex", decay_rate=decay)
    rule = HAMTModel(config).model.layers[0].mixer.memory.rule
    assert rule.decay_rate == config.decay_rate == decay


def test_the_log_says_what_the_library_does(tmp_path, text, caplog):
    with caplog.at_level(logging.DEBUG, logger="hamt"):
        options = words(data=text, output_dir=tmp_path / "out", num_steps=2, max_length=32)
        options += words(hidden_dim=32, num_layers=1, vocab_size=300, num_slots=3)
        assert main(["train", *options, "--token_cache", str(tmp_path / "cache")]) == 0
        load_checkpoint(tmp_path / "out")
        assert main(["train", *options, "--token_cache", str(tmp_path / "cache"), "--resume"]) == 0
    names = {record.name for record in caplog.records}
    assert {"hamt.checkpoint", "hamt.training.checkpoints", "hamt.data.cache"} <= names
    said = caplog.text
    for words_of_it in ("making", "found", "wrote", "resuming from", "loading", "× 3 slots"):
        assert words_of_it in said
    assert said.count("× 3 slots × 16, phasor, gated) runs in the form") == 1  # not for every token


def test_the_demo_shows_a_model_a_forward_pass_and_a_generation(capsys, monkeypatch):
    monkeypatch.setattr(sys, "argv", ["experiments/demo.py"])
    with pytest.raises(SystemExit) as stop:
        runpy.run_path(str(ROOT / "experiments" / "demo.py"), run_name="__main__")
    assert not stop.value.code
    shown = capsys.readouterr().out
    for part in ("parameters", "a forward pass of 256 tokens", "logits (1, 256, 50257)",
                 "a generation", "The state of the Union is"):  # fmt: skip
        assert part in shown


def test_a_missing_part_is_named_with_what_installs_it_anywhere(capsys, monkeypatch):
    monkeypatch.setitem(sys.modules, "gradio", None)
    for name in [name for name in sys.modules if name.startswith("hamt.analysis.explorer.app")]:
        monkeypatch.delitem(sys.modules, name)
    assert "pip install 'gradio>=6'" in fails(["explore"], capsys)
