"""What the page shows, as HTML: a grid of slots, lists of sources and items.

Shape legend: H heads, S slots.
"""

import html
from collections.abc import Iterable, Sequence

import numpy as np

from hamt.analysis.explorer.session import NAMED, Retrieved, View
from hamt.convert.reading import Sources

BLUE, RED = "0, 114, 178", "#D55E00"  # of Okabe and Ito
STYLE = f"""
.prose table, .prose tr {{ border: 0; }}
.prose table.slots {{ border-collapse: separate; border-spacing: 2px; width: 100%; table-layout:
fixed; }} .prose .slots th {{ font-weight: 400; font-size: 11px; text-align: center; border: 0;
padding: 0; }} .prose .slots th:first-child {{ text-align: left; width: 4em; }} .prose .slots td {{
height: 24px; border-radius: 3px; border: 1px solid rgba(128, 128, 128, 0.4); padding: 0; font-size:
9px; text-align: center; overflow: hidden; }} .prose .found td {{ padding: 1px 14px 1px 0;
text-align: left; border: 0; }} .bar {{ display: inline-block; height: 10px; background:
rgb({BLUE}); border-radius: 2px; }} .prose .note {{ opacity: 0.75; color: inherit; }}
#tokens .textfield {{ max-height: 35vh; overflow-y: auto; background: white; }}
@media (max-width: 500px) {{ .prose .slots td {{ font-size: 7px; }} }}
"""
ASKED, SOURCE = "2px solid currentColor", f"2px solid {RED}"  # outlines
MANY = 10_000  # tokens of a half-life that is not written out
NUMBERED = 24  # slots side by side of which each has room for a number


def slot_grid(
    held: np.ndarray,
    largest: float,
    caption: str,
    measured: str,
    half_lives: np.ndarray | None = None,
) -> str:
    """Slots (H, S) as a table, with their numbers above and, where known, half-lives in them.

    What they hold, ``measured`` as its norm or otherwise, is a shade of blue between 0 and
    ``largest``; half-lives are in tokens.
    """
    rows, roomy = "", held.shape[1] <= NUMBERED
    for head, values in enumerate(held.tolist()):
        rows += f"<tr><th>head {head}</th>"
        for slot, value in enumerate(values):
            share = min(value / largest, 1.0) if largest > 0 else 0
            title, text = f"head {head}, slot {slot}: {measured} {value:.2f}", ""
            if half_lives is not None:
                half_life = _short(half_lives[head, slot])
                title += f", half-life {half_life} tokens"
                text = half_life if roomy else ""
            rows += f'<td title="{title}" style="background: rgba({BLUE}, {share:.3f})">{text}</td>'
        rows += "</tr>"
    numbers = "".join(
        f"<th>{slot if roomy or slot % 8 == 0 else ''}</th>" for slot in range(held.shape[1])
    )
    said = (
        f"{html.escape(caption)} Without colour: empty; full blue: a {measured} of {largest:.1f}."
    )
    if half_lives is not None:
        where = "In each slot" if roomy else "Under the pointer"
        said += f" {where}: its half-life in tokens."
    return (
        f'<table class="slots" aria-label="slots"><tr><th>slot</th>{numbers}</tr>{rows}'
        f'</table><p class="note">{said}</p>'
    )


def _short(tokens: float) -> str:
    """A half-life in four characters."""
    if tokens >= MANY:
        return f"&gt;{MANY // 1000}k"
    return f"{tokens:.1f}" if tokens < 9.95 else f"{tokens:.0f}"


def described(view: View, found: Retrieved | Sources, layer: int, token: int) -> str:
    """What was found of a token."""
    if isinstance(found, Sources):
        return sources_list(view, found, token)
    return retrieved_lists(view, found, layer, token)


def sources_list(view: View, found: Sources, token: int) -> str:
    """What earlier tokens added to the logit of one, by way of attention, and in which layer."""
    given = found.logit.sum(dim=0)
    best = given.abs().topk(min(NAMED, len(given))).indices.tolist()
    layers = found.logit.abs().argmax(dim=0).tolist()
    largest = float(given.abs().max()) or 1.0
    rows = [
        (
            place,
            float(given[place]) / largest,
            f"{given[place]:+.2f}, most in layer {layers[place]}",
        )
        for place in best
    ]
    kinds = ", ".join(f"{kind} {part.sum():+.2f}" for kind, part in found.by_kind().items())
    return (
        f"{_outlined(token, best)}"
        f"<h4>From where “{html.escape(view.tokens[token])}” (token {token}) came</h4>"
        f"<p>Added to its logit by attention in all layers: {kinds}.</p>"
        "<p>Most of all by these tokens (outlined in the text), in the window or not:</p>"
        f"{_table(view, token, rows)}"
        '<p class="note">What later layers make of it is not part of it.</p>'
    )


def retrieved_lists(view: View, retrieved: Retrieved, layer: int, token: int) -> str:
    """The sources of a read-out with their shares, and the stored items that it is like."""
    word = html.escape(view.tokens[token])
    sources = [(position, share, f"{100 * share:.1f} %") for position, share in retrieved.sources]
    items = [(position, cosine, f"{cosine:.2f}") for position, cosine in retrieved.items]
    return (
        f"{_outlined(token, [position for position, _ in retrieved.sources])}"
        f"<h4>What “{word}” (token {token}) read in layer {layer}</h4>"
        "<p>From where: exact shares of the read-out, averaged over heads (outlined in the text)."
        f"</p>{_table(view, token, sources)}"
        f"<p>What it is like: items that head {retrieved.head} holds, by cosine. By chance: "
        f"{retrieved.permuted:.2f} (its key in another order), {retrieved.theory:.2f} (random "
        f"directions).</p>{_table(view, token, items)}"
        '<p class="note">A position is its token mixed with the few before it.</p>'
    )


def _outlined(token: int, sources: Iterable[int]) -> str:
    """Outlines in the text, whose tokens are children of one element."""
    outlines = [(position, SOURCE) for position in sources] + [(token, ASKED)]
    rules = "".join(
        f"#tokens .token-container:nth-child({position + 1}) .token {{ outline: {outline}; }}\n"
        for position, outline in outlines
    )
    return f"<style>{rules}</style>"


def _table(view: View, token: int, rows: Sequence[tuple[int, float, str]]) -> str:
    lines = "".join(
        f"<tr><td>{html.escape(view.tokens[position])}</td><td>{token - position} back</td>"
        f'<td>{text} <span class="bar" style="width: {80 * min(max(value, 0), 1):.0f}px"></span>'
        "</td></tr>"
        for position, value, text in rows
    )
    return f'<table class="found">{lines}</table>'
