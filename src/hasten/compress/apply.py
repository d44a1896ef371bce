"""Carry out a plan on a stream of weights, one at a time: what no step targets passes through bit for bit."""

from collections.abc import Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor

from hasten.compress import rtn
from hasten.compress.plan import Plan
from hasten.model.formats import Weight


def carry_out(
    plan: Plan, weights: Iterable[tuple[str, Weight]], pool: ThreadPoolExecutor | None = None
) -> Iterator[tuple[str, Weight]]:
    """The weights with every matrix of the plan in its format. One that has it already is left alone."""
    for name, weight in weights:
        wanted = plan.formats.get(name)
        if wanted is None or wanted == weight.format:
            yield name, weight
        else:
            step = plan.steps.get(name)
            bits = step.bits if step is not None and step.format == wanted.kind else None  # else it fell back
            yield name, rtn.quantize(name, weight, wanted, pool, bits=bits)
