"""hamt ablate: options and recipes that cannot be are refused in one line."""

import pytest
from command_inputs import fails, words

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
