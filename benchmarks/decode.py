"""Time of a decoding step and bytes of the state, after a short and after a long context.

    venv/bin/python benchmarks/decode.py

Prints one JSON object: medians over single steps of one run, the contexts interleaved step by step,
so that whatever else the machine does meets both alike.
"""

import argparse
import json
import platform
import time

import torch
import transformers

import hamt
from hamt import HAMTCache, HAMTConfig, HAMTModel


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
    caches = {context: prefill(model, context) for context in contexts}
    times: dict[int, list[float]] = {context: [] for context in contexts}
    token = torch.zeros(1, 1, dtype=torch.long)
    for step in range(steps + 10):
        for context, cache in caches.items():
            start = time.perf_counter()
            model(token, past_key_values=cache)
            if step >= 10:  # the first steps warm up
                times[context].append(1e3 * (time.perf_counter() - start))
    quartiles = {
        context: torch.tensor(values).quantile(torch.tensor([0.25, 0.5, 0.75])).tolist()
        for context, values in times.items()
    }
    return {
        str(context): {
            "median_ms": round(quartiles[context][1], 4),
            "quartiles_ms": [round(quartiles[context][0], 4), round(quartiles[context][2], 4)],
            "state_bytes": caches[context].nbytes,
        }
        for context in contexts
    }


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--contexts", type=int, nargs="+", default=[256, 16384])
    parser.add_argument("--steps", type=int, default=400)
    parser.add_argument("--hidden_dim", type=int, default=256)
    parser.add_argument("--num_layers", type=int, default=4)
    options = parser.parse_args()
    torch.manual_seed(0)
    config = HAMTConfig(hidden_dim=options.hidden_dim, num_layers=options.num_layers, vocab_size=4096)
    model = HAMTModel(config).eval()
    result = {
        "environment": {
            "hamt": hamt.__version__,
            "torch": torch.__version__,
            "transformers": transformers.__version__,
            "python": platform.python_version(),
            "processor": platform.processor() or platform.machine(),
            "threads": torch.get_num_threads(),
        },
        "parameters": model.num_parameters(),
        "steps": options.steps,
        "contexts": measure(model, options.contexts, options.steps),
    }
    print(json.dumps(result, indent=2))


if __name__ == "__main__":
    main()
