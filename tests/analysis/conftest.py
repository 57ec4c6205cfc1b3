"""A hybrid, for the pages of ``hamt analyze`` and ``hamt explore``."""

import pytest
import torch

from hamt import HAMTConfig, HAMTForCausalLM
from hamt.checkpoint import PRETRAINED, load_checkpoint


@pytest.fixture(scope="module")
def hybrid(tmp_path_factory):
    """A folder with a model of a memory, a window and a memory, which nothing has taught."""
    folder = tmp_path_factory.mktemp("hybrid")
    torch.manual_seed(0)
    trained, tokenizer = load_checkpoint(PRETRAINED)
    sizes = {"hidden_dim": 32, "num_layers": 3, "vocab_size": trained.config.vocab_size}
    mixers = {"mixers": ["memory", "sliding_attention", "memory"], "sliding_window": 6}
    model = HAMTForCausalLM(HAMTConfig(**sizes, **mixers, num_slots=2, num_sinks=1)).eval()
    for part in (model, tokenizer):
        part.save_pretrained(folder)
    return folder
