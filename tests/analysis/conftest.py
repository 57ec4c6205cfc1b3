"""A headless Chromium for the pages of ``hamt analyze`` and ``hamt explore``, and a hybrid."""

import os
import shutil

import pytest
import torch

from hamt import HAMTConfig, HAMTForCausalLM
from hamt.checkpoint import PRETRAINED, load_checkpoint


@pytest.fixture(scope="module")
def chromium():
    """The browser; tests are skipped where there is none."""
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
