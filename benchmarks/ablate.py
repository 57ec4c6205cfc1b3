"""Change one factor of the architecture at a time, train, and tabulate what it was worth.

    venv/bin/python benchmarks/ablate.py --workers 2               # all that is not measured yet
    venv/bin/python benchmarks/ablate.py --only base --tasks shakespeare --seeds 0 1 2
    venv/bin/python benchmarks/ablate.py --table docs/results/ablation.md

The runs are listed in ``ablation.yaml``. Each is a process of its own with one thread, and leaves one
JSON file in ``--results``; what has a file is not run again, so the command can be stopped and repeated.
"""

import argparse
import json
import os
import subprocess
import sys
import time
from collections import defaultdict
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from statistics import mean, stdev
from typing import Any

import torch
import yaml
from environment import environment
from rivals import transformer
from torch import Tensor, nn

from hamt import HAMTConfig, HAMTForCausalLM
from hamt.data.blocks import next_token_batch, shuffled_blocks
from hamt.data.tasks import MQAR
from hamt.evaluation.loss import held_out_loss
from hamt.files import write_file, write_json
from hamt.training.loop import seed_everything, train
from hamt.training.tasks import train_on_task

HERE = Path(__file__).resolve().parent
SHAKESPEARE = HERE.parents[1] / "shared" / "data" / "tinyshakespeare" / "input.txt"


class NoKeys(nn.Module):
    """Stands for a projection to keys: the phase of every key is zero, and binding does nothing."""

    def __init__(self, size: int) -> None:
        super().__init__()
        self.size = size

    def forward(self, hidden_states: Tensor) -> Tensor:
        """(B, N, d) -> zeros (B, N, size)."""
        return hidden_states.new_zeros(*hidden_states.shape[:-1], self.size)


def resolve(recipe: dict, task: str, variant: str) -> dict[str, Any]:
    """What one run consists of: fields of the configuration, learning rate, and options of ``build``."""
    base = recipe["tasks"][task]
    changes = dict(recipe["variants"][variant])
    changes.update(changes.pop(task, {}))
    for other in recipe["tasks"]:
        changes.pop(other, None)
    spec = {"keys": changes.pop("keys", True), "rival": changes.pop("rival", None)}
    spec["learning_rate"] = changes.pop("learning_rate", base["training"]["learning_rate"])
    return {**spec, "config": {**base["config"], **changes}, "parameters": base.get("parameters")}


def build(spec: dict[str, Any], vocab_size: int) -> HAMTForCausalLM:
    """The model of a run, its MLP as wide as ``parameters`` asks."""
    fields = {**spec["config"], "vocab_size": vocab_size}
    if spec["rival"] is not None:
        target = spec["parameters"]
        reference = HAMTConfig(**_matched(fields, True, target)) if target else HAMTConfig(**fields)
        return transformer(reference, **spec["rival"])
    return _hamt(_matched(fields, spec["keys"], spec["parameters"]), spec["keys"])


def _matched(fields: dict, keys: bool, parameters: int | None) -> dict:
    """The fields with the ``intermediate_dim`` that comes nearest to ``parameters``."""
    if parameters is None:
        return fields
    with torch.device("meta"):
        least = _hamt({**fields, "intermediate_dim": 1}, keys).num_parameters()
    config = HAMTConfig(**fields)
    units = (parameters - least) / (3 * config.hidden_dim * config.num_layers)
    return {**fields, "intermediate_dim": max(1, 1 + round(units))}


def _hamt(fields: dict, keys: bool) -> HAMTForCausalLM:
    model = HAMTForCausalLM(HAMTConfig(**fields))
    for block in model.model.layers if not keys else ():
        mixer = block.mixer
        mixer.key_proj = NoKeys(mixer.key_proj.out_features)
        mixer.retrieval.key_proj = NoKeys(mixer.retrieval.key_proj.out_features)
    return model


def characters(path: Path) -> tuple[Tensor, Tensor, int]:
    """nanoGPT's split: ids of the first nine tenths, of the rest, and the size of the vocabulary."""
    text = path.read_text(encoding="utf-8")
    numbers = {character: i for i, character in enumerate(sorted(set(text)))}
    ids = torch.tensor([numbers[character] for character in text])
    cut = int(0.9 * len(ids))
    return ids[:cut], ids[cut:], len(numbers)


def run_shakespeare(recipe: dict, spec: dict, seed: int, data: Path) -> tuple[HAMTForCausalLM, dict]:
    """Train on characters; the figure is the loss on all of the validation text."""
    training, validation, vocab_size = characters(data)
    options = recipe["tasks"]["shakespeare"]["training"]
    generator = seed_everything(seed)
    model = build(spec, vocab_size)
    blocks = shuffled_blocks(training, options["length"], options["batch_size"], generator)
    part = validation[: 40 * options["length"] + 1]  # for the curve
    result = train(
        model,
        (next_token_batch(block) for block in blocks),
        lambda: held_out_loss(model, part, len(part), options["length"]).nats_per_token,
        num_steps=options["num_steps"],
        learning_rate=spec["learning_rate"],
        show_progress=False,
    )
    final = held_out_loss(model, validation, len(validation), options["length"])
    return model, {
        "figure": final.nats_per_token,
        "tokens": result.tokens,
        "seconds": result.seconds,
        "curve": result.held_out,
    }


def run_mqar(recipe: dict, spec: dict, seed: int, data: Path) -> tuple[HAMTForCausalLM, dict]:
    """Train on associative recall until nearly all is right; the figure is the accuracy at the end."""
    options = recipe["tasks"]["mqar"]
    task = MQAR(**options["task"])
    seed_everything(seed)
    model = build(spec, task.vocab_size)
    training = {**options["training"], "learning_rate": spec["learning_rate"]}
    result = train_on_task(model, task, seed=seed, eval_interval=250, target_accuracy=0.999, **training)
    return model, {
        "figure": result.final_accuracy,
        "steps_to_99": result.steps_to_99,
        "seconds": result.seconds,
        "curve": result.accuracies,
    }


RUNNERS = {"shakespeare": run_shakespeare, "mqar": run_mqar}


def run(recipe: dict, name: str, data: Path) -> dict[str, Any]:
    """One run, ``task/variant/seed``, as it is written to its file."""
    task, variant, seed = name.split("/")
    spec = resolve(recipe, task, variant)
    header = environment()
    start = time.time()
    model, measured = RUNNERS[task](recipe, spec, int(seed), data)
    memory = None if spec["rival"] is not None else model.model.layers[0].mixer.memory
    return {
        "task": task,
        "variant": variant,
        "seed": int(seed),
        **measured,
        "num_parameters": model.num_parameters(),
        "state_floats": None if memory is None else memory.num_heads * memory.num_slots * memory.head_dim,
        "intermediate_dim": model.config.intermediate_dim,
        **spec,
        "wall_seconds": time.time() - start,
        "environment": header,
    }


def sweep(options: argparse.Namespace, recipe: dict) -> int:
    """Run what has no file yet, ``workers`` at a time; the number of runs that failed."""
    names = [
        f"{task}/{variant}/{seed}"
        for seed in options.seeds
        for variant in options.only or recipe["variants"]
        for task in options.tasks
    ]
    missing = [name for name in names if not _file(options.results, name).exists()]
    print(f"{len(names) - len(missing)} of {len(names)} runs are there", flush=True)

    def start(name: str) -> int:
        command = [sys.executable, __file__, "--run", name, "--recipe", str(options.recipe)]
        command += ["--results", str(options.results), "--data", str(options.data)]
        return subprocess.run(command, env={**os.environ, "OMP_NUM_THREADS": "1"}, check=False).returncode

    with ThreadPoolExecutor(options.workers) as pool:
        return sum(code != 0 for code in pool.map(start, missing))


def _file(results: Path, name: str) -> Path:
    return results / (name.replace("/", "-") + ".json")


def table(results: Path, recipe: dict) -> str:
    """Markdown: a row for each variant, mean ± standard error over its seeds, for each task."""
    found: dict[tuple[str, str], list[dict]] = defaultdict(list)
    for file in sorted(results.glob("*.json")):
        entry = json.loads(file.read_text(encoding="utf-8"))
        found[entry["task"], entry["variant"]].append(entry)
    lines = [
        "| variant | seeds | validation loss | parameters | state | MQAR accuracy | steps to 0.99 | state |",
        "|---|--:|--:|--:|--:|--:|--:|--:|",
    ]
    for variant in recipe["variants"]:
        text, recall = found[("shakespeare", variant)], found[("mqar", variant)]
        if text or recall:
            seeds = "/".join(str(len(runs)) for runs in (text, recall))
            cells = [variant, seeds, _figure(text), *_sizes(text), _figure(recall), _steps(recall)]
            lines.append(f"| {' | '.join([*cells, _sizes(recall)[1]])} |")
    return "\n".join(lines) + "\n"


def _figure(runs: list[dict]) -> str:
    if not runs:
        return "–"
    figures = [entry["figure"] for entry in runs]
    error = f" ± {stdev(figures) / len(figures) ** 0.5:.3f}" if len(figures) > 1 else ""
    return f"{mean(figures):.3f}{error}"


def _sizes(runs: list[dict]) -> tuple[str, str]:
    if not runs:
        return "–", "–"
    state = runs[0]["state_floats"]
    return f"{runs[0]['num_parameters']:,}", "–" if state is None else f"{state:,}"


def _steps(runs: list[dict]) -> str:
    steps = [entry["steps_to_99"] for entry in runs]
    return ", ".join("never" if step is None else str(step) for step in steps) or "–"


def main() -> None:
    """Sweep, run one, or tabulate."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--recipe", type=Path, default=HERE / "ablation.yaml")
    parser.add_argument("--results", type=Path, default=HERE.parent / "docs" / "results" / "ablation")
    parser.add_argument("--data", type=Path, default=SHAKESPEARE, help="text of tiny-shakespeare")
    parser.add_argument("--tasks", nargs="+", choices=RUNNERS, default=list(RUNNERS))
    parser.add_argument("--only", nargs="+", metavar="VARIANT", help="these variants, in this order")
    parser.add_argument("--seeds", type=int, nargs="+", default=[0])
    parser.add_argument("--workers", type=int, default=2, help="processes of one thread each")
    parser.add_argument("--run", metavar="TASK/VARIANT/SEED", help="one run, in this process")
    parser.add_argument("--table", type=Path, help="write the table of all results there and end")
    options = parser.parse_args()
    recipe = yaml.safe_load(options.recipe.read_text(encoding="utf-8"))
    if unknown := set(options.only or ()) - set(recipe["variants"]):
        parser.error(f"no variant {', '.join(sorted(unknown))}; there are {', '.join(recipe['variants'])}")
    if options.table:
        text = table(options.results, recipe)
        write_file(options.table, lambda file: file.write_text(text, encoding="utf-8"))
    elif options.run:
        result = run(recipe, options.run, options.data)
        write_json(_file(options.results, options.run), result)
        print(f"{options.run}: {result['figure']:.4f} in {result['wall_seconds']:.0f} s", flush=True)
    elif failed := sweep(options, recipe):
        sys.exit(f"{failed} runs failed; the same command runs them again")


if __name__ == "__main__":
    main()
