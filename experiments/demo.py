"""The documented demo: a model, a forward pass and a generation, in seconds.

With options it trains a small model on real text first, in minutes: see ``hamt demo --help``.
"""

import sys
import time

import torch
from transformers.utils import logging

from hamt import HAMTConfig, HAMTModel, cli
from hamt.checkpoint import PRETRAINED, load_checkpoint
from hamt.console import PlainConsole
from hamt.generation import GenerateOptions, stream_text

PROMPT = "The state of the Union is"


def show() -> int:
    console = PlainConsole()
    logging.disable_progress_bar()  # for files of a few MB
    torch.manual_seed(0)
    config = HAMTConfig(hidden_dim=256, hcm_dim=1024, num_layers=4, num_slots=8)
    model = HAMTModel(config).eval()
    console.print(f"a new model: {model.num_parameters():,} parameters, {config.num_layers} layers")
    for length in (64, 256):
        ids = torch.randint(config.vocab_size, (1, length))
        start = time.perf_counter()
        with torch.no_grad():
            outputs = model(ids, labels=ids)
        console.print(
            f"a forward pass of {length} tokens: {time.perf_counter() - start:.2f} s, "
            f"logits {tuple(outputs.logits.shape)}, loss {outputs.loss:.2f} nats/token "
            f"(ln {config.vocab_size:,} = {torch.tensor(config.vocab_size).log():.2f}), "
            f"state {outputs.past_key_values.nbytes / 2**10:,.0f} KiB"
        )
    written = model.generate(ids[:, :8], max_new_tokens=8, do_sample=False)
    console.print(
        f"a generation: it has learnt nothing, and continues with {written[0, 8:].tolist()}"
    )
    trained, tokenizer = load_checkpoint(PRETRAINED)
    console.print(
        f"\nthe model in HAMT, trained: {trained.num_parameters():,} parameters; it writes:"
    )
    stream_text(trained, tokenizer, PROMPT, GenerateOptions(max_new_tokens=60))
    console.print("\nTo train one in minutes: hamt demo, or this script with its options, such as")
    console.print("  python experiments/demo.py --num_steps 600")
    return 0


if __name__ == "__main__":
    sys.exit(cli.main(["demo", *sys.argv[1:]]) if sys.argv[1:] else show())
