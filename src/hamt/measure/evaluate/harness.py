"""lm-evaluation-harness on a model at hand, with the task files of HAMT beside its own."""

import logging
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from transformers import PreTrainedModel, PreTrainedTokenizerBase

from hamt.errors import UserError, reason

LOCAL_TASKS = Path(__file__).parent / "lm_eval_tasks"
FROM_A_FILE = ("hamt_lambada", "hamt_wikitext")


def check_tasks(tasks: Sequence[str], task_data: str | None = None) -> Any:
    """The harness's manager of tasks, which has all of these; ``task_data`` is the file of one that needs it.

    Raises:
        UserError: if the harness is not installed, or there is no such task, or no file for one.
    """
    try:
        import lm_eval  # noqa: F401
        from lm_eval.tasks import TaskManager
    except ImportError as error:
        raise UserError(
            f"--tasks needs lm-evaluation-harness ({error}): pip install 'lm-eval[hf]'"
        ) from error
    logging.getLogger("lm_eval").setLevel(logging.ERROR)
    manager = TaskManager(include_path=str(LOCAL_TASKS), metadata={"task_data": task_data})
    if unknown := [name for name in tasks if name not in manager.all_tasks]:
        raise UserError(
            f"no task {', '.join(unknown)}; beside those of lm-evaluation-harness (`lm_eval ls tasks`) there "
            f"are {', '.join(sorted(path.stem for path in LOCAL_TASKS.glob('*.yaml')))}"
        )
    for name in sorted({*FROM_A_FILE} & {*tasks}):
        if task_data is None:
            raise UserError(f"{name} needs a file: give it with --task_data")
        if not Path(task_data).is_file():
            raise UserError(f"no file {task_data} for {name}")
    return manager


def run_tasks(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    tasks: Sequence[str],
    *,
    context: int | None = None,
    limit: int | None = None,
    manager: Any,
    batch_size: int = 8,
) -> dict[str, dict[str, Any]]:
    """Run tasks through the harness's ``hf`` model: metrics, ``documents`` and ``shots`` of each, by name.

    Args:
        model: a causal language model of Transformers.
        tokenizer: its tokenizer.
        tasks: of the harness, or ``hamt_lambada``, ``hamt_wikitext``, ``hamt_mqar``,
            ``hamt_induction``, ``hamt_passkey``.
        context: tokens that the model sees at most; None is what its configuration says.
        limit: documents of a task at most.
        manager: what ``check_tasks`` returned for them.
        batch_size: rows at a time.

    Raises:
        UserError: if a task cannot be run.
    """
    from lm_eval import simple_evaluate
    from lm_eval.models.huggingface import HFLM

    harness = HFLM(pretrained=model, tokenizer=tokenizer, batch_size=batch_size, max_length=context)
    try:
        found = simple_evaluate(harness, tasks=list(tasks), limit=limit, task_manager=manager)
    except UserError:
        raise
    except (
        Exception
    ) as error:  # of many kinds: data that cannot be had, a task that asks for too much
        raise UserError(f"{', '.join(tasks)} cannot be run ({reason(error)})") from error
    assert found is not None  # only other processes of a group get none
    counts, shots = found["n-samples"], found["n-shot"]
    return {
        name: {
            **_metrics(values),
            "documents": counts.get(name, {}).get("effective"),
            "shots": shots.get(name),
        }
        for name, values in found["results"].items()
    }


def _metrics(values: dict[str, Any]) -> dict[str, Any]:
    """``acc,none`` -> ``acc``, and only what is a number."""
    return {
        name.removesuffix(",none"): value
        for name, value in values.items()
        if isinstance(value, float)  # not the name, nor how many documents there were
    }
