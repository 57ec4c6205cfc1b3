"""Transformers whose attention window and memory have taken over: equal while nothing has left."""

import copy

import pytest
import torch
from converted_inputs import KNOWN, SEVERAL, SIZES, VOCAB, convert, tiny_converted, tiny_transformer
from model_inputs import assert_close, fit, padded, ragged_rows, random_ids
from peft import LoraConfig, get_peft_model
from transformers import AutoConfig, AutoModel, AutoModelForCausalLM

from hamt.batch import Batch
from hamt.convert.exchange import exchange
from hamt.converted_config import ConvertedConfig
from hamt.converted_model import ConvertedBackbone, ConvertedForCausalLM, Pass, full_attention

WIDE = SIZES._replace(window=64, block=16)
ROPES = [
    {"rope_type": "default", "rope_theta": 500.0},
    {"rope_type": "linear", "factor": 2.0, "rope_theta": 1e4},
    {"rope_type": "yarn", "factor": 4.0, "rope_theta": 1e4, "original_max_position_embeddings": 16},
    {"rope_type": "llama3", "factor": 8.0, "rope_theta": 1e4, "low_freq_factor": 1.0,
     "high_freq_factor": 4.0, "original_max_position_embeddings": 16},
]  # fmt: skip
kinds = pytest.mark.parametrize("kind", KNOWN)
pytestmark = [
    pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing`:FutureWarning"),  # of PEFT
]


@kinds
def test_while_the_window_covers_the_text_it_is_the_transformer(kind):
    transformer, ids = tiny_transformer(kind), random_ids(2, 60)
    model = convert(transformer, WIDE)
    with torch.no_grad():
        expected = transformer(ids).logits
        assert_close(model(ids).logits, expected, 2e-5)
        narrow = convert(transformer, SIZES)(ids).logits
        assert_close(narrow[:, : SIZES.window], expected[:, : SIZES.window], 2e-5)
        assert (narrow - expected)[:, SIZES.window :].abs().max() > 0.1


@pytest.mark.parametrize("rope", ROPES, ids=lambda rope: rope["rope_type"])
def test_positions_are_those_of_the_transformer(rope):
    transformer, ids = tiny_transformer(rope_parameters=rope), random_ids(2, 60)
    with torch.no_grad():
        assert_close(convert(transformer, WIDE)(ids).logits, transformer(ids).logits, 2e-5)


@pytest.mark.parametrize("rope", ROPES, ids=lambda rope: rope["rope_type"])
def test_positions_are_exchanged_and_loaded_without_memory_for_weights(rope, tmp_path):
    """Both make the model on the meta device first."""
    transformer, ids = tiny_transformer(rope_parameters=rope), random_ids(2, 60)
    expected = transformer(ids).logits
    model = exchange(transformer, WIDE)
    assert_close(model(ids).logits, expected, 2e-5)
    model.save_pretrained(tmp_path)
    assert_close(AutoModelForCausalLM.from_pretrained(tmp_path)(ids).logits, expected, 2e-5)


def test_biases_and_other_head_sizes_are_those_of_the_transformer():
    options = {"head_dim": 16, "num_key_value_heads": 1, "attention_bias": True, "mlp_bias": True}
    transformer, ids = tiny_transformer(**options, hidden_act="gelu"), random_ids(2, 60)
    with torch.no_grad():
        for name, weight in transformer.named_parameters():
            if name.endswith("bias"):
                weight.normal_()
        assert_close(convert(transformer, WIDE)(ids).logits, transformer(ids).logits, 2e-5)


def test_it_can_still_see_all_tokens():
    """``Pass.instead`` asks another in the place of window and memory."""
    transformer, ids = tiny_transformer(), random_ids(2, 60)
    model = convert(transformer, SIZES)
    with torch.no_grad():
        told = Pass(instead=full_attention)
        hidden_states = model.model.run_body(model.model.embed_tokens(ids), told)
        assert_close(model.lm_head(hidden_states), transformer(ids).logits, 2e-5)
    assert not told.after


@pytest.mark.parametrize("sizes", [SIZES, SEVERAL], ids=["slots", "several"])
@kinds
def test_greedy_is_what_reading_all_again_would_give(kind, sizes):
    model, ids = tiny_converted(kind, sizes), random_ids(2, 30)
    written = model.generate(ids, max_new_tokens=25, do_sample=False, pad_token_id=0)
    read = ids
    with torch.no_grad():
        for _ in range(25):
            read = torch.cat((read, model(read).logits[:, -1:].argmax(dim=-1)), dim=1)
    assert torch.equal(written, read)
    assert len(set(written[0, 30:].tolist())) > 3, "the model repeats itself"


@pytest.mark.parametrize("options", [
    {"do_sample": False},
    {"num_beams": 3, "do_sample": False},
    {"do_sample": True, "top_k": 5},
    {"do_sample": True, "num_return_sequences": 2},
], ids=["greedy", "beams", "sampled", "two each"])  # fmt: skip
def test_generation_with_padding_at_the_left(options):
    """With a state, and without one reading everything again for each token."""
    model, (ids, mask) = tiny_converted(sizes=SEVERAL), padded(ragged_rows(20, 11, 3), "left")
    told = {"attention_mask": mask, "max_new_tokens": 25, "pad_token_id": 0, **options}
    found = []
    for use_cache in (True, False):
        torch.manual_seed(0)
        found.append(model.generate(ids, use_cache=use_cache, **told))
    assert torch.equal(*found)
    assert found[0].shape == (len(ids) * options.get("num_return_sequences", 1), 45)


def test_rows_of_a_batch_are_written_as_alone():
    model, rows = tiny_converted(sizes=SEVERAL), ragged_rows(21, 11, 3)
    ids, mask = padded(rows, "left")
    told = {"max_new_tokens": 24, "do_sample": False, "pad_token_id": 0}
    written = model.generate(ids, attention_mask=mask, **told)
    for row, found in zip(rows, written, strict=True):
        assert torch.equal(model.generate(row[None], **told)[0, len(row) :], found[21:])


def test_a_returned_state_goes_on_and_forks():
    model, ids = tiny_converted(sizes=SEVERAL), random_ids(1, 50)
    told = {"max_new_tokens": 10, "do_sample": False}
    first = model.generate(ids[:, :20], return_dict_in_generate=True, **told)
    state, text = first.past_key_values, torch.cat((first.sequences, ids[:, 20:30]), dim=1)
    fork = state.fork()
    expected = model.generate(text, **told)
    assert torch.equal(model.generate(text, past_key_values=state, **told), expected)
    found = model.generate(ids[:, 20:30], past_key_values=fork, **told)
    assert torch.equal(found[:, 10:], expected[:, 40:])
    assert state.get_seq_length() == fork.get_seq_length() == 49


def test_it_is_read_in_pieces():
    model, ids = tiny_converted(sizes=SEVERAL), random_ids(2, 60)
    with torch.no_grad():
        whole = model(ids, use_cache=True)
        cache, logits = None, []
        for part in ids.split([1, 22, 5, 16, 16], dim=1):
            outputs = model(part, past_key_values=cache, use_cache=True)
            cache = outputs.past_key_values
            logits.append(outputs.logits)
    assert_close(torch.cat(logits, dim=1), whole.logits, 1e-4)
    assert cache.row_shapes == whole.past_key_values.row_shapes
    shapes = [layer.self_attn.window_and_memory.state_shapes() for layer in model.model.layers]
    assert [{n: x.shape[1:] for n, x in state.items()} for state in cache.states] == shapes
    assert cache.nbytes == model(ids[:, :3], use_cache=True).past_key_values.nbytes


def test_packed_documents_do_not_see_each_other():
    model, ids = tiny_converted(sizes=SEVERAL), random_ids(1, 60)
    names = torch.tensor([[0] * 23 + [1] * 37])
    with torch.no_grad():
        logits = model(ids, seq_idx=names).logits
        for part in (slice(23), slice(23, 60)):
            assert_close(logits[:, part], model(ids[:, part]).logits, 1e-4)
        places = torch.cat((torch.arange(23), torch.arange(37)))[None]
        assert_close(model(ids, position_ids=places).logits, logits, 1e-5)


@pytest.mark.parametrize("tied", [True, False])
@kinds
def test_it_is_saved_and_loaded(kind, tied, tmp_path):
    model, ids = tiny_converted(kind, SEVERAL, tie_word_embeddings=tied), random_ids(2, 40)
    model.generation_config.repetition_penalty = 1.25
    model.save_pretrained(tmp_path)
    again = AutoModelForCausalLM.from_pretrained(tmp_path)
    assert type(again) is ConvertedForCausalLM
    there = {"_name_or_path": str(tmp_path)}
    assert again.config.to_dict() == model.config.to_dict() | there
    assert again.generation_config.repetition_penalty == 1.25
    assert (again.lm_head.weight is again.model.embed_tokens.weight) == tied
    with torch.no_grad():
        expected = model(ids).logits
        assert torch.equal(again(ids).logits, expected)
        body = AutoModel.from_pretrained(tmp_path)
        assert type(body) is ConvertedBackbone
        hidden_states = body(ids).last_hidden_state
        assert_close(model.lm_head(hidden_states), expected, 1e-6)
    assert type(AutoConfig.from_pretrained(tmp_path)) is ConvertedConfig
    narrow = AutoModelForCausalLM.from_pretrained(tmp_path, dtype=torch.bfloat16)
    dtypes = {(".slots." in name, x.dtype) for name, x in narrow.named_parameters()}
    assert dtypes == {(False, torch.bfloat16), (True, torch.float32)}
    assert torch.equal(
        narrow.model.layers[0].self_attn.window_and_memory.frequencies,
        model.model.layers[0].self_attn.window_and_memory.frequencies,
    )


def test_weights_that_are_missing_are_made_anew_only_if_asked_for(tmp_path):
    model = tiny_converted()
    weights = {name: x for name, x in model.state_dict().items() if "key_gain" not in name}
    model.save_pretrained(tmp_path, state_dict=weights)
    with pytest.raises(ValueError, match=r"weights are missing: .*slots\.key_gain"):
        ConvertedForCausalLM.from_pretrained(tmp_path)
    again = ConvertedForCausalLM.from_pretrained(tmp_path, ignore_mismatched_sizes=True)
    assert again.model.layers[0].self_attn.window_and_memory.slots.key_gain.eq(1).all()


@pytest.mark.parametrize("given", [True, "config"])
def test_hidden_states_are_those_of_all_layers(given):
    transformer, ids = tiny_transformer(), random_ids(2, 40)
    model = convert(transformer, WIDE)
    if given == "config":
        model.model.config.output_hidden_states = True
        found = model(ids).hidden_states
    else:
        found = model(ids, output_hidden_states=True).hidden_states
    expected = transformer(ids, output_hidden_states=True).hidden_states
    assert len(found) == len(expected) == 4
    for actual, wanted in zip(found, expected, strict=True):
        assert_close(actual, wanted, 2e-5)
    as_tuple = model.model(ids, output_hidden_states=True, return_dict=False)
    assert len(as_tuple[-1]) == 4
    model.config.output_hidden_states = False
    assert model(ids).hidden_states is None


@pytest.mark.filterwarnings("ignore:`gradient_checkpointing_enable`:FutureWarning")
def test_activations_are_computed_twice_if_asked_for():
    model, ids = tiny_converted(sizes=SEVERAL).train(), random_ids(2, 40)
    found = []
    for enable in (False, True):
        if enable:
            model.gradient_checkpointing_enable()
            assert any(layer.gradient_checkpointing for layer in model.model.layers)
        model(ids, labels=ids).loss.backward()
        found.append([x.grad for x in model.parameters()])
        model.zero_grad(set_to_none=True)
    for a, b in zip(*found, strict=True):
        assert_close(a, b, 1e-5)


@pytest.mark.parametrize("kind", ["llama", "gemma3_text"])
def test_it_learns_a_text_by_heart(kind):
    model, ids = tiny_converted(kind, SEVERAL).train(), random_ids(2, 50)
    losses = fit(model, ids, num_steps=30, learning_rate=1e-2)
    assert losses[-1] < 0.5 * losses[0]


def test_a_loss_needs_no_logits():
    model, ids = tiny_converted(), random_ids(2, 40)
    outputs = model(ids, labels=ids, return_logits=False)
    assert outputs.logits is None
    assert_close(outputs.loss, model(ids, labels=ids).loss, 1e-5)


@pytest.mark.parametrize("tied", [True, False])
def test_the_embedding_is_resized(tied, tmp_path):
    model, ids = tiny_converted(tie_word_embeddings=tied), random_ids(2, 40)
    expected = model(ids).logits
    model.resize_token_embeddings(VOCAB + 8, mean_resizing=False)
    assert model.config.vocab_size == model.config.transformer["vocab_size"] == VOCAB + 8
    assert (model.lm_head.weight is model.model.embed_tokens.weight) == tied
    assert_close(model(ids).logits[..., :VOCAB], expected, 1e-5)
    model.save_pretrained(tmp_path)
    again = AutoModelForCausalLM.from_pretrained(tmp_path)
    assert_close(again(ids).logits, model(ids).logits, 1e-6)


def test_a_copy_stands_alone():
    model, ids = tiny_converted(sizes=SEVERAL), random_ids(2, 40)
    expected, copied = model(ids).logits, copy.deepcopy(model)
    assert torch.equal(copied(ids).logits, expected)
    with torch.no_grad():
        for weight in model.parameters():
            weight.zero_()
    assert torch.equal(copied(ids).logits, expected)


@pytest.mark.parametrize("told", [{"target_modules": ["q_proj", "v_proj"]}, {}], ids=str)
def test_an_adapter_learns(told):
    model, ids = tiny_converted(sizes=SEVERAL), random_ids(2, 40)
    adapted = get_peft_model(model, LoraConfig(r=2, **told))
    expected = adapted(ids).logits
    names = [name for name, x in adapted.named_parameters() if x.requires_grad]
    assert len(names) == 2 * 2 * 3
    assert all("q_proj" in name or "v_proj" in name for name in names)
    optimizer = torch.optim.AdamW([x for x in adapted.parameters() if x.requires_grad], 1e-2)
    for _ in range(2):
        adapted(ids, labels=ids).loss.backward()
        optimizer.step()
    assert (adapted(ids).logits - expected).abs().max() > 1e-3


def test_fusing_projections_changes_nothing():
    model, ids = tiny_converted(sizes=SEVERAL), random_ids(2, 40)
    told = {"max_new_tokens": 20, "do_sample": False, "pad_token_id": 0}
    expected, written = model(ids).logits, model.generate(ids, **told)
    model.fuse_projections()
    assert_close(model(ids).logits, expected, 1e-5)
    assert torch.equal(model.generate(ids, **told), written)
    model.unfuse_projections()
    assert torch.equal(model(ids).logits, expected)
    with pytest.raises(ValueError, match="cannot decode with"):
        model.fuse_projections(torch.int8)


def test_it_says_what_it_is():
    summary = tiny_converted(sizes=SEVERAL).model.mixer_summary()
    assert summary.startswith("1 × window of 16, 2 sinks, 0 exact entries and 4 slots, 1 × ")
    assert tiny_converted().model.mixer_summary().startswith("3 × ")


def test_half_precision_is_about_the_same():
    """As near as the transformer itself is to its own float32."""
    transformer, ids = tiny_transformer(), random_ids(2, 60)
    model = convert(transformer, SIZES)
    off = []
    for each in (transformer, model):
        wide = each(ids).logits
        narrow = copy.deepcopy(each).to(torch.bfloat16)(ids, use_cache=True)
        off.append((narrow.logits.float() - wide).abs().mean() / wide.abs().mean())
    assert off[1] < 2 * off[0]
    state = narrow.past_key_values.states[0]
    assert state["slot_keys"].dtype == torch.float32
    assert state["keys"].dtype == torch.bfloat16
    with torch.autocast("cpu", dtype=torch.bfloat16):
        mixed = model(ids, use_cache=True)
    assert mixed.past_key_values.states[0]["slot_keys"].dtype == torch.float32


@pytest.mark.slow
def test_a_compiled_step_is_the_same():
    """In several graphs: what is read in a piece decides which blocks there are."""
    model, ids = tiny_converted(sizes=SEVERAL), random_ids(2, 42)
    compiled = torch.compile(model, backend="eager")
    with torch.no_grad():
        state = model(ids[:, :30], use_cache=True).past_key_values
        fork = state.fork()
        for token in ids[:, 30:].split(1, dim=1):
            expected = model(token, past_key_values=state).logits
            assert_close(compiled(token, past_key_values=fork).logits, expected, 1e-5)
    torch._dynamo.reset()


def test_a_batch_without_padding_needs_no_mask():
    model, ids = tiny_converted(), random_ids(2, 40)
    states = [None] * 3
    embedded = model.model.embed_tokens(ids)
    hidden_states, after, losses = model.model.run_layers(embedded, Batch(), states)
    assert_close(hidden_states, model.model(ids).last_hidden_state, 1e-6)
    assert len(after) == 3
    assert losses == []
