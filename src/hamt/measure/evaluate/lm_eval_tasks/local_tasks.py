"""What the task files beside this one are made of, loaded by lm-evaluation-harness by file name.

Texts come from a local file (``hamt evaluate --task_data FILE``); the synthetic tasks are
``hamt.data.tasks`` written in words, one document for each thing asked.
"""

from pathlib import Path
from typing import Any

import datasets
import torch
from torch import Tensor

from hamt.cross_entropy import IGNORE_INDEX
from hamt.data.copying import Passkey
from hamt.data.corpus import join_articles
from hamt.data.documents import plain_text, read_file
from hamt.data.tasks import MQAR, Induction, Task

EXAMPLES = 64
WORDS = """
apple river stone cloud table green horse paper light water house music bread chair glass plant
sugar wheel beach crown dance earth field grape heart island jewel knife lemon metal night ocean
pearl queen radio salad tiger uncle violin window yacht zebra anchor bridge candle desert engine
forest garden hammer insect jacket kettle ladder mirror needle orange pencil rabbit school
temple umbrella valley wallet
""".split()  # noqa: SIM905
DIGITS = ["zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine"]


def lambada(task_data: str, **_: Any) -> dict[str, datasets.Dataset]:
    """Passages of LAMBADA's OpenAI variant, JSON lines with a ``text`` each."""
    return {"test": datasets.Dataset.from_dict({"text": list(read_file(Path(task_data)))})}


def wikitext(task_data: str, **_: Any) -> dict[str, datasets.Dataset]:
    """Pages of a WikiText file (``wiki.test.raw``)."""
    lines = plain_text(Path(task_data)).splitlines(keepends=True)
    pages = [page for page in join_articles(lines) if page.strip()]
    return {"test": datasets.Dataset.from_dict({"page": pages})}


def mqar(**_: Any) -> dict[str, datasets.Dataset]:
    """Recall of 8 pairs in words."""
    task = MQAR(length=32, vocab_size=len(WORDS), num_kv_pairs=8, random_non_queries=False)
    return _in_words(task, WORDS)


def induction(**_: Any) -> dict[str, datasets.Dataset]:
    """What followed a word the first time."""
    return _in_words(Induction(length=32, vocab_size=len(WORDS)), WORDS)


def passkey(**_: Any) -> dict[str, datasets.Dataset]:
    """Digits of a passkey in filler."""
    task = Passkey(length=256, num_words=20)
    return _in_words(task, [*DIGITS, *WORDS[: task.num_words], "passkey", "question"])


def _in_words(task: Task, words: list[str]) -> dict[str, datasets.Dataset]:
    """A document for each thing asked: the words up to there, and the one that answers."""
    inputs, targets = task.sample(EXAMPLES, torch.Generator().manual_seed(0))
    documents = [
        {"text": _spell(row[: place + 1], words), "answer": f" {words[wanted[place]]}"}
        for row, wanted in zip(inputs, targets, strict=True)
        for place in (wanted != IGNORE_INDEX).nonzero().flatten().tolist()
    ]
    return {"test": datasets.Dataset.from_list(documents)}


def _spell(ids: Tensor, words: list[str]) -> str:
    return " ".join(words[index] for index in ids.tolist())


def detokenised(doc: dict[str, str]) -> str:
    """A page with its spaces put right, by lm-evaluation-harness's own rules."""
    from lm_eval.tasks.wikitext.preprocess_wikitext import wikitext_detokenizer

    return wikitext_detokenizer(doc)


def results(doc: dict[str, str], likelihoods: list[float]) -> dict[str, tuple[float, int]]:
    """Likelihood of a page, and its words and bytes, as lm-evaluation-harness counts them."""
    from lm_eval.tasks.wikitext.preprocess_wikitext import process_results

    return process_results(doc, likelihoods)
