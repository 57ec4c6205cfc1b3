"""What has changed since a model was copied is left to PyTorch, or noticed by the copy."""

import copy

import peft
import pytest
import torch
from decoding_inputs import close, counted_runs, decode, model_of
from memory_inputs import needs_fused
from model_inputs import random_ids
from torch import nn
from torch.nn.utils import parametrizations, prune

from hamt import decoding

pytestmark = needs_fused


@pytest.fixture
def steps(monkeypatch):
    return counted_runs(monkeypatch)


def hooked(model):
    model.model.layers[1].mlp.register_forward_hook(lambda *_: None)


def in_place(model):
    with torch.no_grad():
        model.model.layers[0].mixer.key_proj.weight.mul_(1.5)


def exchanged(model):
    weight = model.model.layers[0].mixer.item_proj.weight
    model.model.layers[0].mixer.item_proj.weight = nn.Parameter(weight.detach() * 2)


def another_part(model):
    model.model.layers[1].mixer.output_proj = nn.Linear(48, 40, bias=False)


def adapted(model):
    targets = ["item_proj", "up_proj"]
    config = peft.LoraConfig(r=2, target_modules=targets, init_lora_weights=False)
    peft.get_peft_model(model, config)


def trained_further(model):
    model.train()
    model.eval()


def another_head(model):
    model.resize_token_embeddings(170)


def another_forward(model):
    part = model.model.layers[1].mlp.down_proj
    original = part.forward
    part.forward = lambda x: -original(x)


def another_class(model):
    class Doubling(nn.Linear):
        def forward(self, x):
            return 2 * super().forward(x)

    model.model.layers[0].mixer.output_proj.__class__ = Doubling


def pruned(model):
    prune.l1_unstructured(model.model.layers[0].mixer.output_proj, "weight", 0.5)


def parametrised(model):
    parametrizations.weight_norm(model.model.layers[0].mlp.up_proj)


CHANGES = [
    *(hooked, in_place, exchanged, another_part, adapted, trained_further, another_head),
    *(another_forward, another_class, pruned, parametrised),
]


def test_dropout_that_is_switched_on_by_hand_is_not_left_out(steps):
    """As in Monte Carlo dropout."""
    model, ids = model_of(dropout=0.5), random_ids(2, 13)
    model.fuse_projections()
    decode(model, ids)
    assert True in steps
    for layer in model.model.layers:
        layer.train()
    steps.clear()
    decode(model, ids)
    assert True not in steps


def test_weights_made_in_inference_mode_can_be_fused(steps):
    with torch.inference_mode():
        model = model_of()
    model.fuse_projections()
    decode(model, random_ids(2, 13))
    assert True in steps


@pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing` is deprecated")  # by PEFT
@pytest.mark.parametrize("change", CHANGES, ids=lambda change: change.__name__)
def test_what_is_changed_is_left_to_pytorch(change, steps):
    model, ids = model_of(), random_ids(2, 13)
    model.fuse_projections()
    torch.manual_seed(0)
    change(model)
    steps.clear()
    found, _ = decode(model, ids)
    assert True not in steps
    model.unfuse_projections()
    expected, _ = decode(model, ids)
    close(found, expected)  # the head may be that of the copy


@pytest.mark.parametrize("ends", ["well", "badly"])
def test_generate_looks_at_the_weights_once_and_each_time_anew(ends, steps, monkeypatch):
    looked = []
    original = decoding._marks
    monkeypatch.setattr(decoding, "_marks", lambda weights: looked.append(1) or original(weights))

    def interrupted(ids, scores):
        raise KeyboardInterrupt

    options = {"max_new_tokens": 9, "do_sample": False, "eos_token_id": None}
    model, ids = model_of(), random_ids(2, 7)
    model.fuse_projections()
    looked.clear()
    if ends == "well":
        model.generate(ids, **options)
        assert len(looked) == 2  # all, and after the prompt the head
        assert steps.count(True) == 8
    else:
        with pytest.raises(KeyboardInterrupt):
            model.generate(ids, stopping_criteria=[interrupted], **options)
    in_place(model)
    steps.clear()
    decode(model, ids, prompt=3)
    written = model.generate(ids, **options)
    assert set(steps) == {False}
    assert torch.equal(written, copy.deepcopy(model).generate(ids, **options))


def of_its_own(model):
    model.lm_head = nn.Linear(40, model.config.vocab_size, bias=False)


def written_to(model):
    with torch.no_grad():
        model.lm_head.weight.mul_(-1)


def hooked_alone(model):
    model.lm_head.register_forward_hook(lambda module, inputs, logits: -logits)


def with_a_forward_of_its_own(model):
    original = model.lm_head.forward
    model.lm_head.forward = lambda x: -original(x)


def with_a_bias(model):
    model.lm_head.bias = nn.Parameter(torch.full((model.config.vocab_size,), 5.0))
    with torch.no_grad():
        model.lm_head.bias[::2] = 0.0


def pruned_alone(model):
    prune.l1_unstructured(model.lm_head, "weight", 0.5)


@pytest.mark.parametrize(
    "change",
    [
        *(
            of_its_own,
            written_to,
            hooked_alone,
            with_a_forward_of_its_own,
            with_a_bias,
            pruned_alone,
        ),
    ],
)
def test_another_head_is_the_one_that_is_asked(change):
    model, ids = model_of(tie_word_embeddings=False), random_ids(2, 13)
    model.fuse_projections()
    change(model)
    options = {"max_new_tokens": 9, "do_sample": False, "eos_token_id": None}
    found, written = decode(model, ids)[0], model.generate(ids, **options)
    model.unfuse_projections()
    close(found, decode(model, ids)[0])
    assert torch.equal(written, model.generate(ids, **options))


def test_a_vocabulary_that_is_called_smaller_costs_no_memory_of_others():
    """The copy has as many rows as its matrix, whatever the configuration is set to."""
    model, ids = model_of(), random_ids(2, 13)
    model.fuse_projections()
    expected, _ = decode(model, ids)
    model.config.vocab_size = 3
    found, _ = decode(model, ids)
    assert torch.equal(found, expected)


@pytest.mark.parametrize("weights", [torch.float32, torch.int8])
def test_hidden_states_that_are_asked_for_once_do_not_end_it(weights, steps):
    """Transformers leaves hooks on the model, which do nothing when nobody asks."""
    model, ids = model_of(), random_ids(2, 13)
    assert model.fuse_projections(weights) > 0
    outputs = model(ids, output_hidden_states=True)
    assert len(outputs.hidden_states) == model.config.num_layers + 1
    steps.clear()
    decode(model, ids)
    assert True in steps
    assert model.fuse_projections(weights) > 0
    with torch.no_grad():
        cache = model(ids, use_cache=True).past_key_values
        again = model(ids[:, :1], past_key_values=cache, output_hidden_states=True)
    assert len(again.hidden_states) == model.config.num_layers + 1


def test_other_weights_for_one_call_are_used():
    model, ids = model_of(), random_ids(2, 10)
    model.fuse_projections()
    others = {name: 1.5 * weight for name, weight in model.named_parameters()}
    with torch.no_grad():
        cache = model(ids[:, :9], use_cache=True).past_key_values
        arguments = {"past_key_values": cache.fork()}
        found = torch.func.functional_call(model, others, (ids[:, 9:],), arguments).logits
        model.unfuse_projections()
        arguments = {"past_key_values": cache.fork()}
        expected = torch.func.functional_call(model, others, (ids[:, 9:],), arguments).logits
    assert torch.equal(found, expected)
