"""Time of a decoding step and bytes of the state, after a short and after a long context.

    venv/bin/python benchmarks/decode.py

Prints one JSON object: medians over single steps of one run, the contexts interleaved step by step,
so that whatever else the machine does meets both alike.
"""

import argparse
import json
from functools import partial

import torch

from hamt import HAMTCache, HAMTConfig, HAMTModel
from hamt.environment import environment
from hamt.evaluation.timing import Timing, interleave


@torch.no_grad()
def prefill(model: HAMTModel, context: int, segment: int = 2048) -> HAMTCache:
    """Read ``context`` random tokens, in segments, so that memory stays flat."""
    ids = torch.randint(model.config.vocab_size, (1, context))
    cache = HAMTCache(model.config.num_layers)
    for part in ids.split(segment, dim=1):
        model(part, past_key_values=cache, logits_to_keep=1)
    return cache


@torch.no_grad()
def measure(model: HAMTModel, contexts: list[int], steps: int) -> dict[str, dict]:
    """Milliseconds per decoded token and bytes of state for each context."""
    caches = {str(context): prefill(model, context) for context in contexts}
    token = torch.zeros(1, 1, dtype=torch.long)
    decode = {name: partial(model, token, past_key_values=cache) for name, cache in caches.items()}
    timings = interleave(decode, rounds=steps, warmup=10)
    return {
        name: {**_milliseconds(timings[name]), "state_bytes": cache.nbytes} for name, cache in caches.items()
    }


def _milliseconds(timing: Timing) -> dict:
    return {
        "median_ms": round(1e3 * timing.median_s, 4),
        "quartiles_ms": [round(1e3 * value, 4) for value in timing.quartiles_s],
    }


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--contexts", type=int, nargs="+", default=[256, 16384])
    parser.add_argument("--steps", type=int, default=400)
    parser.add_argument("--hidden_dim", type=int, default=256)
    parser.add_argument("--num_layers", type=int, default=4)
    options = parser.parse_args()
    header = environment()
    torch.manual_seed(0)
    config = HAMTConfig(hidden_dim=options.hidden_dim, num_layers=options.num_layers, vocab_size=4096)
    model = HAMTModel(config).eval()
    result = {
        "environment": header,
        "parameters": model.num_parameters(),
        "steps": options.steps,
        "contexts": measure(model, options.contexts, options.steps),
    }
    print(json.dumps(result, indent=2))


if __name__ == "__main__":
    main()
