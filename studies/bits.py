"""What weights of fewer bits cost and bring: docs/results/bits.

venv/bin/pip install --no-deps --target checkpoints/torchao torchao==0.18.0
PYTHONPATH=checkpoints/torchao OMP_NUM_THREADS=1 venv/bin/python studies/bits.py \\
    --checkpoint checkpoints/wikitext2 --characters 400000

torchao has a folder of its own, as it writes a warning wherever Transformers is imported; so it is
no part of requirements-dev.txt.
"""

import argparse
import io
import warnings
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch.ao.quantization import quantize_dynamic
from torchao.quantization import (
    Int8DynamicActivationInt8WeightConfig,
    Int8WeightOnlyConfig,
    quantize_,
)

from hamt import HAMTCache, HAMTForCausalLM
from hamt.checkpoint import PRETRAINED, load_checkpoint
from hamt.environment import describe_environment, environment
from hamt.measure.perplexity import score_documents
from hamt.measure.report import write_report
from hamt.measure.tables import markdown, megabytes, number, paragraphs
from hamt.measure.timing import interleave
from hamt.output import claim

STEPS = 32  # tokens that are decoded in a call
ROWS = (1, 16)
PREFILL = 512  # tokens


def fused(model: HAMTForCausalLM) -> HAMTForCausalLM:
    """As ``hamt generate`` runs it."""
    model.fuse_projections()
    return model


def with_torchao(config: Any, model: HAMTForCausalLM) -> HAMTForCausalLM:
    """Every linear map's weight as torchao keeps it."""
    quantize_(model, config)
    return model


KINDS: dict[str, Callable[[HAMTForCausalLM], HAMTForCausalLM]] = {
    "float32": lambda model: model,
    "float32, projections fused": fused,
    "bfloat16": lambda model: model.to(torch.bfloat16),
    "int8 weights (torchao)": partial(with_torchao, Int8WeightOnlyConfig()),
    "int8 weights and activations (torchao)": partial(
        with_torchao, Int8DynamicActivationInt8WeightConfig()
    ),
    "int8 weights and activations (quantize_dynamic)": partial(
        quantize_dynamic, qconfig_spec={torch.nn.Linear}, dtype=torch.qint8
    ),
}


def file_bytes(model: HAMTForCausalLM) -> int:
    """Bytes of all weights, as they are saved."""
    file = io.BytesIO()
    torch.save(model.state_dict(), file)
    return file.getbuffer().nbytes


@torch.no_grad()
def decode(model: HAMTForCausalLM, state: HAMTCache, rows: int) -> None:
    """Decode STEPS tokens in each row."""
    state, ids = state.fork(), torch.zeros(rows, 1, dtype=torch.long)
    for _ in range(STEPS):
        ids = model(ids, past_key_values=state, logits_to_keep=1).logits.argmax(-1)


@torch.no_grad()
def read(model: HAMTForCausalLM, rows: int, length: int) -> HAMTCache:
    """The state after so many tokens."""
    ids = torch.arange(length).expand(rows, -1) % model.config.vocab_size
    return model(ids, use_cache=True, logits_to_keep=1).past_key_values


def main() -> None:
    """Measure, and write a table."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--checkpoint", default=str(PRETRAINED))
    parser.add_argument("--text", default="../shared/data/wikitext-2/wiki.valid.tokens")
    parser.add_argument("--characters", type=int, help="of the text; all if not given")
    parser.add_argument("--rounds", type=int, default=9)
    parser.add_argument("--output_dir", default="docs/results/bits")
    options = parser.parse_args()
    warnings.filterwarnings("ignore", category=DeprecationWarning)
    header = environment()
    text = Path(options.text).read_text(encoding="utf-8")[: options.characters]
    models: dict[str, HAMTForCausalLM] = {}
    for name, change in KINDS.items():
        model, tokenizer = load_checkpoint(options.checkpoint)
        models[name] = change(model)
    calls: dict[str, Callable[[], object]] = {}
    for name, model in models.items():
        for rows in ROWS:
            calls[f"{name}/{rows}"] = partial(decode, model, read(model, rows, 64), rows)
        calls[f"{name}/read"] = partial(read, model, 1, PREFILL)
    times = interleave(calls, options.rounds)
    runs = []
    for name, model in models.items():
        score = score_documents(model, tokenizer, [text], context=512)
        decoding = {rows: times[f"{name}/{rows}"] for rows in ROWS}
        runs.append(
            {
                "weights": name,
                "bytes": file_bytes(model),
                "nats": score.nats / score.tokens,
                "tokens": score.tokens,
                "decode_s": {rows: timing._asdict() for rows, timing in decoding.items()},
                "read_s": times[f"{name}/read"]._asdict(),
            }
        )
        print(runs[-1]["weights"], runs[-1]["bytes"], runs[-1]["nats"], flush=True)

    def cell(timing: dict[str, Any], tokens: int) -> str:
        low, high = (tokens / x for x in reversed(timing["quartiles_s"]))
        middle = tokens / timing["median_s"]
        return f"{number(middle, 0)} ({number(low, 0)} to {number(high, 0)})"

    table = [
        [
            run["weights"],
            megabytes(run["bytes"]),
            f"{run['nats']:.4f}",
            *(cell(run["decode_s"][rows], STEPS * rows) for rows in ROWS),
            cell(run["read_s"], PREFILL),
        ]
        for run in runs
    ]
    headings = ["weights", "MB", "nats/token"]
    headings += [f"tokens/s, decoding {rows} {'row' if rows == 1 else 'rows'}" for rows in ROWS]
    headings.append(f"tokens/s, reading {PREFILL} tokens")
    page = paragraphs(
        "# Weights with fewer bits",
        f"{models['float32'].num_parameters() / 1e6:.1f}M parameters; the loss is that of "
        f"{runs[0]['tokens']:,} tokens of {Path(options.text).name} in windows of 512. Speeds are "
        "medians (quartiles) of calls in interleaved rounds. The embedding, which is also the map "
        "to the vocabulary, is kept in float32 where weights are int8, beside the int8 copy that "
        "the map then is.",
        markdown(headings, table, text=[0]),
        describe_environment(header),
    )
    with claim(options.output_dir, "bits", [r"bits\.(json|md)"], adopt=True) as output:
        write_report(output, "bits", {"environment": header, "runs": runs}, page, {})


if __name__ == "__main__":
    main()
