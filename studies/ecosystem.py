"""Every check of HAMT beside other libraries: docs/results/ecosystem.

venv/bin/pip install --no-deps --target checkpoints/torchao torchao==0.18.0
OMP_NUM_THREADS=1 venv/bin/python studies/ecosystem.py --packages checkpoints/torchao

torchao has a folder of its own, which other processes do not see, as it writes a warning wherever
Transformers is imported. ``--only`` runs the checks whose library or name has these words.
"""

import argparse
import importlib
import os
import sys
from collections import Counter
from contextlib import nullcontext
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("WANDB_MODE", "disabled")
sys.path.insert(0, str(Path(__file__).parent))

from ecosystem_checks.base import CHECKS, Outcome, outcome

from hamt.environment import describe_environment, environment
from hamt.measure.report import write_report
from hamt.measure.tables import grouped, markdown, paragraphs
from hamt.output import claim

MODULES = (
    *("generation", "states", "loading", "trainer", "adapters", "preferences", "quantisation"),
    *("torch_tools", "exporting", "processes", "evaluation", "algebra", "packaging"),
)
for _module in MODULES:
    importlib.import_module(f"ecosystem_checks.{_module}")

NAMES = [r"ecosystem\.(json|md)"]  # what it writes
KINDS = ("works", "refused", "not installed", "FAILED")
# What the names of groups begin with, and the packages that are tried there.
LIBRARIES = {
    "Transformers": ("transformers",),
    "PEFT": ("peft",),
    "TRL": ("trl",),
    "Quantisation": ("torch", "torchao", "bitsandbytes"),
    "PyTorch": ("torch", "tensorboard"),
    "Export": ("torch", "onnxruntime", "onnxscript"),
    "Accelerate": ("accelerate", "torch"),
    "Servers": ("openai", "fastapi", "transformers"),
    "Without": ("transformers",),
    "lm-": ("lm_eval",),
    "datasets": ("datasets", "scikit-learn", "safetensors", "gradio", "gguf"),
    "torchhd": ("torch-hd", "fla-core", "triton"),
    "Python": ("mypy", "numpy"),
}


def versions() -> dict[str, str | None]:
    """Versions of the libraries beside those that every figure is measured with."""
    found: dict[str, str | None] = {}
    for name in sorted({name for names in LIBRARIES.values() for name in names}):
        try:
            found[name] = version(name)
        except PackageNotFoundError:
            found[name] = None
    return found


def used(group: str, libraries: dict[str, str | None]) -> str:
    """Packages of a group with their versions."""
    (names,) = (names for words, names in LIBRARIES.items() if group.startswith(words))
    return ", ".join(f"{name} {libraries[name] or '(not installed)'}" for name in names)


def page(outcomes: list[Outcome], libraries: dict[str, str | None], header: dict) -> str:
    """The outcomes in tables, one a library."""
    groups = grouped(outcomes, lambda each: each.group)

    def counts(of: list[Outcome]) -> list[str]:
        found = Counter(each.outcome for each in of)
        return [str(found[kind]) if found[kind] else "–" for kind in KINDS]

    total = [[name, used(name, libraries), *counts(of)] for name, of in groups.items()]
    total.append(["all", "", *counts(outcomes)])
    tables = [
        f"## {name}\n\n"
        + markdown(
            ["check", "outcome", "what was compared, or the line that was told"],
            [[e.name, e.outcome, e.told.replace("|", "\\|")] for e in of],
            text=[0, 1, 2],
        )
        for name, of in groups.items()
    ]
    return paragraphs(
        "# HAMT beside other libraries",
        "`studies/ecosystem.py` does what a user of each library would do, with a model of a few "
        "thousand parameters or the one in the package, and compares numbers where a fault would "
        "be silent. Works: the numbers agree. Refused: HAMT, or the library, says in the line "
        "beside it that this is not to be had. Not installed: the check was not made.",
        markdown(["what was tried", "packages", *KINDS], total, text=[0, 1]),
        *tables,
        f"{sum(each.seconds for each in outcomes):.0f} s in all; {describe_environment(header)}",
    )


def main() -> int:
    """Run the checks and write their table; the exit code is 1 if one has failed."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--output_dir", default="docs/results/ecosystem")
    parser.add_argument("--only", default="", help="words of a library or of a check's name")
    parser.add_argument("--packages", help="a folder with further packages")
    options = parser.parse_args()
    if options.packages:
        sys.path.append(options.packages)
    with (
        nullcontext()
        if options.only
        else claim(options.output_dir, "ecosystem-study", NAMES, adopt=True) as output
    ):
        header, outcomes = environment(), []
        for each in CHECKS:
            if options.only.lower() in f"{each.group} {each.name}".lower():
                outcomes.append(found := outcome(each))
                print(
                    f"{found.outcome:<14}{found.seconds:6.1f} s  {found.group}: {found.name}",
                    end="",
                )
                print("" if found.outcome == "works" else f" ({found.told})", flush=True)
        if output is not None:
            libraries = versions()
            rows = [each._asdict() for each in outcomes]
            content = {"environment": header, "libraries": libraries, "checks": rows}
            write_report(output, "ecosystem", content, page(outcomes, libraries, header), {})
    print(", ".join(f"{n} {kind}" for kind, n in Counter(e.outcome for e in outcomes).items()))
    return int(any(each.outcome == "FAILED" for each in outcomes))


if __name__ == "__main__":
    sys.exit(main())
