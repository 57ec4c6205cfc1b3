"""What training of 100M, 1B and 7B parameters costs on GPUs, by formula: docs/results/scale.

OMP_NUM_THREADS=1 venv/bin/python studies/cost_model.py

Nothing is trained. What can be measured on this machine is compared with the formulas.
"""

import argparse
import os
from collections.abc import Iterator, Mapping
from dataclasses import asdict
from itertools import product
from typing import Any

import torch

from hamt import HAMTConfig, HAMTForCausalLM
from hamt.environment import describe_environment, environment
from hamt.measure.flops import count_flops
from hamt.measure.report import write_report
from hamt.measure.tables import markdown, number, paragraphs
from hamt.output import claim
from hamt.peak_memory import call_peak_memory
from hamt.training.cost import DEVICES, SIZES, Assumptions, activations, cost, stored_bytes
from hamt.training.estimate import training_flops
from hamt.training.memory import GRADIENT

GPUS = (1, 8, 64)
# Sizes of what is measured here, and rows and tokens of a row.
CHECKED = {
    "small": ({"hidden_dim": 192, "num_layers": 6, "vocab_size": 8192}, 4, 256),
    "medium": ({"hidden_dim": 384, "num_layers": 8, "vocab_size": 8192}, 4, 256),
}


def check(fields: dict[str, Any], rows: int, length: int) -> dict[str, Any]:
    """Formulas beside what a training step of the model does on this CPU, in float32."""
    config = HAMTConfig(**fields | {"max_position_embeddings": length})
    model = HAMTForCausalLM(config).train()
    ids = torch.randint(config.vocab_size, (rows, length))

    def step() -> None:
        loss = model(ids, labels=ids, return_logits=False).loss
        assert loss is not None
        loss.backward()

    step()
    model.zero_grad(set_to_none=True)
    held = activations(fields, rows, length)
    gradients = model.num_parameters() * GRADIENT
    found: dict[str, Any] = {
        "parameters": model.num_parameters(),
        "rows": rows,
        "length": length,
        "operations": [training_flops(model) * rows * length, count_flops(step)],
        "stored_bytes": [
            held.stored(config.num_layers, twice=False),
            stored_bytes(model, rows, length),
        ],
    }
    for twice, name in ((False, "peak_bytes"), (True, "peak_bytes_twice")):
        model.zero_grad(set_to_none=True)
        if twice:
            model.activation_checkpointing_enable()
        measured = call_peak_memory(step)
        found[name] = [held.peak(config.num_layers, gradients, twice=twice), measured]
    model.activation_checkpointing_disable()
    with torch.autocast("cpu", torch.bfloat16):
        found["stored_bytes_bfloat16"] = stored_bytes(model, rows, length)
    return found


def variants() -> Iterator[dict[str, Any]]:
    """The cost of each size on each number of GPUs of each device, by DDP and by FSDP2."""
    for (size, of), processes, kind in product(SIZES.items(), GPUS, ("DDP", "FSDP2")):
        if processes == 1 and kind == "FSDP2":
            continue  # nothing to cut
        for device, figures in DEVICES.items():
            named = {"size": size, "processes": processes, "kind": kind, "device": device}
            yield named | cost(of, kind, processes, figures, Assumptions())


def calculated() -> dict[str, Any]:
    """All that follows from the code, without a measurement."""
    return {
        "sizes": {name: asdict(size) for name, size in SIZES.items()},
        "devices": {name: asdict(device) for name, device in DEVICES.items()},
        "assumptions": asdict(Assumptions()),
        "runs": list(variants()),
    }


def page(result: Mapping[str, Any]) -> str:
    """The tables."""
    assumed = result["assumptions"]
    return paragraphs(
        "# What training costs on GPUs, by formula",
        "No GPU was used: every figure follows from shapes, from the data sheets' figures and from "
        f"what is assumed: {assumed['share_of_peak']:.0%} of the peak operations, "
        f"{assumed['tokens_per_parameter']} tokens a parameter, at most "
        f"{assumed['micro_batch']:,} tokens at a time in each process. "
        "[How they are derived](../../scale.md#what-a-run-on-gpus-would-cost).",
        _sizes(result),
        "Memory of a GPU in GB (10⁹ bytes): what weights, optimiser and gradients take, and the "
        "most in a step, of blocks that are computed once and twice (`--gradient_checkpointing`), "
        "with activations in float32; and GB that a GPU sends in a step.",
        _memory(result),
        "Seconds of a step: for the operations / to send / to read and write the memory. Tokens/s "
        "and days are those of the longest of the three. `twice`: the blocks are computed twice, "
        "since they do not fit otherwise.",
        _times(result),
        "Formulas beside what was measured on this CPU with PyTorch's operators, as a GPU without "
        "flash-linear-attention has them:",
        _checks(result),
        describe_environment(result["environment"]),
    )


def _sizes(result: Mapping[str, Any]) -> str:
    rows = []
    for name, size in result["sizes"].items():
        run = next(run for run in result["runs"] if run["size"] == name)
        rows.append(
            [
                name,
                f"{run['parameters'] / 1e6:,.1f}M",
                f"{size['hidden_dim']:,} × {size['num_layers']}",
                f"{run['operations_per_token'] / 1e9:.2f}",
                f"{size['batch']:,}",
                f"{run['tokens'] / 1e9:.1f}",
            ]
        )
    header = [
        *("model", "parameters", "width × blocks", "10⁹ operations a token"),
        *("tokens of a step (assumed)", "10⁹ tokens in all"),
    ]
    return markdown(header, rows, text=[0])


def _of(run: Mapping[str, Any]) -> list[str]:
    return [run["size"], str(run["processes"]), run["kind"] if run["processes"] > 1 else "–"]


def _memory(result: Mapping[str, Any]) -> str:
    device = next(iter(result["devices"]))  # memory does not depend on it
    rows = [
        [
            *_of(run),
            *(
                number(run[name] / 1e9, 1)
                for name in ("state_bytes", "peak_bytes", "peak_bytes_twice", "sent_bytes")
            ),
        ]
        for run in result["runs"]
        if run["device"] == device
    ]
    header = [
        *("model", "GPUs", "by", "weights, optimiser, gradients"),
        *("most, once", "most, twice", "sent"),
    ]
    return markdown(header, rows, text=[0, 2])


def _times(result: Mapping[str, Any]) -> str:
    rows = []
    for run in result["runs"]:
        cells = ["does not fit", "–", "–"]
        if run["step_s"] is not None:
            parts = ("compute_s", "communication_s", "memory_s")
            cells = [
                " / ".join(f"{run[part]:.3g}" for part in parts) + (" twice" * run["twice"]),
                f"{run['tokens_per_s']:,.0f}",
                f"{run['days']:.2g}" if run["days"] < 10 else f"{run['days']:.0f}",
            ]
        rows.append([*_of(run), run["device"], *cells])
    header = ["model", "GPUs", "by", "device", "seconds of a step", "tokens/s", "days"]
    return markdown(header, rows, text=[0, 2, 3, 4])


def _checks(result: Mapping[str, Any]) -> str:
    names = {
        "operations": "operations of a step (counted by PyTorch)",
        "stored_bytes": "bytes stored for the backward pass",
        "peak_bytes": "most bytes in a step",
        "peak_bytes_twice": "most bytes, blocks computed twice",
    }
    rows = []
    for of, found in result["checks"].items():
        label = f"{of}, {found['parameters'] / 1e6:.1f}M, {found['rows']} × {found['length']}"
        for name, text in names.items():
            formula, measured = found[name]
            rows.append(
                [label, text, f"{formula:,.0f}", f"{measured:,.0f}", f"{formula / measured:.3f}"]
            )
        share = found["stored_bytes_bfloat16"] / found["stored_bytes"][1]
        text = "bytes stored under bfloat16 autocast, over those in float32"
        rows.append([label, text, "–", f"{found['stored_bytes_bfloat16']:,.0f}", f"{share:.3f}"])
    return markdown(["model", "what", "formula", "measured", "ratio"], rows, text=[0, 1])


def main() -> None:
    """Calculate, measure, write."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--output_dir", default="docs/results/scale")
    options = parser.parse_args()
    os.environ["HAMT_FUSED"] = "0"  # the fused operator for CPUs stores less
    checks = {name: check(*sizes) for name, sizes in CHECKED.items()}
    result = {"environment": environment(), **calculated(), "checks": checks}
    with claim(options.output_dir, "cost_model", [r"cost\.(json|md)"], adopt=True) as output:
        for path in write_report(output, "cost", result, page(result), {}):
            print(f"wrote {path}")


if __name__ == "__main__":
    main()
