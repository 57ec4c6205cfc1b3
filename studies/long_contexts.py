"""Loss far beyond the training length, and after a change of text: docs/results/long_contexts.

Checkpoints of one name are seeds of one model, in the order of the seeds. Those of the published
table are made so, with seeds 0, 1, ..., once as it stands, once with ``--mixers
hierarchical_memory``, and once with ``--mixers memory sliding_attention memory memory
--sliding_window 256``:

hamt train configs/sotu.yaml --rotation none --max_length 512 --batch_size 8 --num_epochs 2 \\
    --seed 0 --output_dir FOLDER

OMP_NUM_THREADS=1 venv/bin/python studies/long_contexts.py --models NAME=FOLDER NAME=FOLDER ...
"""

import argparse
from collections.abc import Iterable, Iterator
from itertools import pairwise
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor

from hamt import HAMTCache, HAMTForCausalLM
from hamt.checkpoint import load_checkpoint
from hamt.data.corpus import load_corpus
from hamt.data.tokenizer import start_token
from hamt.environment import describe_environment, environment
from hamt.measure.perplexity import SEGMENT, score_documents
from hamt.measure.report import write_report
from hamt.measure.tables import grouped, markdown, paragraphs, with_error
from hamt.output import claim

LONGEST = 64  # times the training length, up to which a context is scored
FIRST = 1024  # tokens of an address before the other text
AFTER = 256  # tokens of the same address after it, which are scored
BETWEEN = (1024, 4096, 16384)  # tokens of the other text


def read(model: HAMTForCausalLM, cache: HAMTCache, ids: Tensor) -> None:
    """Read ids (1, N) into the cache."""
    for part in ids.split(SEGMENT, dim=1):
        model(part, past_key_values=cache, logits_to_keep=1)


def loss(model: HAMTForCausalLM, cache: HAMTCache, ids: Tensor) -> float:
    """Mean loss in nats of ids (1, N) but the first, after what the cache has read."""
    logits = model(ids[:, :-1], past_key_values=cache.fork()).logits
    return float(F.cross_entropy(logits[0].float(), ids[0, 1:]))


def returns(model: HAMTForCausalLM, addresses: Iterable[Tensor], prose: Tensor) -> dict[str, float]:
    """Mean loss of the rest of an address: alone, after its beginning, and after prose between.

    ``addresses`` are ids of FIRST + AFTER + 1 tokens, ``prose`` of max(BETWEEN).
    """
    names = ["alone", "beginning", *(str(tokens) for tokens in BETWEEN)]
    sums = dict.fromkeys(names, 0.0)
    count = 0
    for ids in addresses:
        rest, cache = ids[None, FIRST:], HAMTCache(model.config.num_layers)
        sums["alone"] += loss(model, cache, rest)
        read(model, cache, ids[None, :FIRST])
        sums["beginning"] += loss(model, cache, rest)
        for begin, end in pairwise((0, *BETWEEN)):
            read(model, cache, prose[None, begin:end])
            sums[str(end)] += loss(model, cache, rest)
        count += 1
    return {name: total / count for name, total in sums.items()}


def edges_of(trained: int) -> list[int]:
    """Positions at which the training length is doubled, up to LONGEST times."""
    edges = [0, trained]
    while edges[-1] < LONGEST * trained:
        edges.append(2 * edges[-1])
    return edges


def texts_of(books: Path) -> Iterator[str]:
    """The held-out novels."""
    for path in sorted(books.glob("*.txt")):
        yield path.read_text(encoding="utf-8")


@torch.inference_mode()
def measured(folder: str, trained: int, books: Path) -> dict[str, object]:
    """All figures of one checkpoint."""
    model, tokenizer = load_checkpoint(folder)
    assert isinstance(model, HAMTForCausalLM)

    start = torch.tensor([start_token(tokenizer)])

    def encoded(text: str) -> Tensor:
        ids = tokenizer(text, verbose=False, return_tensors="pt").input_ids[0]
        return torch.cat((start, ids))

    novels = [encoded(text) for text in texts_of(books)]
    beginnings = [tokenizer.decode(ids[1 : LONGEST * trained + 1]) for ids in novels]
    score = score_documents(model, tokenizer, beginnings, context=None)
    addresses = [encoded(text) for text in load_corpus("sotu").held_out]
    long_enough = [ids[: FIRST + AFTER + 1] for ids in addresses if len(ids) > FIRST + AFTER]
    return {
        "state_bytes": state_bytes(model),
        "by_position": [mean for _, _, mean in score.mean_by_position(edges_of(trained))],
        "addresses": len(long_enough),
        "returns": returns(model, long_enough, novels[0]),
    }


def state_bytes(model: HAMTForCausalLM) -> int:
    """Bytes of the state of one row."""
    cache = HAMTCache(model.config.num_layers)
    read(model, cache, torch.arange(2)[None])
    return cache.nbytes


def main() -> None:
    """Measure every checkpoint, and write a page of two tables."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--models", nargs="+", required=True, metavar="NAME=FOLDER")
    parser.add_argument("--trained", type=int, default=512, help="tokens of a row in training")
    parser.add_argument("--books", type=Path, default=Path("../shared/data/books/held_out"))
    parser.add_argument("--output_dir", default="docs/results/long_contexts")
    options = parser.parse_args()
    header, runs = environment(), []
    for model in options.models:
        name, _, folder = model.partition("=")
        runs.append({"model": name, **measured(folder, options.trained, options.books)})
        print(runs[-1], flush=True)
    seeds = grouped(runs, lambda run: run["model"])
    places = list(pairwise(edges_of(options.trained)))
    by_position = [
        [name, f"{group[0]['state_bytes']:,}"]
        + [
            with_error(figures, 3)
            for figures in zip(*(run["by_position"] for run in group), strict=True)
        ]
        for name, group in seeds.items()
    ]
    after = [
        [name]
        + [
            with_error(figures, 3)
            for figures in zip(*(run["returns"].values() for run in group), strict=True)
        ]
        for name, group in seeds.items()
    ]
    page = paragraphs(
        "# Far beyond the training length, and after a change of text",
        "Loss in nats per token of two novels, read by models trained on State of the Union "
        f"addresses in rows of {options.trained:,} tokens; the state is carried along.",
        markdown(
            ["model", "bytes of a state", *(f"tokens {a + 1:,} to {b:,}" for a, b in places)],
            by_position,
            text=[0],
        ),
        f"Loss of {AFTER} tokens of a held-out address, the mean of {runs[0]['addresses']} "
        f"addresses: without what stands before, after the {FIRST:,} tokens before, and when so "
        "many tokens of a novel stand between the two.",
        markdown(
            ["model", "alone", "after its beginning", *(f"{n:,} tokens between" for n in BETWEEN)],
            after,
            text=[0],
        ),
        describe_environment(header),
    )
    names = [r"long_contexts\.(json|md)"]
    with claim(options.output_dir, "long_contexts", names, adopt=True) as output:
        write_report(output, "long_contexts", {"environment": header, "runs": runs}, page, {})


if __name__ == "__main__":
    main()
