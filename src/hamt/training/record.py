"""The record of a run, ``training_info.json``: written when it ends, and read by other commands.

Whoever got a checkpoint from somebody else also got a record: it is checked like any input.
"""

import re
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import Any

from hamt.environment import environment
from hamt.errors import UserError, reason
from hamt.files import parse_json
from hamt.options import check
from hamt.peak_memory import process_peak_memory
from hamt.training.held_out import Loss
from hamt.training.loop import TrainingResult
from hamt.training.options import TrainOptions
from hamt.training.plan import Plan

RECORD = "training_info.json"
READ = ("data", "held_out", "tokenizer", "init_from")  # options whose paths a record may name
# Where a run wrote, and how it began, is nothing that another command does again.
OWN = ("config", "output_dir", "resume", "overwrite", "dry_run", "token_cache")


@dataclass(frozen=True)
class Record:
    """What other commands take from a record.

    ``paths`` are those of the files that were read; None in older records, which have none.
    """

    options: TrainOptions
    steps: int
    fingerprint: str
    tokens: tuple[int, int]  # to train on, and held out
    paths: dict[str, str] | None
    finished: bool = True  # not stopped by the user

    def texts(self) -> dict[str, Any]:
        """The options that say which text was read, with the paths that files had then."""
        names = ("data", "held_out", "text_column", "streaming")
        chosen = {name: getattr(self.options, name) for name in names}
        found = {name: path for name, path in (self.paths or {}).items() if Path(path).exists()}
        return chosen | {name: path for name, path in found.items() if name in chosen}


def find_record(checkpoint: Path) -> Path | None:
    """The record of a checkpoint: beside it, or in the folder of the run that it belongs to."""
    inside = checkpoint.is_file() or checkpoint.parent.name == "checkpoints"
    above = (checkpoint.parent, checkpoint.parent.parent) if inside else ()
    found = (folder / RECORD for folder in (checkpoint, *above))
    return next((path for path in found if path.is_file()), None)


def read_record(path: Path) -> Record:
    """Read and check the record of a run.

    Raises:
        UserError: if it cannot be read, or something in it is not what a run writes.
    """
    try:
        info = parse_json(path.read_text(encoding="utf-8"))
        names = {field.name for field in fields(TrainOptions)} - set(OWN)
        options = TrainOptions(**{k: v for k, v in info["options"].items() if k in names})
        check(options)
        tokens = (_count(info, "train_tokens"), _count(info, "held_out_tokens"))
        finished = info.get("finished", True) is not False
        named = _fingerprint(info), tokens, _paths(info), finished
        return Record(options, _count(info, "steps"), *named)
    except (OSError, ValueError, KeyError, TypeError, AttributeError, UserError) as error:
        what = f"it has no {error}" if isinstance(error, KeyError) else reason(error)
        raise UserError(
            f"{path} is not the record of a run ({what}): give a folder that hamt train wrote"
        ) from error


def training_info(plan: Plan, result: TrainingResult[Loss], final: Loss | None) -> dict:
    """What ``training_info.json`` holds: what was done, with what, and what came of it."""
    here = environment()
    return {
        "finished": not result.interrupted,
        "options": asdict(plan.options),
        "paths": plan.options.paths(),
        "corpus": plan.corpus.name,
        "data_fingerprint": plan.corpus.fingerprint,
        "train_tokens": len(plan.corpus.train),
        "held_out_tokens": len(plan.corpus.held_out),
        "num_parameters": plan.model.num_parameters(),
        "held_out_loss": None if final is None else final._asdict(),
        **asdict(result),
        "tokens_per_second": result.tokens_per_second,
        "peak_memory_bytes": process_peak_memory(),
        "date": here["date"],
        "commit": here["commit"],
        "config": plan.model.config.to_dict(),
        "versions": {name: here[name] for name in ("hamt", "torch", "transformers", "python")},
    }


def _count(info: dict[str, Any], name: str) -> int:
    value = info[name]
    if not isinstance(value, int) or isinstance(value, bool) or value < 0:
        raise ValueError(f"{name} must be a whole number; got {value!r}")
    return value


def _fingerprint(info: dict[str, Any]) -> str:
    value = info["data_fingerprint"]
    if not isinstance(value, str) or not re.fullmatch("[0-9a-f]{16}", value):
        raise ValueError(f"data_fingerprint must be 16 hexadecimal digits; got {value!r}")
    return value


def _paths(info: dict[str, Any]) -> dict[str, str] | None:
    paths = info.get("paths")
    if paths is None:
        return None
    if not isinstance(paths, dict) or not all(isinstance(path, str) for path in paths.values()):
        raise ValueError(f"paths must map options to paths; got {paths!r}")
    if unknown := paths.keys() - set(READ):
        raise ValueError(f"paths must be of {', '.join(READ)}; got {', '.join(sorted(unknown))}")
    return paths
