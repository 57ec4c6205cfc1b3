"""hamt/cpu and hamt/gpu only make HAMT faster: without them everything gives the same result."""

import json
import subprocess
import sys

import pytest

PROGRAM = """
import json, sys, torch
if sys.argv[1] == "without":
    class Missing:  # as if the folders were not there
        def find_spec(self, name, path=None, target=None):
            if name.split(".")[:2] in (["hamt", "cpu"], ["hamt", "gpu"]):
                raise ModuleNotFoundError(name, name=name)
    sys.meta_path.insert(0, Missing())
from hamt.checkpoint import PRETRAINED, load_checkpoint
from hamt.memory import FORMS
from hamt.cli import main
assert main(["generate", "--max_new_tokens", "1", "--seed", "0"]) == 0
model, _ = load_checkpoint(PRETRAINED)
model.fuse_projections()
ids = torch.arange(200)[None] % model.config.vocab_size
with torch.no_grad():
    logits = model(ids).logits
model.train()
loss = model(ids, labels=ids).loss
loss.backward()
norms = [p.grad.norm().item() for p in model.parameters()]
tokens = model.eval().generate(ids[:, :20], max_new_tokens=10, do_sample=False)
print(json.dumps([sorted(FORMS), logits[0, ::20, ::50].tolist(), norms, tokens.tolist()]))
"""


@pytest.mark.slow
@pytest.mark.timeout(600)
def test_without_the_folders_results_are_the_same():
    outcomes = {}
    for kind in ("with", "without"):
        command = [sys.executable, "-W", "ignore", "-c", PROGRAM, kind]
        run = subprocess.run(command, capture_output=True, text=True, timeout=300, check=True)
        outcomes[kind] = json.loads(run.stdout.splitlines()[-1])
    forms, logits, norms, tokens = outcomes["without"]
    assert forms == ["chunked", "recurrent"]
    assert outcomes["with"][0] == ["chunked", "fla", "fused", "recurrent"]
    assert tokens == outcomes["with"][3]
    for seen, expected in zip(logits, outcomes["with"][1], strict=True):
        assert seen == pytest.approx(expected, abs=1e-4)
    assert norms == pytest.approx(outcomes["with"][2], rel=1e-3)
