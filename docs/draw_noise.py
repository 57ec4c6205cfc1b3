"""Draw docs/images/noise.png: one picture read back from memories of more and more items.

venv/bin/python docs/draw_noise.py
"""

from pathlib import Path

import numpy as np
import torch
from matplotlib.figure import Figure
from torch import Tensor

from hamt import HolographicMemory, similarity
from hamt.visualization import COLOURS, DIVERGING, as_png

TARGET = Path(__file__).parent / "images" / "noise.png"
SIDE = 64  # pixels: an item is a vector of SIDE² numbers
SHOWN = (1, 2, 5, 20, 100)  # items in the memories whose answers are shown
COUNTS = (1, 2, 3, 5, 7, 10, 20, 30, 50, 70, 100)
ITEM = "#333333"


def rings() -> Tensor:
    """The picture that is asked for, +1 and -1, (SIDE²)."""
    y, x = (np.mgrid[:SIDE, :SIDE] + 0.5) / SIDE - 0.5
    return (
        torch.tensor(np.where(np.cos(5 * np.pi * np.hypot(x, y)) >= 0, 1.0, -1.0)).float().ravel()
    )


def read_back(count: int) -> Tensor:
    """What comes back for the rings from one slot that holds them and count - 1 random items."""
    memory = HolographicMemory(hcm_dim=SIDE**2, num_slots=1)
    items = torch.cat((rings()[None], torch.randn(count - 1, SIDE**2)))
    keys = memory.algebra.random_keys(count, memory.key_size)
    state = memory.initial_state()
    for item, key in zip(items, keys, strict=True):
        state = memory.write(state, item, key)
    return memory.retrieve(state, keys[0]).flatten()


def draw() -> Figure:
    """``HolographicMemory`` computes every number."""
    torch.manual_seed(0)
    figure = Figure(figsize=(12, 5.6))
    for place, count in enumerate(SHOWN):
        retrieved = read_back(count)
        axes = figure.add_axes((0.03 + 0.194 * place, 0.52, 0.17, 0.36))
        extreme = float(retrieved.abs().max())
        picture = retrieved.reshape(SIDE, SIDE).numpy()
        axes.imshow(picture, cmap=DIVERGING, vmin=-extreme, vmax=extreme)
        axes.set(xticks=[], yticks=[])
        axes.set_title(f"{count} item{'s' if count > 1 else ''} in the memory", fontsize=11)
        cosine = float(similarity(retrieved, rings()))
        axes.set_xlabel(f"cosine {cosine:.2f}, theory {count**-0.5:.2f}", fontsize=11)
    axes = figure.add_axes((0.07, 0.1, 0.89, 0.28))
    measured = [float(similarity(read_back(count), rings())) for count in COUNTS]
    line = np.geomspace(1, COUNTS[-1], 100)
    axes.plot(line, line**-0.5, color=ITEM, label="theory, 1/√n")
    axes.plot(COUNTS, measured, "o", color=COLOURS[1], label="computed")
    axes.set(xscale="log", ylim=(0, 1.08), ylabel="cosine")
    axes.set_xlabel("n, items in one vector of 4,096 numbers")
    axes.set_xticks(COUNTS, [str(count) for count in COUNTS])
    axes.minorticks_off()
    axes.legend(frameon=False)
    return figure


if __name__ == "__main__":
    TARGET.write_bytes(as_png(draw(), dpi=100))
