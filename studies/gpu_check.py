"""What a GPU makes of HAMT: whether the kernels agree there, and how fast recipes are.

studies/gpu_check.sh

It needs PyTorch for the GPU and ``pip install -e '.[gpu]'``, and takes less than ten minutes. What
the first run compiles is kept, so that a second one measures more.
``--device cpu --tiny`` runs every part of it on models of no use, whose kernels Triton interprets:
it shows that the script works, and none of its figures means anything.
"""

import argparse
import os
import sys
from dataclasses import asdict
from importlib.metadata import version
from pathlib import Path
from typing import Any

if __name__ == "__main__" and "--tiny" in sys.argv:  # before anything imports Triton
    os.environ["TRITON_INTERPRET"] = "1"
sys.path.insert(0, str(Path(__file__).parent))

import torch
from gpu_checks.agreement import Case, cases_on_a_gpu, errors, model_errors, untuned, worst
from gpu_checks.interpreter import interpret
from gpu_checks.speed import (
    RECIPES,
    TINY,
    Clock,
    Scale,
    build,
    configuration,
    measurements,
    reason,
)

from hamt.environment import environment
from hamt.files import write_json
from hamt.gpu.kernels import kernels_found

NO_GPU = (
    "no CUDA GPU here, nothing was measured: run it on a machine that has one, with PyTorch for it"
)
NO_KERNELS = "the kernels do not run here, nothing was measured: pip install -e '.[gpu]'"
SHARE = 0.45  # of the time, for comparisons


def compare(case: Case, how: str, device: str, clock: Clock) -> dict[str, Any]:
    """A case, and how far it is off."""
    about = {"name": f"{case}, {how}", **asdict(case), "tolerance": case.tolerance(device)}
    try:
        with clock.limit():
            found = errors(case, device)
    except Exception as error:  # the others are still worth their time
        print(f"{about['name']}: {reason(error)}", flush=True)
        return {**about, "left_out": reason(error)}
    off = worst(found["fla"])
    agrees = off <= about["tolerance"]
    print(f"{off:.1e}{'' if agrees else ' TOO FAR OFF'} {about['name']}", flush=True)
    return {**about, "errors": found, "agrees": agrees}


def run(device: str, tiny: bool, minutes: float, path: Path) -> dict[str, Any]:
    """Compare and measure; the file is written again after every part."""
    clock, scale = Clock(60 * minutes), TINY if tiny else Scale()
    result: dict[str, Any] = {
        "environment": environment(),
        "device": torch.cuda.get_device_name() if device == "cuda" else "none",
        "versions": {name: version(name) for name in ("fla-core", "triton")},
        "cuda": torch.version.cuda or torch.version.hip,
        "tiny": tiny,
        "agreement": [],
        "speed": [],
    }

    def note(part: str, row: dict[str, Any]) -> None:
        result[part].append(row)
        write_json(path, result)

    comparing = Clock(SHARE * clock.left())
    small = [Case("gated", length=20), Case("delta", "bfloat16", 17, 1, 1)]
    with untuned():
        for case in small if tiny else cases_on_a_gpu():
            note("agreement", compare(case, "the first configuration", device, comparing))
    for row in measurements(device, scale, tiny, clock):
        told = row.get("left_out") or f"{row['tokens_per_second']:,.0f} tokens/s"
        print(f"{row['recipe']}, {row['model']}, {row['what']}: {told}", flush=True)
        note("speed", row)
    # With the configurations that training has chosen.
    config = configuration(RECIPES[0], tiny)
    features = config.hcm_dim // config.num_heads
    sizes = {"heads": config.num_heads, "slots": config.num_slots, "features": features}
    case = Case("gated", "bfloat16", config.max_position_embeddings, **sizes)
    note("agreement", compare(case, f"as tuned for {RECIPES[0]}", device, clock))
    try:
        with clock.limit():
            result["model"] = model_errors(build(config, "hamt, fla", device), 16)
    except Exception as error:
        result["model"] = {"left_out": reason(error)}
    print(f"{RECIPES[0]} in float32, from float64: {result['model']}", flush=True)
    write_json(path, result)
    return result


def main() -> None:
    """Compare, measure, write one JSON file, and end in one line."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--output", default="gpu_check.json", help="the file that is written")
    parser.add_argument("--minutes", type=float, default=9.0, help="after which it ends")
    parser.add_argument("--device", choices=("cuda", "cpu"), default="cuda")
    parser.add_argument("--tiny", action="store_true", help="models of no use, to try the script")
    options = parser.parse_args()
    if (options.device == "cpu") != options.tiny:
        parser.error("--device cpu and --tiny go together: nothing is measured on a CPU")
    if options.tiny:
        interpret()
    if options.device == "cuda" and not torch.cuda.is_available():
        raise SystemExit(NO_GPU)
    if not kernels_found(torch.device(options.device)):
        raise SystemExit(NO_KERNELS)
    result = run(options.device, options.tiny, options.minutes, Path(options.output))
    compared, measured = result["agreement"], result["speed"]
    apart = sum(each.get("agrees") is False for each in compared)
    agreeing = sum(each.get("agrees", False) for each in compared)
    speeds = sum("left_out" not in row for row in measured)
    whole = agreeing == len(compared) and speeds == len(measured)
    print(
        f"{'Tried on a CPU, no figure means anything: ' if options.tiny else ''}"
        f"{agreeing} of {len(compared)} comparisons agree and {apart} do not, "
        f"{speeds} of {len(measured)} speeds were measured; all is in {options.output}"
    )
    sys.exit(1 if apart or (options.tiny and not whole) else 0)


if __name__ == "__main__":
    main()
