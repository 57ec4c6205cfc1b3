"""What was found in a converted model, as lines for a terminal and as one HTML page."""

from collections.abc import Iterator, Mapping
from statistics import mean
from typing import Any

from matplotlib.figure import Figure
from rich.table import Column, Table

from hamt.analysis.converted_pictures import CAPTIONS
from hamt.analysis.dashboard import page

CARRIED = ("window", "sinks", "exact", "slots")
HELD = 12  # tokens that are named of what is held exactly
COLUMNS = ("layer", "carried", "attention, %", "half-lives", "in use", "recall")


def converted_page(results: Mapping[str, Any], figures: Mapping[str, Figure], heading: str) -> str:
    """The page as HTML; ``heading`` says what was read, by which model, where."""
    shown = {"text": results["text"], "next": results["next"]}
    shown["window"] = results["next"][-1]["window"]  # where the shortest one begins
    shown["held"] = {index: layer["held"] for index, layer in results["layers"].items()}
    rows = [
        f"<tr>{''.join(f'<td>{cell}</td>' for cell in cells(index, layer))}</tr>"
        for index, layer in results["layers"].items()
    ]
    return page("converted.html", heading, shown, rows, figures, CAPTIONS)


def cells(index: str, layer: Mapping[str, Any]) -> list[str]:
    """One layer in one line of a table; a dash where there are no slots, or nothing in them."""
    attention = [mean(part) for part in zip(*layer["attention"], strict=True)]
    found = [
        index,
        *(f"{layer[name]:,}" for name in CARRIED),
        *(f"{100 * x:.1f}" for x in attention),
    ]
    if "mass" not in layer:
        return [*found, *("–",) * 4]
    half_lives = sorted(x for head in layer["half_life_tokens"] for x in head)
    reach, in_use = f"{half_lives[0]:,.0f} – {half_lives[-1]:,.0f}", mean(layer["effective_slots"])
    found, recall = [*found, reach, f"{in_use:.1f}"], layer["recall"]
    return found + ([f"{recall[end][1]:.2f}" for end in (0, -1)] if recall else ["–", "–"])


def converted_lines(results: Mapping[str, Any]) -> Iterator[Table | str]:
    """What a terminal shows."""
    table = Table(*(Column(name, justify="right") for name in COLUMNS))
    for index, layer in results["layers"].items():
        found = cells(index, layer)
        carried = "+".join(cell.replace(",", "") for cell in found[1:5])
        attention = " ".join(f"{float(cell):>3.0f}" for cell in found[5:9])
        table.add_row(index, carried, attention, *found[9:11], ", ".join(found[11:]))
    yield table
    yield (
        "carried, and attention at the end of the text: window, sinks, exact entries, slots; "
        "half-lives of slots in tokens, slots as good as in use; recall: the cosine of what slots "
        "give back with what they were given, newest and oldest tokens (docs/convert.md)"
    )
    for index, layer in results["layers"].items():
        # Of the head that holds most different tokens: others hold many of a kind.
        words = [[results["text"][place] for place in head] for head in layer["held"]]
        if any(words):
            most = max(words, key=lambda head: len(set(head)))
            named = ", ".join(f"“{word}”" for word in list(dict.fromkeys(most))[:HELD])
            yield f"layer {index} holds {len(most):,} tokens exactly, worth most first: {named}"
    loss, without = results["loss_behind_the_window"], results["loss_without_memory"]
    if not any(layer["slots"] or layer["exact"] for layer in results["layers"].values()):
        yield "no layer has slots or exact entries: there is no memory"
    elif loss is None:
        yield "the text fits into a window: nothing is in the memory yet"
    elif without is not None:
        yield (
            f"loss behind the first {results['begin']:,} tokens: {loss:.3f} nats/token, without "
            f"the memory {without:.3f}"
        )
    told = results["next"][-1]
    kinds = ", ".join(f"{kind} {sum(layers):+.2f}" for kind, layers in told["logit"].items())
    best = ", ".join(
        f"“{results['text'][source['place']]}” ({told['place'] - source['place']:,} back) "
        f"{source['logit']:+.2f}"
        for source in told["sources"][:4]
    )
    yield f"most probable next token “{told['token']}”: to its logit attention added by {kinds}"
    yield f"most of all by {best}"
