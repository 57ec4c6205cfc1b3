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
    found = summarise(layer)
    cells = [
        index,
        " – ".join(f"{x:,.1f}" for x in found.half_lives),
        f"{found.written:.1f}",
        f"{found.read:.1f}",
        str(found.dead),
        f"{found.rank:.1f}",
        f"{found.fidelity:.2f}",
    ]
    return "<tr>" + "".join(f"<td>{html.escape(cell)}</td>" for cell in cells) + "</tr>"


def _embedded(figure: Figure) -> str:
    return "data:image/png;base64," + base64.b64encode(as_png(figure, dpi=110)).decode()
