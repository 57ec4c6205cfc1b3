"""Draw docs/images/layer.png: what happens to one token in one layer of the model.

venv/bin/python docs/draw_layer.py
"""

import math
from pathlib import Path

import numpy as np
from matplotlib.figure import Figure
from matplotlib.patches import FancyArrowPatch, FancyBboxPatch

from hamt import HAMTConfig
from hamt.parts import forget_logits
from hamt.visualization import SEQUENTIAL, as_png

TARGET = Path(__file__).parent / "images" / "layer.png"
SLOTS = 5  # of one head; a model has 16 by default
AGES = np.geomspace(1, 10_000, 200)  # tokens ago
GREY = "#555555"


def half_lives() -> list[float]:
    """Those that the slots of a head begin with, in tokens."""
    config = HAMTConfig(num_slots=SLOTS, num_heads=1)
    shortest, longest = float(config.min_half_life), float(config.max_half_life)
    logits = forget_logits(1, SLOTS, shortest, longest)
    forgotten = logits.double().sigmoid()  # 1 - α
    return (math.log(2) / -(-forgotten).log1p()).tolist()


def draw() -> Figure:
    """Boxes and arrows, and the slots with what is left in them of older tokens."""
    figure = Figure(figsize=(12, 5.4))
    axes = figure.add_axes((0, 0, 1, 1))
    axes.set(xlim=(0, 120), ylim=(0, 54))
    axes.axis("off")

    def box(x, y, text, width=14.0, colour="white", height=6.0):
        style = {"boxstyle": "round,pad=0,rounding_size=1", "edgecolor": GREY, "facecolor": colour}
        corner = (x - width / 2, y - height / 2)
        axes.add_patch(FancyBboxPatch(corner, width, height, **style))
        axes.text(x, y, text, ha="center", va="center", fontsize=11)

    def arrow(start, end, text="", offset=(0.0, 1.2)):
        style = {"arrowstyle": "-|>", "mutation_scale": 14, "color": GREY}
        axes.add_patch(FancyArrowPatch(start, end, shrinkA=0, shrinkB=0, **style))
        middle = ((start[0] + end[0]) / 2 + offset[0], (start[1] + end[1]) / 2 + offset[1])
        axes.text(*middle, text, ha="center", va="bottom", fontsize=10)

    made, gates = "#e8eef9", "#fdebdc"
    axes.text(7, 51, "a token", ha="center", va="center", fontsize=12, weight="bold")
    axes.text(68, 51, "the memory of a head", ha="center", va="center", fontsize=12, weight="bold")
    axes.text(109, 51, "what it read", ha="center", va="center", fontsize=12, weight="bold")
    box(7, 27, "token and\nthe 3 before it", width=12, height=8)
    for y, text, colour in (
        (45, "item v", made),
        (37, "key k", made),
        (27, "gates α, w", gates),
        (17, "read weights r", gates),
        (9, "unbinding key u", made),
    ):
        box(27, y, text, colour=colour, width=15)
        arrow((13, 27), (19.5, y))
    box(43, 41, "x = k ⊛ v", width=10, colour=made)
    axes.text(43, 45.6, "1  bind", ha="center", fontsize=11, weight="bold")
    arrow((34.5, 45), (38, 41.8))
    arrow((34.5, 37), (38, 40.2))

    inside = figure.add_axes((0.455, 0.39, 0.23, 0.46))
    left = np.array([0.5 ** (AGES / half_life) for half_life in half_lives()])
    inside.imshow(left, cmap=SEQUENTIAL, aspect="auto", vmin=0, vmax=1)
    names = [f"slot {slot + 1}: {life:,.0f}" for slot, life in enumerate(half_lives())]
    inside.yaxis.tick_right()
    inside.set_yticks(range(SLOTS), names, fontsize=9.5)
    ages = (1, 10, 100, 1000, 10_000)
    inside.set_xticks([50 * math.log10(age) * 0.995 for age in ages], [f"{age:,}" for age in ages])
    inside.set_xlabel("written so many tokens ago", fontsize=9.5)
    inside.tick_params(length=0, labelsize=9.5)
    for edge in range(1, SLOTS):
        inside.axhline(edge - 0.5, color="white", linewidth=3)
    axes.text(84, 46.8, "half-life", ha="left", fontsize=9.5, style="italic")
    arrow((48, 41), (54, 39))
    adding = "2  add x: M = α M + w x"
    axes.text(68, 46.8, adding, ha="center", fontsize=11, weight="bold")
    arrow((34.5, 27), (54, 29))

    box(68, 9, "Σ r M", width=10, colour=gates)
    axes.text(68, 3.4, "3  sum the slots", ha="center", fontsize=11, weight="bold")
    arrow((68, 16.5), (68, 12))
    arrow((34.5, 17), (63, 10.2))
    box(88, 9, "u⁻¹ ⊛ Σ r M", width=14, colour=made)
    axes.text(88, 3.4, "4  unbind", ha="center", fontsize=11, weight="bold")
    arrow((73, 9), (81, 9))
    axes.plot([34.5, 40, 40, 88], [9, 9, 1.3, 1.3], color=GREY, linewidth=1.2)
    arrow((88, 1.3), (88, 2.6))
    box(109, 9, "norm,\noutput gate", width=13, height=8)
    arrow((95, 9), (102.5, 9))
    box(109, 27, "linear map", width=13)
    arrow((109, 13), (109, 24))
    box(109, 41, "to the next\npart of the block", width=17, height=8)
    arrow((109, 30), (109, 37))
    return figure


if __name__ == "__main__":
    TARGET.write_bytes(as_png(draw(), dpi=100))
