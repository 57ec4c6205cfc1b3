"""The model as Transformers sees it: files, Auto classes, arguments, dtypes, causality, padding."""

import subprocess
import sys

import pytest
import torch
import torch.nn.functional as F
from model_inputs import (
    BINDINGS,
    VOCAB,
    assert_close,
    assert_same_gradients,
    gradients,
    logits_of,
    padded,
    ragged_rows,
    random_ids,
    tiny_config,
    tiny_model,
    variants,
)
from safetensors import safe_open
from transformers import (
    AutoConfig,
    AutoModel,
    AutoModelForCausalLM,
    AutoModelForSequenceClassification,
)

from hamt import (
    HAMTBackbone,
    HAMTConfig,
    HAMTForCausalLM,
    HAMTForSequenceClassification,
    HAMTModel,
)

IDS = random_ids(2, 21)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A saved model (seed 0, all defaults of ``tiny_model``)."""
    folder = tmp_path_factory.mktemp("model")
    tiny_model().save_pretrained(folder)
    return folder


@variants
def test_a_loaded_model_gives_the_same_logits_bit_by_bit(tmp_path, options):
    model = tiny_model(**options)
    model.save_pretrained(tmp_path)
    loaded = HAMTModel.from_pretrained(tmp_path)
    assert not loaded.training
    assert loaded.config.rotation == model.config.rotation
    assert torch.equal(loaded(IDS).logits, model(IDS).logits)


@pytest.mark.parametrize("tied", [True, False])
def test_tied_weights_stay_tied_and_are_written_once(tmp_path, tied):
    model = tiny_model(tie_word_embeddings=tied)
    model.save_pretrained(tmp_path)
    with safe_open(tmp_path / "model.safetensors", "pt") as file:
        names = set(file.keys())
    assert "model.embed_tokens.weight" in names
    assert ("lm_head.weight" in names) != tied
    loaded = HAMTModel.from_pretrained(tmp_path)
    assert (loaded.lm_head.weight is loaded.model.embed_tokens.weight) == tied
    assert torch.equal(loaded(IDS).logits, model(IDS).logits)
    with torch.no_grad():
        loaded.model.embed_tokens.weight.zero_()
    assert bool(loaded.lm_head.weight.any()) != tied


def test_a_model_without_an_mlp_has_the_memory_alone_trains_and_is_kept_in_a_file(tmp_path):
    model = tiny_model(intermediate_dim=0)
    assert len(model.model.layers) == 2
    assert not [name for name, _ in model.named_modules() if "mlp" in name]
    fewer = tiny_model().num_parameters() - model.num_parameters()
    assert fewer == 2 * (3 * 32 * tiny_config().intermediate_dim + 32)
    optimizer, losses = torch.optim.SGD(model.parameters(), lr=0.1), []
    for _ in range(2):
        losses.append(model(IDS, labels=IDS).loss)
        losses[-1].backward()
        optimizer.step()
        assert all(gradient.any() for gradient in gradients(model).values())
    assert losses[1] < losses[0]
    model.save_pretrained(tmp_path)
    loaded = HAMTModel.from_pretrained(tmp_path)
    assert loaded.config.intermediate_dim == 0
    assert torch.equal(loaded(IDS).logits, model(IDS).logits)


def test_every_auto_class_finds_its_own(folder):
    assert type(AutoConfig.from_pretrained(folder)) is HAMTConfig
    causal = AutoModelForCausalLM.from_pretrained(folder)
    assert type(causal) is HAMTForCausalLM is HAMTModel
    expected = tiny_model()
    assert torch.equal(causal(IDS).logits, expected(IDS).logits)
    backbone = AutoModel.from_pretrained(folder)
    assert type(backbone) is HAMTBackbone
    assert torch.equal(backbone(IDS).last_hidden_state, expected.model(IDS).last_hidden_state)
    labels = {"num_labels": 3, "pad_token_id": 0}
    classifier = AutoModelForSequenceClassification.from_pretrained(folder, **labels)
    assert type(classifier) is HAMTForSequenceClassification
    for name, weight in expected.model.state_dict().items():
        assert torch.equal(classifier.model.state_dict()[name], weight), name


@pytest.mark.slow
def test_importing_hamt_is_enough_in_a_fresh_process(folder):
    program = (
        "import sys, torch, hamt\n"
        "from transformers import AutoModelForCausalLM\n"
        "model = AutoModelForCausalLM.from_pretrained(sys.argv[1])\n"
        "logits = model(torch.arange(1, 9)[None]).logits\n"
        "print(type(model).__name__, logits.double().sum().item())\n"
    )
    command = [sys.executable, "-c", program, folder]
    run = subprocess.run(command, capture_output=True, text=True, timeout=120, check=True)
    name, total = run.stdout.split()
    assert name == "HAMTForCausalLM"
    expected = tiny_model()(torch.arange(1, 9)[None]).logits.double().sum().item()
    assert float(total) == pytest.approx(expected, abs=1e-4)


@pytest.mark.parametrize("binding_type", BINDINGS)
def test_a_data_dependent_rotation_starts_as_the_default_one(binding_type):
    """The constant rotation where keys have phases, none where they are signs."""
    learnt = HAMTModel(tiny_config(binding_type=binding_type, rotation="data_dependent")).double()
    plain = HAMTModel(tiny_config(binding_type=binding_type)).double()
    missing, unexpected = plain.load_state_dict(learnt.state_dict(), strict=False)
    assert not missing
    assert unexpected == [f"model.layers.{i}.mixer.rotation.weight" for i in range(2)]
    assert_close(learnt(IDS).logits, plain(IDS).logits, 1e-9)


def test_the_loss_is_the_mean_over_the_tokens_that_have_a_label():
    model, labels = tiny_model(), IDS.clone()
    labels[0, :7] = -100
    labels[1, 15:] = -100
    outputs = model(IDS, labels=labels)
    logits, targets = outputs.logits[:, :-1].flatten(0, 1), labels[:, 1:].flatten()
    wanted = targets != -100
    expected = -logits.log_softmax(dim=-1)[wanted, targets[wanted]].mean()
    assert outputs.loss.item() == pytest.approx(expected.item(), rel=1e-5)
    assert outputs.loss.item() != pytest.approx(model(IDS, labels=IDS).loss.item(), rel=1e-4)


def test_embeddings_may_be_given_in_the_place_of_ids():
    model = tiny_model()
    embeddings = model.get_input_embeddings()(IDS)
    assert torch.equal(model(inputs_embeds=embeddings).logits, model(IDS).logits)
    for wrong in ({}, {"input_ids": IDS, "inputs_embeds": embeddings}):
        with pytest.raises(ValueError, match="exactly one of input_ids and inputs_embeds"):
            model(**wrong)


def test_embeddings_are_multiplied_on_their_way_in_alone(tmp_path):
    scaled, plain = tiny_model(embedding_multiplier=3), tiny_model(tie_word_embeddings=False)
    plain.load_state_dict(scaled.state_dict())
    with torch.no_grad():
        plain.model.embed_tokens.weight *= 3
    assert_close(scaled(IDS).logits, plain(IDS).logits, 1e-5)
    embeddings = scaled.get_input_embeddings()(IDS)
    assert_close(embeddings, plain.get_input_embeddings()(IDS), 1e-6)
    assert torch.equal(scaled(inputs_embeds=embeddings).logits, scaled(IDS).logits)
    scaled.save_pretrained(tmp_path)
    loaded = HAMTModel.from_pretrained(tmp_path)
    assert torch.equal(loaded(IDS).logits, scaled(IDS).logits)
    loaded.resize_token_embeddings(VOCAB + 8)
    assert_close(loaded(IDS).logits[..., :VOCAB], scaled(IDS).logits, 1e-6)


def test_logits_are_kept_only_where_wanted():
    model = tiny_model()
    whole = model(IDS).logits
    assert_close(model(IDS, logits_to_keep=1).logits, whole[:, -1:], 1e-6)
    assert_close(model(IDS, logits_to_keep=5).logits, whole[:, -5:], 1e-6)
    chosen = torch.tensor([0, 3, 20])
    assert_close(model(IDS, logits_to_keep=chosen).logits, whole[:, chosen], 1e-6)


def test_hidden_states_are_the_inputs_of_the_blocks_and_the_final_norm():
    model = tiny_model()
    outputs = model(IDS, output_hidden_states=True)
    first, second, last = outputs.hidden_states
    assert torch.equal(first, model.model.embed_tokens(IDS))
    assert torch.equal(second, model.model.layers[0](first)[0])
    assert torch.equal(last, model.model.norm(model.model.layers[1](second)[0]))
    assert torch.equal(model.lm_head(last), outputs.logits)
    assert model(IDS).hidden_states is None


def test_the_state_is_returned_unless_it_is_not_wanted():
    assert tiny_model()(IDS).past_key_values.get_seq_length() == 21
    assert tiny_model()(IDS, use_cache=False).past_key_values is None
    assert tiny_model(use_cache=False)(IDS).past_key_values is None
    assert tiny_model(use_cache=False)(IDS, use_cache=True).past_key_values.get_seq_length() == 21


def test_a_tuple_is_returned_on_request():
    model = tiny_model()
    loss, logits, *_ = model(IDS, labels=IDS, return_dict=False)
    expected = model(IDS, labels=IDS)
    assert loss == expected.loss
    assert torch.equal(logits, expected.logits)


def test_the_vocabulary_can_grow():
    model = tiny_model()
    before = model(IDS).logits
    model.resize_token_embeddings(VOCAB + 3, mean_resizing=False)
    assert model.lm_head.weight is model.model.embed_tokens.weight
    assert torch.equal(model(IDS).logits[..., :VOCAB], before)


def test_a_mask_that_cannot_mean_padding_is_refused():
    model = tiny_model()
    for wrong in (torch.ones(2, 1, 21, 21), torch.zeros(2, 20)):
        with pytest.raises(ValueError, match=r"must be \(batch, tokens\) and cover the 21 tokens"):
            model(IDS, attention_mask=wrong)


@pytest.mark.parametrize("t", [0, 1, 4, 20])
@variants
def test_a_token_changes_no_logit_before_it_and_those_after_it(options, t):
    model, ids = tiny_model(**options), IDS[:1]
    changed = ids.clone()
    changed[0, t] = ids[0, t] % (VOCAB - 1) + 1
    difference = (model(changed).logits - model(ids).logits).abs().amax(dim=-1)[0]
    # A change must not even alter the rounding of what went before.
    assert torch.equal(difference[:t], torch.zeros(t))
    assert (difference[t:] > 1e-4).all()


@pytest.mark.parametrize("side", ["left", "right"])
@variants
def test_a_padded_row_has_the_logits_of_the_row_alone(options, side):
    model, rows = tiny_model(**options), ragged_rows(21, 13, 1, 4, 20)
    ids, mask = padded(rows, side, length=23)  # padding in every row
    for kind in (mask, mask.bool(), mask.float()):
        logits = model(ids, attention_mask=kind).logits
        for b, row in enumerate(rows):
            assert_close(logits[b, mask[b].bool()], logits_of(model, row))


def test_what_stands_in_the_padding_does_not_matter():
    model = tiny_model()
    ids, mask = padded(ragged_rows(9, 4), "left")
    other, real = torch.where(mask.bool(), ids, 55), mask.bool()
    logits = [model(rows, attention_mask=mask).logits[real] for rows in (ids, other)]
    assert torch.equal(*logits)


def test_padding_gets_no_gradient_and_changes_none():
    model, rows = tiny_model().double(), ragged_rows(12, 7)
    ids, mask = padded(rows, "left", length=15)
    labels = ids.masked_fill(mask == 0, -100)
    # The first real token has no predecessor; a padded row would score it against padding.
    labels[torch.arange(2), mask.argmax(dim=1)] = -100
    model(ids, attention_mask=mask, labels=labels).loss.backward()
    expected = gradients(model)
    losses = [F.cross_entropy(logits_of(model, row)[:-1], row[1:], reduction="sum") for row in rows]
    (sum(losses) / sum(len(row) - 1 for row in rows)).backward()
    assert_same_gradients(model, expected, 1e-6)  # the loss is taken in float32


def test_a_token_that_also_pads_still_learns_its_embedding():
    model, ids = tiny_model(pad_token_id=3, eos_token_id=3), random_ids(1, 12)
    ids[0, 5] = 3
    model(ids, labels=ids).loss.backward()
    assert model.get_input_embeddings().weight[3].abs().sum() > 0
    model.zero_grad()
    model.model(ids).last_hidden_state.sum().backward()  # without the tied head
    assert model.get_input_embeddings().weight.grad[3].abs().sum() > 0


def test_autocast_is_close_to_float32_and_keeps_the_state_in_float32():
    model, ids = tiny_model(), random_ids(2, 40)
    expected = model(ids, labels=ids)
    expected.loss.backward()
    wanted = gradients(model)
    with torch.autocast("cpu", torch.bfloat16):
        outputs = model(ids, labels=ids)
    assert outputs.logits.dtype == torch.bfloat16
    error = (outputs.logits.float() - expected.logits).square().mean().sqrt()
    assert 0 < error < 0.05 * expected.logits.std()
    assert outputs.loss.item() == pytest.approx(expected.loss.item(), rel=0.01)
    for state in outputs.past_key_values.states:
        assert state["slots"].dtype == state["position_key"].dtype == torch.float32
    outputs.loss.backward()
    for name, gradient in gradients(model).items():
        assert gradient.dtype == torch.float32
        assert gradient.isfinite().all()
        if gradient.ndim == 2:  # a bias sums over all tokens, and what cancels is rounding
            likeness = F.cosine_similarity(gradient.flatten(), wanted[name].flatten(), dim=0)
            assert likeness > 0.97, name


@variants
def test_a_model_in_bfloat16_runs_trains_and_keeps_the_state_in_float32(options):
    model, ids = tiny_model(**options).to(torch.bfloat16), random_ids(2, 40)
    outputs = model(ids, labels=ids)
    assert outputs.logits.dtype == torch.bfloat16
    expected = tiny_model(**options)(ids, labels=ids)
    assert outputs.loss.item() == pytest.approx(expected.loss.item(), rel=0.02)
    for state in outputs.past_key_values.states:
        tensors = [state["slots"], state.get("position_key")]
        assert {x.dtype for x in tensors if x is not None} == {torch.float32}
    outputs.loss.backward()
    assert all(gradient.isfinite().all() for gradient in gradients(model).values())
    step = model(ids[:, :1], past_key_values=outputs.past_key_values.detach())
    assert step.logits.isfinite().all()


def test_a_loaded_model_may_be_given_a_dtype(folder):
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.bfloat16)
    assert {parameter.dtype for parameter in model.parameters()} == {torch.bfloat16}
    assert model.generate(IDS[:, :5], max_new_tokens=3, do_sample=False).shape == (2, 8)


@pytest.mark.parametrize("shifted", [True, False])
@pytest.mark.parametrize("num_items", [None, 100])
def test_the_loss_without_logits_is_the_loss(shifted, num_items):
    torch.manual_seed(0)
    model = HAMTModel(HAMTConfig(hidden_dim=32, num_layers=1, vocab_size=600))
    ids, targets = torch.randint(600, (2, 3, 150), generator=torch.Generator().manual_seed(1))
    targets[0, :9] = -100
    options = {"labels": targets, "num_items_in_batch": num_items}
    if shifted:
        options["shift_labels"] = targets
    found = []
    for without in ({}, {"return_logits": False}):
        outputs = model(ids, **options, **without)
        outputs.loss.backward()
        found.append([outputs.loss.detach(), *(p.grad.clone() for p in model.parameters())])
        model.zero_grad()
    assert outputs.logits is None
    torch.testing.assert_close(*found, rtol=1e-4, atol=1e-7)
