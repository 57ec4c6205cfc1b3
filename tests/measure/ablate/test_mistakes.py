"""hamt ablate: options and recipes that cannot be are refused in one line."""

import pytest
from command_inputs import fails, words

from hamt.cli import main

WRONG = [
    (["--variants", "nothing"], "nothing; there are"),
    (["--tasks", "nothing"], "nothing; there are"),
    (["--recipe", "nowhere.yaml"], "no recipe nowhere.yaml"),
    (["--recipe", __file__], "is not YAML"),
    (["--workers", "0"], "--workers must be at least 1"),
    (["--seeds", "-1"], "--seeds must lie in [0"),
    (["--table", "table.txt"], "a .md file; got table.txt"),
    (["--output_dir", f"{__file__}/below", "--tasks", "recall"], "choose another --output_dir"),
]


RECALL = "kind: recall, training: {batch_size: 2, num_steps: 2, learning_rate: 0.01}"
NO_RECIPES = [
    ("a: " + "[" * 3000, "nested too deeply"),
    ("[1, 2]", "must have `tasks:` and `variants:`"),
    ("tasks: {a: 3}\nvariants: {b: {}}", "a (in "),
    ("tasks: {a: {kind: chess}}\nvariants: {b: {}}", "must be one of characters"),
    ("tasks: {a: {kind: recall}}\nvariants: {b:}", "give batch_size, num_steps, learning_rate"),
    ("tasks: {a: {kind: recall, training: 3}}\nvariants: {b:}", "training of a (in "),
    ("tasks: {a: {kind: recall, task: 3}}\nvariants: {b:}", "task of a (in "),
    (f"tasks: {{a: {{{RECALL}, task: {{long: 3}}}}}}\nvariants: {{b:}}", "no option long"),
    (f"tasks: {{a: {{{RECALL}}}}}\nvariants: {{b: 3}}", "b (in "),
    (f"tasks: {{a: {{{RECALL}}}}}\nvariants: {{b: {{rival: 3}}}}", "rival of b"),
    (f"tasks: {{a: {{{RECALL}}}}}\nvariants: {{b: {{length: 3}}}}", "no option length"),
    (f"tasks: {{a: {{{RECALL}}}}}\nvariants: {{b: {{mixed_precision: bf16}}}}", "no option mixed"),
    (
        f"tasks: {{a: {{{RECALL}}}}}\nvariants: {{b: {{rival: {{kind: mamba2, foo: 3}}}}}}",
        "a mamba2 has no foo",
    ),
    (
        f"tasks: {{a: {{{RECALL}}}}}\nvariants: {{b: {{rival: {{no_such_field: 3}}}}}}",
        "a transformer has no no_such_field",
    ),
    (
        "tasks: {a: {kind: text, training: {length: 2}}}\nvariants: {b:}",
        "give batch_size, every, learning_rate, num_steps, text",
    ),
]


@pytest.mark.parametrize(("text", "message"), NO_RECIPES)
def test_what_is_no_recipe_is_told_in_one_line(text, message, tmp_path, capsys):
    (tmp_path / "mine.yaml").write_text(text, encoding="utf-8")
    assert message in fails(["ablate", "--recipe", str(tmp_path / "mine.yaml")], capsys)


@pytest.mark.parametrize(("options", "message"), WRONG)
def test_mistakes_end_in_one_line(options, message, capsys):
    assert message in fails(["ablate", *options], capsys)


@pytest.mark.parametrize(("changed", "message"), [
    (("base: {}", "base: {num_slot: 3}"), "there is no option num_slot"),
    (("base: {}", "base: {num_heads: 7}"), "multiple of 2 * num_heads"),
    (("base: {}", "base: {rival: {kind: rnn}}"), "no architecture rnn"),
    (("base: {}", "base: {rival: {kind: mamba2}}"), "needs `parameters`"),
    (("variants: {base: {}}", ""), "must have `tasks:` and `variants:`"),
    (("kind: characters", "kind: nothing"), "the kind of text must be one of characters"),
    (("", ""), "name the folder it is in with --data"),
])  # fmt: skip
def test_recipes_that_cannot_be_are_refused(changed, message, tmp_path, capsys):
    text = """
tasks:
  text:
    kind: characters
    config: {hidden_dim: 32}
    training: {length: 16, batch_size: 2, num_steps: 2, learning_rate: 0.01}
variants: {base: {}}
"""
    (tmp_path / "recipe.yaml").write_text(text.replace(*changed), encoding="utf-8")
    options = words(recipe=tmp_path / "recipe.yaml", output_dir=tmp_path / "out")
    assert message in fails(["ablate", *options], capsys)


def test_a_variant_that_cannot_be_is_refused_before_another_is_run(tmp_path, capsys):
    """The table at the end has all variants of which there are results."""
    text = f"tasks: {{a: {{{RECALL}}}}}\nvariants: {{b: {{}}, later: {{num_slotz: 4}}}}"
    (tmp_path / "mine.yaml").write_text(text, encoding="utf-8")
    options = words(recipe=tmp_path / "mine.yaml", output_dir=tmp_path / "out", variants="b")
    assert "no option num_slotz" in fails(["ablate", *options], capsys)
    assert not (tmp_path / "out").exists()


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["llama", "mamba2", "gpt2", "gated-deltanet"])
def test_rivals_of_all_kinds_learn_a_task(kind, tmp_path):
    rival = f"rival: {{kind: {kind}}}, parameters: 20000"
    config = "config: {hidden_dim: 16, num_layers: 1}"
    text = f"tasks: {{a: {{{RECALL}, {config}, task: {{length: 32, num_kv_pairs: 2}}}}}}\n"
    (tmp_path / "mine.yaml").write_text(f"{text}variants: {{b: {{{rival}}}}}", encoding="utf-8")
    options = words(recipe=tmp_path / "mine.yaml", output_dir=tmp_path / "out")
    assert main(["ablate", *options]) == 0


@pytest.mark.slow
def test_a_figure_of_another_text_is_not_taken_over(tmp_path, capsys):
    sizes = "length: 8, batch_size: 2, every: 1, num_steps: 1, learning_rate: 0.01"
    task = f"kind: text, training: {{{sizes}}}, task: {{text: a.txt}}"
    config = "config: {hidden_dim: 16, num_layers: 1}"
    recipe = f"data: .\ntasks: {{a: {{{task}, {config}}}}}\nvariants: {{b: {{}}}}"
    (tmp_path / "mine.yaml").write_text(recipe, encoding="utf-8")
    options = words(recipe=tmp_path / "mine.yaml", output_dir=tmp_path / "out")
    (tmp_path / "a.txt").write_text("one text " * 200, encoding="utf-8")
    assert main(["ablate", *options]) == 0
    assert main(["ablate", *options]) == 0
    (tmp_path / "a.txt").write_text("another text " * 200, encoding="utf-8")
    capsys.readouterr()
    assert "is of another a.txt than there is now" in fails(["ablate", *options], capsys)
