"""``hamt analyze``: what the memories of a model hold and do with a text."""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
from matplotlib.figure import Figure
from rich.table import Column, Table

from hamt.analysis.analyse import TRACED, Analysis, analyse, name_of_attention, summarise
from hamt.analysis.converted import analyse_converted
from hamt.analysis.converted_page import converted_lines, converted_page
from hamt.analysis.converted_pictures import converted_pictures
from hamt.analysis.dashboard import dashboard
from hamt.analysis.record import memory_layers
from hamt.checkpoint import load_checkpoint, named_or_own
from hamt.console import PlainConsole
from hamt.converted_model import ConvertedForCausalLM
from hamt.data.documents import plain_text
from hamt.environment import describe_environment, environment
from hamt.errors import UserError
from hamt.generation import encode_text
from hamt.options import given_text, option, parse
from hamt.output import Output, claim
from hamt.visualization import save_figure

TEXT = (
    "Mr. Speaker, Mr. Vice President, Members of Congress, my fellow Americans: The state of the "
    "Union is strong. Our economy is growing, and the people of the United States are at work. I "
    "ask the Congress to act this year on the budget, on taxes, and on the defense of the nation. "
    "The Congress of the United States has the power to act, and the people of the United States "
    "expect it to act. Let us work together, and the state of the Union will be stronger still."
)
COLUMNS = ("layer", "half-lives", "slots written", "slots read", "dead", "rank", "fidelity")
WRITTEN = (
    *(r"analysis_results\.json", r"dashboard\.html", r"contributions_layer_\d+\.png"),
    r"(memory_evolution|slots|retrieval|gates|attention|recall|next_token)\.png",
)


@dataclass
class AnalyzeOptions:
    """Look into the memories of a model while it reads a text: figures, pictures, one page."""

    checkpoint: str | None = option(
        None, "a checkpoint folder, or a .pt file; none is the model in HAMT"
    )
    text: str | None = option(None, "the text to read; none is a short one of HAMT's own")
    file: str | None = option(None, "a file with the text to read")
    max_tokens: int = option(16384, "tokens that are read, from the start of the text", at_least=2)
    skip_silencing: bool = option(False, "leave out the loss without each slot, the longest part")
    demo: bool = option(False, "the model and the text that come with HAMT")
    output_dir: str = option("analyze_output", "where everything goes")


def main(arguments: Sequence[str]) -> int:
    """Analyse; write ``analysis_results.json``, a PNG for each picture, and ``dashboard.html``."""
    options = parse(AnalyzeOptions, arguments, "analyze")
    text = _text(options)
    with claim(options.output_dir, "analyze", WRITTEN) as output:
        _analyze(options, text, output)
    return 0


def _analyze(options: AnalyzeOptions, text: str, output: Output) -> None:
    model, tokenizer = load_checkpoint(named_or_own(options.checkpoint))
    converted = isinstance(model, ConvertedForCausalLM)
    if not converted and not memory_layers(model):
        raise UserError("this model has no memory to look into: all its mixers are of other kinds")
    ids = encode_text(tokenizer, text)
    if len(ids) < 2 or not text.strip():
        raise UserError("the text must have at least two tokens")
    input_ids, silence = torch.tensor(ids[: options.max_tokens]), not options.skip_silencing
    if isinstance(model, ConvertedForCausalLM):
        results = analyse_converted(model, tokenizer, input_ids, silence)
        figures = converted_pictures(results)
        lines, as_page = converted_lines(results), partial(converted_page, results, figures)
    else:
        analysis = analyse(model, tokenizer, input_ids, silence)
        results, figures = analysis.results, analysis.figures
        lines, as_page = _lines(analysis), partial(dashboard, analysis)
    results["tokens_of_the_text"] = len(ids)
    header, console = environment(), PlainConsole()
    name = options.checkpoint or "The model in HAMT"
    told = f"{name}: {model.num_parameters():,} parameters, {_read(results)}"
    own = options.text is None and options.file is None
    console.print(f"{told} of HAMT's own text (--file reads yours)" if own else told)
    for line in lines:
        console.print(line)
    shown = f"the last {TRACED} shown" if results["tokens"] > TRACED else "all shown"
    read = _read(results) if converted else f"{_read(results)}, {shown}"
    html = as_page(f"{name}; {read}. {describe_environment(header)}")
    record = {"environment": header, "options": vars(options), "model": name, **results}
    for path in write(record, figures, html, output):
        console.print(f"wrote {path}")


def write(
    record: dict[str, Any], figures: Mapping[str, Figure], html: str, output: Output
) -> list[Path]:
    """Write everything into the output folder; returns the paths."""
    return [
        output.write_json("analysis_results.json", record),
        *(
            output.write_file(f"{plot}.png", partial(save_figure, figure=figure))
            for plot, figure in figures.items()
        ),
        output.write_text("dashboard.html", html),
    ]


def _lines(analysis: Analysis) -> Iterator[Table | str]:
    yield summary(analysis)
    slots = len(next(iter(analysis.results["layers"].values()))["write_share"][0])
    yield (
        f"half-lives in tokens; slots as good as in use, of {slots} a head; effective rank of a "
        "head; fidelity, the cosine of a write that is read back at once (docs/analysis.md)"
    )
    if analysis.results["attention"]:
        yield _by_layer(analysis)


def summary(analysis: Analysis) -> Table:
    """A table with a line for each layer."""
    table = Table(*(Column(name, justify="right") for name in COLUMNS))
    for index, layer in analysis.results["layers"].items():
        half_lives, cells, fidelity = summarise(layer)
        reach = f"{half_lives[0]:,.1f} to {half_lives[-1]:,.0f}"
        table.add_row(index, reach, *cells, f"{fidelity:.3f}")
    return table


def _by_layer(analysis: Analysis) -> str:
    """What memories and attention each add to the logit of the next token."""
    memories, attention = (analysis.results[name] for name in ("layers", "attention"))
    names = {**dict.fromkeys(memories, "memory")}
    names |= {index: name_of_attention(figures) for index, figures in attention.items()}
    added = [
        f"layer {index} ({names[index]}) {found['added_to_next_logit']:+.3f}"
        for index, found in sorted({**memories, **attention}.items(), key=lambda pair: int(pair[0]))
        if found["added_to_next_logit"] is not None
    ]
    told = ", ".join(added) or "not told, since an adapter is in the way"
    return f"added to the logit of the next token, means of the end: {told}"


def _read(results: Mapping[str, Any]) -> str:
    read, there = results["tokens"], results["tokens_of_the_text"]
    which = f"{read:,}" if read == there else f"the first {read:,} of {there:,}"
    return f"{which} tokens read"


def _text(options: AnalyzeOptions) -> str:
    if options.demo and (options.text, options.file, options.checkpoint) != (None, None, None):
        raise UserError(
            "--demo has its own model and text: leave --checkpoint, --text and --file out"
        )
    if options.text is not None and options.file is not None:
        raise UserError("give --text or --file, not both")
    if options.file is None:
        return TEXT if options.text is None else given_text("--text", options.text, "--file")
    return plain_text(Path(options.file))
