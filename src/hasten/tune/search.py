"""The search: measure uniform formats, then formats layer by layer where a limit is missed, then ways of running; prove
the best on text that the search has not seen.

Every finished part is kept in a State, and taken from there when a run goes on. Decisions are choose.py's.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

from hasten.measure.quality import summarize
from hasten.measure.speed import Workload
from hasten.measure.text import Window
from hasten.receipt import Candidate, Measurement, Quality, build
from hasten.recipe import Recipe
from hasten.tune import candidates as made
from hasten.tune import choose
from hasten.tune.choose import Goal
from hasten.tune.lab import ORIGINAL, Lab, ticks
from hasten.tune.state import State

_MOST_UNITS = 48  # measured one by one; of a deeper model, layers and classes are, and their product stands for a unit
_SENSITIVITY_WINDOWS = 4


class Progress:
    """Counts pieces of work for a callback progress(done, total, label); total grows as more is planned."""

    def __init__(self, callback: Callable[[int, int, str], None] | None) -> None:
        self._callback = callback
        self._done = 0
        self._total = 0

    def plan(self, pieces: int) -> None:
        self._total += pieces

    def tick(self, label: str) -> None:
        self._done += 1
        if self._callback is not None:
            self._callback(self._done, max(self._done, self._total), label)


@dataclass(frozen=True)
class Search:
    """One search: what is measured with (lab), on what, towards what, and where finished parts are kept."""

    lab: Lab
    state: State
    progress: Progress
    windows: Sequence[Window]
    workloads: Mapping[str, Workload]
    sampled: Mapping[str, Workload]
    goal: Goal
    max_loss: float
    rounds: int

    def run(self, final: Sequence[Window]) -> tuple[list[Candidate], Candidate | None]:
        """The whole search: every candidate with its verdict, and the chosen one, None where the original stays."""
        tried = self.uniform()
        tried += self.by_layer(tried)
        ranked = choose.rank(tried, self.goal)
        ways = self.ways_to_run(ranked[0] if ranked else self.original())
        order = choose.rank(ways, self.goal) + ranked
        proven = {candidate.name: candidate for candidate in self.prove(order, final)}
        every = [proven.get(candidate.name, candidate) for candidate in (*tried, *ways)]
        return every, next((candidate for candidate in every if candidate.verdict == "chosen"), None)

    def original(self) -> Candidate:
        """The original as it was measured beside the first candidates."""
        if self.state.get("candidates", ORIGINAL) is None:
            self.progress.plan(ticks(0, self.rounds))
            self.state.put("candidates", ORIGINAL, self._alone())
        return build(Candidate, self.state.get("candidates", ORIGINAL))

    def measured(
        self,
        recipes: Mapping[str, Recipe],
        workloads: Mapping[str, Workload] | None = None,
        base: tuple[str, Recipe] | None = None,
    ) -> dict[str, Candidate]:
        """Each recipe with its verdict; what is in the state is not done again. base: measured beside every group, for
        what is gained over it."""
        missing = {name: recipe for name, recipe in recipes.items() if self.state.get("candidates", name) is None}
        groups = self.lab.groups(missing)
        beside = {} if base is None else {base[0]: base[1]}
        self.progress.plan(sum(ticks(len(group) + len(beside), self.rounds) for group in groups))
        for group in groups:
            found = self.lab.measure(
                {**beside, **group},
                self.windows,
                workloads or self.workloads,
                self.rounds,
                base[0] if base else ORIGINAL,
            )
            if self.state.get("candidates", ORIGINAL) is None:
                self.state.put("candidates", ORIGINAL, replace(found[ORIGINAL], verdict="reference"))
            for name in group:
                self.state.put("candidates", name, choose.judge(found[name], self.goal, self.max_loss))
        return {name: build(Candidate, self.state.get("candidates", name)) for name in recipes}

    def uniform(self) -> list[Candidate]:
        """Every format that could make this model smaller, for all layers alike."""
        return list(self.measured(made.uniform(self.lab.spec, self.lab.found)).values())

    def by_layer(self, tried: Sequence[Candidate]) -> list[Candidate]:
        """Where a better uniform format lost too much: that format in as many places as the limit allows."""
        rejected = sorted((c for c in tried if c.verdict == "rejected"), key=lambda c: -choose.score(c, self.goal))
        ranked = choose.rank(tried, self.goal)
        best = choose.score(ranked[0], self.goal) if ranked else 1.0
        if not rejected or choose.score(rejected[0], self.goal) < best * choose.WORTHWHILE or self.max_loss <= 0:
            return []
        high, low = self._careful(tried), rejected[0].recipe
        order = self._order(high, low)
        count = self._most(high, low, order)
        if count == 0:
            return []
        names = [name for unit in order[:count] for name in made.units(self.lab.spec)[unit]]
        recipe = made.mixed(high, low, names, self.lab.spec)
        return list(self.measured({f"mixed-{rejected[0].name}": recipe}).values())

    def ways_to_run(self, base: Candidate) -> list[Candidate]:
        """The best candidate with other ways of running, all timed while sampling. Only one that brings something worth
        its complication is accepted."""
        ways = made.ways_to_run(base.name, base.recipe, self.lab.kv_cache(base.recipe), self.lab.threads)
        found = self.measured(ways, self.sampled, (f"{base.name} sampled", base.recipe))
        return [self._worthwhile(way, base.name) for way in found.values()]

    def prove(self, ranked: Sequence[Candidate], final: Sequence[Window]) -> list[Candidate]:
        """Walk down the ranking until one keeps the limit on text the search has not seen. All that were tried, the
        last of them chosen if it did."""
        tried: list[Candidate] = []
        for candidate in ranked:
            found = self.quality("final", candidate.name, candidate.recipe, final)
            if choose.within(found, self.max_loss):
                return [*tried, replace(candidate, verdict="chosen", final=found)]
            assert found.loss is not None
            reason = f"loss up to {found.loss.high:+.2%} on the text kept for the proof, {self.max_loss:.2%} allowed"
            tried.append(replace(candidate, verdict="rejected", reason=reason, final=found))
        return tried

    def quality(self, section: str, name: str, recipe: Recipe, windows: Sequence[Window]) -> Quality:
        """Quality of one recipe against the original."""
        if self.state.get(section, name) is None:
            self.progress.plan(2)
            scores = self.lab.quality({name: recipe}, windows)
            self.state.put(section, name, summarize(scores[name], scores[ORIGINAL]))
        return build(Quality, self.state.get(section, name))

    def sensitivity(self) -> dict[str, Measurement]:
        """What the search by layer measured: divergence with one unit, layer or class in the low format."""
        return {name: build(Measurement, value) for name, value in self.state.section("sensitivity").items()}

    def _alone(self) -> Candidate:
        return replace(self.lab.measure({}, self.windows, self.workloads, self.rounds)[ORIGINAL], verdict="reference")

    def _worthwhile(self, way: Candidate, base: str) -> Candidate:
        if way.verdict == "rejected":
            return way
        gain = way.ratio[f"gain {choose.STREAMS.get(self.goal, self.goal)}"]
        reason = f"{gain.median:.2f}x {base} ({gain.low:.2f} .. {gain.high:.2f}), both sampled at temperature 1"
        if choose.worthwhile(way, self.goal):
            return replace(way, verdict="accepted", reason=reason)
        return replace(way, verdict="slower", reason=f"{reason}: not worth it")

    def _careful(self, tried: Sequence[Candidate]) -> Recipe:
        """What the sensitive places keep: of the accepted formats that leave at least half the limit, the best for the
        goal; else the original's."""
        room = [candidate for candidate in choose.rank(tried, self.goal) if _upper_loss(candidate) <= self.max_loss / 2]
        return room[0].recipe if room else Recipe()

    def _order(self, high: Recipe, low: Recipe) -> list[str]:
        """Units that save bytes in the low format, the least harm for a byte first."""
        spec = self.lab.spec
        high_formats, low_formats = self.lab.formats(high), self.lab.formats(low)
        every = made.units(spec)
        saved = {u: made.saved_bytes(spec, high_formats, low_formats, names) for u, names in every.items()}
        useful = {unit: names for unit, names in every.items() if saved[unit] > 0}
        if len(useful) <= _MOST_UNITS:
            harm = self._harm(high, low, useful)
        else:
            harm = self._harm_of_deep(high, low, useful)
        return sorted(useful, key=lambda unit: harm[unit] / saved[unit])

    def _harm(self, high: Recipe, low: Recipe, parts: Mapping[str, Sequence[str]]) -> dict[str, float]:
        """Divergence from the original with each part alone in the low format."""
        recipes = {
            name: made.mixed(high, low, names, self.lab.spec)
            for name, names in parts.items()
            if self.state.get("sensitivity", name) is None
        }
        groups = self.lab.groups(recipes, most=4)
        self.progress.plan(sum(len(group) + 1 for group in groups))
        step = max(1, len(self.windows) // _SENSITIVITY_WINDOWS)
        for group in groups:
            scores = self.lab.quality(group, self.windows[::step])
            for name in group:
                self.state.put("sensitivity", name, summarize(scores[name], scores[ORIGINAL]).divergence)
        return {name: self.state.get("sensitivity", name)["median"] for name in parts}

    def _harm_of_deep(self, high: Recipe, low: Recipe, parts: Mapping[str, Sequence[str]]) -> dict[str, float]:
        """As _harm, with a layer's share times its class's in place of a measurement of each unit."""
        spec = self.lab.spec
        layers, classes = made.by_layer(spec), made.by_class(spec)
        rest = {unit: names for unit, names in parts.items() if not unit.startswith("layers.")}
        harm = self._harm(high, low, {**layers, **classes, **rest})
        total = sum(harm[name] for name in classes) or 1.0
        out = {unit: harm[unit] for unit in rest}
        for unit in parts.keys() - rest.keys():
            layer, members = unit.rsplit(".", 1)
            out[unit] = harm[layer] * harm[_class_of(members, classes)] / total
        return out

    def _most(self, high: Recipe, low: Recipe, order: Sequence[str]) -> int:
        """How many units, from the front of `order`, can take the low format within the limit: bisection."""
        every = made.units(self.lab.spec)
        good, bad = 0, len(order) + 1
        while bad - good > max(1, len(order) // 32):
            count = (good + bad) // 2
            names = [name for unit in order[:count] for name in every[unit]]
            recipe = made.mixed(high, low, names, self.lab.spec)
            found = self.quality("bisection", f"{count} units", recipe, self.windows)
            good, bad = (count, bad) if choose.within(found, self.max_loss) else (good, count)
        return good


def _upper_loss(candidate: Candidate) -> float:
    assert candidate.search is not None
    assert candidate.search.loss is not None
    return candidate.search.loss.high


def _class_of(members: str, classes: Mapping[str, Any]) -> str:
    return next(name for name in classes if set(members.split("+")) <= set(name.split("+")))
