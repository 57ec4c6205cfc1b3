"""The tables and the plot of ``hamt evaluate``."""

from collections.abc import Mapping, Sequence
from typing import Any

from matplotlib.figure import Figure

from hamt.environment import describe_environment
from hamt.measure.evaluate.run import ContextScore
from hamt.measure.tables import markdown, number, paragraphs
from hamt.visualization import Series, loss_by_position

COUNTS = ("documents", "shots")  # of a task, beside its metrics
INTERVALS = [0, *(2**power for power in range(4, 31))]  # of positions, of doubling length


def page(content: Mapping[str, Any], scores: Sequence[ContextScore]) -> str:
    """What ``evaluation.md`` says: the model, its perplexities, and the tasks if there are any."""
    about = (
        f"{content['parameters']:,} parameters; {content['tokenizer']}; text: {content['text']}."
    )
    about += f"\n{describe_environment(content['environment'])}"
    perplexities = _perplexity_table(scores) if scores else ""
    tasks = _task_table(content) if "tasks" in content else ""
    return paragraphs(f"# {content['model']}", about, perplexities, tasks) + "\n"


def figures_of(measured: ContextScore) -> dict[str, Any]:
    """What ``evaluation.json`` holds of a score."""
    return {
        "context": "carried" if measured.context is None else measured.context,
        "stride": measured.stride,
        **measured.score.figures(),
        "by_position": measured.score.mean_by_position(INTERVALS),
    }


def _perplexity_table(scores: Sequence[ContextScore]) -> str:
    header = ["context", "stride", "nats/token", "perplexity by token", "by word", "bits/byte"]
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
    return markdown([*header, "tokens scored"], rows, text=(0,))


def _task_table(content: Mapping[str, Any]) -> str:
    rows = []
    for task, values in content["tasks"].items():
        counts = [number(values[count], 0) for count in COUNTS]
        for metric, value in values.items():
            if not metric.endswith("_stderr") and metric not in COUNTS:
                error = values.get(f"{metric}_stderr")
                shown = "" if error is None else f"{error:.4f}"
                rows.append([task, metric, f"{value:.4f}", shown, *counts])
    context = content["context_of_tasks"]
    how = "the model's own context" if context is None else f"a context of {context:,} tokens"
    table = markdown(["task", "metric", "value", "s.e.", *COUNTS], rows, text=(0, 1))
    return f"lm-evaluation-harness {content['environment']['lm_eval']}, {how}.\n\n{table}"


def figure(scores: Sequence[ContextScore], trained: int) -> Figure | None:
    """The losses by position of the longest context, in intervals of doubling length.

    None if there is only one interval, which is no curve. ``trained`` is the context of the
    training.
    """
    if not scores:
        return None
    context, _, score = scores[-1]
    intervals = score.mean_by_position(INTERVALS)
    if len(intervals) < 2:
        return None
    name = "state carried" if context is None else f"context {context:,}"
    # Of the last interval there may be only the beginning.
    middles = [(low + min(high, score.longest)) / 2 for low, high, _ in intervals]
    series = Series(middles, [loss for *_, loss in intervals])
    return loss_by_position({name: series}, trained=trained)
