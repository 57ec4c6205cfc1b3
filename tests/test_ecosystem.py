"""The tools around Transformers: Trainer, collators, adapters, and each private hook HAMT uses."""

import json

import pytest
import torch
from model_inputs import random_ids, tiny_config, tiny_model
from transformers import (
    AutoModelForCausalLM,
    DataCollatorWithFlattening,
    Trainer,
    TrainingArguments,
    default_data_collator,
)
from transformers.generation import GenerationMode
from transformers.modeling_layers import GradientCheckpointingLayer

from hamt import HAMTCache, HAMTForSequenceClassification, HAMTModel
from hamt.checkpoint import load_checkpoint, save_checkpoint, save_pt
from hamt.errors import UserError
from hamt.model import HAMTBlock


def rows(*lengths: int) -> list[dict]:
    ids = [random_ids(1, length, seed=i)[0].tolist() for i, length in enumerate(lengths)]
    return [{"input_ids": row, "labels": row} for row in ids]


def trainer_for(
    model: HAMTModel, folder, data, collator=default_data_collator, **options
) -> Trainer:
    steps = {"max_steps": 3, "logging_steps": 1, "save_steps": 3}
    rate = {"learning_rate": 1e-2, "lr_scheduler_type": "constant"}
    quiet = {"report_to": [], "use_cpu": True, "disable_tqdm": True}
    options = {"per_device_train_batch_size": 2, **steps, **rate, **quiet, **options}
    arguments = TrainingArguments(output_dir=str(folder), **options)
    return Trainer(model, arguments, data_collator=collator, train_dataset=data, eval_dataset=data)


@pytest.mark.parametrize(
    "options", [{}, {"activation_checkpointing": True}, {"bf16": True}], ids=str
)
def test_trainer_trains_evaluates_and_saves(tmp_path, options):
    model = tiny_model()
    trainer = trainer_for(model, tmp_path, rows(16, 16), **options)
    losses = [trainer.evaluate()["eval_loss"]]
    trainer.train()
    losses += [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]
    assert len(losses) == 4
    assert losses[1] == pytest.approx(losses[0], rel=0.02)  # the same two rows
    assert losses[3] < losses[1] - 0.1
    saved = AutoModelForCausalLM.from_pretrained(tmp_path / "checkpoint-3")
    ids = random_ids(2, 9)
    with torch.autocast("cpu", torch.bfloat16, enabled="bf16" in options):
        # Trainer leaves a model in the precision it was trained in.
        assert torch.equal(saved(ids).logits.float(), model.eval()(ids).logits.float())
    # The state is no prediction.
    assert trainer.predict(rows(16, 16)).predictions.shape == (2, 16, 97)


def test_trainer_packs_documents_without_padding(tmp_path):
    """One step on packed rows changes the model as one on the documents in their own rows."""
    found = []
    for collator in (DataCollatorWithFlattening(), default_data_collator):
        model = tiny_model()
        options = {"optim": "sgd", "max_grad_norm": 0.0}
        trainer_for(model, tmp_path, rows(11, 11), collator, **options).train()
        found.append(model.state_dict())
    for name, weight in found[0].items():
        assert torch.allclose(weight, found[1][name], atol=1e-5), name
    assert not torch.allclose(found[0]["lm_head.weight"], tiny_model().lm_head.weight, atol=1e-3)


# peft 0.21 still asks for the old name of a property of Transformers.
@pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing` is deprecated:FutureWarning")
def test_lora_adapters_train(tmp_path):
    import peft

    targets = ["item_proj", "output_proj"]
    config = peft.LoraConfig(task_type="CAUSAL_LM", target_modules=targets, r=2)
    model = peft.get_peft_model(tiny_model(), config)
    ids = random_ids(2, 9)
    model(ids, labels=ids).loss.backward()
    assert all(p.grad is not None for p in model.parameters() if p.requires_grad)
    assert model.generate(input_ids=ids, max_new_tokens=2, do_sample=False).shape == (2, 11)


rules = pytest.mark.parametrize(
    "options", [{}, {"write_rule": "delta", "rotation": "data_dependent"}], ids=str
)


def test_hook_generate_prepares_our_state_and_keeps_one_that_is_given():
    model, given = tiny_model(), HAMTCache(2)

    def prepared(use_cache, **arguments):
        config = model.generation_config.__class__(use_cache=use_cache)
        mode = GenerationMode.GREEDY_SEARCH
        model._prepare_cache_for_generation(config, arguments, mode, 1, 100)
        return arguments.get("past_key_values")

    assert type(prepared(True)) is HAMTCache
    assert prepared(False) is None
    assert prepared(True, past_key_values=given) is given


def test_hook_generate_calls_the_model_with_our_state_only():
    model, seen = tiny_model(), []
    model.register_forward_pre_hook(lambda *call: seen.append(call[2]), with_kwargs=True)
    model.generate(random_ids(1, 5), max_new_tokens=3, do_sample=False, pad_token_id=0)
    assert len(seen) == 3
    states = [kwargs["past_key_values"] for kwargs in seen]
    assert all(type(state) is HAMTCache for state in states)
    assert len({id(state) for state in states}) == 1
    # Positions live in the state; theirs would be taken for the starts of documents.
    assert all(kwargs["position_ids"] is None for kwargs in seen)


def test_hook_class_attributes_that_transformers_reads():
    model = tiny_model()
    assert model._is_stateful
    assert set(model._no_split_modules) == {"HAMTBlock"}
    assert set(model._skip_keys_device_placement) == {"past_key_values"}
    assert model.supports_gradient_checkpointing
    assert isinstance(model.model.layers[0], GradientCheckpointingLayer)
    assert issubclass(HAMTBlock, GradientCheckpointingLayer)
    assert model.all_tied_weights_keys == {"lm_head.weight": "model.embed_tokens.weight"}
    assert model.config.keys_to_ignore_at_inference == ["past_key_values"]


def test_hook_the_cache_cannot_be_compiled_in_or_cropped():
    cache = tiny_model()(random_ids(1, 5)).past_key_values
    assert not cache.is_compileable
    assert not cache.is_croppable
    assert cache.get_max_length() == -1


@rules
def test_hook_weights_are_initialised_once_and_not_over_loaded_ones(tmp_path, options):
    """``_init_weights`` also runs at loading: only for weights the file does not have."""
    model = tiny_model(**options)
    model.save_pretrained(tmp_path)
    loaded, info = HAMTModel.from_pretrained(tmp_path, num_layers=3, output_loading_info=True)
    assert info["missing_keys"]
    assert all(name.startswith("model.layers.2.") for name in info["missing_keys"])
    weights = loaded.state_dict()
    for name, weight in model.state_dict().items():
        assert torch.equal(weights[name], weight), name
    assert_initialised(loaded.model.layers[2], num_layers=3)


@rules
def test_hook_every_kind_of_weight_is_initialised_as_meant(options):
    """Transformers passes over some modules: ``_init_weights`` sees those with own weights."""
    torch.manual_seed(0)
    model = HAMTModel(tiny_config(**options))
    for block in model.model.layers:
        assert_initialised(block, num_layers=2)
    assert model.model.embed_tokens.weight.std().item() == pytest.approx(0.02, rel=0.1)
    classifier = HAMTForSequenceClassification(tiny_config(**options))
    assert_initialised(classifier.model.layers[1], num_layers=2)


def assert_initialised(block: HAMTBlock, num_layers: int) -> None:
    mixer, mlp = block.mixer, block.mlp
    assert torch.equal(mixer.gating.bias, mixer.gating.initial_bias())
    assert mixer.gating.weight.std().item() == pytest.approx(32**-0.5, rel=0.1)
    if mixer.rotation.weight is not None:
        assert not mixer.rotation.weight.any()
    assert torch.equal(mixer.conv.weight[-1], torch.ones(32))
    assert mixer.conv.weight[:-1].std().item() == pytest.approx(0.1, rel=0.3)
    assert torch.equal(mixer.retrieval.read_bias, torch.ones(6))
    assert torch.equal(block.mixer_norm.weight, torch.ones(32))
    inner, last = (mixer.item_proj, mixer.key_proj, mlp.up_proj), (mixer.output_proj, mlp.down_proj)
    for linear in (*inner, *last):
        variance = 1 / linear.in_features / (1 if linear in inner else 2 * num_layers)
        assert linear.weight.std().item() == pytest.approx(variance**0.5, rel=0.1)


@pytest.mark.parametrize("save", [save_checkpoint, save_pt])
def test_a_checkpoint_holds_all_that_is_needed(tmp_path, tokenizer, save):
    model = tiny_model(vocab_size=len(tokenizer), write_rule="convex", binding_type="circular_conv")
    path = tmp_path / "checkpoint"
    save(path, model, tokenizer)
    loaded, loaded_tokenizer = load_checkpoint(path)
    assert not loaded.training
    sizes = ("vocab_size", "hidden_dim", "num_slots", "max_half_life")
    for name in (*sizes, "write_rule", "binding_type"):
        assert getattr(loaded.config, name) == getattr(model.config, name)
    text = "The state of Ünion — strange. "
    ids = tokenizer(text, return_tensors="pt").input_ids
    assert loaded_tokenizer(text).input_ids == ids[0].tolist()
    assert loaded_tokenizer.decode(ids[0]) == text
    for token in ("bos_token_id", "eos_token_id", "pad_token_id", "padding_side"):
        assert getattr(loaded_tokenizer, token) == getattr(tokenizer, token)
    assert torch.equal(loaded(ids).logits, model(ids).logits)


def test_a_path_without_a_checkpoint_is_the_users_mistake(tmp_path, tokenizer):
    for name, config in (("gpt2", json.dumps({"model_type": "gpt2"})), ("broken", "{")):
        (tmp_path / name).mkdir()
        (tmp_path / name / "config.json").write_text(config)
    tiny_config().save_pretrained(tmp_path / "half")
    (tmp_path / "text.pt").write_text("nothing")
    torch.save({"weights": 1}, tmp_path / "other.pt")
    for name, advice in (
        ("nowhere", "no checkpoint at .*nowhere: give a folder with a config.json, or a .pt file"),
        ("gpt2", "holds a 'gpt2' model, not a HAMT model"),
        ("broken", "not a model configuration"),
        ("half", "not a whole checkpoint"),
        ("text.pt", "not a HAMT checkpoint"),
        ("other.pt", "not a HAMT checkpoint"),
    ):
        with pytest.raises(UserError, match=advice) as raised:
            load_checkpoint(tmp_path / name)
        assert "\n" not in str(raised.value)
