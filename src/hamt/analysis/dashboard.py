"""One HTML page with everything, that opens without network and without a server."""

import base64
import html
import json
from collections.abc import Mapping
from importlib.resources import files
from typing import Any

from matplotlib.figure import Figure

from hamt.analysis.analyse import Analysis, summarise
from hamt.visualization import as_png


def dashboard(analysis: Analysis, heading: str, captions: Mapping[str, str]) -> str:
    """The page as HTML: a text whose tokens can be clicked, tables, and the pictures.

    Args:
        analysis: of the text.
        heading: what was read, by which model, where.
        captions: of pictures by their names.
    """
    template = files("hamt.analysis").joinpath("dashboard.html").read_text(encoding="utf-8")
    layers = analysis.results["layers"]
    data = {
        "tokens": analysis.tokens,
        "sources": {str(layer): rows for layer, rows in analysis.sources.items()},
        "write": {str(layer): row for layer, row in analysis.write.items()},
        "held": {index: layer["held"] for index, layer in layers.items()},
        "slots": {
            index: {"half_lives": layer["half_life_tokens"], "norms": layer["norms"][-1]}
            for index, layer in layers.items()
        },
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
    summary = summarise(layer)
    cells = [
        index,
        " – ".join(f"{half_life:,.1f}" for half_life in summary.half_lives),
        f"{summary.written:.1f}",
        f"{summary.read:.1f}",
        str(summary.dead),
        f"{summary.rank:.1f}",
        f"{summary.fidelity:.2f}",
    ]
    return "<tr>" + "".join(f"<td>{html.escape(cell)}</td>" for cell in cells) + "</tr>"


def _embedded(figure: Figure) -> str:
    return "data:image/png;base64," + base64.b64encode(as_png(figure, dpi=110)).decode()
