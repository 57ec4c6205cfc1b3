"""Make a PDF of docs/WHITEPAPER.md: ``make paper``.

It needs pandoc and Typst, of docs/whitepaper/requirements.txt, and neither HAMT nor a network.
"""

import argparse
import re
import tempfile
from pathlib import Path

import pypandoc
import typst

DOCS = Path(__file__).parent.parent / "docs"
# What comes before pandoc's own: the page, and figures and tables that fit it.
STYLE = """
#set page(paper: "a4", margin: (x: 22mm, y: 24mm), numbering: "1")
#set text(font: "Libertinus Serif", size: 10pt, lang: "en")
#set par(justify: true, leading: 0.58em, spacing: 0.9em)
#show heading: set block(above: 1.4em, below: 0.8em)
#show heading.where(level: 1): set text(size: 17pt)
#show raw: set text(size: 9pt)
#show table: set text(size: 8.5pt)
#show table: set par(justify: false, leading: 0.45em)
#set table(inset: (x: 4pt, y: 3pt), stroke: none)
#show figure: set block(breakable: false, above: 1.2em, below: 1.2em)
#show figure.caption: set text(size: 9pt)
#show math.equation.where(block: true): set block(above: 1em, below: 1em)
#show link: set text(fill: rgb("#0a4d8c"))
#let horizontalrule = line(length: 100%)
"""
# Widths of pictures, of that of the text.
PICTURES = {
    "binding.png": 70,
    "capacity.png": 88,
    "recall.png": 62,
    "language.png": 100,
    "cost.png": 80,
}


def markdown() -> str:
    """The paper, without what only its place in the repository makes sense of."""
    text = (DOCS / "WHITEPAPER.md").read_text(encoding="utf-8")
    text = re.sub(r"<!--.*?-->\n*", "", text, flags=re.DOTALL)
    text = re.sub(r"!\[([^\]]+)\]\(([^)]+)\)", _figure, text)
    # Links to other pages lead nowhere from a PDF: their words stay, or where they lead.
    text = re.sub(r"\(\[[^\]]+\]\((?!http)([^)#]+)[^)]*\)\)", r"(docs/\1)", text)
    return re.sub(r"\[([^\]]+)\]\((?!http)[^)]*\)", r"\1", text)


def _figure(match: re.Match[str]) -> str:
    """A picture with its words as the caption, in the language of Typst."""
    caption, path = match.groups()
    width = PICTURES[Path(path).name]
    picture = f'#figure(image("{path}", width: {width}%), caption: [{caption}], placement: auto)'
    return f"```{{=typst}}\n{picture}\n```"


def typeset() -> str:
    """The paper in the language of Typst."""
    extensions = "+tex_math_gfm+tex_math_dollars+raw_attribute"
    body = pypandoc.convert_text(
        markdown(), "typst", format=f"gfm{extensions}", extra_args=["--wrap=none"]
    )
    # Names that Typst has changed since, and a word that is no product of letters.
    body = body.replace("times.circle", "times.o").replace("upright(D i a g)", 'op("Diag")')
    body = re.sub(r"(?<=[(,])auto\b", "left", body)  # columns of words
    # A table of two columns is one of text: the second has what is left of the line.
    return STYLE + body.replace("columns: 2,\n", "columns: (32%, 1fr),\n")


def main() -> None:
    """Write the PDF."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--output", default="WHITEPAPER.pdf")
    target = Path(parser.parse_args().output)
    # Typst reads pictures from below its root alone.
    with tempfile.NamedTemporaryFile("w", suffix=".typ", dir=DOCS, encoding="utf-8") as source:
        source.write(typeset())
        source.flush()
        typst.compile(source.name, output=str(target), root=str(DOCS))
    print(f"wrote {target}")


if __name__ == "__main__":
    main()
