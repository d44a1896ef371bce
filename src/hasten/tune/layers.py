"""The search layer by layer: which matrices take a low format that all of them together cannot afford.

What each part of a model costs is measured: its divergence from the original with that part alone in the low format.
Parts start large, and the one that costs most is halved again and again, so that a few sensitive matrices among
hundreds are found in a number of measurements that grows with the logarithm. Then as many as the limit allows take the
low format, those first that cost least for a byte saved.
"""

import hashlib
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING

from hasten.measure.quality import summarize
from hasten.recipe import Recipe
from hasten.tune import candidates as made
from hasten.tune import choose
from hasten.tune.lab import ORIGINAL

if TYPE_CHECKING:
    from hasten.tune.search import Search

_MOST_PROBES = 64
_WINDOWS = 4  # that a part's cost is measured on
_TOGETHER = 4  # parts measured beside one reading of the original
_STEPS = 5  # of the bisection at the end

Part = tuple[str, ...]  # units that lie side by side
SENSITIVITY = "sensitivity "  # sections of the state begin so


def find(search: "Search", high: Recipe, low: Recipe) -> Recipe | None:
    """`high`, with as many matrices as `low` stores them as max_loss allows; None where that is none, or time is over.
    What is left out for time is noted in search.notes."""
    spec = search.lab.spec
    every = made.units(spec)
    formats = search.lab.formats(high), search.lab.formats(low)
    saved = {unit: made.saved_bytes(spec, *formats, names) for unit, names in every.items()}
    useful = [unit for unit in every if saved[unit] > 0]
    if not useful:
        return None
    harm = _measure_parts(search, high, low, useful)
    if harm is None:
        search.notes.append("formats layer by layer were not tried: no time was left for them")
        return None
    order = sorted(harm, key=lambda part: harm[part] / sum(saved[unit] for unit in part))
    return _most(search, high, low, [unit for part in order for unit in part])


def _measure_parts(search: "Search", high: Recipe, low: Recipe, units: Sequence[str]) -> dict[Part, float] | None:
    """Divergence by part, the parts that cost most in single units as far as time allows. None: no time at all."""
    section = SENSITIVITY + _digest(high.to_yaml(), low.to_yaml())
    blocks = [unit for unit in units if unit.startswith("layers.")]
    parts = [*((unit,) for unit in units if unit not in blocks), *_halves(tuple(blocks))]
    if not _time_for(search, len(parts)):
        return None
    harm = _harm(search, section, high, low, parts)
    while len(search.state.section(section)) < _MOST_PROBES and _time_for(search, _TOGETHER):
        worst = sorted((part for part in harm if len(part) > 1), key=lambda part: -harm[part])[: _TOGETHER // 2]
        if not worst:
            break
        harm |= _harm(search, section, high, low, [half for part in worst for half in _halves(part)])
        for part in worst:
            del harm[part]
    return harm


def _harm(search: "Search", section: str, high: Recipe, low: Recipe, parts: Sequence[Part]) -> dict[Part, float]:
    """Divergence from the original with each part alone in the low format."""
    names = {part: _name(part) for part in parts}
    recipes = {
        name: _with_low(search, high, low, part)
        for part, name in names.items()
        if search.state.get(section, name) is None
    }
    step = max(1, len(search.windows) // _WINDOWS)
    for group in search.lab.groups(recipes, most=_TOGETHER):
        scores = search.lab.quality(group, search.windows[::step])
        for name in group:
            search.state.put(section, name, summarize(scores[name], scores[ORIGINAL]).divergence)
    return {part: search.state.get(section, name)["median"] for part, name in names.items()}


def _most(search: "Search", high: Recipe, low: Recipe, order: Sequence[str]) -> Recipe | None:
    """As many units as can take the low format within the limit, from the front of `order`: bisection."""
    good, bad, found, section = 0, len(order) + 1, None, "bisection " + _digest(high.to_yaml(), low.to_yaml(), *order)
    for _ in range(_STEPS):
        if bad - good <= max(1, len(order) // 32) or not _time_for(search, 1):
            break
        count = (good + bad) // 2
        recipe = _with_low(search, high, low, order[:count])
        quality = search.quality(section, f"{count} of {len(order)} parts", recipe, search.windows)
        if choose.within(quality, search.max_loss):
            good, found = count, recipe
        else:
            bad = count
    return found


def _time_for(search: "Search", probes: int) -> bool:
    """Whether so many more measurements fit, and a candidate's own after them."""
    pace = search.lab.pace
    one = pace.load + 2 * _WINDOWS * pace.window
    rest = search.cost({"": Recipe()}) + search.cost_of_rest()
    search.progress.expect(probes * one + rest)
    return search.budget.left > probes * one + rest


def _with_low(search: "Search", high: Recipe, low: Recipe, units: Sequence[str]) -> Recipe:
    every: Mapping[str, tuple[str, ...]] = made.units(search.lab.spec)
    return made.mixed(high, low, [name for unit in units for name in every[unit]], search.lab.spec)


def _halves(part: Part) -> list[Part]:
    middle = len(part) // 2
    return [half for half in (part[:middle], part[middle:]) if half]


def _digest(*texts: str) -> str:
    return hashlib.sha256("\n".join(texts).encode()).hexdigest()[:12]


def _name(part: Part) -> str:
    return part[0] if len(part) == 1 else f"{part[0]} .. {part[-1]}"
