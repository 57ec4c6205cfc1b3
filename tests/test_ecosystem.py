"""The tools around Transformers: Trainer, collators, adapters, and each private hook HAMT uses."""

import warnings

import pytest
import torch
import torch.nn.functional as F
import transformers
from model_inputs import random_ids, tiny_config, tiny_model
from torch import nn
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    AutoModelForQuestionAnswering,
    AutoModelForSequenceClassification,
    AutoModelForTokenClassification,
    DataCollatorWithFlattening,
    DynamicCache,
    StaticCache,
    Trainer,
    TrainingArguments,
    default_data_collator,
)
from transformers.generation import GenerationMode
from transformers.modeling_layers import GradientCheckpointingLayer
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES

from hamt import (
    HAMTBackbone,
    HAMTCache,
    HAMTForQuestionAnswering,
    HAMTForSequenceClassification,
    HAMTForTokenClassification,
    HAMTModel,
)
from hamt.model import HAMTBlock

HEADS = {
    HAMTForSequenceClassification: AutoModelForSequenceClassification,
    HAMTForTokenClassification: AutoModelForTokenClassification,
    HAMTForQuestionAnswering: AutoModelForQuestionAnswering,
}


# peft 0.21 still asks for the old name of a property of Transformers.
old_name = pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing` is deprecated")


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


def test_trainer_smooths_labels_of_the_tokens_that_follow(tmp_path):
    """It knows by the name of the class whose labels are shifted."""
    model, data = tiny_model(), rows(16, 16)
    trainer = trainer_for(model, tmp_path, data, label_smoothing_factor=0.1)
    ids = torch.tensor([row["input_ids"] for row in data])
    logits = model(ids).logits[:, :-1].flatten(0, 1)
    wanted = F.cross_entropy(logits, ids[:, 1:].flatten(), label_smoothing=0.1)
    assert trainer.evaluate()["eval_loss"] == pytest.approx(wanted.item(), rel=1e-5)


def test_the_classes_are_found_by_their_names(tmp_path):
    """As TRL, ``transformers serve`` and pipelines look them up."""
    for kind in (HAMTBackbone, HAMTModel, *HEADS):
        kind(tiny_config()).save_pretrained(tmp_path)
        config = AutoConfig.from_pretrained(tmp_path)
        assert getattr(transformers, config.architectures[0]) is kind
    for kind, auto in HEADS.items():
        assert type(auto.from_config(tiny_config())) is kind
    assert MODEL_FOR_CAUSAL_LM_MAPPING_NAMES["hamt"] == "HAMTForCausalLM"
    # The tables of classes go on without it.
    assert all(isinstance(kind, type) for kind in AutoModelForCausalLM._model_mapping)
    assert AutoModelForCausalLM.from_config(tiny_config()).config.model_type == "hamt"


def test_quantisers_find_every_linear_map():
    """They replace what is of the type nn.Linear, and no subclass of it."""
    model, ids = tiny_model(hidden_dim=64, mixers=["memory", "full_attention"]), random_ids(2, 9)
    before = model(ids, labels=ids)
    maps = {name for name, module in model.named_modules() if isinstance(module, nn.Linear)}
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # torch.ao is deprecated
        small = torch.ao.quantization.quantize_dynamic(model, {nn.Linear}, torch.qint8)
        after = small(ids, labels=ids)
        without_logits = small(ids, labels=ids, return_logits=False)
        small.generate(ids, max_new_tokens=2, do_sample=False, pad_token_id=0)
    replaced = {name for name, module in small.named_modules() if "quantized" in str(type(module))}
    assert maps <= replaced
    assert after.loss.item() == pytest.approx(before.loss.item(), rel=0.1)
    assert without_logits.loss.item() == pytest.approx(after.loss.item(), rel=1e-5)


@old_name
def test_lora_adapters_train(tmp_path):
    import peft

    options = {"hidden_dim": 64, "mixers": ["memory", "full_attention"]}
    config = peft.LoraConfig(task_type="CAUSAL_LM", r=2)  # PEFT is told which maps a HAMT has
    model = peft.get_peft_model(tiny_model(**options), config)
    adapted = {name for name, _ in model.named_parameters() if "lora_A" in name}
    assert len(adapted) == 4 + 3
    ids = random_ids(2, 9)
    model(ids, labels=ids).loss.backward()
    assert all(p.grad is not None for p in model.parameters() if p.requires_grad)
    assert model.generate(input_ids=ids, max_new_tokens=2, do_sample=False).shape == (2, 11)


# As of every model whose norms are no nn.LayerNorm.
@pytest.mark.filterwarnings("ignore:Unsupported layer type .*RMSNorm")
@old_name
@pytest.mark.parametrize("method", ["LoraConfig", "IA3Config", "AdaLoraConfig", "LNTuningConfig"])
def test_peft_is_told_whenever_it_is_imported(method, monkeypatch):
    peft = pytest.importorskip("peft")
    told = [t for t in vars(peft.utils.constants).values() if isinstance(t, dict) and "llama" in t]
    assert len(told) > 20
    for table in told:
        monkeypatch.delitem(table, "hamt", raising=False)
    model = tiny_model()
    options = {"total_step": 10} if method == "AdaLoraConfig" else {}
    adapted = peft.get_peft_model(model, getattr(peft, method)(task_type="CAUSAL_LM", **options))
    names = {name.rsplit(".", 1)[-1] for name in adapted.targeted_module_names}
    maps = {"item_proj", "key_proj", "output_proj"}
    wanted = {
        "IA3Config": {"item_proj", "key_proj", "down_proj"},
        "LNTuningConfig": {"mixer_norm", "mlp_norm", "norm"},
    }
    assert names == wanted.get(method, maps)


@old_name
def test_prompts_of_peft_are_read_before_the_text():
    """Prompt tuning gives embeddings; the state has read them when ``generate`` goes on."""
    peft = pytest.importorskip("peft")
    model, ids = tiny_model(), random_ids(2, 9)
    config = peft.PromptTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=4)
    tuned = peft.get_peft_model(model, config)
    tuned.prompt_encoder.default.embedding.weight.data.normal_()
    written = tuned.generate(input_ids=ids, max_new_tokens=3, do_sample=False, pad_token_id=0)
    prompt = tuned.get_prompt(batch_size=2)
    for _ in range(3):
        read = torch.cat([prompt, model.get_input_embeddings()(ids)], dim=1)
        chosen = model(inputs_embeds=read).logits[:, -1].argmax(dim=-1, keepdim=True)
        ids = torch.cat([ids, chosen], dim=1)
    assert torch.equal(written, ids)


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


CACHES = [DynamicCache, lambda config: StaticCache(config=config, max_cache_len=20)]


@pytest.mark.parametrize("make", CACHES)
def test_caches_for_keys_and_values_are_refused(make):
    model = tiny_model()
    cache = make(config=model.config)
    with pytest.raises(ValueError, match=r"must be a HAMTCache; got .* leave it out"):
        model.generate(random_ids(1, 5), past_key_values=cache, max_new_tokens=2)


@pytest.mark.parametrize("kind", ["static", "quantized", "offloaded", "sliding_window"])
def test_ways_to_keep_keys_and_values_are_refused(kind):
    with pytest.raises(ValueError, match=f"^cache_implementation='{kind}' .* leave it out$"):
        tiny_model().generate(random_ids(1, 5), cache_implementation=kind, max_new_tokens=2)


@pytest.mark.parametrize("kind", ["sdpa", "flash_attention_2", "flex_attention"])
def test_ways_to_compute_attention_are_refused(kind):
    with pytest.raises(ValueError, match=f"^attn_implementation='{kind}' .* leave it out$"):
        HAMTModel(tiny_config(attn_implementation=kind))
    assert HAMTModel(tiny_config()).config._attn_implementation == "eager"


def test_continuous_batching_is_refused():
    model = tiny_model()
    with pytest.raises(ValueError, match=r"^HAMT has no keys and values .* as one batch"):
        model.generate_batch([[1, 2, 3], [4, 5]])


@old_name
def test_prefix_tuning_is_refused():
    peft = pytest.importorskip("peft")
    config = peft.PrefixTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=4)
    tuned = peft.get_peft_model(tiny_model(), config)
    with pytest.raises(ValueError, match="must be a HAMTCache; got DynamicCache"):
        tuned(input_ids=random_ids(1, 5))
