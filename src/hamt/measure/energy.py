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
        packages = _packages(folder)
        if not packages:
            return None
        before, ranges = (_read(packages, name) for name in ("energy_uj", "max_energy_range_uj"))
        run()
        after = _read(packages, "energy_uj")
    except (OSError, ValueError):
        return None
    # A counter starts from zero again when it reaches its range.
    return sum((b - a) % top for a, b, top in zip(before, after, ranges, strict=True)) / 1e6


def _packages(folder: Path) -> list[Path]:
    """The zone of each package, once.

    Machines may have a package again under another interface, and a zone of the whole system.
    """
    named: dict[str, Path] = {}
    for zone in sorted(folder.iterdir()):
        name = (zone / "name").read_text(encoding="ascii").strip() if ":" in zone.name else ""
        if name.startswith("package-"):
            named.setdefault(name, zone)
    return list(named.values())


def _read(zones: Iterable[Path], name: str) -> list[int]:
    """Microjoules of all zones."""
    return [int((zone / name).read_text(encoding="ascii")) for zone in zones]
