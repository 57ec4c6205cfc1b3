"""What a conversion has come to, on held-out text, beside the transformer."""

from collections.abc import Sequence
from typing import Any

import torch
from rich.table import Column, Table
from torch import Tensor

from hamt.convert.objectives import divergence, without_adapters
from hamt.convert.recall_text import FactRow
from hamt.converted_model import ConvertedForCausalLM, Pass, full_attention
from hamt.cross_entropy import next_token_loss


@torch.no_grad()
def figures(
    model: ConvertedForCausalLM, rows: Sequence[Tensor], facts: Sequence[FactRow]
) -> dict[str, float]:
    """Means over rows of ids (1, N), and over answers to questions for facts.

    Returns:
        ``nats`` a token, ``of_transformer``, the ``divergence`` from it, and, if there are texts
        with facts, ``facts`` and ``facts_of_transformer``, nats a token of the answers.
    """
    head = model.lm_head.weight
    found = dict.fromkeys(("nats", "of_transformer", "divergence"), 0.0)
    for row in rows:
        whole, own = _both(model, row)
        for name, hidden in (("of_transformer", whole), ("nats", own)):
            found[name] += float(next_token_loss(hidden[:, :-1], head, row[:, 1:])) / len(rows)
        found["divergence"] += float(divergence(own, whole, head)) / len(rows)
    for ids, answers in facts:
        whole, own = _both(model, ids)
        for name, hidden in (("facts_of_transformer", whole), ("facts", own)):
            loss = next_token_loss(hidden[:, answers - 1], head, ids[:, answers])
            found[name] = found.get(name, 0.0) + float(loss) / len(facts)
    return found


def _both(model: ConvertedForCausalLM, row: Tensor) -> tuple[Tensor, Tensor]:
    """What leaves the last norm, (1, N, d): of the transformer, and of the model."""
    embedded = model.model.embed_tokens(row)
    with without_adapters(model):
        whole = model.model.run_body(embedded, Pass(instead=full_attention))
    return whole, model.model.run_body(embedded, Pass())


def told(found: dict[str, float]) -> str:
    """``figures`` in a line."""
    excess = found["nats"] / found["of_transformer"] - 1
    line = (
        f"loss {found['nats']:.3f} nats/token, {excess:+.1%} of the transformer's; "
        f"divergence {found['divergence']:.3f} nats"
    )
    if "facts" in found:
        line += f"; facts {found['facts']:.2f} nats/token ({found['facts_of_transformer']:.2f})"
    return line


def stage_table(rows: Sequence[dict[str, Any]]) -> Table:
    """What each stage brought, in 80 columns."""
    columns = ["tokens", "minutes", "loss", "excess", "divergence"]
    caption = "loss, divergence"
    if has_facts := all("facts" in row for row in rows):
        columns += ["facts"]
        caption += ", and loss on facts (the transformer's)"
    caption += ": nats a token, held out; excess: of the loss over the transformer's"
    shown = (Column(name, justify="right", no_wrap=True) for name in columns)
    table = Table(Column("after", no_wrap=True), *shown, caption=caption, caption_justify="left")
    for row in rows:
        cells = [
            f"{row['tokens']:,}",
            f"{row['seconds'] / 60:.1f}",
            f"{row['nats']:.3f}",
            f"{row['nats'] / row['of_transformer'] - 1:+.1%}",
            f"{row['divergence']:.3f}",
        ]
        if has_facts:
            cells += [f"{row['facts']:.2f} ({row['facts_of_transformer']:.2f})"]
        table.add_row(row["stage"], *cells)
    return table
