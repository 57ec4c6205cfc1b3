"""Views as HTML: a grid of slots, lists of sources.

Shape legend: H heads, S slots.
"""

import html
from collections.abc import Sequence

import numpy as np

from hamt.analysis.explorer.session import Retrieved, View

BLUE = "0, 114, 178"  # of Okabe and Ito
STYLE = """
.prose table, .prose tr { border: 0; }
.prose table.slots { border-collapse: separate; border-spacing: 2px; width: 100%; table-layout:
fixed; } .prose .slots th { font-weight: 400; font-size: 12px; text-align: left; width: 4.5em;
border: 0; padding: 0; } .prose .slots td { height: 24px; border-radius: 3px; border: 1px solid
rgba(128, 128, 128, 0.4); padding: 0; } .prose .found td { padding: 1px 14px 1px 0; text-align:
left; border: 0; } .bar { display: inline-block; height: 10px; background: #0072B2; border-radius:
2px; } .prose .note { opacity: 0.75; color: inherit; }
#tokens .textfield { max-height: 35vh; overflow-y: auto; }
"""
ASKED, SOURCE = "2px solid currentColor", "2px solid #D55E00"  # outlines


def slot_grid(norms: np.ndarray, largest: float, caption: str) -> str:
    """Norms (H, S) as a table of shades between 0 and ``largest``."""
    rows = []
    for head, values in enumerate(norms):
        cells = "".join(
            f'<td title="head {head}, slot {slot}: norm {value:.2f}" '
            f'style="background: rgba({BLUE}, {min(value / largest, 1.0) if largest > 0 else 0:.3f})"></td>'
            for slot, value in enumerate(values.tolist())
        )
        rows.append(f"<tr><th>head {head}</th>{cells}</tr>")
    said = f"{html.escape(caption)} Without colour: empty; full blue: a norm of {largest:.1f}."
    return (
        f'<table class="slots" aria-label="slots">{"".join(rows)}</table><p class="note">{said}</p>'
    )


def retrieved_lists(view: View, found: Retrieved, layer: int, token: int) -> str:
    """Sources of a read-out with their shares, and the stored items it is like."""
    word = html.escape(view.tokens[token])
    sources = [(position, share, f"{100 * share:.1f} %") for position, share in found.sources]
    items = [(position, cosine, f"{cosine:.2f}") for position, cosine in found.items]
    return (
        f"{_marks(token, [position for position, _ in found.sources])}"
        f"<h4>What “{word}” (token {token}) read in layer {layer}</h4>"
        f"<p>From where: exact shares of the read-out, averaged over heads (outlined in the text).</p>"
        f"{_table(view, token, sources)}"
        f"<p>What it is like: items that head {found.head} holds, by cosine. By chance: "
        f"{found.permuted:.2f} (its key in another order), {found.theory:.2f} (random directions).</p>"
        f"{_table(view, token, items)}"
        '<p class="note">A position is its token mixed with the few before it.</p>'
    )


def _marks(token: int, sources: Sequence[int]) -> str:
    """Outlines of a token and its sources in the text, whose tokens are children of one element."""
    rules = "".join(
        f"#tokens .token-container:nth-child({position + 1}) .token {{ outline: {outline}; }}\n"
        for positions, outline in ((sources, SOURCE), ([token], ASKED))
        for position in positions
    )
    return f"<style>{rules}</style>"


def _table(view: View, token: int, rows: Sequence[tuple[int, float, str]]) -> str:
    lines = "".join(
        f"<tr><td>{html.escape(view.tokens[position])}</td><td>{token - position} back</td><td>{text} "
        f'<span class="bar" style="width: {max(min(value, 1.0), 0.0) * 80:.0f}px"></span></td></tr>'
        for position, value, text in rows
    )
    return f'<table class="found">{lines}</table>'
