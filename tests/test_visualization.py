"""Plots: how models and numbers are named, and what is drawn where little was measured."""

import pytest

from hamt.visualization import (
    Series,
    bars,
    loss_by_position,
    plain_number,
    scaling,
    short_label,
    short_labels,
    training_curves,
)


@pytest.mark.parametrize(("description", "label"), [
    ("hamt", "HAMT"),
    ("hamt:hcm_dim=64,num_heads=1,rotation=none", "HAMT, one head"),
    ("hamt:num_heads=8,write_rule=delta", "HAMT, 8 heads, write rule delta"),
    ("hamt:rotation=constant", "HAMT, rotation constant"),
    ("gated-deltanet", "Gated DeltaNet"),
    ("HAMT (demo)", "HAMT (demo)"),
    ("org/model:revision", "org/model:revision"),
])  # fmt: skip
def test_models_have_short_names_in_legends(description, label):
    assert short_label(description) == label


def test_models_of_one_plot_are_told_apart():
    wide, narrow = "hamt:hcm_dim=64", "hamt:hcm_dim=32"
    expected = {wide: wide, narrow: narrow, "mamba2": "Mamba-2"}
    assert short_labels([wide, narrow, "mamba2"]) == expected


def tick_labels(axis):
    axis.figure.draw_without_rendering()
    return [label.get_text() for label in axis.get_ticklabels()]


def test_ticks_are_plain_numbers_at_what_was_measured():
    numbers = {8192: "8,192", 0.05: "0.05", 20: "20", 1.5e7: "15,000,000"}
    assert [plain_number(x) for x in numbers] == list(numbers.values())
    (axes,) = scaling({"a": {"hamt": Series([1024, 8192, 65536], [0.3, 3, 30])}}, "MB").axes
    assert tick_labels(axes.xaxis) == ["1,024", "8,192", "65,536"]
    assert {"1", "10"} <= set(tick_labels(axes.yaxis))
    (axes,) = scaling({"a": {"hamt": Series([1024, 2048], [25.0, 60.0])}}, "MB").axes
    assert {"50"} <= set(tick_labels(axes.yaxis)), "within a decade there are ticks, too"
    (axes,) = scaling({"a": {"hamt": Series([8000, 8192, 65536], [1, 2, 3])}}, "MB").axes
    assert tick_labels(axes.xaxis) == ["8,000", "65,536"], "labels do not lie on each other"
    (axes,) = loss_by_position({"carried": Series([8, 512, 16384], [1, 2, 3])}, trained=256).axes
    assert "1,024" in tick_labels(axes.xaxis)
    axes = bars(["a", "b"], {"tokens/s": [40_000.0, float("nan")]}).axes[0]
    assert "15,000" in tick_labels(axes.xaxis)


def test_no_two_of_many_series_look_alike():
    (axes,) = scaling({"a": {str(i): Series([8], [i]) for i in range(20)}}, "MB").axes
    lines = [points.lines[0] for points in axes.containers]
    assert len({(line.get_color(), line.get_marker()) for line in lines}) == 20


def test_one_point_has_a_tick_and_no_line():
    series = {"hamt": Series([32768], [0.006]), "static": Series([32768], [0.1])}
    (axes,) = scaling({"batch 4": series}, "seconds").axes
    assert tick_labels(axes.xaxis) == ["32,768"]
    assert [points.lines[0].get_linestyle() for points in axes.containers] == ["None", "None"]


def test_a_curve_of_a_few_steps_is_seen():
    """Fewer steps than losses are logged at leave no training loss, a few more a single one."""
    (axes,) = training_curves([], [(5, 3.2)]).axes
    assert [text.get_text() for text in axes.get_legend().get_texts()] == ["held out"]
    assert set(tick_labels(axes.xaxis)) <= {str(step) for step in range(7)}
    (axes,) = training_curves([(10, 3.4)], [(10, 3.2)]).axes
    for line in axes.lines:
        assert line.get_marker() == "o"
        assert line.get_linestyle() == "None"
    (axes,) = training_curves([(step, 3.0) for step in range(1, 900)], [(899, 3.2)]).axes
    assert axes.lines[0].get_linestyle() == "-"
    assert axes.lines[0].get_marker() == "None"
