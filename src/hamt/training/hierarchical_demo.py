"""``hamt demo --hierarchical``: fast and slow slots at work, in seconds; nothing is trained."""

import torch
import torch.nn.functional as F
from matplotlib.figure import Figure
from rich.console import Console
from torch import Tensor

from hamt.hierarchical_memory import HierarchicalMemory
from hamt.output import Output
from hamt.visualization import Series, draw_series, panels, save_figure

PICTURE = "hierarchical_memory.png"
WIDTH, SLOTS, EVERY = 1024, 4, 3
TOLD, STEPS = 12, 2000  # tokens whose consolidations are printed; tokens of the picture


@torch.no_grad()
def show_hierarchical(console: Console, output: Output, seed: int) -> None:
    """Write random items to a ``HierarchicalMemory``, and draw what becomes of the first one."""
    torch.manual_seed(seed)
    memory = HierarchicalMemory(WIDTH, SLOTS, boundary_every=EVERY)
    console.print(
        f"{SLOTS} fast slots, which forget {memory.fast_decay:.2%} at every token, and {SLOTS} "
        f"slow ones, which forget {memory.slow_decay:.2%}. "
        f"Every {EVERY} tokens each slow slot takes over a part of its fast one, as much as its "
        "gate says; the gates are as before training. "
        "Norms are those of the slots as they are: nothing normalises them.\n"
    )
    norms: list[Tensor] = []
    kept: list[Tensor] = []
    state = alone = memory.initial_state()  # of all items, and of the first one alone
    for step in range(1, STEPS + 1):
        item = F.normalize(torch.randn(1, 1, WIDTH), dim=-1)
        key = memory.algebra.random_keys(1, 1, memory.memory.key_size)
        state = memory.write(state, item, key)
        alone = memory.write(alone, item if step == 1 else torch.zeros_like(item), key)
        norms.append(torch.cat(memory.norms(state), dim=-1)[0, 0])
        kept.append(torch.cat(memory.norms(alone), dim=-1)[0, 0])  # of norm 1 when it was written
        if step % EVERY == 0 and step <= TOLD:
            fast, slow = (_listed(part) for part in norms[-1].chunk(2))
            console.print(f"step {step}: CONSOLIDATED | fast: {fast} | slow: {slow}")
    console.print(f"and so on, every {EVERY} tokens: the picture has all")
    fast, slow = (_listed(part) for part in kept[-1].chunk(2))
    console.print(
        f"\nshare of the first item that is left after {STEPS:,} tokens | fast: {fast} | "
        f"slow: {slow}"
    )
    output.write_file(PICTURE, lambda file: save_figure(file, _picture(norms, kept)))
    console.print(f"wrote {output.folder / PICTURE}")


def _listed(values: Tensor) -> str:
    return " ".join(f"{value:.2f}" for value in values.tolist())


def _picture(norms: list[Tensor], kept: list[Tensor]) -> Figure:
    """Norms of slots, and what is left in them of the first item, over tokens."""
    figure, axes = panels(2)
    steps = range(0, STEPS, STEPS // 50)
    labels = ("norm of a slot", "share of the first item in a slot")
    for axis, rows, label in zip(axes, (norms, kept), labels, strict=True):
        values = torch.stack(rows)[steps].T.tolist()  # all fast slots are written alike
        lines = {"fast": values[0]} | {f"slow {i + 1}": values[SLOTS + i] for i in range(SLOTS)}
        drawn = {name: Series([step + 1 for step in steps], line) for name, line in lines.items()}
        draw_series(axis, drawn, "tokens written", label)
    return figure
