"""What a tune can make best. On its own, so that the command line knows it without importing a search."""

from typing import Literal, get_args

Goal = Literal["latency", "throughput", "memory"]
GOALS: tuple[Goal, ...] = get_args(Goal)
