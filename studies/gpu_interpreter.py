"""The kernels of flash-linear-attention beside the chunked form, on a CPU: docs/results/gpu.

OMP_NUM_THREADS=1 venv/bin/python studies/gpu_interpreter.py

Triton interprets the kernels: what is compared is what they compute, in the first of the
configurations that they can be tuned to. Nothing is said of their speed.
"""

import argparse
import os
import sys
from dataclasses import asdict
from importlib.metadata import version
from pathlib import Path
from typing import Any

if __name__ == "__main__":  # before anything imports Triton
    os.environ["TRITON_INTERPRET"] = "1"
sys.path.insert(0, str(Path(__file__).parent))

from gpu_checks.agreement import cases, errors, model_errors, worst
from gpu_checks.interpreter import interpret

from hamt.checkpoint import PRETRAINED, load_checkpoint
from hamt.environment import describe_environment, environment
from hamt.measure.report import write_report
from hamt.measure.tables import markdown, paragraphs
from hamt.output import claim

TOKENS = 33  # that the model reads


def page(result: dict[str, Any]) -> str:
    """The figures in a table."""

    def cell(found: dict[str, float], gradients: bool) -> str:
        part = {n: error for n, error in found.items() if n.startswith("gradient") == gradients}
        return f"{worst(part):.1e}" if part else "–"

    lines = []
    for each in result["cases"]:
        fla, chunked = each["errors"]["fla"], each["errors"]["chunked"]
        cells = [cell(form, gradients) for gradients in (False, True) for form in (fla, chunked)]
        lines.append([each["name"], *cells, f"{each['tolerance']:.0e}"])
    headings = ["rule, dtype, tokens, slots × features", "outputs and state, `fla`", "`chunked`"]
    headings += ["gradients, `fla`", "`chunked`", "tolerance"]
    model = ", ".join(f"{name} {error:.1e}" for name, error in result["model"].items())
    return paragraphs(
        "# The kernels for GPUs, interpreted on a CPU",
        "The largest difference from the chunked form in float64, as a share of the largest entry "
        "of the same tensor: of the form `fla`, and of the chunked form in the dtypes of the "
        "first column. Outputs, state and all gradients, that of the state before the first token "
        "included; one token is read without gradients. Documents are those of the first row, and "
        "padding is that of the last.",
        markdown(headings, lines, text=[0]),
        f"The model of the package, {TOKENS} tokens, float32: {model}.",
        f"fla-core {result['versions']['fla-core']}, triton {result['versions']['triton']}, whose "
        f"interpreter runs the kernels; {describe_environment(result['environment'])}",
    )


def main() -> None:
    """Compare, and write a table."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--output_dir", default="docs/results/gpu")
    options = parser.parse_args()
    interpret()
    result: dict[str, Any] = {
        "environment": environment(),
        "versions": {name: version(name) for name in ("fla-core", "triton")},
        "cases": [],
    }
    for case in cases():
        found = errors(case, "cpu")
        about = {"name": str(case), **asdict(case), "tolerance": case.tolerance("cpu")}
        result["cases"].append({**about, "errors": found})
        print(case, f"{worst(found['fla']):.1e}", flush=True)
    model, _ = load_checkpoint(PRETRAINED)
    result["model"] = model_errors(model, TOKENS)
    print(result["model"])
    with claim(options.output_dir, "gpu", [r"interpreter\.(json|md)"], adopt=True) as output:
        write_report(output, "interpreter", result, page(result), {})
    failed = [
        each["name"]
        for each in result["cases"]
        if not worst(each["errors"]["fla"]) <= each["tolerance"]
    ]
    if failed:
        raise SystemExit("further off than they may be: " + "; ".join(failed))


if __name__ == "__main__":
    main()
