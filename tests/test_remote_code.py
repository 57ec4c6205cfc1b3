"""A model with its code beside it runs by ``trust_remote_code`` where HAMT is not installed."""

import json
import os
import subprocess
import sys

import pytest
import torch
from model_inputs import random_ids, tiny_model

from hamt import HAMTConfig, HAMTForCausalLM, HAMTForSequenceClassification
from hamt.mixers import MIXERS
from hamt.remote_code import auto_map

ELSEWHERE = """
import json, sys

class Missing:  # HAMT is not installed
    def find_spec(self, name, path=None, target=None):
        if name.split(".")[0] == "hamt":
            raise ModuleNotFoundError(f"No module named {name!r}", name=name)

sys.meta_path.insert(0, Missing())
import torch
from transformers import AutoModel, AutoModelForCausalLM

source, again, ids = sys.argv[1], sys.argv[2], torch.tensor(json.loads(sys.argv[3]))
model = AutoModelForCausalLM.from_pretrained(source, trust_remote_code=True).eval()
written = model.generate(ids, max_new_tokens=5, do_sample=False, pad_token_id=0).tolist()
loss = model.train()(ids, labels=ids).loss
loss.backward()
missing = [n for n, p in model.named_parameters() if p.grad is None]
assert not missing, missing
model.save_pretrained(again)
copy = AutoModelForCausalLM.from_pretrained(again, trust_remote_code=True)
backbone = AutoModel.from_pretrained(again, trust_remote_code=True)
assert torch.equal(copy.model(ids)[0], backbone(ids)[0])
print(json.dumps([type(model).__module__, written, loss.item()]))
"""


@pytest.fixture(autouse=True)
def asked_for(monkeypatch):
    monkeypatch.setattr(HAMTConfig, "_with_code", False)
    HAMTForCausalLM.register_for_auto_class("AutoModelForCausalLM")


@pytest.mark.slow
def test_a_model_runs_where_hamt_is_not_installed(tmp_path):
    model = tiny_model(
        mixers=["memory", "hierarchical_memory", "sliding_attention", "full_attention"],
        num_layers=4, num_slots=4, boundary_every=8, gate_feedback=True, write_rule="delta",
    )  # fmt: skip
    model.save_pretrained(tmp_path / "here")
    ids = random_ids(2, 40)
    arguments = [str(tmp_path / "here"), str(tmp_path / "there"), json.dumps(ids.tolist())]
    env = {**os.environ, "HF_HOME": str(tmp_path / "hub"), "HF_HUB_OFFLINE": "1"}
    done = subprocess.run(
        [sys.executable, "-c", ELSEWHERE, *arguments],
        capture_output=True, text=True, env=env, timeout=240,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr[-2000:]
    home, written, loss = json.loads(done.stdout.splitlines()[-1])
    assert home.startswith("transformers_modules.")
    told = {"max_new_tokens": 5, "do_sample": False, "pad_token_id": 0}
    assert written == model.generate(ids, **told).tolist()
    assert loss == pytest.approx(model(ids, labels=ids).loss.item(), rel=1e-5)
    # Installed, HAMT reads either folder by itself.
    for name in ("here", "there"):
        loaded = HAMTForCausalLM.from_pretrained(tmp_path / name)
        assert torch.equal(loaded(ids).logits, model(ids).logits)


def test_all_classes_are_found_there_and_only_where_the_code_is(tmp_path, monkeypatch):
    HAMTForSequenceClassification(tiny_model().config).save_pretrained(tmp_path / "with")
    assert auto_map() == json.loads((tmp_path / "with" / "config.json").read_text())["auto_map"]
    for place in auto_map().values():
        module, name = place.split(".")
        text = (tmp_path / "with" / f"{module}.py").read_text(encoding="utf-8")
        assert f"class {name}(" in text
    model = HAMTForSequenceClassification.from_pretrained(tmp_path / "with")
    monkeypatch.setattr(HAMTConfig, "_with_code", False)
    model.save_pretrained(tmp_path / "without")
    assert "auto_map" not in json.loads((tmp_path / "without" / "config.json").read_text())
    assert not list((tmp_path / "without").glob("*.py"))


def test_parts_of_others_are_not_saved_as_if_they_were_there(tmp_path, monkeypatch):
    class Mine:
        layer_type = "linear_attention"

    config = tiny_model().config
    monkeypatch.setitem(MIXERS, "mine", Mine)
    config.mixers = "mine"
    with pytest.raises(ValueError, match=r"^'mine' is not a part of HAMT: .* with its code$"):
        config.save_pretrained(tmp_path)
