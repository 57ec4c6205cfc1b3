"""``make fuzz``: random command lines, configurations and damaged files, for FUZZ_SECONDS.

    python tests/fuzz/run.py                                   all parts, from a random seed
    python tests/fuzz/run.py --part commands --seed 123        one case, as a failure names it

It prints what came of the cases, and ends with status 1 if one ended in a traceback, hung, crashed,
wrote where it should not, or in more than one line.
"""

import argparse
import os
import random
import re
import sys
import tempfile
import time
from collections import Counter
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[1]))
from fuzz.sandbox import Outcome, Sandbox

FAILURES = ("traceback", "hang", "crash", "written outside", "no line")
SHARES = {"commands": 0.5, "damage": 0.35, "configurations": 0.15}  # of the time


def main() -> int:
    """Run the parts, one after the other; returns the exit status."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--part", choices=list(SHARES))
    parser.add_argument("--seed", type=int, help="run this case alone")
    parser.add_argument("--first", type=int, default=os.environ.get("FUZZ_FIRST"))
    parser.add_argument("--seconds", type=float, default=os.environ.get("FUZZ_SECONDS", 600))
    parser.add_argument("--workers", type=int, default=os.cpu_count())
    options = parser.parse_args()
    with tempfile.TemporaryDirectory(prefix="hamt-fuzz-") as folder:
        failures = _run(options, Path(folder))
    alike: dict[tuple[str, str], list[Outcome]] = {}
    for outcome in failures:  # one cause fails many cases
        last = outcome.said.strip().rpartition("\n")[2]
        alike.setdefault((outcome.kind, re.sub(r"\d+", "0", last)[:60]), []).append(outcome)
    for outcomes in alike.values():
        outcome = min(outcomes, key=lambda each: len(each.case.name))
        times = f" ({len(outcomes)} like it)" if len(outcomes) > 1 else ""
        print(f"\n{outcome.kind}{times}, {outcome.seconds:.0f} s:")
        print(f"python tests/fuzz/run.py {outcome.case.name}")
        print("    " + outcome.said.strip()[-800:].replace("\n", "\n    "))
    return 1 if failures else 0


def _run(options: argparse.Namespace, folder: Path) -> list[Outcome]:

    sandbox = Sandbox(folder)  # sets the environment, which libraries read when they are imported
    from fuzz import commands, configurations, damage
    from fuzz.inputs import prepare

    for command in commands.COMMANDS:
        commands.options_of(command)  # imported once, for all forks
    prepare(sandbox)
    parts = {"commands": commands, "damage": damage, "configurations": configurations}
    failures = []
    first = options.first if options.seed is None else options.seed
    if first is None:
        first = random.SystemRandom().randrange(10**6)
    print(f"seeds from {first}")
    for name, part in parts.items():
        if options.part not in (None, name):
            continue
        share = SHARES[name] if options.part is None else 1.0
        cases = part.cases(first) if options.seed is None else iter([part.case(first)])
        until, counts = time.monotonic() + share * options.seconds, Counter()
        for outcome in sandbox.run_all(cases, until, options.workers):
            counts[outcome.kind] += 1
            if outcome.kind in FAILURES:
                failures.append(outcome)
            if options.seed is not None:
                print(f"{outcome.kind}, {outcome.seconds:.1f} s: {outcome.said}")
        said = ", ".join(f"{counts[kind]} {kind}" for kind in ("ran", "refused", *FAILURES))
        print(f"{name}: {counts.total()} tried, {said}", flush=True)
    return failures


if __name__ == "__main__":
    sys.exit(main())
