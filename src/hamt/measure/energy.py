"""Energy that the processor's packages take.

It can be read where Linux has RAPL counters, which virtual machines seldom have.
"""

from collections.abc import Callable, Iterable
from pathlib import Path

POWERCAP = Path("/sys/class/powercap")


def joules(run: Callable[[], object], folder: Path = POWERCAP) -> float | None:
    """Joules that all packages take while ``run`` runs, other processes included.

    None where no counter can be read; then ``run`` is not called.
    """
    try:
        packages = [zone for zone in sorted(folder.iterdir()) if zone.name.count(":") == 1]
        if not packages:
            return None
        before, ranges = (_read(packages, name) for name in ("energy_uj", "max_energy_range_uj"))
        run()
        after = _read(packages, "energy_uj")
    except (OSError, ValueError):
        return None
    # A counter starts from zero again when it reaches its range.
    return sum((b - a) % top for a, b, top in zip(before, after, ranges, strict=True)) / 1e6


def _read(zones: Iterable[Path], name: str) -> list[int]:
    """Microjoules of all zones."""
    return [int((zone / name).read_text(encoding="ascii")) for zone in zones]
