"""One HTML page with everything, that opens without network and without a server."""

import base64
import html
import json
from collections.abc import Mapping, Sequence
from importlib.resources import files
from typing import Any

from matplotlib.figure import Figure

from hamt.analysis.analyse import SILENCED, Analysis, name_of_attention, summarise
from hamt.visualization import as_png

CAPTIONS = {
    "memory_evolution": "Norms of the slots while the text is read, not normalised; the slots with "
    "the shortest half-lives are lowest.",
    "slots": "How evenly slots are written and read, how long they keep what they are told, and by "
    f"how much the loss of the first {SILENCED} tokens rises when a slot is never read.",
    "retrieval": "What is read back under the key of a token, some tokens after it was written, "
    "beside what the keys of other tokens give.",
    "gates": "How strongly each token is written, averaged over heads and slots.",
}
# Of the other pictures, contributions by layer.
CONTRIBUTIONS = (
    "Where each read-out came from: exact shares with keys and gates, in layers of attention its "
    "weights, held fixed. What came before "
    "the first token shown is left out."
)


def dashboard(analysis: Analysis, heading: str) -> str:
    """The page as HTML: a text whose tokens can be clicked, tables, and the pictures.

    ``heading`` says what was read, by which model, where.
    """
    layers = analysis.results["layers"]
    data = {
        "tokens": analysis.results["tokens_of_the_end"],
        "sources": analysis.sources,
        "write": {index: layer["write_gate_of_the_end"] for index, layer in layers.items()},
        "held": {index: layer["held"] for index, layer in layers.items()},
        "half_lives": {index: layer["half_life_tokens"] for index, layer in layers.items()},
        "attention": {
            index: name_of_attention(layer)
            for index, layer in analysis.results["attention"].items()
        },
        "norms": {index: layer["norms"][-1] for index, layer in layers.items()},
    }
    rows = [_row(index, layer) for index, layer in layers.items()]
    captions = {name: CAPTIONS.get(name, CONTRIBUTIONS) for name in analysis.figures}
    return page("dashboard.html", heading, data, rows, analysis.figures, captions)


def page(
    template: str,
    heading: str,
    data: Mapping[str, Any],
    rows: Sequence[str],
    figures: Mapping[str, Figure],
    captions: Mapping[str, str],
) -> str:
    """A page of this package as HTML.

    Args:
        template: the name of a file with places for what follows.
        heading: says what was read, by which model, where.
        data: what the script of the page shows.
        rows: of a table, as HTML.
        figures: pictures by their names, with
        captions: by the same names.
    """
    folder = files("hamt.analysis")
    parts = {
        "STYLE": folder.joinpath("page.css").read_text(encoding="utf-8"),
        "HEADING": html.escape(heading),
        "ROWS": "\n".join(rows),
        "PICTURES": "\n".join(
            _picture(name, figure, captions[name]) for name, figure in figures.items()
        ),
        # A text may hold </script>.
        "DATA": json.dumps(data).replace("<", "\\u003c"),
    }
    written = folder.joinpath(template).read_text(encoding="utf-8")
    for name, content in parts.items():
        written = written.replace(f"<!--{name}-->", content)
    return written


def _row(index: str, layer: Mapping[str, Any]) -> str:
    half_lives, cells, fidelity = summarise(layer)
    named = (half_lives[0], half_lives[len(half_lives) // 2], half_lives[-1])
    reach = " – ".join(f"{half_life:,.1f}" for half_life in named)
    cells = [index, reach, *cells, f"{fidelity:.2f}"]
    return f"<tr>{''.join(f'<td>{cell}</td>' for cell in cells)}</tr>"


def _picture(name: str, figure: Figure, caption: str) -> str:
    png = base64.b64encode(as_png(figure, dpi=110)).decode()
    return (
        f'<figure><img alt="{html.escape(name)}" src="data:image/png;base64,{png}">'
        f"<figcaption>{html.escape(caption)}</figcaption></figure>"
    )
