"""A state knows which model made it, and is refused by any other."""

import copy
import gc
import pickle
import warnings

import pytest
import torch
from accelerate import cpu_offload
from model_inputs import random_ids, tiny_model
from peft import LoraConfig, get_peft_model
from safetensors import safe_open
from safetensors.torch import load_file, save_file

from hamt import HAMTCache, HAMTForSequenceClassification, HAMTModel
from hamt.identity import EVERY, WHOLE, identity

pytestmark = [
    pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing`:FutureWarning"),  # of PEFT
    pytest.mark.filterwarnings("ignore:`torch.jit.script_method`:DeprecationWarning"),  # of compile
]
IDS, MORE = random_ids(2, 12), random_ids(2, 5, seed=3)
OTHER = "made by another model, or with other weights"
GONE = "the model that made this state is gone, or its weights have changed since"


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
    lambda model: cpu_offload(model, execution_device=torch.device("cpu")),
    lambda model: [model.model.layers[0].compile(), model][1],
    lambda model: compiled_in_place(model),
], ids=["copy", *map(str, CASTS), "tile", "mixers in full", "training", "fused", "offloaded",
        "compiled", "wrapped"])  # fmt: skip
def test_the_same_model_has_the_same_name(change):
    model = tiny_model()
    before = name_of(model)
    assert len(before) == 32
    assert name_of(change(model)) == before


def compiled_in_place(model: HAMTModel) -> HAMTModel:
    model.model.layers[0] = torch.compile(model.model.layers[0])
    return model


def changed(name: str, function) -> HAMTModel:
    model = tiny_model()
    with torch.no_grad():
        function(model.get_parameter(f"model.{name}"))
    return model


def adapted(model: HAMTModel, **told) -> HAMTModel:
    """With two adapters, of which the first is active."""
    adapter = get_peft_model(model, LoraConfig(r=2, target_modules=["item_proj"], **told))
    adapter.add_adapter("second", LoraConfig(r=2, target_modules=["item_proj"]))
    with torch.no_grad():
        for name, weight in adapter.named_parameters():
            if "lora_" in name:
                weight.fill_(0.1)
    return adapter


def quantised(model: HAMTModel) -> HAMTModel:
    with warnings.catch_warnings(action="ignore"):  # PyTorch calls its own deprecated
        return torch.ao.quantization.quantize_dynamic(model, {torch.nn.Linear})


def with_other_matrix(how) -> str:
    """The name of a model of which a map has changed before ``how`` was done to it."""
    return name_of(how(changed("layers.0.mixer.item_proj.weight", lambda x: x.add_(0.1))))


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
    lambda: quantised(tiny_model()),
], ids=map(str, range(11)))  # fmt: skip
def test_another_model_has_another_name(other):
    assert name_of(other()) != name_of(tiny_model())


def test_quantised_weights_have_a_part_in_the_name():
    assert with_other_matrix(quantised) != name_of(quantised(tiny_model()))


@pytest.mark.parametrize("change", [
    lambda model: model.set_adapter("second"),
    lambda model: model.base_model.disable_adapter_layers(),
    lambda model: model.merge_adapter(),
    lambda model: model.delete_adapter("second"),
    lambda model: [layer.set_scale("default", 3.0) for layer in model.modules()
                   if hasattr(layer, "set_scale")],
], ids=["another", "disabled", "merged", "deleted", "scaled"])  # fmt: skip
def test_what_decides_what_adapters_do_has_a_part_in_the_name(change, tmp_path):
    model = adapted(tiny_model(), lora_alpha=2).eval()
    assert name_of(adapted(tiny_model(), lora_alpha=16).get_base_model()) != name_of(
        model.get_base_model()
    )
    state = model(IDS, use_cache=True).past_key_values
    state.save(tmp_path / "state")
    model(MORE, past_key_values=HAMTCache.load(tmp_path / "state"))
    change(model)
    with pytest.raises(ValueError, match=OTHER):
        model(MORE, past_key_values=HAMTCache.load(tmp_path / "state"))
    state.save(tmp_path / "state")
    assert HAMTCache.load(tmp_path / "state").origin is None, "another adapter has made it"


def test_a_model_without_values_has_no_name():
    model = tiny_model()
    model.model.layers[1].to("meta")
    with pytest.raises(ValueError, match="this model has no weights"):
        name_of(model)


@pytest.mark.parametrize("width", [8, 32, 64, 256])
def test_a_row_of_a_large_matrix_that_has_changed_is_noticed(width):
    model = tiny_model(vocab_size=WHOLE // width + 1, hidden_dim=width)
    weight, before = model.model.embed_tokens.weight, name_of(model)
    assert weight.numel() > WHOLE
    assert len({width >= EVERY, width >= 4 * EVERY}) == 1 + (EVERY <= width < 4 * EVERY)
    with torch.no_grad():
        for row in (*range(20), len(weight) - 1):
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
    for kept in (HAMTCache.fork, HAMTCache.detach, copy.copy, copy.deepcopy):
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


def test_a_loaded_state_is_compared_once_with_its_forks(tmp_path, monkeypatch):
    model, compared = tiny_model(), []
    saved(model, tmp_path / "state")
    monkeypatch.setattr(
        "hamt.identity.identity", lambda model: compared.append(1) or identity(model)
    )
    state = HAMTCache.load(tmp_path / "state")
    for _ in range(3):
        model.generate(MORE, past_key_values=state.fork(), max_new_tokens=5)
    assert len(compared) == 1
    with torch.no_grad():
        model.model.norm.weight += 1
    with pytest.raises(ValueError, match=OTHER):
        model.generate(MORE, past_key_values=state.fork(), max_new_tokens=5)


@pytest.mark.parametrize("how", ["fork", "pickle", "tensors"])
def test_a_state_whose_model_is_gone_is_refused(how):
    """Its name is told as long as the model is there."""
    model = tiny_model()
    state = model(IDS, use_cache=True).past_key_values
    named = {"pickle": lambda x: pickle.loads(pickle.dumps(x)),
             "tensors": lambda x: HAMTCache.from_tensors(x.to_tensors("int8"))}  # fmt: skip
    moved = named.get(how, HAMTCache.fork)(state)
    del model
    gc.collect()
    message = OTHER if how in named else GONE
    other = tiny_model(seed=1)
    with pytest.raises(ValueError, match=message):
        other(MORE, past_key_values=moved)
    with pytest.raises(ValueError, match=GONE):
        other(MORE, past_key_values=pickle.loads(pickle.dumps(state)))
    if how in named:
        tiny_model()(MORE, past_key_values=moved)


def test_a_file_does_not_name_weights_that_have_not_made_the_state(tmp_path, caplog):
    model = tiny_model()
    state = model(IDS, use_cache=True).past_key_values.detach()
    optimizer = torch.optim.SGD(model.parameters(), lr=1.0)
    model(IDS, labels=IDS).loss.backward()
    optimizer.step()
    with torch.no_grad():
        model(MORE, past_key_values=state)  # as when a state is carried while a model is trained
    state.save(tmp_path / "state")
    assert "does not name the model that made this state: it is gone, or" in caplog.text
    assert HAMTCache.load(tmp_path / "state").origin is None
    saved(model, tmp_path / "state")
    assert HAMTCache.load(tmp_path / "state").origin.known() == name_of(model)
    with pytest.raises(ValueError, match=GONE):
        copy.deepcopy(model)(MORE, past_key_values=state)


@pytest.mark.slow
def test_a_compiled_model_reads_on_from_a_file_and_refuses_the_state_of_another(tmp_path):
    model = tiny_model()
    compiled = torch.compile(model, backend="eager", fullgraph=True)
    saved(model, tmp_path / "state")
    state = HAMTCache.load(tmp_path / "state")
    with torch.no_grad():
        with pytest.raises(Exception, match=r"call state\.check_origin\(model\.model\)"):
            compiled(MORE, past_key_values=state.fork())
        state.check_origin(model.model)
        for length in (17, 22):
            compiled(MORE, past_key_values=state)
            assert state.get_seq_length() == length
        torch._dynamo.reset()
        compiled = torch.compile(model, backend="eager")
        compiled(MORE, past_key_values=HAMTCache.load(tmp_path / "state"))
        saved(tiny_model(seed=1), tmp_path / "state")
        with pytest.raises(ValueError, match=OTHER):
            compiled(MORE, past_key_values=HAMTCache.load(tmp_path / "state"))
    torch._dynamo.reset()


def test_a_state_that_was_only_loaded_is_saved_with_the_name_that_it_had(tmp_path):
    saved(tiny_model(), tmp_path / "state")
    HAMTCache.load(tmp_path / "state").save(tmp_path / "again", "int8")
    assert HAMTCache.load(tmp_path / "again").origin.known() == name_of(tiny_model())


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
    assert "state does not name the model that made this state: it is gone" in caplog.text
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
    loaded = HAMTCache.load(tmp_path / "state")
    assert loaded.fork().notes == loaded.notes
    loaded.fork().save(tmp_path / "again")
    assert HAMTCache.load(tmp_path / "again").notes == loaded.notes
    tiny_model()(IDS, past_key_values=loaded)
    assert loaded.notes == {}, "they were of what was before"
    loaded.save(tmp_path / "again")
    assert HAMTCache.load(tmp_path / "again").notes == {}
    loaded.notes = {"x": "y"}
    loaded.reset()
    assert loaded.notes == {}
    with safe_open(tmp_path / "state", "pt") as file:
        assert file.metadata()["format"] == "hamt-state-4"
    assert load_file(tmp_path / "state").keys() == state.to_tensors().keys()
