"""Fast and slow slots: by hand, as a model, and in the demo."""

import subprocess
import sys
from pathlib import Path

import pytest
import torch
from model_inputs import assert_close

from hamt import HAMTConfig, HAMTModel
from hamt.cli import main
from hamt.hierarchical_memory import HierarchicalHAMTLayer, HierarchicalMemory
from hamt.hierarchical_model import HierarchicalHAMTModel
from hamt.layers import HAMTLayer

ROOT = Path(__file__).parents[1]
SIZES = {"hidden_dim": 32, "num_layers": 2, "vocab_size": 97, "num_slots": 4}


def test_the_memory_by_hand_is_its_equations():
    torch.manual_seed(0)
    options = {"fast_decay": 0.1, "slow_decay": 0.02, "boundary_every": 3, "max_half_life": 60}
    memory = HierarchicalMemory(hcm_dim=32, num_slots=2, num_heads=2, **options).double()
    torch.nn.init.normal_(memory.consolidation.output)
    state = memory.initial_state(1)
    fast = slow = torch.zeros(2, 2, 16).double()
    for n in range(1, 11):
        item, key = torch.randn(1, 2, 16), memory.algebra.random_keys(1, 2, 8)
        write = torch.rand(1, 2, 2)
        state = memory.write(state, item, key, write)
        bound = memory.algebra.bind(item, key)[0]
        fast = 0.9 * fast + write[0][..., None] * bound[:, None]
        slow = 0.98 * slow
        if n % 3 == 0:
            gate = memory.consolidation.gate(torch.cat((fast, slow), dim=1)[None])[0][..., None]
            slow = (1 - gate) * slow + gate * fast
        assert_close(state.memory.slots[0].double(), torch.cat((fast, slow), dim=1), 1e-6)
        norms = torch.cat(memory.norms(state), dim=-1)[0]
        assert_close(norms.double(), torch.cat((fast, slow), dim=1).norm(dim=-1), 1e-6)
    assert state.num_tokens == 10


def test_what_is_written_once_is_read_from_both_tiers():
    torch.manual_seed(0)
    memory = HierarchicalMemory(hcm_dim=256, boundary_every=1)
    item, key = torch.randn(1, 1, 256), memory.algebra.random_keys(1, 1, 128)
    state = memory.write(memory.initial_state(), item, key)
    for tier in (slice(0, 4), slice(4, 8)):
        read = torch.zeros(1, 1, 8)
        read[..., tier] = 1
        found = memory.retrieve(state, key, read)
        assert torch.cosine_similarity(found, item, dim=-1) > 0.9999


def test_slow_slots_start_with_half_lives_from_four_boundaries_to_the_longest():
    memory = HierarchicalMemory(hcm_dim=64, num_slots=4, num_heads=2, max_half_life=6400)
    kept = 1 - memory.consolidation.gate(torch.randn(1, 2, 8, 32))
    half_lives = torch.log(torch.tensor(0.5)) / kept.log() * 64  # in tokens
    assert_close(half_lives.min() / 256, torch.tensor(1.0), 1e-3)
    assert_close(half_lives.max() / 6400, torch.tensor(1.0), 1e-3)
    assert (half_lives[0].diff(dim=-1) > 0).all()


@pytest.mark.parametrize("wrong", [
    {"boundary_every": 0}, {"fast_decay": 1.0}, {"slow_decay": -0.1}, {"num_slots": 0},
], ids=str)  # fmt: skip
def test_sizes_that_make_no_sense_are_refused(wrong):
    with pytest.raises(ValueError, match="must"):
        HierarchicalMemory(hcm_dim=64, **wrong)


def test_an_odd_number_of_slots_is_refused():
    with pytest.raises(ValueError, match="num_slots must be even; got 3"):
        HAMTConfig(mixers="hierarchical_memory", num_slots=3)
    with pytest.raises(ValueError, match="num_slots must be even; got 3"):
        HierarchicalHAMTLayer(HAMTConfig(**{**SIZES, "num_slots": 3}))


def test_fast_slots_of_the_normalised_rule_are_of_one_size():
    """Whatever they forget beside the gates: w² / (1 - α²) is the same as without that."""
    torch.manual_seed(0)
    sizes = {**SIZES, "write_rule": "normalized", "num_slots": 8}
    layer = HierarchicalHAMTLayer(HAMTConfig(**sizes, decay_rate=0.01)).double()
    plain = HAMTLayer(HAMTConfig(**{**sizes, "num_slots": 4})).double()
    plain.gating.load_state_dict(layer.gating.state_dict())
    tokens = torch.randn(2, 9, 32).double()
    gates, wanted = layer.gates(tokens), plain.gates(tokens)
    sizes = gates.write.square()[..., :4] / -torch.expm1(2 * gates.log_forget[..., :4])
    assert_close(sizes, wanted.write.square() / -torch.expm1(2 * wanted.log_forget), 1e-9)
    assert (gates.log_forget[..., :4] < wanted.log_forget).all()


def test_a_text_without_a_boundary_leaves_no_parameter_without_gradient():
    """Processes that train a model together wait for the gradients of all."""
    model = HierarchicalHAMTModel(HAMTConfig(**SIZES)).train()
    ids = torch.randint(97, (2, 20))
    model(ids, labels=ids).loss.backward()
    assert [name for name, x in model.named_parameters() if x.grad is None] == []


def test_the_model_is_not_made_of_others_and_not_subclassed():
    with pytest.raises(ValueError, match="has no hierarchical_memory"):
        HierarchicalHAMTModel(HAMTConfig(**SIZES, mixers="memory"))
    with pytest.raises(TypeError, match="subclass that one"):
        type("Mine", (HierarchicalHAMTModel,), {})


def test_the_hierarchical_model_is_a_language_model_of_these_layers(tmp_path):
    torch.manual_seed(0)
    model = HierarchicalHAMTModel(HAMTConfig(**SIZES)).eval()
    assert type(model) is HAMTModel
    assert all(isinstance(block.mixer, HierarchicalHAMTLayer) for block in model.model.layers)
    ids = torch.arange(20)[None]
    model.save_pretrained(tmp_path)
    for loaded in (HierarchicalHAMTModel, HAMTModel):
        assert torch.equal(loaded.from_pretrained(tmp_path)(ids).logits, model(ids).logits)
    chosen = HierarchicalHAMTModel(HAMTConfig(**SIZES, mixers=["memory", "hierarchical_memory"]))
    assert not isinstance(chosen.model.layers[0].mixer, HierarchicalHAMTLayer)


def test_a_state_is_as_large_as_that_of_one_memory():
    sizes = [
        sum(block.mixer.state_size() for block in model.model.layers)
        for model in (HAMTModel(HAMTConfig(**SIZES)), HierarchicalHAMTModel(HAMTConfig(**SIZES)))
    ]
    assert sizes[0] == sizes[1]


def test_the_demo_tells_each_consolidation_and_draws(tmp_path, capsys):
    assert main(["demo", "--hierarchical", "--output_dir", str(tmp_path)]) == 0
    told = capsys.readouterr().out
    assert [line.split(":")[0] for line in told.splitlines() if "CONSOLIDATED" in line] == [
        *("step 3", "step 6", "step 9", "step 12")
    ]
    assert (tmp_path / "hierarchical_memory.png").stat().st_size > 10_000
    assert sorted(path.name for path in tmp_path.iterdir()) == [".hamt", "hierarchical_memory.png"]


@pytest.mark.slow
def test_the_documented_scripts_are_that_demo():
    first, second = (ROOT / folder / "demo_hierarchical.py" for folder in (".", "experiments"))
    assert first.read_text() == second.read_text()
    command = [sys.executable, str(first), "--help"]
    shown = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    assert "--hierarchical" in shown
