"""Century and party of a passage, told by two models and two baselines: docs/results/labels.

The Llama is the one that was trained as HAMT's own model was, with as many parameters:

hamt compare --rivals llama
venv/bin/python studies/sotu_labels.py checkpoints/labels
OMP_NUM_THREADS=1 venv/bin/python studies/labels.py --llama ~/.cache/hamt/rivals/sotu/llama
"""

import argparse
import hashlib
import json
from pathlib import Path
from typing import Any

from hamt.checkpoint import PRETRAINED
from hamt.cli import main as hamt
from hamt.data.documents import content_hash
from hamt.environment import describe_environment, environment
from hamt.measure.report import write_report
from hamt.measure.tables import markdown, number, paragraphs
from hamt.output import claim

TASKS = {"century": "century", "party": "party of the speaker"}
NAMES = {PRETRAINED.name: "HAMT", "llama": "Llama"}


def tuned(task: str, model: str, options: argparse.Namespace) -> dict[str, Any]:
    """What ``hamt finetune`` writes of a model; a run that is there is not run again."""
    tables = [options.tables / f"{task}_{part}.csv" for part in ("train", "held_out")]
    files = [*sorted(Path(model).glob("*.safetensors")), *tables]
    known = "".join([*map(content_hash, files), f"{options.epochs:g}"])
    run = hashlib.sha256(known.encode()).hexdigest()[:8]
    folder = options.tables / f"{task}-{Path(model).name}-{run}"
    told = folder / "finetune_results.json"
    if not told.exists():
        words = ["finetune", str(tables[0]), "--checkpoint", model, "--held_out", str(tables[1])]
        if hamt([*words, "--epochs", str(options.epochs), "--output_dir", str(folder)]):
            raise SystemExit(f"hamt {' '.join(words)} has failed")
    return dict(json.loads(told.read_text(encoding="utf-8")))


def page(runs: list[dict[str, Any]], epochs: float) -> str:
    """The figures in a table."""
    lines, counted = [], f"{epochs:g} {'epoch' if epochs == 1 else 'epochs'}"
    for run in runs:
        for name, scores in run["scores"].items():
            right = f"{100 * scores['accuracy']:.1f} ± {100 * scores['standard_error']:.1f}"
            line = [
                TASKS[run["asked"]],
                NAMES.get(name, name),
                right,
                number(scores["macro_f1"], 3),
            ]
            if line not in lines:  # the baselines are those of each model's run
                lines.append(line)
    return paragraphs(
        "# The century and the party of a passage",
        "Passages of 200 words of State of the Union addresses, those of 12 addresses held out, "
        "which the language models were not trained on either. Both models were trained on the "
        "same text before, with 1.4M parameters each, and then on the labels "
        f"({counted}, the default learning rate, one seed).",
        "The standard error takes passages for independent; those of one address are alike, so it "
        "is too small.",
        markdown(["what is told", "by", "% right", "macro F1"], lines, text=[0, 1]),
        describe_environment(*(run["environment"] for run in runs)),
    )


def main() -> None:
    """Train what is missing, and write the page."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--tables", type=Path, default=Path("checkpoints/labels"))
    parser.add_argument("--llama", required=True, help="the folder of the Llama")
    parser.add_argument("--epochs", type=float, default=3)
    parser.add_argument("--output_dir", default="docs/results/labels")
    options = parser.parse_args()
    with claim(options.output_dir, "labels", [r"labels\.(json|md)"], adopt=True) as output:
        runs = []
        for task in TASKS:
            for model in (str(PRETRAINED), options.llama):
                run = {"asked": task, **tuned(task, model, options)}
                del run["options"]  # paths of this machine
                runs.append(run)
        result = {"environment": environment(), "epochs": options.epochs, "runs": runs}
        write_report(output, "labels", result, page(runs, options.epochs), {})


if __name__ == "__main__":
    main()
