"""hamt ablate: recipes resolve to what they say, what is missing runs once, all is tabulated."""

import json
import math
import os
import signal
from pathlib import Path

import pytest
import torch
import yaml
from command_inputs import fails, read_json, words

from hamt.checkpoint import PRETRAINED
from hamt.cli import main
from hamt.data.tokenizer import load_tokenizer, train_tokenizer
from hamt.environment import environment
from hamt.files import write_json
from hamt.measure.ablate.command import AblateOptions, plan
from hamt.measure.ablate.recipe import DEFAULT, load_recipe, names, resolve
from hamt.measure.ablate.report import figure, page
from hamt.measure.ablate.runs import AblationRun, make_model
from hamt.measure.sweep import Sweep, contents
from hamt.training.loop import Trainer

ROOT = Path(__file__).parents[3]
STUDIES = ("ablation", "state_tracking", "wikitext2")
RECIPES = {name: load_recipe(ROOT / "studies" / f"{name}.yaml") for name in STUDIES}
RECIPES["default"] = load_recipe(DEFAULT)
for name in ("positions", "auxiliary"):
    RECIPES[name] = load_recipe(ROOT / "studies" / f"{name}.yaml")
NAMES = [(name, *pair) for name, recipe in RECIPES.items() for pair in names(recipe)]
VOCAB_SIZES = {"wikitext2": 50257, "default": 2048}

TINY = """
tasks:
  text:
    kind: characters
    parameters: 12000
    config: {hidden_dim: 32, num_layers: 1, num_slots: 2, num_heads: 2}
    training: {length: 16, batch_size: 2, num_steps: 2, learning_rate: 0.01}
  recall:
    kind: recall
    config: {hidden_dim: 32, num_layers: 1, num_slots: 2, num_heads: 2}
    task: {length: 12, vocab_size: 12, num_kv_pairs: 2}
    training: {batch_size: 2, num_steps: 2, learning_rate: 0.01, eval_interval: 1}
  parity:
    kind: counting
    config: {hidden_dim: 32, num_layers: 1, num_slots: 2, num_heads: 2}
    task: {modulus: 2, length: 8, test_length: 20}
    training: {batch_size: 2, num_steps: 2, learning_rate: 0.01, lengths: [2, 8]}
  prose:
    kind: text
    config: {hidden_dim: 32, num_layers: 1, num_slots: 2, num_heads: 2}
    task: {text: a.txt, held_out: b.txt, tokenizer: tokenizer}
    training:
      {length: 16, batch_size: 2, epochs: 0.5, every: 1, learning_rate: 0.01, mixed_precision: bf16}
variants:
  base: {}
  slots-3: {num_slots: 3, text: {num_slots: 4}}
  same: {tasks: [text], num_slots: 2, conv_kernel_size: 4}
  transformer: {rival: {}, learning_rate: 0.02}
"""


@pytest.fixture
def recipe(tmp_path, monkeypatch):
    """A tiny recipe, with the texts that it names."""
    (tmp_path / "tinyshakespeare").mkdir()
    for name in ("tinyshakespeare/input.txt", "a.txt", "b.txt"):
        (tmp_path / name).write_text("abcdefgh " * 60, encoding="utf-8")
    train_tokenizer(["abcdefgh "], 260).save_pretrained(tmp_path / "tokenizer")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    (tmp_path / "tiny.yaml").write_text(TINY, encoding="utf-8")
    return tmp_path / "tiny.yaml"


@pytest.mark.parametrize(("name", "task", "variant"), NAMES)
def test_every_run_of_the_recipes_can_be_built_with_the_parameters_it_names(name, task, variant):
    spec = resolve(RECIPES[name], task, variant)
    with torch.device("meta"):
        model = make_model({**spec, "common_direction": 0.0}, VOCAB_SIZES.get(name, 65))
    if (spec["rival"] or {}).get("kind"):
        assert abs(model.num_parameters() / spec["parameters"] - 1) < 0.015
    elif spec["parameters"] and model.config.intermediate_dim > 1:  # else the mixer alone is larger
        unit = 3 * model.config.hidden_dim * model.config.num_layers
        unit *= 8 if model.config.hidden_dim >= 256 else 1
        assert abs(model.num_parameters() - spec["parameters"]) <= unit


@pytest.mark.parametrize("name", STUDIES)
def test_the_runs_behind_the_results_are_found_and_are_built_as_they_were(name):
    """All files of docs/results, whatever fields configurations have gained since."""
    recipe, folder = RECIPES[name], ROOT / "docs" / "results" / name
    files = contents(folder)
    seeds = sorted({content["seed"] for content in files})
    sweep = Sweep(plan(AblateOptions(seeds=seeds), recipe), folder)
    found = {(run.task, run.seed, repr(run.spec)): content for run, content in sweep.results}
    assert len(found) == len(files) == {"ablation": 65, "state_tracking": 26, "wikitext2": 31}[name]
    assert not set(map(str, found.values())) - set(map(str, files))
    specs = {(run.task, repr(run.spec)): (run, content) for run, content in sweep.results}
    for run, content in specs.values():
        sizes = {"shakespeare": 65, "mqar": 128, "parity": 2, "modulo-3": 3, "modulo-5": 5}
        with torch.device("meta"):
            model = make_model(run.spec, sizes.get(run.task, 50257))
        assert model.num_parameters() == content["num_parameters"], run.name


def test_a_variant_changes_what_it_names_for_the_task_it_names():
    recipe = yaml.safe_load(TINY)
    base, changed = (resolve(recipe, "text", variant) for variant in ("base", "slots-3"))
    assert changed["config"] == {**base["config"], "num_slots": 4}
    assert resolve(recipe, "recall", "slots-3")["config"]["num_slots"] == 3
    assert resolve(recipe, "text", "same")["config"] == base["config"]
    assert ("text", "same") in names(recipe)
    assert ("recall", "same") not in names(recipe)
    rival = resolve(recipe, "text", "transformer")
    assert rival["rival"] == {}
    assert rival["training"] == {**base["training"], "learning_rate": 0.02}
    assert rival["config"] == base["config"]


def test_without_keys_nothing_is_bound():
    spec = resolve(RECIPES["ablation"], "mqar", "unbound")
    mixer = make_model(spec, 20).model.layers[0].mixer
    conditioned = torch.randn(2, 3, spec["config"]["hidden_dim"])
    keys, _ = mixer.retrieval(conditioned)
    assert keys.shape == (2, 3, 4, mixer.memory.key_size)
    assert not keys.any()
    assert not mixer.key_proj(conditioned).any()
    assert mixer.rotation is None


def test_a_common_direction_makes_the_writes_of_the_delta_rule_alike():
    spec = resolve(RECIPES["ablation"], "mqar", "delta")
    alike = resolve(RECIPES["ablation"], "mqar", "delta-common-direction")
    conditioned = torch.randn(1, 200, spec["config"]["hidden_dim"])
    cosines = []
    for options in (spec, alike):
        torch.manual_seed(0)
        gating = make_model(options, 20).model.layers[0].mixer.gating
        write = gating(conditioned).write
        cosines.append((write[0, 0] * write[0, 1:]).sum(-1).mean().item())
    assert abs(cosines[0]) < 0.1
    assert cosines[1] > 0.7


@pytest.mark.slow
def test_a_sweep_runs_what_is_missing_and_tabulates_it(recipe, tmp_path, capsys):
    results = tmp_path / "results"
    options = words(recipe=recipe, output_dir=results, data=tmp_path)

    def command(*more: str) -> str:
        assert main(["ablate", *options, *more]) == 0
        return capsys.readouterr().out

    def here(task: str, variant: str) -> None:  # a process for each takes as long as all the rest
        options = AblateOptions(tasks=[task], variants=[variant], data=str(tmp_path))
        (run,) = plan(options, load_recipe(recipe))
        write_json(results / f"{run.name}.json", run.perform())

    here("text", "slots-3")
    here("recall", "base")
    here("parity", "base")
    here("text", "transformer")
    assert "1 of 1 runs are there" in command("--variants", "slots-3", "--tasks", "text")
    shown = command("--variants", "same", "--tasks", "text")
    assert "0 of 1 runs are there\ntext-same-0: " in shown
    shown = command("--variants", "base", "same", "--tasks", "text", "recall")
    assert "3 of 3 runs are there" in shown  # `same` is what the base is, by another name
    for task in ("text", "recall", "parity"):
        (file, *_) = results.glob(f"{task}-*.json")
        measured = read_json(file)["fidelity"]
        assert 0 < measured["cosine"] < 1
        assert measured["mse"] > 0
        assert 0 <= measured["accuracy"] <= 1
    assert read_json(results / "text-transformer-0.json")["fidelity"] is None
    found = read_json(results / "text-slots-3-0.json")
    assert found["state_floats"] == 4 * 64 + 3 * 32
    assert found["tokens"] == 2 * 2 * 16
    assert found["figure"] > 0
    (file,) = results.glob("text-same-0.json")
    assert read_json(file)["environment"]["threads"] == 1
    command("--table", str(tmp_path / "table.md"))
    lines = (tmp_path / "table.md").read_text(encoding="utf-8").splitlines()
    assert (tmp_path / "table.png").read_bytes()[:4] == b"\x89PNG"
    assert lines[0].startswith("5 runs: ")
    assert f"; {found['environment']['date'][:10]}, load " in lines[0]
    assert "last inputs of short convolutions" in lines[2]
    assert "transformer: RoPE transformer of HAMT's parts, without HAMT's short" in lines[2]
    lines = lines[4:]
    variants = [line.split("|")[1].strip() for line in lines[2:]]
    assert variants == ["base", "slots-3", "same", "transformer"]
    assert f"{found['figure']:.3f} | 1 | {found['num_parameters']:,} | 352" in lines[3]
    assert len({line.count("|") for line in lines}) == 1
    here("prose", "base")
    command("--tasks", "prose", "--table", str(tmp_path / "prose.md"))
    prose = read_json(results / "prose-base-0.json")
    assert prose["tokens"] == 6 * 2 * 16  # half of the 12 steps of an epoch
    (line,) = (tmp_path / "prose.md").read_text(encoding="utf-8").splitlines()[4:]
    perplexity, bits = f"{math.exp(prose['figure']):.1f}", f"{prose['bits_per_byte']:.3f}"
    assert f"{prose['figure']:.3f} | {perplexity} | 1 | {bits} | 0.01 | 192 |" in line
    (tmp_path / "a.txt").unlink()
    assert "no a.txt in" in fails(["ablate", *options, "--tasks", "prose"], capsys)


def result(recipe: dict, seed: int, measured: float | None) -> dict:
    """What a run of the base on the text has left."""
    where = {"commit": f"{seed % 2}" * 40, "date": f"2026-11-2{seed % 2}"}
    where = {**environment(), **where, "load_average": [seed, 0, 0]}
    run = {"task": "text", "variant": "base", "seed": seed, "figure": measured}
    spec = resolve(recipe, "text", "base")
    return {**run, "num_parameters": 1234, "spec": spec, "environment": where}


def write_results(folder: Path, recipe: dict, figures: dict[int, float | None]) -> None:
    """Files of runs of the base, by seed."""
    for seed, measured in figures.items():
        entry = json.dumps(result(recipe, seed, measured))
        (folder / f"text-base-{seed}.json").write_text(entry, encoding="utf-8")


def tabulated(recipe: dict, folder: Path, tasks: tuple[str, ...] = ()) -> tuple[Sweep, str]:
    """What is found in a folder, and the page with it."""
    sweep = Sweep(plan(AblateOptions(tasks=list(tasks), seeds=[0, 1, 2]), recipe), folder)
    kinds = {task: recipe["tasks"][task]["kind"] for task in tasks or recipe["tasks"]}
    return sweep, page(sweep.results, kinds)


def test_the_table_gives_mean_and_standard_error_over_seeds(tmp_path):
    recipe = {**yaml.safe_load(TINY), "data": None}
    write_results(tmp_path, recipe, {0: 1.0, 1: 2.0, 2: 4.0})
    sweep, text = tabulated(recipe, tmp_path)
    assert "| base | 2.333 ± 0.882 | 3 | 1,234 | 224 |" in text
    first = text.splitlines()[0]  # `same` is the base by another name, counted once
    assert first.startswith("3 runs: ")
    assert f"({'0' * 12}, {'1' * 12})" in first
    assert first.endswith("; 2026-11-20, 2026-11-21, load 0.0 to 2.0.")
    (axes,) = figure(sweep.results, {"text": "characters"}).axes
    assert [label.get_text() for label in axes.get_yticklabels()] == ["base", "same"]
    (points, _, (bars,)) = axes.containers[0]
    assert points.get_xdata().tolist() == [pytest.approx(7 / 3)] * 2
    assert bars.get_segments()[0][:, 0] == pytest.approx([7 / 3 - 0.882, 7 / 3 + 0.882], abs=1e-3)
    assert tabulated(recipe, tmp_path, ("recall",))[1].startswith("No runs yet.")
    recipe["tasks"]["text"]["training"]["num_steps"] = 3  # then they are results of something else
    assert "base" not in tabulated(recipe, tmp_path)[1]


def test_fidelity_is_tabulated_where_an_auxiliary_loss_trains_a_variant(tmp_path):
    recipe = {**yaml.safe_load(TINY), "data": None}
    for seed, cosine in ((0, 0.2), (1, 0.4)):
        entry = result(recipe, seed, 1.0)
        entry["fidelity"] = {"cosine": cosine, "mse": 2.0, "accuracy": 0.5}
        (tmp_path / f"text-base-{seed}.json").write_text(json.dumps(entry), encoding="utf-8")
    assert "right item" not in tabulated(recipe, tmp_path)[1]
    recipe["variants"]["taught"] = {"tasks": ["text"], "use_auxiliary_loss": True}
    entry = result(recipe, 0, 2.0)  # of a run that was measured before there was fidelity
    entry["spec"] = resolve(recipe, "text", "taught")
    (tmp_path / "text-taught-0.json").write_text(json.dumps(entry), encoding="utf-8")
    text = tabulated(recipe, tmp_path)[1]
    cells = [line.split("|") for line in text.splitlines() if line.startswith("|")]
    shown = {row[1].strip(): [cell.strip() for cell in row[6:9]] for row in cells}
    assert shown["variant"] == ["cosine", "MSE", "right item"]
    spread = ["0.300 ± 0.100", "2.000 ± 0.000", "0.500 ± 0.000"]
    assert shown["base"] == spread
    assert shown["taught"] == ["–", "–", "–"]
    assert "what memories give back of held-out items" in text
    assert "right item" not in tabulated(recipe, tmp_path, ("recall",))[1]


def test_a_run_that_diverges_has_no_figure_and_costs_no_other(recipe, tmp_path):
    spec = resolve(load_recipe(recipe), "text", "base")
    spec["training"]["learning_rate"] = 1e30
    found = AblationRun("text", "base", 0, "characters", spec, tmp_path).perform()
    assert found["figure"] is None
    assert found["diverged"]
    content = {**yaml.safe_load(TINY), "data": None}
    write_results(tmp_path, content, {0: None, 1: 2.0})
    assert "| base | 2.000 | 1 (1 diverged) | 1,234 | 224 |" in tabulated(content, tmp_path)[1]


def test_a_text_alone_is_read_with_the_tokenizer_of_the_model_in_hamt(recipe, tmp_path):
    spec = {**resolve(load_recipe(recipe), "prose", "base"), "task": {"text": "a.txt"}}
    found = AblationRun("prose", "base", 0, "text", spec, tmp_path).perform()
    assert found["figure"] > 0
    embedding = found["num_parameters"] - found["non_embedding_parameters"]
    assert embedding == 32 * len(load_tokenizer(str(PRETRAINED)))


@pytest.mark.parametrize("task", ["text", "recall", "prose"])
def test_a_run_that_is_interrupted_has_no_figure(task, recipe, tmp_path, monkeypatch):
    step = Trainer._step

    def interrupted(trainer, *arguments):  # Ctrl-C during the first step
        os.kill(os.getpid(), signal.SIGINT)
        step(trainer, *arguments)

    monkeypatch.setattr(Trainer, "_step", interrupted)
    content = load_recipe(recipe)
    kind, spec = content["tasks"][task]["kind"], resolve(content, task, "base")
    with pytest.raises(KeyboardInterrupt):
        AblationRun(task, "base", 0, kind, spec, tmp_path).perform()


def test_the_file_of_a_run_of_another_recipe_is_not_overwritten(recipe, tmp_path, capsys):
    (tmp_path / "out").mkdir()
    entry = result({**yaml.safe_load(TINY), "data": None}, 0, 1.0)
    entry["spec"]["training"]["num_steps"] = 3
    file = tmp_path / "out" / "text-base-0.json"
    file.write_text(json.dumps(entry), encoding="utf-8")
    options = words(recipe=recipe, data=tmp_path, tasks="text", output_dir=tmp_path / "out")
    assert main(["ablate", *options]) == 2
    assert (
        "of a run with other settings (spec): move it away, or choose another"
        in capsys.readouterr().err
    )
    assert read_json(file) == entry
