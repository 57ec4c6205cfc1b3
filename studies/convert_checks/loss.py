"""Loss, KL divergence and agreement beside the teacher, by position (``hamt.measure.beside``)."""

import time
from collections.abc import Sequence
from typing import Any

import torch

from convert_checks.models import Named, fingerprint, texts
from convert_checks.rows import Rows
from hamt.measure.beside import Beside, compared_windows, figures

STARTS = (0, 512, 1024, 2048)


def measure_loss(
    rows: Rows, teacher: Named, models: Sequence[Named], text: tuple[str, str], options: Any
) -> None:
    """Rows of one text, a name and its source, at ``options.contexts`` tokens.

    Models that are not measured yet read the text together.
    """
    name, source = text
    documents = texts(source, teacher.tokenizer, options.tokens)
    for context in options.contexts:
        pending, settings = {}, {}
        for model in models:
            place = {"part": "loss", "text": name, "context": context, "model": model.name}
            of = {"tokens": options.tokens, "weights": model.weights, "teacher": teacher.weights}
            of |= {"text": fingerprint(documents), "device": options.device}
            if rows.done(place, of) is None:
                pending[model.name], settings[model.name] = model, (place, of)
        if not pending:
            continue
        begun = time.perf_counter()
        starts = [start for start in STARTS if start < context]
        key = {"text": name, "context": context, "of": {k: of for k, (_, of) in settings.items()}}
        sums = rows.partial(key)
        told = teacher.tokenizer, documents, context, starts
        loaded = {name: model.model for name, model in pending.items()}
        for each in compared_windows(teacher.model, loaded, *told, skip=len(sums)):
            sums.append({name: bands.tolist() for name, bands in each.items()})
            rows.keep(key, sums)
        num_bytes = sum(len(document.encode()) for document in documents)
        for model, (place, of) in settings.items():
            found = figures(torch.tensor([each[model] for each in sums]).double(), starts)
            shown = {"bytes": num_bytes, "from": [as_dict(each) for each in found]}
            rows.add(place, of, shown, begun)


def as_dict(figure: Beside) -> dict[str, Any]:
    """For a file; a ratio is [value, error]."""
    return {k: list(v) if isinstance(v, tuple) else v for k, v in figure._asdict().items()}
