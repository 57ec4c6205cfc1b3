"""What others wrote is loaded whole or not at all, and never runs code or takes memory first."""

import io
import json
import shutil
import sys

import pytest
import torch
from model_inputs import tiny_config, tiny_model
from safetensors.torch import load_file, save_file
from transformers import (
    AutoModel,
    AutoModelForCausalLM,
    AutoModelForSequenceClassification,
    LlamaConfig,
    LlamaForCausalLM,
)

from hamt import HAMTForCausalLM, HAMTForSequenceClassification
from hamt.baselines.loading import load_any_model
from hamt.checkpoint import load_checkpoint, save_checkpoint, save_pt
from hamt.cli import main
from hamt.data.tokenizer import load_tokenizer
from hamt.errors import UserError

ITEM, CONV = "model.layers.1.mixer.item_proj.weight", "model.layers.0.mixer.conv.weight"
EMBEDDING = "model.embed_tokens.weight"


@pytest.fixture(scope="module")
def written(tmp_path_factory, tokenizer):
    """A checkpoint as a folder and as a .pt file, and a folder with a Llama."""
    folder = tmp_path_factory.mktemp("written")
    model = tiny_model(vocab_size=len(tokenizer))
    save_checkpoint(folder / "ours", model, tokenizer)
    save_pt(folder / "ours.pt", model, tokenizer)
    sizes = {"hidden_size": 32, "intermediate_size": 32, "num_hidden_layers": 2}
    heads = {"num_attention_heads": 2, "num_key_value_heads": 2, "vocab_size": len(tokenizer)}
    LlamaForCausalLM(LlamaConfig(**sizes, **heads)).save_pretrained(folder / "llama")
    tokenizer.save_pretrained(folder / "llama")
    return folder


@pytest.fixture
def copy(written, tmp_path):
    def copy(name="ours"):
        return shutil.copytree(written / name, tmp_path / name)

    return copy


def change_weights(folder, change):
    """``change`` the weights of a folder, a dictionary, in place."""
    file = folder / "model.safetensors"
    weights = load_file(file)
    change(weights)
    save_file(weights, file, {"format": "pt"})


def change_json(file, **changes):
    content = json.loads(file.read_text())
    file.write_text(json.dumps({**content, **changes}))


def renamed(weights):
    weights["model.layers.1.mixer.item.weight"] = weights.pop(ITEM)


# Of each the first name that is told.
NOT_WHOLE = {
    "a weight is missing": (lambda w: w.pop(ITEM), f"are missing: {ITEM}"),
    "a layer is missing": (
        lambda w: [w.pop(name) for name in list(w) if ".layers.1." in name],
        "has 2 layers, its weights are those of 1",
    ),
    "the embedding is missing": (lambda w: w.pop(EMBEDDING), f"are missing: {EMBEDDING}"),
    "nothing is there": (lambda w: w.clear(), "its weights are those of 0"),
    "one too many": (lambda w: w.update(more=torch.ones(1)), "belong to another model: more"),
    "another name": (renamed, "mixer.item.weight"),
    "more layers": (
        lambda w: w.update({"model.layers.2.mixer.item_proj.weight": torch.ones(1)}),
        "its weights are those of 3",
    ),
    "transposed": (
        lambda w: w.update({ITEM: w[ITEM].T.contiguous()}),
        f"have another shape: {ITEM} (32, 64) for (64, 32)",
    ),
    "shorter": (lambda w: w.update({CONV: w[CONV][1:]}), f"{CONV} (3, 32) for (4, 32)"),
    "flat": (lambda w: w.update({ITEM: w[ITEM].flatten()}), f"{ITEM} (2048,) for (64, 32)"),
    "NaN": (lambda w: w[ITEM][3].fill_(torch.nan), f"hold NaN or infinity: {ITEM}"),
    "infinity": (lambda w: w[CONV][0, 0].fill_(torch.inf), f"hold NaN or infinity: {CONV}"),
}


@pytest.mark.parametrize("fault", NOT_WHOLE)
def test_a_checkpoint_that_is_not_whole_is_refused_with_the_names(written, copy, tmp_path, fault):
    change, told = NOT_WHOLE[fault]
    folder, lone = copy(), tmp_path / "lone.pt"
    change_weights(folder, change)
    content = torch.load(written / "ours.pt", weights_only=True)
    content["state_dict"].pop("lm_head.weight")  # tied
    change(content["state_dict"])
    torch.save(content, lone)
    for path in (folder, lone):
        with pytest.raises(UserError, match="is not a whole checkpoint") as refused:
            load_checkpoint(path)
        assert told in str(refused.value)
        assert "\n" not in str(refused.value)


@pytest.mark.parametrize("value", [10**30, -1, 10**6, "2", 1.5, [1, 10**30], []])
@pytest.mark.parametrize("name", ["bos_token_id", "eos_token_id", "pad_token_id"])
def test_tokens_that_are_none_end_no_text(copy, name, value):
    folder = copy()
    change_json(folder / "generation_config.json", **{name: value})
    with pytest.raises(UserError, match="is not a whole checkpoint"):
        load_checkpoint(folder)


COMMANDS = (
    "generate Hello --checkpoint {}",
    "evaluate --checkpoint {} --data none --prompts Hello --output_dir {}/out",
    "compare --checkpoint {} --output_dir {}/out",
    "analyze --checkpoint {} --output_dir {}/out",
    "train --init_from {} --data sotu --output_dir {}/out",
)


@pytest.mark.parametrize("command", COMMANDS)
def test_every_command_refuses_it(copy, capsys, command):
    folder = copy()
    change_weights(folder, NOT_WHOLE["a weight is missing"][0])
    assert main(command.format(*[folder] * command.count("{}")).split()) == 2
    assert f"weights are missing: {ITEM}" in capsys.readouterr().err


FOREIGN = {
    "missing": (lambda w: w.pop("model.layers.1.mlp.up_proj.weight"), "are missing: model.layers"),
    "misshapen": (lambda w: w.update({"model.norm.weight": torch.ones(7)}), "norm.weight (7,) for"),
    "NaN": (lambda w: w["model.norm.weight"].fill_(torch.nan), "hold NaN or infinity"),
}


@pytest.mark.parametrize("fault", FOREIGN)
def test_so_is_a_foreign_model(copy, fault):
    change, told = FOREIGN[fault]
    folder = copy("llama")
    load_any_model(str(folder))
    change_weights(folder, change)
    with pytest.raises(UserError, match="no model") as refused:
        load_any_model(str(folder))
    assert told in str(refused.value)
    assert "\n" not in str(refused.value)


def test_weights_that_are_pickled_are_not_read(copy):
    folder = copy("llama")
    torch.save(load_file(folder / "model.safetensors"), folder / "pytorch_model.bin")
    (folder / "model.safetensors").unlink()
    with pytest.raises(UserError, match=r"model\.safetensors"):
        load_any_model(str(folder))


def test_in_python_what_is_missing_is_refused_unless_asked_for(copy):
    folder = copy()
    change_weights(folder, NOT_WHOLE["a weight is missing"][0])
    for kind in (AutoModelForCausalLM, AutoModel, AutoModelForSequenceClassification):
        with pytest.raises(ValueError, match="not a whole checkpoint") as refused:
            kind.from_pretrained(folder)
        assert "layers.1.mixer.item_proj.weight" in str(refused.value)
    model = HAMTForCausalLM.from_pretrained(folder, ignore_mismatched_sizes=True)
    assert model.model.layers[1].mixer.item_proj.weight.isfinite().all()
    _, report = HAMTForCausalLM.from_pretrained(folder, output_loading_info=True)
    assert set(report["missing_keys"]) == {ITEM}


@pytest.mark.parametrize("tied", [True, False])
def test_a_head_may_be_new_where_the_checkpoint_is_of_another_class(tmp_path, tied):
    HAMTForCausalLM(tiny_config(tie_word_embeddings=tied)).save_pretrained(tmp_path / "lm")
    classifier = HAMTForSequenceClassification.from_pretrained(tmp_path / "lm")
    AutoModel.from_pretrained(tmp_path / "lm")
    classifier.save_pretrained(tmp_path / "classifier")
    HAMTForCausalLM.from_pretrained(tmp_path / "classifier")
    change_weights(tmp_path / "classifier", lambda weights: weights.pop("score.weight"))
    with pytest.raises(ValueError, match=r"weights are missing: score\.weight"):
        HAMTForSequenceClassification.from_pretrained(tmp_path / "classifier")
    if not tied:
        change_weights(tmp_path / "lm", lambda weights: weights.pop("lm_head.weight"))
        with pytest.raises(ValueError, match=r"weights are missing: lm_head\.weight"):
            HAMTForCausalLM.from_pretrained(tmp_path / "lm")


SIZES = [
    {"num_layers": 10**9},
    {"num_hidden_layers": 10**9, "num_layers": None},
    {"num_layers": 3},
    {"hidden_dim": 2 * 10**9, "hcm_dim": 64},
    {"hcm_dim": 4 * 10**12},
    {"num_slots": 10**9},
    {"vocab_size": 10**12},
    {"intermediate_dim": 10**11},
    {"conv_kernel_size": 10**9},
    {"mixers": ["memory"] * 3, "num_layers": 3},
    {"num_heads": 1, "num_slots": 10**15},
    {"hidden_dim": 2**62, "hcm_dim": 64},
]


@pytest.mark.timeout(30)
@pytest.mark.parametrize("sizes", SIZES, ids=str)
def test_sizes_are_compared_with_the_weights_before_memory_is_taken(written, copy, tmp_path, sizes):
    folder, lone = copy(), tmp_path / "lone.pt"
    change_json(folder / "config.json", **sizes)
    content = torch.load(written / "ours.pt", weights_only=True)
    content["config"].update(sizes)
    torch.save(content, lone)
    for path in (folder, lone):
        with pytest.raises(UserError) as refused:
            load_checkpoint(path)
        assert "\n" not in str(refused.value)


CONFIGS = ["", "[]", "3", "{", "[" * 100_000, '{"model_type": 3}', '{"model_type": "hamt"}']


@pytest.mark.parametrize("content", [*CONFIGS, b"\xff\xfe", b"\0" * 9], ids=lambda x: str(x)[:9])
def test_a_configuration_that_is_none_ends_in_one_line(copy, content):
    folder = copy()
    content = content if isinstance(content, bytes) else content.encode()
    (folder / "config.json").write_bytes(content)
    for load in (load_checkpoint, lambda path: load_any_model(str(path))):
        with pytest.raises(UserError) as refused:
            load(folder)
        assert "\n" not in str(refused.value)


def test_weights_in_several_files_are_loaded_and_stay_in_their_folder(copy, tmp_path):
    folder = copy()
    whole = load_checkpoint(folder)[0]
    (folder / "model.safetensors").unlink()
    whole.save_pretrained(folder, max_shard_size="20KB")
    index = folder / "model.safetensors.index.json"
    assert index.is_file()
    for name, weight in load_checkpoint(folder)[0].state_dict().items():
        assert torch.equal(weight, whole.state_dict()[name])
    places = json.loads(index.read_text())["weight_map"]
    shutil.copy(folder / places[ITEM], tmp_path / places[ITEM])
    change_json(index, weight_map=places | {ITEM: f"../{places[ITEM]}"})
    with pytest.raises(UserError, match="is no file of this folder"):
        load_checkpoint(folder)


def test_a_tokenizer_with_more_tokens_than_the_model_is_refused(copy):
    folder = copy()
    tokenizer = load_tokenizer(str(folder))
    tokenizer.add_tokens(["<more>"])
    tokenizer.save_pretrained(folder)
    with pytest.raises(UserError, match="its tokenizer has a token"):
        load_checkpoint(folder)


EVIL = "import pathlib\npathlib.Path(r'{}').touch()\nclass Evil: pass\n"
NAMED = {
    "tokenizer_config.json": {"auto_map": {"AutoTokenizer": ["evil.Evil", "evil.Evil"]}},
    "config.json": {
        "auto_map": {
            "AutoConfig": "evil.Evil",
            "AutoModelForCausalLM": "evil.Evil",
            "AutoTokenizer": ["evil.Evil", None],
        }
    },
}


@pytest.fixture
def with_code(copy, tmp_path, monkeypatch):
    """Make a folder that asks to run code, which leaves a file behind, and answer every question.

    With yes, as ``yes | hamt generate`` would.
    """
    monkeypatch.setattr(sys, "stdin", io.StringIO("y\n" * 99))

    def make(name, file, **further):
        folder = copy(name)
        (folder / "evil.py").write_text(EVIL.format(tmp_path / "ran"))
        (folder / "tokenizer.json").unlink() if further.pop("alone", False) else None
        change_json(folder / file, **NAMED[file], **further)
        return folder

    return make


@pytest.mark.parametrize("file", NAMED)
@pytest.mark.parametrize("name", ["ours", "llama"])
@pytest.mark.parametrize(
    "further", [{}, {"tokenizer_class": "Evil"}, {"model_type": "evil"}, {"alone": True}], ids=str
)
def test_code_beside_a_checkpoint_never_runs(with_code, tmp_path, name, file, further, capsys):
    folder = with_code(name, file, **further)
    for load in (load_any_model, load_tokenizer, load_checkpoint):
        try:
            load(str(folder))
        except UserError as error:
            assert "\n" not in str(error)  # noqa: PT017
    assert not (tmp_path / "ran").exists()
    assert "[y/N]" not in capsys.readouterr().out


@pytest.mark.parametrize("command", COMMANDS[:-1])
def test_no_command_asks_whether_to_run_it(with_code, tmp_path, command, capsys):
    """Where it can only be refused: a kind of tokenizer that nobody knows."""
    folder = with_code("ours", "tokenizer_config.json", tokenizer_class="Evil", alone=True)
    assert main(command.format(*[folder] * command.count("{}")).split()) == 2
    assert not (tmp_path / "ran").exists()
    assert len(capsys.readouterr().err.splitlines()) == 1
