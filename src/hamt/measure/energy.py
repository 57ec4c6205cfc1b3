"""Energy of the processor's packages, where it can be read (RAPL, Linux; mostly not in virtual machines)."""

from collections.abc import Callable
from pathlib import Path

POWERCAP = Path("/sys/class/powercap")


def joules(run: Callable[[], object], folder: Path = POWERCAP) -> float | None:
    """Joules that all packages took while ``run`` ran, whoever used them.

    None where nothing can be read; then ``run`` does not run.
    """
    try:
        packages = [zone for zone in sorted(folder.iterdir()) if zone.name.count(":") == 1]
        if not packages:
            return None
        before = [_microjoules(zone, "energy_uj") for zone in packages]
        run()
        after = [_microjoules(zone, "energy_uj") for zone in packages]
        ranges = [_microjoules(zone, "max_energy_range_uj") for zone in packages]
    except (OSError, ValueError):
        return None
    # The counters start anew at their range.
    return sum((b - a) % top for a, b, top in zip(before, after, ranges, strict=True)) / 1e6


def _microjoules(zone: Path, name: str) -> int:
    return int((zone / name).read_text(encoding="ascii"))
