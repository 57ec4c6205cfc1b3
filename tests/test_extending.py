"""Parts from outside the package: each in under 30 lines, trained, saved, loaded, generating.

docs/extending.md shows these classes; a test there holds the page against this file.
"""

import inspect

import pytest
import torch
import torch.nn.functional as F
from model_inputs import assert_close, fit, random_ids
from torch import nn

from hamt import HAMTCache, HAMTConfig, HAMTModel
from hamt.boundaries import Boundary, boundary_options
from hamt.layers import HAMTLayer, as_keys
from hamt.memory import FORMS, WRITE_RULES, Gates
from hamt.memory.write_rules import Gated, WriteRule
from hamt.mixers import GATING_NETWORKS, MIXERS, RETRIEVAL_HEADS, Mixer


class Strongest(WriteRule):
    """Only the slot with the largest write logit is written; the others keep what they hold."""

    name = "strongest"

    def logit_sizes(self, heads, slots):
        return (heads * slots,)

    def initial_logits(self, forget, heads, constant):
        return torch.zeros_like(forget)

    def gates(self, logits, heads):
        shares = logits.unflatten(-1, (heads, -1)).softmax(dim=-1)
        chosen = F.one_hot(shares.argmax(dim=-1), shares.shape[-1]) * shares
        return Gates(chosen, torch.log1p(-0.9 * chosen))

    def turn(self, slots, bound, gates):
        return self.kept(gates)[..., None] * slots + gates.write[..., None] * bound[..., None, :]

    def adjoint(self, weight, gates):
        return (weight * gates.write).sum(dim=-1), weight * self.kept(gates)


class RunningMean(Mixer):
    """Each token sees an exponential mean of the tokens before it."""

    def __init__(self, config):
        super().__init__()
        self.width = config.hidden_dim
        self.input_proj = nn.Linear(self.width, self.width, bias=False)
        self.output_proj = nn.Linear(self.width, self.width, bias=False)

    def state_shapes(self):
        return {"mean": (self.width,)}

    def forward(self, hidden_states, batch=None, state=None):
        inputs, outputs = self.input_proj(hidden_states), []
        mean = inputs.new_zeros(len(inputs), self.width) if state is None else state["mean"]
        for token in inputs.unbind(1):
            mean = 0.9 * mean + 0.1 * token
            outputs.append(mean)
        return self.output_proj(torch.stack(outputs, dim=1)), {"mean": mean}, None


class SlotAttention(nn.Module):
    """Read weights by attention of the token over a learned key for each slot."""

    def __init__(self, config, algebra, key_size):
        super().__init__()
        self.algebra, self.heads = algebra, config.num_heads
        width = config.hidden_dim // config.num_heads
        self.key_proj = nn.Linear(config.hidden_dim, config.num_heads * key_size, bias=False)
        self.query_proj = nn.Linear(config.hidden_dim, config.num_heads * width, bias=False)
        self.slot_keys = nn.Embedding(config.num_heads * config.num_slots, width)

    def forward(self, conditioned):
        keys = as_keys(self.key_proj(conditioned), self.heads, self.algebra)
        queries = self.query_proj(conditioned).unflatten(-1, (self.heads, -1))
        slots = self.slot_keys.weight.unflatten(0, (self.heads, -1))
        scores = torch.einsum("bnhd,hsd->bnhs", queries, slots) / queries.shape[-1] ** 0.5
        return keys, scores.softmax(dim=-1) * scores.shape[-1]


class Perceptron(nn.Module):
    """Gates by a perceptron of the token, and of what it read at the last boundary, if asked."""

    def __init__(self, config):
        super().__init__()
        rule, self.heads = WRITE_RULES[config.write_rule], config.num_heads
        self.rule = rule(config.decay_rate)
        size = sum(self.rule.logit_sizes(config.num_heads, config.num_slots))
        width = config.hidden_dim
        self.mlp = nn.Sequential(nn.Linear(width, 32), nn.SiLU(), nn.Linear(32, size))

    def forward(self, conditioned, feedback=None):
        logits = self.mlp(conditioned).float()
        return self.rule.gates(logits if feedback is None else logits + feedback, self.heads)


class TakeOver(Boundary):
    """The second half of the slots takes over a learned part of the first half."""

    def __init__(self, config, head_dim):
        super().__init__(*boundary_options(config))
        self.consolidation_gate = nn.Linear(2 * head_dim, 1)

    def mixing(self, slots):
        pairs = torch.cat(slots.chunk(2, dim=2), dim=-1).to(self.consolidation_gate.weight.dtype)
        gate = self.consolidation_gate(pairs).sigmoid().to(slots.dtype)
        identity = torch.eye(gate.shape[2]).to(gate).expand(*gate.shape[:3], -1)
        first = torch.cat((identity, torch.zeros_like(identity)), dim=-1)
        second = torch.cat((gate * identity, (1 - gate) * identity), dim=-1)
        return torch.cat((first, second), dim=-2)


class TakeOverLayer(HAMTLayer):
    """A memory whose slots take over from each other at every boundary."""

    def __init__(self, config):
        super().__init__(config)
        self.boundary = TakeOver(config, self.memory.head_dim)


PARTS = {
    "a write rule": (WRITE_RULES, Strongest, {"write_rule": "strongest"}),
    "a mixer": (MIXERS, RunningMean, {"mixers": ["memory", "running_mean"]}),
    "a retrieval head": (RETRIEVAL_HEADS, SlotAttention, {"retrieval_head": "slot_attention"}),
    "a gating network": (
        GATING_NETWORKS,
        Perceptron,
        {"gating_network": "perceptron", "gate_feedback": True, "boundary_every": 4},
    ),
    "a layer with an action": (
        MIXERS,
        TakeOverLayer,
        {"mixers": "take_over", "boundary_every": 4, "num_slots": 4},
    ),
}


@pytest.mark.parametrize(("table", "part", "options"), PARTS.values(), ids=PARTS)
def test_a_part_of_ones_own_trains_is_saved_and_generates(
    table, part, options, tmp_path, monkeypatch
):
    assert len(inspect.getsource(part).splitlines()) < 30
    name = options[next(iter(options))]
    name = name if isinstance(name, str) else name[-1]
    sizes = {"vocab_size": 97, "hidden_dim": 32, "num_layers": 2, "num_slots": 3, "num_heads": 2}
    with pytest.raises(ValueError, match=name):
        HAMTConfig(**sizes | options)
    monkeypatch.setitem(table, name, part)
    torch.manual_seed(0)
    model, ids = HAMTModel(HAMTConfig(**sizes | options)), random_ids(4, 12)
    losses = fit(model, ids, 15, 1e-2)
    assert losses[-1] < 0.7 * losses[0]
    model.save_pretrained(tmp_path)
    loaded = HAMTModel.from_pretrained(tmp_path).eval()
    assert_close(loaded(ids).logits, model.eval()(ids).logits)
    greedy = {"max_new_tokens": 6, "do_sample": False}
    without = loaded.generate(ids[:, :5], use_cache=False, **greedy)
    assert torch.equal(loaded.generate(ids[:, :5], **greedy), without)


def test_a_rule_without_tiles_runs_in_the_loop_alone(monkeypatch):
    monkeypatch.setitem(WRITE_RULES, "strongest", Strongest)
    model = HAMTModel(HAMTConfig(vocab_size=97, hidden_dim=32, write_rule="strongest"))
    memory = model.model.layers[0].mixer.memory
    assert [name for name, form in FORMS.items() if form.computes(memory.rule)] == ["recurrent"]


class Louder(Gated):
    """A rule with a turn of its own, and tiles that are not its own."""

    def turn(self, slots, bound, gates):
        return super().turn(slots, 2 * bound, gates)


@pytest.mark.parametrize("name", ["gated", "louder"])
def test_a_rule_with_a_turn_of_its_own_is_never_computed_by_the_tiles_of_another(name, monkeypatch):
    monkeypatch.setitem(WRITE_RULES, "louder", Louder)
    monkeypatch.setattr(Louder, "name", name)
    torch.manual_seed(0)
    model = HAMTModel(HAMTConfig(vocab_size=97, hidden_dim=32, write_rule="louder")).eval()
    ids, cache, logits = random_ids(1, 9), None, []
    for token in ids.split(1, dim=1):
        outputs = model(token, past_key_values=cache, use_cache=True)
        cache = outputs.past_key_values
        logits.append(outputs.logits)
    assert_close(torch.cat(logits, dim=1), model(ids).logits)


def test_a_mixer_without_a_state_is_kept_in_a_file(monkeypatch, tmp_path):
    class Nothing(RunningMean):
        def state_shapes(self):
            return {}

        def forward(self, hidden_states, batch=None, state=None):
            return self.output_proj(hidden_states), {}, None

    monkeypatch.setitem(MIXERS, "nothing", Nothing)
    model = HAMTModel(HAMTConfig(vocab_size=97, hidden_dim=32, num_layers=2, mixers="nothing"))
    ids = random_ids(2, 5)
    cache = model(ids, use_cache=True).past_key_values
    cache.save(tmp_path / "state")
    loaded = HAMTCache.load(tmp_path / "state")
    assert_close(model(ids, past_key_values=loaded).logits, model(ids).logits)
