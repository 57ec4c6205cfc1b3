"""A folder to work in, for tests of commands that keep states."""

import pytest
import torch
from command_inputs import BOOK

from hamt import HAMTConfig, HAMTModel
from hamt.checkpoint import load_checkpoint, save_checkpoint


@pytest.fixture
def place(folders, tmp_path, monkeypatch):
    """A folder with a text, a model, and another one."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / "book.txt").write_text(BOOK, encoding="utf-8")
    (tmp_path / "ours").symlink_to(folders / "ours")
    _, tokenizer = load_checkpoint(folders / "ours")
    torch.manual_seed(1)
    config = {"vocab_size": 300, "hidden_dim": 32, "num_layers": 1}
    save_checkpoint(tmp_path / "other", HAMTModel(HAMTConfig(**config)), tokenizer)
    return tmp_path
