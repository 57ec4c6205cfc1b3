"""Draw docs/images/binding.png: five pictures in one vector, and one of them read back by its key.

venv/bin/python docs/draw_binding.py
"""

from pathlib import Path

import numpy as np
import torch
from matplotlib.figure import Figure
from matplotlib.patches import FancyArrowPatch
from torch import Tensor

from hamt import HolographicMemory, similarity
from hamt.visualization import COLOURS, DIVERGING, SEQUENTIAL, as_png

TARGET = Path(__file__).parent / "images" / "binding.png"
SIDE = 64  # pixels: an item is a vector of SIDE² numbers, +1 or -1
ASKED = 2  # the index of the item that is read back
STEPS = (
    (0.149, "1  Bind", "An item bound to its key\nlooks like noise."),
    (0.452, "2  Superpose", "The memory is the sum of all five:\none vector, as long as one item."),
    (0.713, "3  Unbind", "Undoing key 3 gives item 3;\nthe other four stay noise."),
    (0.915, "Compare", "Cosine of what came back\nwith each item"),
)


def patterns() -> Tensor:
    """Five pictures of +1 and -1 that are nearly orthogonal to each other, (5, SIDE²)."""
    y, x = (np.mgrid[:SIDE, :SIDE] + 0.5) / SIDE
    radius = np.hypot(x - 0.5, y - 0.5)
    waves = (
        np.sin(6 * np.pi * y),
        np.sin(6 * np.pi * x),
        np.cos(5 * np.pi * radius),
        np.sin(4 * np.pi * x) * np.sin(4 * np.pi * y),
        np.sin(4 * np.pi * (x + y)),
    )
    return torch.tensor(np.array([np.where(wave >= 0, 1, -1).ravel() for wave in waves])).float()


def draw() -> Figure:
    """Bind, superpose, unbind and compare: ``HolographicMemory`` computes every number."""
    torch.manual_seed(0)
    memory = HolographicMemory(hcm_dim=SIDE**2, num_slots=1)
    items = patterns()
    keys = memory.algebra.random_keys(len(items), memory.key_size)
    bound = [memory.bind(item, key) for item, key in zip(items, keys, strict=True)]
    state = memory.initial_state()
    for item, key in zip(items, keys, strict=True):
        state = memory.write(state, item, key)
    retrieved = memory.retrieve(state, keys[ASKED]).flatten()

    figure = Figure(figsize=(12, 5.4))
    for x, title, text in STEPS:
        figure.text(x, 0.95, title, ha="center", va="center", fontsize=15, weight="bold")
        figure.text(x, 0.91, text, ha="center", va="top", fontsize=10.5)
    for x, name in ((0.062, "item"), (0.150, "key"), (0.238, "bound")):
        figure.text(x, 0.785, name, ha="center", fontsize=11)
    rows = [0.63, 0.48, 0.33, 0.18, 0.03]
    middle = rows[ASKED] + 0.065
    for index, bottom in enumerate(rows):
        y, asked = bottom + 0.065, index == ASKED
        figure.text(0.02, y, str(index + 1), ha="center", va="center", fontsize=12)
        _image(figure, (0.033, bottom, 0.058, 0.13), items[index], framed=asked)
        figure.text(0.106, y, "⊛", ha="center", va="center", fontsize=15)
        _image(figure, (0.121, bottom, 0.058, 0.13), keys[index], SEQUENTIAL, asked)
        figure.text(0.194, y, "=", ha="center", va="center", fontsize=15)
        _image(figure, (0.209, bottom, 0.058, 0.13), bound[index])
        _arrow(figure, (0.271, y), (0.366, middle))
    _image(figure, (0.37, middle - 0.18, 0.16, 0.36), sum(bound))
    figure.text(0.45, middle - 0.225, f"memory: {SIDE**2:,} numbers", ha="center", fontsize=10.5)
    figure.text(0.71, middle - 0.225, "item 3 + noise", ha="center", fontsize=10.5)
    _image(figure, (0.551, middle + 0.03, 0.058, 0.13), keys[ASKED], SEQUENTIAL, framed=True)
    figure.text(0.58, middle + 0.175, "key 3", ha="center", fontsize=11)
    _arrow(figure, (0.534, middle), (0.626, middle))
    _image(figure, (0.63, middle - 0.18, 0.16, 0.36), retrieved)
    _bars(figure, (0.865, middle - 0.18, 0.12, 0.36), similarity(retrieved, items).tolist())
    return figure


def _image(figure, place, values: Tensor, colours: str = DIVERGING, framed: bool = False) -> None:
    """A vector as a picture, zero in the middle of the colours."""
    axes = figure.add_axes(place)
    picture = values.reshape(SIDE, -1).numpy()
    extreme = np.abs(picture).max()
    axes.imshow(picture, cmap=colours, vmin=-extreme, vmax=extreme, aspect="auto")
    axes.set(xticks=[], yticks=[])
    for spine in axes.spines.values():
        spine.set(color=COLOURS[1] if framed else "black", linewidth=3 if framed else 0.8)


def _arrow(figure: Figure, start: tuple[float, float], end: tuple[float, float]) -> None:
    style = {"arrowstyle": "-|>", "mutation_scale": 14, "color": "#555555"}
    figure.add_artist(FancyArrowPatch(start, end, transform=figure.transFigure, **style))


def _bars(figure: Figure, place, cosines: list[float]) -> None:
    axes = figure.add_axes(place)
    numbers = range(1, len(cosines) + 1)
    colours = [COLOURS[1 if index == ASKED else 0] for index in range(len(cosines))]
    axes.barh(numbers, cosines, color=colours)
    for number, cosine in zip(numbers, cosines, strict=True):
        axes.annotate(f" {round(cosine, 2) + 0.0:.2f}", (max(cosine, 0), number), va="center")
    axes.set(xlim=(-0.08, 0.75), ylim=(len(cosines) + 0.6, 0.4), xticks=[])
    axes.set_yticks(numbers, [f"item {number}" for number in numbers])
    axes.tick_params(length=0)
    axes.axvline(0, color="black", linewidth=0.8)
    axes.spines[:].set_visible(False)


if __name__ == "__main__":
    TARGET.write_bytes(as_png(draw(), dpi=100))
