"""What an earlier version of HAMT wrote: its checkpoints load, its state files are refused.

``earlier/`` was written by version 0.1.0 at commit 1ad7ebf: a tiny model with the delta rule and a
rotation that depends on the token, its logits at every fourth of 40 tokens, and its state.
"""

from pathlib import Path

import pytest
import torch
from model_inputs import assert_close
from safetensors.torch import load_file

from hamt import HAMTCache, HAMTForCausalLM

EARLIER = Path(__file__).parent / "earlier"


def test_a_checkpoint_gives_the_same_logits():
    model = HAMTForCausalLM.from_pretrained(EARLIER).eval()
    known = load_file(EARLIER / "logits.safetensors")
    with torch.no_grad():
        assert_close(model(known["ids"]).logits[:, ::4], known["logits"], 1e-6)


def test_a_state_is_refused_in_one_line():
    with pytest.raises(ValueError, match="a state of an earlier version of HAMT: read the prompt"):
        HAMTCache.load(EARLIER / "state.safetensors")
