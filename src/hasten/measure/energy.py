"""Energy of a stretch of work, from the package counters of RAPL where the system lets them be read."""

import time
from collections.abc import Callable
from pathlib import Path

from hasten.hardware import energy_counters


def measure_energy(work: Callable[[], object]) -> dict[str, float] | None:
    """Joules and seconds that `work` took, all packages together, whatever else ran beside it. None where the counters
    cannot be read: nothing is estimated."""
    counters = energy_counters()
    before = [_microjoules(path) for path in counters]
    start = time.perf_counter()
    work()
    seconds = time.perf_counter() - start
    if not counters:
        return None
    used = 0.0
    for path, first in zip(counters, before, strict=True):
        change = _microjoules(path) - first
        if change < 0:  # the counter wrapped
            change += int((path.parent / "max_energy_range_uj").read_text())
        used += change
    return {"joules": used / 1e6, "seconds": seconds}


def _microjoules(path: Path) -> int:
    return int(path.read_text())
