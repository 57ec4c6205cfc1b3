"""Draw docs/images/cost.png from docs/results: how many times as fast as a transformer HAMT is.

venv/bin/python docs/draw_cost.py
"""

import json
from pathlib import Path
from statistics import median

from matplotlib.figure import Figure

from hamt.visualization import Series, as_png, draw_series, panels

HERE = Path(__file__).parent
TARGET = HERE / "images" / "cost.png"


def ratios() -> dict[str, Series]:
    """Medians over the rounds of a run, against the context in tokens."""
    results = HERE / "results"
    bench = json.loads((results / "bench" / "bench.json").read_text(encoding="utf-8"))
    decode = json.loads((results / "decode" / "bench.json").read_text(encoding="utf-8"))
    train = [row for row in bench["model"]["rows"] if row["phase"] == "train"]
    lengths = [row["length"] for row in train]
    without_attention = [
        median(
            a / b for a, b in zip(row["times_s"]["sdpa"], row["times_s"]["ceiling"], strict=True)
        )
        for row in train
    ]
    one, several = (
        [row for row in decode["decode"]["rows"] if (row["batch"] == 1) == alone]
        for alone in (True, False)
    )

    def decoding(rows: list[dict]) -> Series:
        medians = [row["ratios"]["hamt over static"]["median"] for row in rows]
        return Series([row["length"] for row in rows], medians)

    return {
        "decoding 16 rows (4 at 32,768): HAMT": decoding(several),
        "decoding one row: HAMT": decoding(one),
        "training: HAMT": Series(
            lengths, [row["ratios"]["hamt over sdpa"]["median"] for row in train]
        ),
        "training: without any mixer, the ceiling": Series(lengths, without_attention),
    }


def draw() -> Figure:
    """One panel, both axes logarithmic."""
    figure, (axes,) = panels(1, size=(8, 4))
    draw_series(axes, ratios(), "context (tokens)", "times as fast as the table's transformer")
    axes.axhline(1, color="black", linewidth=1)
    axes.set_xscale("log", base=2)
    axes.set_yscale("log", base=2)
    contexts = [2**power for power in range(7, 16)]
    axes.set_xticks(contexts, [f"{context:,}" for context in contexts])
    axes.set_yticks([1, 2, 4, 8, 16, 32], ["1", "2", "4", "8", "16", "32"])
    return figure


if __name__ == "__main__":
    TARGET.write_bytes(as_png(draw(), dpi=100))
