"""Train on associative recall, and see from where the right answers come: docs/results/sources.

venv/bin/python studies/sources.py
"""

import argparse
from pathlib import Path

import numpy as np
import torch
from matplotlib.figure import Figure

from hamt.analysis.contributions import logit_contributions
from hamt.analysis.record import record
from hamt.analysis.sources import recall_sources, value_position
from hamt.environment import describe_environment, environment
from hamt.measure.recall.runs import RecallRun, make_model, train
from hamt.measure.recall.settings import SETTINGS
from hamt.measure.report import write_report
from hamt.measure.tables import markdown
from hamt.measure.task_training import HELD_OUT
from hamt.model import HAMTForCausalLM
from hamt.output import claim
from hamt.training.loop import seed_everything
from hamt.visualization import COLOURS, DIVERGING, panels

SETTING = SETTINGS["mqar"]
EXAMPLES = 64


def trained(options: argparse.Namespace) -> HAMTForCausalLM:
    """A model of docs/results/recall, from the folder it was saved in, or trained."""
    sizes = f"{options.state}-{options.learning_rate:g}-{options.num_steps}-{options.seed}"
    folder = options.output_dir / f"model-{sizes}"
    if (folder / "config.json").exists():
        return HAMTForCausalLM.from_pretrained(folder).eval()
    model_name = "hamt:hcm_dim=64,num_heads=1,rotation=none"
    run = RecallRun(
        "mqar", model_name, options.state, options.learning_rate, options.seed, options.num_steps
    )
    seed_everything(run.seed)
    model = make_model(run)
    train(model, run)
    model.save_pretrained(folder)
    return model.eval()


def picture(model: HAMTForCausalLM, seed: int) -> Figure:
    """The contributions to the right answers of one example."""
    task = SETTING.tests["16 pairs, 64 tokens"].task
    inputs, targets = task.sample(1, torch.Generator().manual_seed(seed))
    queries = (targets[0] >= 0).nonzero()[:, 0]
    recording = record(model, inputs)
    added = logit_contributions(model, recording, queries.tolist(), targets[:, queries])[0]
    values = [value_position(inputs[0], int(v), task.num_kv_pairs) for v in targets[0, queries]]
    return draw(added.numpy(), queries.tolist(), values)


def draw(added: np.ndarray, queries: list[int], values: list[int]) -> Figure:
    """What each position adds to the logits of right answers (Q, N); rings where they stand."""
    figure, (axes,) = panels(1, size=(9.0, 1.2 + 0.25 * len(added)))
    axes.grid(visible=False)
    extreme = float(np.abs(added).max()) or 1.0
    image = axes.imshow(added, aspect="auto", cmap=DIVERGING, vmin=-extreme, vmax=extreme)
    figure.colorbar(image, ax=axes, label="added to the logit of the answer")
    axes.plot(
        values, range(len(values)), "o", markersize=9, markerfacecolor="none", color=COLOURS[2]
    )
    axes.set_yticks(range(len(queries)), [str(query) for query in queries], fontsize="small")
    axes.set_xlabel("position that contributes; rings: where the value was given")
    axes.set_ylabel("query at position")
    return figure


def main() -> None:
    """Train, measure, write."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--num_steps", type=int, default=3000)
    parser.add_argument("--learning_rate", type=float, default=0.01)
    parser.add_argument("--state", type=int, default=2304, help="floats a layer")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--output_dir", type=Path, default=Path("docs/results/sources"))
    options = parser.parse_args()
    header, model, seed = environment(), trained(options), options.seed + HELD_OUT
    found = {
        name: recall_sources(model, test.task, EXAMPLES, seed, test.length)
        for name, test in SETTING.tests.items()
    }
    header_row = ["test", "answers", "right", "source is the value", "within the convolution"]
    header_row.append("by chance")
    rows = []
    for name, one in found.items():
        shares = (one[key] for key in ("accuracy", "exact", "hits", "chance"))
        rows.append([name, f"{one['queries']:,}", *(f"{100 * share:.1f} %" for share in shares)])
    table = markdown(header_row, rows, text=(0,))
    text = f"# From where answers come\n\n{describe_environment(header)}\n\n{table}"
    chosen = {name: str(value) for name, value in vars(options).items()}
    content = {"environment": header, "options": chosen, "tests": found}
    with claim(options.output_dir, "sources", [r"sources\.(json|md|png)"], adopt=True) as output:
        write_report(output, "sources", content, text, {"sources": picture(model, seed)})
    print(text)


if __name__ == "__main__":
    main()
