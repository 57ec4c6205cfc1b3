"""Batches by step: nothing lost, nothing twice, the same again after a restart."""

import pickle
from itertools import pairwise

import numpy as np
import pytest
import torch
from text_inputs import TEXT, files

from hamt.data.corpus import load_corpus
from hamt.data.loader import Batches
from hamt.data.tokens import Split, tokenise
from hamt.errors import UserError


def split(length=1000, starts=(0,)):
    return Split(np.arange(length, dtype=np.uint16), np.asarray(starts), length)


def test_batches_go_to_other_processes_as_a_name_of_their_file(tokenizer, tmp_path):
    corpus = load_corpus(str(files(tmp_path, a_txt=TEXT * 900) / "a.txt"))
    split = tokenise(corpus, tokenizer, tmp_path / "cache").train
    batches = Batches(split, length=16, batch_size=2)
    first = batches[3]
    sent = pickle.dumps(batches)
    assert len(sent) < len(split)
    assert torch.equal(pickle.loads(sent)[3]["input_ids"], first["input_ids"])


def test_an_epoch_visits_every_token_once():
    batches = Batches(split(), length=10, batch_size=4, documents_flow=True, seed=3)
    assert len(batches) == 24
    epoch = torch.cat([batches[step]["input_ids"] for step in range(24)])
    assert (epoch == epoch[:, :1] + torch.arange(10)).all(), "a block is a run of the text"
    assert len(epoch.unique()) == epoch.numel()
    assert epoch[:, 0].tolist() != sorted(epoch[:, 0].tolist()), "blocks are shuffled"
    again = torch.cat([batches[step]["input_ids"] for step in range(24, 48)])
    assert not torch.equal(epoch, again)


def test_targets_are_the_next_tokens():
    batch = Batches(split(), length=10, batch_size=4)[5]
    assert torch.equal(batch["shift_labels"], batch["input_ids"] + 1)
    assert set(batch) == {"input_ids", "shift_labels", "seq_idx"}


def test_contiguous_rows_go_on_where_they_ended():
    batches = Batches(split(), length=10, batch_size=4, order="contiguous")
    steps = [batches[step]["input_ids"] for step in range(24)]
    for before, after in pairwise(steps):
        assert torch.equal(after[:, 0], before[:, -1] + 1)
    assert [step for step in (0, 1, 23, 24, 25) if batches.begins(step)] == [0, 24]
    assert len(torch.cat(steps).unique()) == 24 * 40
    assert Batches(split(), length=10, batch_size=4).begins(7)


def test_documents_of_a_row_are_numbered_across_steps():
    text = split(400, [0, 95, 100, 250])
    batches = Batches(text, length=40, batch_size=1, order="contiguous", seed=1)
    for step in range(len(batches)):
        batch = batches[step]
        ids = batch["input_ids"][0].tolist()
        expected = [1 + (t >= 95) + (t >= 100) + (t >= 250) for t in ids]
        assert batch["seq_idx"][0].tolist() == expected
    assert "seq_idx" not in Batches(split(), length=10, batch_size=4, documents_flow=True)[0]


def test_the_order_depends_on_seed_and_step_alone():
    same = {"length": 10, "batch_size": 4}
    first, second, other = (Batches(split(), **same, seed=seed) for seed in (1, 1, 2))
    list(map(first.__getitem__, range(30)))  # what was read before does not matter
    assert torch.equal(first[40]["input_ids"], second[40]["input_ids"])
    assert not torch.equal(first[40]["input_ids"], other[40]["input_ids"])


@pytest.mark.parametrize("order", ["shuffled", "contiguous"])
def test_processes_share_the_rows_of_a_batch(order):
    def ids(**rows):
        return Batches(split(), length=10, batch_size=4, order=order, **rows)[7]["input_ids"]

    whole, parts = ids(), [ids(rows=slice(begin, begin + 2)) for begin in (0, 2)]
    assert torch.equal(torch.cat(parts), whole)


@pytest.mark.parametrize("num_workers", [0, 2])
def test_the_loader_gives_the_batches_of_its_steps_and_draws_no_random_number(num_workers):
    batches = Batches(split(), length=10, batch_size=4)
    before = torch.get_rng_state()
    found = list(batches.loader(20, 27, num_workers))
    assert torch.equal(torch.get_rng_state(), before)
    assert len(found) == 7
    for step, batch in enumerate(found, 20):
        assert torch.equal(batch["input_ids"], batches[step]["input_ids"])


def test_texts_and_orders_that_cannot_be_are_refused():
    with pytest.raises(UserError, match="too short for a batch of 4 blocks of 250"):
        Batches(split(), length=250, batch_size=4)
    with pytest.raises(UserError, match="shuffled, contiguous; got 'sorted'"):
        Batches(split(), length=10, batch_size=4, order="sorted")
