"""Running lm-evaluation-harness on a model, with its own tasks and those of HAMT."""

import logging
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from transformers import PreTrainedModel, PreTrainedTokenizerBase

from hamt.errors import UserError, reason

LOCAL_TASKS = Path(__file__).parent / "lm_eval_tasks"
FROM_A_FILE = ("hamt_lambada", "hamt_wikitext")


def check_tasks(tasks: Sequence[str], task_data: str | None = None) -> Any:
    """Make the harness's manager of tasks, and see to it that it can run all of these.

    ``task_data`` is the file of a task that reads one (``FROM_A_FILE``).

    Raises:
        UserError: if the harness is not installed, there is no such task, or a file is missing.
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
            f"no task {', '.join(unknown)}; beside those of lm-evaluation-harness "
            "(`lm_eval ls tasks`) there are "
            f"{', '.join(sorted(path.stem for path in LOCAL_TASKS.glob('*.yaml')))}"
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
    """Run tasks through the harness's ``hf`` model, with the manager that ``check_tasks`` made.

    The model sees ``context`` tokens at most; None is what its configuration says. ``limit`` is the
    number of documents of a task.

    Returns:
        By task its metrics, and the numbers of ``documents`` and ``shots``.

    Raises:
        UserError: if a task cannot be run.
    """
    from lm_eval import simple_evaluate
    from lm_eval.models.huggingface import HFLM

    harness = HFLM(pretrained=model, tokenizer=tokenizer, batch_size=batch_size, max_length=context)
    try:
        results = simple_evaluate(harness, tasks=list(tasks), limit=limit, task_manager=manager)
    except UserError:
        raise
    except Exception as error:  # of many kinds: no data, a task that asks for too much
        raise UserError(f"{', '.join(tasks)} cannot be run ({reason(error)})") from error
    assert results is not None  # only processes of a group beside the first get none
    found = {}
    for task, values in results["results"].items():
        # Names and counts stand among the metrics.
        metrics = {metric_name(k): v for k, v in values.items() if isinstance(v, float)}
        documents = results["n-samples"].get(task, {}).get("effective")
        found[task] = {**metrics, "documents": documents, "shots": results["n-shot"].get(task)}
    return found


def metric_name(key: str) -> str:
    """``acc`` of ``acc,none``, ``acc,x_stderr`` of ``acc_stderr,x``: the error ends in its name."""
    name, _, chosen = key.partition(",")
    of = "" if chosen in ("", "none") else f",{chosen}"
    if name.endswith("_stderr"):
        return f"{name.removesuffix('_stderr')}{of}_stderr"
    return name + of
