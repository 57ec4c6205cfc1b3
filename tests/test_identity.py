"""A state knows which model made it, and is refused by any other."""

import copy
import gc
import pickle

import pytest
import torch
from model_inputs import random_ids, tiny_model
from peft import LoraConfig, get_peft_model
from safetensors import safe_open
from safetensors.torch import load_file, save_file

from hamt import HAMTCache, HAMTForSequenceClassification, HAMTModel
from hamt.identity import EVERY, WHOLE, identity

IDS, MORE = random_ids(2, 12), random_ids(2, 5, seed=3)
OTHER = "made by another model, or with other weights"


def name_of(model: torch.nn.Module) -> str:
    return identity(model.model)


def saved(model: HAMTModel, path) -> None:
    model(IDS, use_cache=True).past_key_values.save(path)


CASTS = (torch.bfloat16, torch.float64, torch.float32)


@pytest.mark.parametrize("change", [
    copy.deepcopy,
    *(lambda model, dtype=dtype: copy.deepcopy(model).to(dtype) for dtype in CASTS),
    lambda model: tiny_model(chunk_size=16, dropout=0.3, use_auxiliary_loss=True),
    lambda model: tiny_model(mixers=["memory", "memory"], max_position_embeddings=7),
    lambda model: model.train(),
    lambda model: [model.fuse_projections(), model][1],
], ids=["copy", *map(str, CASTS), "tile", "mixers in full", "training", "fused"])  # fmt: skip
def test_the_same_model_has_the_same_name(change):
    model = tiny_model()
    before = name_of(model)
    assert len(before) == 32
    assert name_of(change(model)) == before


def changed(name: str, function) -> HAMTModel:
    model = tiny_model()
    with torch.no_grad():
        function(model.get_parameter(f"model.{name}"))
    return model


def adapted(model: HAMTModel) -> HAMTModel:
    adapter = get_peft_model(model, LoraConfig(r=2, target_modules=["item_proj"]))
    with torch.no_grad():
        for name, weight in adapter.named_parameters():
            if "lora_B" in name:
                weight.normal_()
    return adapter


@pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing`:FutureWarning")
@pytest.mark.parametrize("other", [
    lambda: tiny_model(seed=1),
    lambda: tiny_model(rms_norm_eps=1e-4),
    lambda: tiny_model(state_precision="int8", boundary_every=4),
    lambda: tiny_model(mixers=["memory", "full_attention"]),
    lambda: changed("layers.1.mixer.item_proj.weight", lambda x: x[3].mul_(1.01)),
    lambda: changed("embed_tokens.weight", lambda x: x[-1].add_(0.01)),
    lambda: changed("norm.weight", lambda x: x[0].add_(0.01)),
    lambda: adapted(tiny_model()).merge_and_unload(),
    lambda: adapted(tiny_model()).get_base_model(),
    lambda: copy.deepcopy(tiny_model()).requires_grad_(False).half().float(),
], ids=map(str, range(10)))  # fmt: skip
def test_another_model_has_another_name(other):
    assert name_of(other()) != name_of(tiny_model())


def test_a_row_of_a_large_matrix_that_has_changed_is_noticed():
    model = tiny_model(vocab_size=WHOLE // 64 + 1, hidden_dim=64)
    weight, before = model.model.embed_tokens.weight, name_of(model)
    assert weight.numel() > WHOLE
    assert weight.shape[1] >= EVERY
    with torch.no_grad():
        for row in (0, 17, len(weight) - 1):
            weight[row] += 0.1
            assert name_of(model) != before
            weight[row] -= 0.1


def test_a_classifier_with_the_same_backbone_goes_on_from_the_state(tmp_path):
    model = tiny_model()
    saved(model, tmp_path / "state")
    classifier = HAMTForSequenceClassification(model.config)
    classifier.model = model.model
    state = HAMTCache.load(tmp_path / "state")
    classifier.model(MORE, past_key_values=state)
    assert state.get_seq_length() == 17


@pytest.mark.parametrize("how", ["forward", "generate", "beams"])
def test_a_state_from_a_file_is_refused_by_another_model(how, tmp_path):
    saved(tiny_model(), tmp_path / "state")
    state, other = HAMTCache.load(tmp_path / "state"), tiny_model(seed=1)
    told = {"max_new_tokens": 2, "num_beams": 2 if how == "beams" else 1}
    read, told = (other, {}) if how == "forward" else (other.generate, told)
    with pytest.raises(ValueError, match=OTHER):
        read(MORE, past_key_values=state, **told)
    assert state.get_seq_length() == 12
    tiny_model()(MORE, past_key_values=state)  # the same weights in another object


def test_a_state_in_memory_is_refused_by_another_model():
    model, twin, other = tiny_model(), tiny_model(), tiny_model(seed=1)
    for kept in (HAMTCache.fork, HAMTCache.detach, copy.deepcopy):
        state = kept(model(IDS, use_cache=True).past_key_values)
        twin(MORE, past_key_values=state)
        with pytest.raises(ValueError, match=OTHER):
            other(MORE, past_key_values=state)
        state.reset()
        other(MORE, past_key_values=state)


def test_a_loaded_model_knows_its_states_again(tmp_path):
    model = tiny_model()
    saved(model, tmp_path / "state")
    for dtype in (torch.float32, torch.bfloat16):
        model.save_pretrained(tmp_path / "model")
        again = HAMTModel.from_pretrained(tmp_path / "model", dtype=dtype)
        again(MORE, past_key_values=HAMTCache.load(tmp_path / "state"))
        model = model.to(torch.bfloat16)


def test_a_loaded_state_is_compared_once(tmp_path, monkeypatch):
    model, compared = tiny_model(), []
    saved(model, tmp_path / "state")
    monkeypatch.setattr("hamt.cache.identity", lambda model: compared.append(1) or identity(model))
    model.generate(MORE, past_key_values=HAMTCache.load(tmp_path / "state"), max_new_tokens=5)
    assert len(compared) == 1


def test_a_state_that_was_only_loaded_is_saved_with_the_name_that_it_had(tmp_path):
    saved(tiny_model(), tmp_path / "state")
    HAMTCache.load(tmp_path / "state").save(tmp_path / "again", "int8")
    assert HAMTCache.load(tmp_path / "again").origin == name_of(tiny_model())


def test_a_state_is_sent_to_another_process_with_the_name_of_its_model():
    model = tiny_model()
    state = pickle.loads(pickle.dumps(model(IDS, use_cache=True).past_key_values.detach()))
    with pytest.raises(ValueError, match=OTHER):
        tiny_model(seed=1)(MORE, past_key_values=state)
    assert tiny_model()(MORE, past_key_values=state).logits.shape == (2, 5, 97)


def test_a_state_of_an_unknown_model_is_read_and_that_is_said(tmp_path, caplog):
    state = tiny_model()(IDS, use_cache=True).past_key_values
    gc.collect()
    state.save(tmp_path / "state")
    assert "state: the model that made this state is gone, and not named there" in caplog.text
    tensors = state.to_tensors()
    save_file(tensors, tmp_path / "earlier", {"format": "hamt-state-4"})
    for name in ("state", "earlier"):
        caplog.clear()
        state = HAMTCache.load(tmp_path / name)
        (line,) = caplog.messages
        assert f"{name} does not say which model made it" in line
        tiny_model(seed=1)(MORE, past_key_values=state)


def test_a_damaged_file_is_refused(tmp_path):
    saved(tiny_model(), tmp_path / "state")
    content = bytearray((tmp_path / "state").read_bytes())
    content[-40] ^= 1
    (tmp_path / "state").write_bytes(content)
    with pytest.raises(ValueError, match=r"state is damaged \(its checksum is wrong\)"):
        HAMTCache.load(tmp_path / "state")


def test_words_are_kept_beside_a_state(tmp_path):
    state = tiny_model()(IDS, use_cache=True).past_key_values
    state.save(tmp_path / "state", notes={"last": "é\n{}", "empty": ""})
    assert HAMTCache.load(tmp_path / "state").notes == {"last": "é\n{}", "empty": ""}
    assert HAMTCache.load(tmp_path / "state").fork().notes == {}
    with safe_open(tmp_path / "state", "pt") as file:
        assert file.metadata()["format"] == "hamt-state-4"
    assert load_file(tmp_path / "state").keys() == state.to_tensors().keys()
