"""The recipes of the ablations resolve to what they say, and a sweep runs what is missing, once."""

import json
import math
import os
import signal
import sys
from pathlib import Path

import pytest
import torch
import yaml

STUDIES = Path(__file__).resolve().parents[2] / "studies"
sys.path.insert(0, str(STUDIES))

import ablate  # noqa: E402
import runs  # noqa: E402

from hamt.data.tokenizer import train_tokenizer  # noqa: E402
from hamt.environment import environment  # noqa: E402
from hamt.training.loop import Trainer  # noqa: E402

RECIPES = {
    name: yaml.safe_load((STUDIES / f"{name}.yaml").read_text(encoding="utf-8"))
    for name in ("ablation", "state_tracking", "wikitext2")
}
NAMES = [
    (name, task, variant)
    for name, recipe in RECIPES.items()
    for task, variant in runs.names(recipe)
]

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


@pytest.mark.parametrize(("name", "task", "variant"), NAMES)
def test_every_run_of_the_recipes_can_be_built_with_the_parameters_it_names(name, task, variant):
    spec = runs.resolve(RECIPES[name], task, variant)
    with torch.device("meta"):
        model = runs.build({**spec, "common_direction": 0.0}, 50257 if name == "wikitext2" else 65)
    if (spec["rival"] or {}).get("kind"):
        assert abs(model.num_parameters() / spec["parameters"] - 1) < 0.015
    elif spec["parameters"] and model.config.intermediate_dim > 1:  # else the mixer alone is larger
        unit = 3 * model.config.hidden_dim * model.config.num_layers
        unit *= 8 if model.config.hidden_dim >= 256 else 1
        assert abs(model.num_parameters() - spec["parameters"]) <= unit


def test_a_variant_changes_what_it_names_for_the_task_it_names():
    recipe = yaml.safe_load(TINY)
    base, changed = (runs.resolve(recipe, "text", variant) for variant in ("base", "slots-3"))
    assert changed["config"] == {**base["config"], "num_slots": 4}
    assert runs.resolve(recipe, "recall", "slots-3")["config"]["num_slots"] == 3
    assert runs.resolve(recipe, "text", "same")["config"] == base["config"]
    assert ("text", "same") in runs.names(recipe)
    assert ("recall", "same") not in runs.names(recipe)
    rival = runs.resolve(recipe, "text", "transformer")
    assert rival["rival"] == {}
    assert rival["training"] == {**base["training"], "learning_rate": 0.02}
    assert rival["config"] == base["config"]


def test_without_keys_nothing_is_bound():
    spec = runs.resolve(RECIPES["ablation"], "mqar", "unbound")
    mixer = runs.build(spec, 20).model.layers[0].mixer
    conditioned = torch.randn(2, 3, spec["config"]["hidden_dim"])
    keys, _ = mixer.retrieval(conditioned)
    assert keys.shape == (2, 3, 4, mixer.memory.key_size)
    assert not keys.any()
    assert not mixer.key_proj(conditioned).any()
    assert mixer.rotation is None


def test_a_common_direction_makes_the_writes_of_the_delta_rule_alike():
    spec = runs.resolve(RECIPES["ablation"], "mqar", "delta")
    alike = runs.resolve(RECIPES["ablation"], "mqar", "delta-common-direction")
    conditioned = torch.randn(1, 200, spec["config"]["hidden_dim"])
    cosines = []
    for options in (spec, alike):
        torch.manual_seed(0)
        gating = runs.build(options, 20).model.layers[0].mixer.gating
        _, write, _ = gating(conditioned)
        cosines.append((write[0, 0] * write[0, 1:]).sum(-1).mean().item())
    assert abs(cosines[0]) < 0.1
    assert cosines[1] > 0.7


def test_a_sweep_runs_what_is_missing_and_tabulates_it(tmp_path, monkeypatch, capfd):
    recipe = tmp_path / "tiny.yaml"
    (tmp_path / "tinyshakespeare").mkdir()
    for name in ("tinyshakespeare/input.txt", "a.txt", "b.txt"):
        (tmp_path / name).write_text("abcdefgh " * 60, encoding="utf-8")
    train_tokenizer(["abcdefgh "], 260).save_pretrained(tmp_path / "tokenizer")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    recipe.write_text(TINY, encoding="utf-8")
    results = tmp_path / "results"
    options = ["--recipe", str(recipe), "--results", str(results), "--data", str(tmp_path)]

    def command(*more: str) -> None:
        monkeypatch.setattr(sys, "argv", ["ablate.py", *options, *more])
        ablate.main()

    command("--run", "text/slots-3/0")
    command("--run", "recall/base/0")
    command("--run", "parity/base/0")
    command("--run", "text/transformer/0")
    command("--only", "slots-3", "--tasks", "text")
    assert "1 of 1 runs are there" in capfd.readouterr().out
    command("--run", "text/same/0")  # what the base is, by another name
    command("--only", "base", "same", "--tasks", "text", "recall")
    assert "3 of 3 runs are there" in capfd.readouterr().out
    found = json.loads((results / "text-slots-3-0.json").read_text(encoding="utf-8"))
    assert found["state_floats"] == 4 * 64
    assert found["tokens"] == 2 * 2 * 16
    assert found["figure"] > 0
    command("--table", str(tmp_path / "table.md"))
    lines = (tmp_path / "table.md").read_text(encoding="utf-8").splitlines()
    assert lines[0].startswith("5 runs: ")
    assert f"; {found['environment']['date'][:10]}, load " in lines[0]
    lines = lines[2:]
    assert [line.split("|")[1].strip() for line in lines[2:]] == [
        "base",
        "slots-3",
        "same",
        "transformer",
    ]
    assert f"{found['figure']:.3f} | 1 | {found['num_parameters']:,} | 256" in lines[3]
    assert len({line.count("|") for line in lines}) == 1
    command("--run", "prose/base/0")
    command("--tasks", "prose", "--table", str(tmp_path / "prose.md"))
    prose = json.loads((results / "prose-base-0.json").read_text(encoding="utf-8"))
    assert prose["tokens"] == 6 * 2 * 16  # half of the 12 steps of an epoch
    (line,) = (tmp_path / "prose.md").read_text(encoding="utf-8").splitlines()[4:]
    perplexity = f"{math.exp(prose['figure']):.1f}"
    assert (
        f"{prose['figure']:.3f} | {perplexity} | 1 | {prose['bits_per_byte']:.3f} | 0.01 | 192 |"
        in line
    )
    (tmp_path / "a.txt").unlink()
    with pytest.raises(SystemExit):
        command("--tasks", "prose")
    assert "no a.txt in" in capfd.readouterr().err


def test_the_table_gives_mean_and_standard_error_over_seeds(tmp_path):
    recipe = yaml.safe_load(TINY)
    for seed, figure in enumerate((1.0, 2.0, 4.0)):
        entry = {"task": "text", "variant": "base", "seed": seed, "figure": figure}
        entry |= {
            "num_parameters": 1234,
            "state_floats": None,
            "spec": runs.resolve(recipe, "text", "base"),
        }
        where = {
            "commit": f"{seed % 2}" * 40,
            "date": f"2026-11-2{seed % 2}",
            "load_average": [seed, 0, 0],
        }
        entry["environment"] = {**environment(), **where}
        (tmp_path / f"text-base-{seed}.json").write_text(json.dumps(entry), encoding="utf-8")
    assert "| base | 2.333 ± 0.882 | 3 | 1,234 | – |" in ablate.table(tmp_path, recipe)
    first = ablate.table(tmp_path, recipe).splitlines()[
        0
    ]  # `same` is the base by another name, counted once
    assert first.startswith("3 runs: ")
    assert f"({'0' * 12}, {'1' * 12})" in first
    assert first.endswith("; 2026-11-20, 2026-11-21, load 0.0 to 2.0.")
    assert ablate.table(tmp_path, recipe, ["recall"]).startswith("No runs yet.")
    recipe["tasks"]["text"]["training"]["num_steps"] = 3  # then they are results of something else
    assert "base" not in ablate.table(tmp_path, recipe)


@pytest.mark.parametrize("task", ["text", "recall", "prose"])
def test_a_run_that_is_interrupted_has_no_figure(task, tmp_path, monkeypatch):
    (tmp_path / "tinyshakespeare").mkdir()
    for name in ("tinyshakespeare/input.txt", "a.txt", "b.txt"):
        (tmp_path / name).write_text("abcdefgh " * 60, encoding="utf-8")
    train_tokenizer(["abcdefgh "], 260).save_pretrained(tmp_path / "tokenizer")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    step = Trainer._step

    def interrupted(trainer, *arguments):  # Ctrl-C during the first step
        os.kill(os.getpid(), signal.SIGINT)
        step(trainer, *arguments)

    monkeypatch.setattr(Trainer, "_step", interrupted)
    with pytest.raises(KeyboardInterrupt):
        runs.run(yaml.safe_load(TINY), f"{task}/base/0", tmp_path)


def test_unknown_variants_and_tasks_are_refused(monkeypatch, capsys):
    for options in (["--only", "nothing"], ["--tasks", "nothing"]):
        monkeypatch.setattr(sys, "argv", ["ablate.py", *options])
        with pytest.raises(SystemExit):
            ablate.main()
        assert "nothing; there are" in capsys.readouterr().err
