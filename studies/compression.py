"""What fewer bits for the memory's slots cost: docs/results/compression.

OMP_NUM_THREADS=1 venv/bin/python studies/compression.py
"""

import argparse
import copy
import tempfile
from itertools import pairwise
from pathlib import Path

import torch
from transformers import PreTrainedTokenizerBase

from hamt import HAMTCache, HAMTForCausalLM
from hamt.checkpoint import PRETRAINED, load_checkpoint
from hamt.environment import describe_environment, environment
from hamt.measure.perplexity import score_documents
from hamt.measure.report import write_report
from hamt.measure.tables import markdown, paragraphs
from hamt.memory.precision import PRECISIONS
from hamt.output import claim

TRAINED = 256  # tokens of a row in training
TIMES = (1, 8, 64)  # as many, up to which a context is scored
EVERY = (16, 64, 256)  # tokens from one rounding to the next


def rounding(model: HAMTForCausalLM, precision: str, every: int) -> HAMTForCausalLM:
    """The same model, which rounds its slots at boundaries."""
    config = copy.deepcopy(model.config)
    config.state_precision, config.boundary_every = precision, every
    other = HAMTForCausalLM(config)
    other.load_state_dict(model.state_dict())
    return other.eval()


def file_bytes(model: HAMTForCausalLM, precision: str) -> int:
    """Bytes of the file of a state of one row."""
    cache = HAMTCache(model.config.num_layers)
    model(torch.arange(64)[None], past_key_values=cache)
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "state"
        cache.save(path, precision)
        return path.stat().st_size


def losses(
    model: HAMTForCausalLM, tokenizer: PreTrainedTokenizerBase, texts: list[str]
) -> dict[int, float]:
    """Mean loss in nats per token of the positions up to each multiple of the training length.

    Of the positions beyond the multiple before, that is, in the part that is new.
    """
    score = score_documents(model, tokenizer, texts, context=None)
    edges = [0, *(times * TRAINED for times in TIMES)]
    means = score.mean_by_position(edges)
    return {times: mean for times, (_, _, mean) in zip(TIMES, means, strict=True)}


def main() -> None:
    """Score two novels with every precision, and write a table."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--books", default="../shared/data/books/held_out")
    parser.add_argument("--output_dir", default="docs/results/compression")
    options = parser.parse_args()
    header = environment()
    model, tokenizer = load_checkpoint(PRETRAINED)
    texts = []
    for path in sorted(Path(options.books).glob("*.txt")):
        ids = tokenizer(path.read_text(encoding="utf-8"), verbose=False).input_ids
        texts.append(tokenizer.decode(ids[: max(TIMES) * TRAINED]))
    rows, figures = [], []
    for precision in PRECISIONS:
        size = file_bytes(model, precision)
        for every in EVERY if precision != "float32" else (TRAINED,):
            found = losses(rounding(model, precision, every), tokenizer, texts)
            figures.append(
                {"precision": precision, "boundary_every": every, "bytes": size, "nats": found}
            )
            shown = "" if precision == "float32" else str(every)
            rows.append([precision, shown, f"{size:,}", *(f"{x:.4f}" for x in found.values())])
            print(rows[-1], flush=True)
    headings = ["slots", "rounded every", "bytes of a state's file"]
    edges = (0, *(times * TRAINED for times in TIMES))
    headings += [f"nats/token, tokens {a + 1:,} to {b:,}" for a, b in pairwise(edges)]
    page = paragraphs(
        "# Slots with fewer bits",
        f"Two novels, {len(texts)} × {max(TIMES) * TRAINED:,} tokens, read by the model in HAMT, "
        f"which was trained on rows of {TRAINED} tokens of other text; its state is carried along.",
        markdown(headings, rows, text=[0]),
        describe_environment(header),
    )
    with claim(
        options.output_dir, "compression", [r"compression\.(json|md)"], adopt=True
    ) as output:
        write_report(output, "compression", {"environment": header, "runs": figures}, page, {})


if __name__ == "__main__":
    main()
