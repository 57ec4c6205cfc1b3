"""Write docs/WHITEPAPER.md and its figure from the template and the files of docs/results.

venv/bin/python studies/whitepaper.py

``--check`` writes nothing, and fails in one line that names the first place where the paper does
not say what its template and the results say. ``make paper`` makes a PDF of the paper.
"""

import argparse
import difflib
import json
import re
import sys
import textwrap
from itertools import zip_longest
from pathlib import Path
from statistics import mean

from jinja2 import Environment, StrictUndefined
from matplotlib.figure import Figure
from PIL import Image
from PIL.PngImagePlugin import PngInfo

sys.path.insert(0, str(Path(__file__).parent))

from whitepaper_contexts import CONTEXT_VALUES
from whitepaper_values import DOCS, VALUES, seeds_of

from hamt.measure.tables import standard_error
from hamt.visualization import COLOURS, as_png, panels

TEMPLATE = DOCS / "whitepaper" / "paper.md.j2"
PAPER = DOCS / "WHITEPAPER.md"
PICTURE = DOCS / "whitepaper" / "language.png"
DRAWN = "drawn"  # the field of the PNG file that has the figures in the picture
# What stands as it is: tables, headings, pictures, indented lines, equations and comments.
WHOLE = re.compile(r"\||#|!\[| {4}|\$\$|<!--")
ATOM = re.compile(r"\$[^$]+\$|`[^`]+`")  # in a line: never cut in two
WIDTH = 100
MODELS = {
    "HAMT": "half-hamt-no-rotation",
    "transformer": "half-transformer-conv",
    "Mamba-2": "half-mamba2",
    "Gated DeltaNet": "half-gated-deltanet",
}
LARGER = {
    "HAMT": "half-multiplier",
    "HAMT, normalised rule": "half-normalized-rule-multiplier",
    "HAMT, windows": "half-hybrid-multiplier",
    "transformer": "half-transformer-conv-multiplier",
}


def render() -> str:
    """The paper as its template and the results would have it."""
    environment = Environment(
        undefined=StrictUndefined, trim_blocks=True, lstrip_blocks=True, keep_trailing_newline=True
    )
    environment.globals.update({**VALUES, **CONTEXT_VALUES})
    text = environment.from_string(TEMPLATE.read_text(encoding="utf-8")).render()
    return re.sub(r"\n{3,}", "\n\n", wrapped(text)).rstrip() + "\n"


def wrapped(text: str) -> str:
    """Sentences of at most ``WIDTH`` columns a line; blocks and equations stay as they are."""
    lines, block = [], None
    for line in text.splitlines():
        fence = line.strip() if line.strip() in ("$$",) or line.startswith("```") else None
        if block or fence or WHOLE.match(line) or len(line) <= WIDTH:
            lines.append(line)
        else:
            indent = "  " if line.startswith("- ") else ""
            kept = ATOM.sub(lambda atom: atom[0].replace(" ", "\0"), line)
            lines += [
                each.replace("\0", " ")
                for each in textwrap.wrap(
                    kept,
                    WIDTH,
                    subsequent_indent=indent,
                    break_long_words=False,
                    break_on_hyphens=False,
                )
            ]
        if fence:
            block = None if block else fence
    return "\n".join(lines)


def drawn() -> dict[str, dict[str, list[float]]]:
    """By panel and model, the mean loss and its standard error; 0 of one run."""
    found: dict[str, dict[str, list[float]]] = {}
    for title, folder, names in (
        ("small embeddings (0.02)", "wikitext2", MODELS),
        ("embeddings × √width", "architecture", LARGER),
    ):
        panel = found[title] = {}
        for label, name in names.items():
            losses = [each["figure"] for each in seeds_of(f"{folder}/{name}")]
            seeds = f"{label}\n({len(losses)} seed{'s' * (len(losses) > 1)})"
            panel[seeds] = [round(mean(losses), 6), round(standard_error(losses), 6)]
    return found


def draw(found: dict[str, dict[str, list[float]]]) -> Figure:
    """A panel for each initialisation, on one scale."""
    figure, all_axes = panels(len(found), size=(4.6, 2.6))
    values = [value for panel in found.values() for value, _ in panel.values()]
    for axes, (title, panel) in zip(all_axes, found.items(), strict=True):
        rows, (means, errors) = range(len(panel)), zip(*panel.values(), strict=True)
        axes.errorbar(means, rows, xerr=errors, fmt="o", capsize=3, color=COLOURS[0])
        axes.set_yticks(rows, list(panel), fontsize="small")
        axes.set_ylim(len(panel) - 0.5, -0.5)
        axes.set_xlim(min(values) - 0.03, max(values) + 0.04)
        axes.set_xlabel("held-out loss, nats/token (± s.e.)")
        axes.set_title(title, fontsize="medium")
    return figure


def write() -> None:
    """Write the paper, and the picture where its figures have changed."""
    PAPER.write_text(render(), encoding="utf-8")
    if picture_differs():
        PICTURE.write_bytes(as_png(draw(drawn())))
        notes = PngInfo()
        notes.add_text(DRAWN, json.dumps(drawn()))
        with Image.open(PICTURE) as image:
            image.load()
        image.save(PICTURE, pnginfo=notes)


def picture_differs() -> bool:
    """Whether the picture is missing, or was drawn from other figures."""
    if not PICTURE.is_file():
        return True
    with Image.open(PICTURE) as image:
        return image.info.get(DRAWN) != json.dumps(drawn())


def difference(paper: str, wanted: str) -> str | None:
    """Where the paper first differs from what it should say, in one line; None if nowhere."""
    pairs = zip_longest(paper.splitlines(), wanted.splitlines(), fillvalue="(the end)")
    for number, (got, right) in enumerate(pairs, start=1):
        if got != right:
            got, right = _around(got, right)
            return f"docs/WHITEPAPER.md:{number}: says “{got}”, the results say “{right}”"
    return None


def _around(got: str, right: str) -> tuple[str, str]:
    """The parts of two lines around their first difference."""
    match = difflib.SequenceMatcher(None, got, right, autojunk=False)
    first = next(code for code in match.get_opcodes() if code[0] != "equal")
    begin = max(0, first[1] - 30)
    return got[begin : first[2] + 30], right[begin : first[4] + 30]


def check() -> str | None:
    """What is wrong with the paper or its picture, in one line."""
    paper = PAPER.read_text(encoding="utf-8") if PAPER.is_file() else ""
    if found := difference(paper, render()):
        return found
    if picture_differs():
        return f"docs/{PICTURE.relative_to(DOCS)} was drawn from other figures"
    return None


def main() -> int:
    """Write the paper, or say where it is wrong."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--check", action="store_true", help="write nothing")
    if not parser.parse_args().check:
        write()
        return 0
    if wrong := check():
        print(f"{wrong}; venv/bin/python studies/whitepaper.py writes it anew", file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
