"""A checkpoint, a folder or a .pt file, holds all that is needed; other paths are refused."""

import copy
import json

import pytest
import torch
from model_inputs import tiny_config, tiny_model

from hamt import HAMTForSequenceClassification
from hamt.checkpoint import load_checkpoint, save_checkpoint, save_pt
from hamt.errors import UserError


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


@pytest.mark.parametrize("save", [save_checkpoint, save_pt])
@pytest.mark.parametrize("template", [None, "{{ messages[0].content }}"])
def test_a_checkpoint_keeps_its_chat_template(tmp_path, tokenizer, save, template):
    tokenizer = copy.deepcopy(tokenizer)
    tokenizer.chat_template = template
    path = tmp_path / ("model.pt" if save is save_pt else "model")
    save(path, tiny_model(vocab_size=len(tokenizer)), tokenizer)
    assert load_checkpoint(path)[1].chat_template == template
    if save is save_pt:  # as earlier versions wrote it
        content = torch.load(path, weights_only=True)
        del content["chat_template"]
        torch.save(content, path)
        assert load_checkpoint(path)[1].chat_template is None


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


def test_what_is_no_language_model_is_called_by_its_name(tmp_path, tokenizer):
    config = tiny_config(vocab_size=len(tokenizer))
    HAMTForSequenceClassification(config).save_pretrained(tmp_path / "labels")
    tokenizer.save_pretrained(tmp_path / "labels")
    with pytest.raises(UserError, match="labels holds a HAMTForSequenceClassification, which"):
        load_checkpoint(tmp_path / "labels")
    save_checkpoint(tmp_path / "whole", tiny_model(vocab_size=len(tokenizer)), tokenizer)
    with pytest.raises(UserError, match="give the folder that it is in"):
        load_checkpoint(tmp_path / "whole" / "model.safetensors")
    config = tmp_path / "whole" / "config.json"
    told = json.loads(config.read_text(encoding="utf-8"))
    for names in (5, None, "HAMTForCausalLM", [7]):  # as damage leaves them
        config.write_text(json.dumps({**told, "architectures": names}), encoding="utf-8")
        load_checkpoint(tmp_path / "whole")
    (tmp_path / "model.gguf").write_bytes(b"GGUF")
    with pytest.raises(UserError, match="hamt convert makes one of it"):
        load_checkpoint(tmp_path / "model.gguf")
