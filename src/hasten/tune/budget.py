"""Time: how long pieces of work take here, how much of the time allowed is left, and what a progress bar is told."""

import time
from collections.abc import Callable
from dataclasses import dataclass


@dataclass(slots=True)
class Pace:
    """Seconds that one model takes here, from the last time it was seen: to quantise and load, to read a window of
    text and compare it, to run every workload once. 0 until it was seen."""

    load: float = 0.0
    window: float = 0.0
    timing: float = 0.0


class Budget:
    """Seconds that a run may take, and has taken: `before` counts the parts of it that were interrupted."""

    def __init__(self, seconds: float, before: float = 0.0, now: Callable[[], float] = time.monotonic) -> None:
        self.seconds = seconds
        self._now = now
        self._start = now() - before

    @property
    def spent(self) -> float:
        return self._now() - self._start

    @property
    def left(self) -> float:
        return self.seconds - self.spent


class Progress:
    """Tells a callback progress(done, 100, what): done in percent of the time that the work is expected to take. It
    never goes back, whatever is found out on the way."""

    def __init__(self, callback: Callable[[int, int, str], None] | None, budget: Budget) -> None:
        self._callback = callback
        self._budget = budget
        self._end = budget.seconds
        self._done = 0

    def expect(self, seconds: float) -> None:
        """From now on, so many are still to come."""
        self._end = self._budget.spent + seconds

    def tick(self, what: str) -> None:
        """A piece is done."""
        if self._callback is not None:
            spent = self._budget.spent
            self._done = max(self._done, min(99, int(100 * spent / max(spent, self._end, 1e-9))))
            self._callback(self._done, 100, what)

    def finished(self) -> None:
        """All is done."""
        if self._callback is not None:
            self._callback(100, 100, "done")
