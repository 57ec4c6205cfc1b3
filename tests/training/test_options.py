"""Options of training: the fields of the configuration, recipes and texts as the first argument."""

import inspect
from dataclasses import dataclass

import pytest
from command_inputs import fails, words
from training_inputs import info_of

from hamt.cli import main
from hamt.config import HAMTConfig
from hamt.errors import UserError
from hamt.options import check, option, parse
from hamt.recipes import FOLDER
from hamt.training import options as training_options
from hamt.training.command import recipe_or_text
from hamt.training.options import TrainOptions
from hamt.training.plan import make_plan
from hamt.training.quick_train import QuickTrainOptions

GIVEN = "vocab_size max_position_embeddings use_cache bos_token_id eos_token_id pad_token_id"
DECIDED = set(GIVEN.split())  # by the tokenizer, the text or Transformers


@pytest.mark.parametrize("options", [TrainOptions, QuickTrainOptions])
def test_every_field_of_the_configuration_is_an_option(options, capsys):
    fields = options.__dataclass_fields__
    for name in HAMTConfig.__annotations__.keys() - DECIDED:
        assert fields[name].default is None
        value = getattr(HAMTConfig, name)
        flags = [] if value is None else [f"--{name}", str(value)]
        assert getattr(parse(options, flags, "train"), name) == value
    with pytest.raises(SystemExit):
        parse(options, ["--help"], "train")
    shown = " ".join(capsys.readouterr().out.split())
    slowest = "--max_half_life FLOAT half-life in tokens of the slowest slot at initialisation"
    assert slowest in shown
    assert "(default: 4096.0)" in shown


def test_what_the_documentation_of_the_configuration_says_is_the_help():
    documented = inspect.getdoc(HAMTConfig)
    for name in HAMTConfig.__annotations__.keys() - DECIDED - {"tie_word_embeddings"}:
        assert f"    {name}: " in documented
        start = TrainOptions.__dataclass_fields__[name].metadata["help"].split(";")[0][:40]
        assert start.replace("``", "") in " ".join(documented.replace("``", "").split())


def test_a_field_that_is_added_becomes_an_option(monkeypatch):
    monkeypatch.setitem(training_options.ARCHITECTURE, "mixers", list[str] | str | None)
    monkeypatch.setattr(HAMTConfig, "mixers", None, raising=False)
    monkeypatch.setitem(training_options._MEANINGS, "mixers", "of each layer")

    @dataclass
    @training_options.architecture_options
    class Options:
        """More."""

        seed: int = option(0, "a seed")

    assert parse(Options, ["--mixers", "memory"], "train").mixers == "memory"
    assert parse(Options, ["--mixers", "a", "b"], "train").mixers == ["a", "b"]


def test_names_of_transformers_and_of_the_documents_are_flags_too():
    names = words(num_attention_heads=2, hidden_size=64, num_hidden_layers=3, use_aux_loss=True)
    flags = [*names, "--decay_rate", "0.01", "--conv-kernel-size", "0"]
    options = parse(TrainOptions, flags, "train")
    sizes = {"num_heads": 2, "hidden_dim": 64, "num_layers": 3}
    others = {"use_auxiliary_loss": True, "decay_rate": 0.01, "conv_kernel_size": 0}
    assert options.architecture() == sizes | others
    assert TrainOptions().architecture() == {}


def test_a_size_is_changed_by_flags_and_replaces_sizes_of_a_recipe():
    flags = ["--config", "a100", "--size", "small", "--num_layers", "1"]
    options = parse(TrainOptions, flags, "train")
    assert (options.size, options.num_layers, options.hidden_dim) == ("small", 1, None)
    assert options.num_slots == 16, "of the recipe: no size has slots"


def test_options_made_in_python_are_checked_before_a_run_is_planned(tmp_path):
    for wrong in ({"batch_size": 0}, {"schedule": "step"}, {"warmup": 2.0}, {"hidden_dim": "wide"}):
        with pytest.raises(UserError, match=f"--{next(iter(wrong))}"):
            make_plan(TrainOptions(output_dir=str(tmp_path / "run"), **wrong))
    assert not (tmp_path / "run").exists()


def test_the_first_argument_is_a_recipe_or_a_text(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "texts").mkdir()
    (tmp_path / "my_text.txt").write_text("a b c")
    recipes = ("tiny", "sotu", "some/run.yaml", "none.yml")  # sotu is a text's name, too
    texts = ("my_text.txt", "texts", "wikitext-2", "Salesforce/wikitext:wikitext-2-raw-v1")
    for option_of, values in (("config", recipes), ("data", texts)):
        for value in values:
            assert recipe_or_text(value) == (option_of, value)
    (tmp_path / "tiny").mkdir()
    assert recipe_or_text("tiny") == ("data", "tiny")


def test_neither_a_recipe_nor_a_text_says_what_there_is(capsys, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    line = fails(["train", "tinny", "--dry_run"], capsys)
    assert "no recipe or text tinny: for a text" in line
    assert "the recipes are 100M, 200M, 50M, a100" in line
    assert "or the path of a .txt" in line
    assert "no recipe none.yaml" in fails(["train", "none.yaml"], capsys)
    error = fails(["train", "tiny", "--config", "sotu"], capsys)
    assert "give tiny or --config sotu, not both" in error


def test_a_recipe_by_name_and_a_text_by_path_are_trained(text, tmp_path, capsys, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    monkeypatch.chdir(tmp_path)
    small = words(vocab_size=300, max_length=32, batch_size=4, num_steps=1)
    assert main(["train", "tiny", "--data", text, *small, "--output_dir", "a"]) == 0
    info = info_of(tmp_path / "a")
    assert info["config"]["hidden_dim"] == 64
    assert info["options"]["eval_interval"] == 20
    assert main(["train", text, "--size", "tiny", *small, "--output_dir", "b"]) == 0
    info = info_of(tmp_path / "b")
    assert info["options"]["data"] == text
    assert info["config"]["num_layers"] == 2


def test_the_recipes_are_within_the_package():
    assert (FOLDER / "tiny.yaml").is_file()
    assert FOLDER.parent.name == "hamt"
    check(parse(TrainOptions, ["--config", "tiny"], "train"))
