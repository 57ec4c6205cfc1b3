"""Options of commands: what a field declares is shown, checked, and read from recipes alike."""

import math
from dataclasses import dataclass
from typing import ClassVar

import pytest

from hamt.analysis.command import AnalyzeOptions
from hamt.errors import UserError
from hamt.options import check, option, parse


@dataclass
class Options:
    """Cook something.

    Not shown.
    """

    REPLACES: ClassVar = {"epochs": ("count",)}
    IMPLIES: ClassVar = {"quick": {"count": 2, "lengths": [1]}}

    config: str | None = option(None, "a recipe")
    text: str = option("sotu", "a text", "dataset")
    kind: str = option("muon", "50 % of them", choices=("muon", "adamw"))
    rate: float = option(0.1, "of learning", "learning_rate", above=0)
    share: float = option(0.5, "of all", at_least=0, at_most=1)
    seconds: float = option(9.0, "at most", above=0, at_most=math.inf)
    count: int | None = option(None, "of steps", at_least=1)
    epochs: int = option(1, "instead of count", at_most=9)
    factor: float = option(2.0, "of growth", above=1)
    decay: float = option(0.0, "of weights")
    quick: bool = option(False, "only a taste")
    lengths: list[int] = option([1, 2], "of rows", at_least=1)
    tasks: list[str] = option([], "to do", choices=("parity", "mqar"))
    mixers: list[str] | str | None = option(None, "one, or one a layer")


def refusal(*arguments):
    with pytest.raises(UserError) as refused:
        given(*arguments)
    return str(refused.value)


def given(*arguments, **others):
    return parse(Options, arguments, "cook", **others)


def recipe(tmp_path, content):
    path = tmp_path / "a.yaml"
    path.write_text(content, encoding="utf-8")
    return ["--config", str(path)]


def test_flags_become_values_of_their_type():
    words = "--dataset a --learning-rate=1e-3 --count 3 --quick --decay -1 --lengths 4 5"
    options = given(*f"{words} --tasks mqar --mixers memory".split())
    assert (options.text, options.rate, options.count, options.quick) == ("a", 1e-3, 3, True)
    assert (options.lengths, options.tasks, options.decay) == ([4, 5], ["mqar"], -1.0)
    assert options.mixers == "memory"
    assert given("--mixers", "a", "b").mixers == ["a", "b"]
    assert given("--quick", "no") == given() == Options()
    assert given("--seconds", "inf").seconds == math.inf


WRONG = [
    ("rate", "0", "--rate must be positive; got 0.0"),
    ("rate", "nan", "--rate must be positive; got nan"),
    ("rate", "inf", "--rate must be positive; got inf"),
    ("rate", "1e308", "--rate must be a number that float32 can hold; got 1e+308"),
    ("rate", "1e-45", "--rate must be a number that float32 can hold; got 1e-45"),
    ("rate", "high", "--rate: invalid float value 'high'"),
    ("share", "-0.1", "--share must lie in [0, 1]; got -0.1"),
    ("share", "1.5", "--share must lie in [0, 1]; got 1.5"),
    ("seconds", "0", "--seconds must lie in (0, inf]; got 0.0"),
    ("seconds", "nan", "--seconds must lie in (0, inf]; got nan"),
    ("count", "0", "--count must be at least 1; got 0"),
    ("count", "1.5", "--count: invalid int value '1.5'"),
    ("count", str(2**63), f"--count: invalid int value '{2**63}'"),
    ("factor", "1", "--factor must be above 1; got 1.0"),
    ("epochs", "10", "--epochs must be at most 9; got 10"),
    ("decay", "nan", "--decay must be finite; got nan"),
    ("decay", "-inf", "--decay must be finite; got -inf"),
    ("kind", "sgd", "--kind must be one of muon, adamw; got 'sgd'"),
    ("quick", "perhaps", "--quick: invalid bool value 'perhaps'"),
    ("lengths", "0", "--lengths must be at least 1; got 0"),
    ("tasks", "cook", "--tasks must be one of parity, mqar; got 'cook'"),
]


@pytest.mark.parametrize(("name", "value", "message"), WRONG)
def test_a_value_out_of_range_is_refused_wherever_it_comes_from(name, value, message, tmp_path):
    assert refusal(f"--{name}={value}") == message
    arguments = recipe(tmp_path, f"{name}: {value}\n")
    assert refusal(*arguments) == f"{message} (in {arguments[1]})"


@pytest.mark.parametrize(("values", "message"), [
    ({"rate": -1}, "--rate must be positive; got -1"),
    ({"rate": None}, "--rate: invalid float value None"),
    ({"count": True}, "--count: invalid int value True"),
    ({"count": "3"}, "--count: invalid int value '3'"),
    ({"quick": 1}, "--quick: invalid bool value 1"),
    ({"lengths": [4, 0]}, "--lengths must be at least 1; got 0"),
    ({"lengths": []}, "--lengths needs at least one value"),
    ({"tasks": ["mqar", "x"]}, "--tasks must be one of parity, mqar; got 'x'"),
    ({"mixers": [1]}, "--mixers: invalid str value 1"),
], ids=str)  # fmt: skip
def test_options_made_in_python_are_checked_too(values, message):
    with pytest.raises(UserError) as refused:
        check(Options(**values))
    assert str(refused.value) == message


def test_right_options_made_in_python_pass():
    check(Options())
    check(Options(rate=1, count=None, tasks=[], mixers=["a"], seconds=math.inf, share=0))


def test_help_shows_range_choices_default_and_a_heading(capsys):
    def text_or_recipe(value):
        """What to cook."""

    with pytest.raises(SystemExit):
        given("--help", positional=text_or_recipe)
    shown = " ".join(capsys.readouterr().out.split())
    for words in (
        "usage: hamt cook [text_or_recipe] [--options] Cook something.",
        "text_or_recipe What to cook.",
        "--kind {muon,adamw} 50 % of them (default: muon)",
        "--rate FLOAT, --learning_rate FLOAT of learning (default: 0.1; positive)",
        "--share FLOAT of all (default: 0.5; in [0, 1])",
        "--count INT of steps (default: None; at least 1)",
        "--lengths INT [INT ...] of rows (default: 1 2; at least 1)",
        "--quick [BOOL] only a taste (default: False)",
    ):
        assert words in shown
    assert "Not shown" not in shown
    assert "learning-rate" not in shown


@pytest.mark.parametrize(("flag", "hint"), [
    ("--learning_rte", "did you mean --learning_rate?"),
    ("--conv_kernel_size", "hamt cook --help lists the options"),
    ("--length=3", "did you mean --lengths?"),
    ("stew", "a text of several words stands in quotes; hamt cook --help lists the options"),
])  # fmt: skip
def test_an_unknown_option_is_told_with_the_nearest_known_one(flag, hint):
    assert refusal(flag) == f"unknown option {flag}: {hint}"


def test_a_file_without_a_flag_is_told_where_a_file_is_given():
    with pytest.raises(
        UserError, match=r"option my\.txt: a file is given by --file; a text of sev"
    ):
        parse(AnalyzeOptions, ["my.txt"], "analyze")


def test_a_flag_without_its_value_is_refused():
    with pytest.raises(UserError, match=r"expected one argument \(hamt cook --help"):
        given("--count")


def test_an_argument_without_a_flag_is_a_value_of_the_option_it_belongs_to():
    def text(value):
        """A text."""
        return "text", value

    assert given("soup", "--quick", positional=text).text == "soup"
    assert given("--count", "3", "soup", positional=text).text == "soup"
    assert given("--", "--soup", positional=text).text == "--soup"
    with pytest.raises(UserError, match="give soup or --text stew, not both"):
        given("soup", "--dataset", "stew", positional=text)


def test_flags_go_before_the_recipe_and_before_what_they_replace(tmp_path):
    found = recipe(tmp_path, "dataset: a\ncount: 7\nlengths: [3, 4]\nlearning_rate: 1e-3\nquick:\n")
    options = given(*found, "--text", "b")
    assert (options.text, options.count, options.lengths, options.rate) == ("b", 7, [3, 4], 1e-3)
    assert given(*found, "--epochs", "2").count is None
    assert given(*found).config == found[1]


def test_a_switch_puts_other_values_in_the_place_of_defaults_only(tmp_path):
    assert (given("--quick").count, given("--quick").lengths) == (2, [1])
    assert given("--quick", "--count", "5").count == 5
    assert given(*recipe(tmp_path, "quick: yes\ncount: 5\n")).lengths == [1]
    assert given(*recipe(tmp_path, "quick: yes\ncount: 5\n")).count == 5
    assert given("--quick", "false").count is None


@pytest.mark.parametrize(("content", "message"), [
    ("coun: 3", "unknown option --coun (in {path}): did you mean --count?"),
    ("config: b.yaml", "unknown option --config (in {path}): hamt cook --help"),
    ("count: [3, 4]", "--count takes one value; got 2 (in {path})"),
    ("lengths: []", "--lengths needs at least one value (in {path})"),
    ("count: 2001-99-99", "--count: invalid int value '2001-99-99' (in {path})"),
])  # fmt: skip
def test_what_is_wrong_in_a_recipe_is_told_with_its_path(content, message, tmp_path):
    arguments = recipe(tmp_path, content)
    assert refusal(*arguments).startswith(message.format(path=arguments[1]))


def test_words_of_a_recipe_stay_words(tmp_path):
    options = given(*recipe(tmp_path, "text: no\nquick: on\nmixers: [2024-01-01, 1.50]\n"))
    assert (options.text, options.quick) == ("no", True)
    assert options.mixers == ["2024-01-01", "1.50"]
