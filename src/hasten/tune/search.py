"""The search: measure uniform formats, then formats layer by layer where a limit is missed; prove the best; then try
ways of running what was proven.

Every finished part is kept in a State, and taken from there when a run goes on. Decisions are choose.py's; layers.py is
the search layer by layer, proof.py the proof.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

from hasten.goals import Goal
from hasten.measure.quality import summarize
from hasten.measure.speed import Workload
from hasten.measure.text import Window
from hasten.receipt import Candidate, Measurement, Quality, build
from hasten.recipe import Recipe
from hasten.tune import candidates as made
from hasten.tune import choose, layers
from hasten.tune.budget import Budget, Progress
from hasten.tune.lab import ORIGINAL, Lab
from hasten.tune.proof import ROUNDS as PROOF_ROUNDS
from hasten.tune.proof import Proof
from hasten.tune.state import State

UNTRIED = "not tried"
# A format that is expected to reach no more than this part of one that keeps the limit is not measured.
_HOPELESS = 0.85


@dataclass(frozen=True)
class Search:
    """One search: what is measured with (lab), on what, towards what, within what time, and where finished parts are
    kept. notes: what was left out."""

    lab: Lab
    state: State
    budget: Budget
    progress: Progress
    windows: Sequence[Window]
    workloads: Mapping[str, Workload]
    sampled: Mapping[str, Workload]
    goal: Goal
    max_loss: float
    rounds: int
    notes: list[str] = field(default_factory=list)

    def run(self, proof: Proof) -> tuple[list[Candidate], Candidate | None]:
        """The whole search: every candidate with its verdict, and the chosen one, None where the original stays."""
        tried = self.uniform()
        tried += self.by_layer(tried)
        tried = _updated(tried, proof.walk(choose.rank(tried, self.goal)))
        weights = _chosen(tried)
        ways = self.ways_to_run(weights or self.original())
        ways = _updated(ways, proof.walk(choose.rank(ways, self.goal), weights or self.original()))
        way = _chosen(ways)
        if way is not None and weights is not None:
            tried = _updated(tried, [replace(weights, verdict="accepted")])
        return [*tried, *ways], way or weights

    def original(self) -> Candidate:
        """The original as it was measured beside the first candidates."""
        if self.state.get("candidates", ORIGINAL) is None:
            found = self.lab.measure({}, self.windows, self.workloads, self.rounds)[ORIGINAL]
            self.state.put("candidates", ORIGINAL, replace(found, verdict="reference"))
        return build(Candidate, self.state.get("candidates", ORIGINAL))

    def uniform(self) -> list[Candidate]:
        """Every format that could make this model smaller, for all layers alike. One that cannot win, or that there is
        no time for, is said to be so instead of measured; the first few are always measured."""
        waiting = self.lab.uniform()
        names = list(waiting)
        found = self._known(waiting)
        while waiting := {name: recipe for name, recipe in waiting.items() if name not in found}:
            hopeless = {
                name: why for name, recipe in waiting.items() if (why := self._hopeless(recipe, found.values()))
            }
            if hopeless:
                found |= {name: self._untried(name, waiting[name], why) for name, why in hopeless.items()}
                continue
            group = self.lab.groups(waiting)[0]
            if found and self.budget.left < self.cost(group) + self.cost_of_rest():
                found |= {name: self._untried(name, waiting[name], "no time was left for it") for name in waiting}
                continue
            self.progress.expect(self.cost_of_uniform(waiting) + self.cost_of_rest())
            found |= self.measured(group)
        return [found[name] for name in names]

    def by_layer(self, tried: Sequence[Candidate]) -> list[Candidate]:
        """Where a better uniform format lost too much: that format in as many places as the limit allows."""
        rejected = sorted((c for c in tried if c.verdict == "rejected"), key=lambda c: -choose.score(c, self.goal))
        ranked = choose.rank(tried, self.goal)
        best = choose.score(ranked[0], self.goal) if ranked else 1.0
        if not rejected or choose.score(rejected[0], self.goal) < best * choose.WORTHWHILE or self.max_loss <= 0:
            return []
        name = f"mixed-{rejected[0].name}"
        recipe = layers.find(self, self._careful(tried), rejected[0].recipe)
        return list(self.measured({name: recipe}).values()) if recipe is not None else []

    def ways_to_run(self, base: Candidate) -> list[Candidate]:
        """The best candidate with other ways of running, all timed while sampling. Only one that brings something worth
        its complication is accepted."""
        ways = self.lab.ways_to_run(base.name, base.recipe)
        assert base.search is not None
        # The KV cache changes what a model says; speculation and threads do not.
        kv_cache = self.lab.kv_cache(base.recipe)
        known = {name: base.search for name, way in ways.items() if self.lab.kv_cache(way) == kv_cache}
        plain = f"{base.name} sampled"
        rest = self.cost_of_ways() + self.cost_of_proof() + self.cost_of_end()
        self.progress.expect(rest)
        if self._known(ways).keys() != ways.keys() and self.budget.left < rest:
            return [self._untried(name, way, "no time was left for it") for name, way in ways.items()]
        known |= {ORIGINAL: self._quality_of_original(), plain: base.search}
        found = self.measured(ways, self.sampled, known, (plain, base.recipe))
        return [self._worthwhile(way, base.name) for way in found.values()]

    def measured(
        self,
        recipes: Mapping[str, Recipe],
        workloads: Mapping[str, Workload] | None = None,
        known: Mapping[str, Quality] | None = None,
        base: tuple[str, Recipe] | None = None,
    ) -> dict[str, Candidate]:
        """Each recipe with its verdict; what is in the state is not done again. known: qualities that need no text.
        base: measured beside every group, for what is gained over it."""
        missing = {name: recipe for name, recipe in recipes.items() if self.state.get("candidates", name) is None}
        beside = {} if base is None else {base[0]: base[1]}
        for group in self.lab.groups(missing):
            every = {**beside, **group}
            found = self.lab.measure(
                every, self.windows, workloads or self.workloads, self.rounds, known, base[0] if base else ORIGINAL
            )
            if self.state.get("candidates", ORIGINAL) is None:
                self.state.put("candidates", ORIGINAL, replace(found[ORIGINAL], verdict="reference"))
            for name in group:
                self.state.put("candidates", name, choose.judge(found[name], self.goal, self.max_loss))
        return self._known(recipes)

    def quality(
        self, section: str, name: str, recipe: Recipe, windows: Sequence[Window], confidence: float = 0.95
    ) -> Quality:
        """Quality of one recipe against the original."""
        if self.state.get(section, name) is None:
            scores = self.lab.quality({name: recipe}, windows)
            self.state.put(section, name, summarize(scores[name], scores[ORIGINAL], confidence))
        return build(Quality, self.state.get(section, name))

    def sensitivity(self) -> dict[str, Measurement]:
        """What the search by layer measured: divergence with only these matrices in the low format."""
        return {name: build(Measurement, value) for name, value in self.state.section(layers.SENSITIVITY).items()}

    def cost(self, group: Mapping[str, Recipe]) -> float:
        """Seconds that measuring a group will take, to the best of what was seen."""
        pace, models = self.lab.pace, len(group) + 1
        load = pace.load * len(group) * (1 if self.state.section("candidates") else 2)  # the original is not rounded
        return load + models * (len(self.windows) * pace.window + (self.rounds + 1) * pace.timing)

    def cost_of_uniform(self, waiting: Mapping[str, Recipe] | None = None) -> float:
        """Seconds of the uniform formats, as many of them as fit into the time."""
        if waiting is None:
            waiting = self.lab.uniform()
        costs = [self.cost(group) for group in self.lab.groups(waiting)]
        return max(costs[0], min(sum(costs), self.budget.left - self.cost_of_rest())) if costs else 0.0

    def cost_of_rest(self) -> float:
        """Seconds of what follows the uniform formats: proof, ways of running, the end."""
        return self.cost_of_ways() + self.cost_of_proof() + self.cost_of_end()

    def cost_of_ways(self) -> float:
        return 4 * (self.rounds + 1) * self.lab.pace.timing

    def cost_of_proof(self) -> float:
        """Seconds of writing one candidate and reading it back, of its quality, of timing it beside the original."""
        pace = self.lab.pace
        return 2 * pace.load + 2 * len(self.windows) * pace.window + 2 * (PROOF_ROUNDS + 1) * pace.timing

    def cost_of_end(self) -> float:
        """Seconds of energy and of two fresh processes."""
        return 2 * self.lab.pace.load + 2 * self.lab.pace.timing + 2

    def _known(self, recipes: Mapping[str, Recipe]) -> dict[str, Candidate]:
        found = {name: self.state.get("candidates", name) for name in recipes}
        return {name: build(Candidate, value) for name, value in found.items() if value is not None}

    def _hopeless(self, recipe: Recipe, tried: Any) -> str | None:
        """Why a format cannot be chosen, from what was measured of others; None where it may be."""
        formats, measured = self.lab.formats(recipe), [c for c in tried if c.verdict != UNTRIED]
        for other in measured:
            if other.verdict != "rejected" or other.search.loss.low <= self.max_loss:
                continue
            if made.at_least_as_fine(self.lab.formats(other.recipe), formats):
                return f"{other.name} keeps more and loses {other.search.loss.median:+.2%} already"
        ranked = choose.rank(measured, self.goal)
        if not ranked:
            return None
        hope = choose.expected(self.lab.predict(recipe), self.lab.predict(Recipe()), measured, self.goal)
        best = choose.score(ranked[0], self.goal)
        if hope >= _HOPELESS * best:
            return None
        return f"{hope:.2f}x the original expected, {ranked[0].name} reaches {best:.2f}x"

    def _untried(self, name: str, recipe: Recipe, why: str) -> Candidate:
        return Candidate(
            name=name,
            recipe=recipe,
            weight_bytes=self.lab.weight_bytes(recipe),
            verdict=UNTRIED,
            reason=why,
            predicted=self.lab.predict(recipe),
            memory=self.lab.memory(recipe),
        )

    def _quality_of_original(self) -> Quality:
        found = self.original().search
        assert found is not None
        return found

    def _worthwhile(self, way: Candidate, base: str) -> Candidate:
        if way.verdict == "rejected":
            return way
        gain = choose.figure(way, self.goal, "gain ")
        reason = f"{gain.median:.2f}x {base} ({gain.low:.2f} .. {gain.high:.2f}), both sampled at temperature 1"
        if way.verdict == "accepted" and choose.worthwhile(way, self.goal):
            return replace(way, reason=reason)
        return replace(way, verdict="slower", reason=f"{reason}: not worth it")

    def _careful(self, tried: Sequence[Candidate]) -> Recipe:
        """What the sensitive places keep: of the accepted formats that leave at least half the limit, the best for the
        goal; else the original's."""
        room = [candidate for candidate in choose.rank(tried, self.goal) if _upper_loss(candidate) <= self.max_loss / 2]
        return room[0].recipe if room else Recipe()


def _updated(every: Sequence[Candidate], changed: Sequence[Candidate]) -> list[Candidate]:
    found = {candidate.name: candidate for candidate in changed}
    return [found.get(candidate.name, candidate) for candidate in every]


def _chosen(candidates: Sequence[Candidate]) -> Candidate | None:
    return next((candidate for candidate in candidates if candidate.verdict == "chosen"), None)


def _upper_loss(candidate: Candidate) -> float:
    assert candidate.search is not None
    assert candidate.search.loss is not None
    return candidate.search.loss.high
