"""One HTML page with everything, that opens without network and without a server."""

import base64
import html
import json
from collections.abc import Mapping
from importlib.resources import files
from typing import Any

from matplotlib.figure import Figure

from hamt.analysis.report import Analysis
from hamt.visualization import as_png


def dashboard(analysis: Analysis, heading: str, captions: Mapping[str, str]) -> str:
    """The page: text whose tokens can be clicked, a table of layers, the pictures with their captions."""
    template = files("hamt.analysis").joinpath("dashboard.html").read_text(encoding="utf-8")
    layers = analysis.results["layers"]
    data = {
        "tokens": analysis.tokens,
        "sources": {str(layer): rows for layer, rows in analysis.sources.items()},
        "write": {str(layer): row for layer, row in analysis.write.items()},
        "held": {index: layer["held"] for index, layer in layers.items()},
    }
    pictures = "\n".join(
        f'<figure><img alt="{html.escape(name)}" src="{_embedded(figure)}">'
        f"<figcaption>{html.escape(captions.get(name, ''))}</figcaption></figure>"
        for name, figure in analysis.figures.items()
    )
    parts = {
        "HEADING": html.escape(heading),
        "ROWS": "\n".join(_row(index, layer) for index, layer in layers.items()),
        "PICTURES": pictures,
        # A text may hold </script>.
        "DATA": json.dumps(data).replace("<", "\\u003c"),
    }
    for name, content in parts.items():
        template = template.replace(f"<!--{name}-->", content)
    return template


def _row(index: str, layer: Mapping[str, Any]) -> str:
    half_lives = sorted(x for head in layer["half_life_tokens"] for x in head)
    cells = [
        index,
        " – ".join(f"{x:,.1f}" for x in (half_lives[0], half_lives[len(half_lives) // 2], half_lives[-1])),
        _mean(layer["effective_slots_written"]),
        _mean(layer["effective_slots_read"]),
        str(len(layer["dead_slots"])),
        _mean(layer["effective_rank_after"]),
        f"{layer['retrieval']['cosine'][0]:.2f}",
    ]
    return "<tr>" + "".join(f"<td>{html.escape(cell)}</td>" for cell in cells) + "</tr>"


def _mean(values: list[float]) -> str:
    return f"{sum(values) / len(values):.1f}"


def _embedded(figure: Figure) -> str:
    return "data:image/png;base64," + base64.b64encode(as_png(figure, dpi=110)).decode()
