"""The kernels of flash-linear-attention beside the chunked form, on a CPU: docs/results/gpu.

OMP_NUM_THREADS=1 venv/bin/python studies/gpu_interpreter.py

Triton interprets the kernels: what is compared is what they compute, in the first of the
configurations that they can be tuned to. Nothing is said of their speed.
"""

import argparse
import sys
from dataclasses import asdict
from importlib.metadata import version
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parent))

from gpu_checks.interpreter import interpret

interpret()

from gpu_checks.agreement import Case, cases, errors, model_errors  # noqa: E402

from hamt.checkpoint import PRETRAINED, load_checkpoint  # noqa: E402
from hamt.environment import describe_environment, environment  # noqa: E402
from hamt.measure.report import write_report  # noqa: E402
from hamt.measure.tables import markdown, paragraphs  # noqa: E402
from hamt.output import claim  # noqa: E402

TOKENS = 33  # that the model reads


def compared(case: Case) -> dict[str, Any]:
    """A case, and its errors."""
    found = {"name": str(case), **asdict(case), "tolerance": case.tolerance("cpu")}
    return {**found, "errors": errors(case, "cpu")}


def worst(found: dict[str, float], gradients: bool) -> float:
    """The largest error of gradients, or of all else."""
    return max(
        (error for name, error in found.items() if name.startswith("gradient") == gradients),
        default=float("nan"),
    )


def page(result: dict[str, Any]) -> str:
    """The figures in a table."""

    def cell(error: float) -> str:
        return "–" if error != error else f"{error:.1e}"

    lines = []
    for each in result["cases"]:
        fla, chunked = each["errors"]["fla"], each["errors"]["chunked"]
        cells = [cell(worst(form, part)) for part in (False, True) for form in (fla, chunked)]
        lines.append([each["name"], *cells, cell(each["tolerance"])])
    headings = ["rule, dtype, tokens, slots × features", "outputs and state, `fla`", "`chunked`"]
    headings += ["gradients, `fla`", "`chunked`", "tolerance"]
    model = ", ".join(f"{name} {cell(error)}" for name, error in result["model"].items())
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
    result: dict[str, Any] = {
        "environment": environment(),
        "versions": {name: version(name) for name in ("fla-core", "triton")},
        "cases": [],
    }
    for case in cases():
        result["cases"].append(compared(case))
        print(case, f"{max(result['cases'][-1]['errors']['fla'].values()):.1e}", flush=True)
    model, _ = load_checkpoint(PRETRAINED)
    result["model"] = model_errors(model, TOKENS)
    print(result["model"])
    with claim(options.output_dir, "gpu", [r"interpreter\.(json|md)"]) as output:
        write_report(output, "interpreter", result, page(result), {})
    failed = [each["name"] for each in result["cases"]
              if not max(each["errors"]["fla"].values()) <= each["tolerance"]]  # fmt: skip
    if failed:
        raise SystemExit("further off than they may be: " + "; ".join(failed))


if __name__ == "__main__":
    main()
