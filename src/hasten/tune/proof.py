"""The proof: the best candidates as they are written, on text and in rounds of timing that had no part in picking them.

Whatever is picked as the best of several measurements looks better than it is. So nothing that picked a candidate
counts here, and the more were tried before, the wider are the intervals that the next one is judged by.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

from hasten.measure.speed import Workload
from hasten.measure.text import Window
from hasten.receipt import Candidate, Quality, build
from hasten.recipe import Recipe
from hasten.tune import choose
from hasten.tune.lab import ORIGINAL
from hasten.tune.staged import Staged

if TYPE_CHECKING:
    from hasten.tune.search import Search

ROUNDS = 9  # from so many on, the interval bears a disturbed one


@dataclass(frozen=True)
class Proof:
    """final: windows of text that the search has not seen. staged: where the folder is written and read back from."""

    search: "Search"
    final: Sequence[Window]
    staged: Staged

    def walk(self, ranked: Sequence[Candidate], base: Candidate | None = None) -> list[Candidate]:
        """Walk down a ranking until one keeps the limit and is faster. All that were tried, the last of them chosen if
        it is. base: the candidates are ways to run it, and must be worth that."""
        tried: list[Candidate] = []
        for candidate in ranked:
            self.search.progress.expect(self.search.cost_of_proof() + self.search.cost_of_end())
            tried.append(self._prove(candidate, base))
            if tried[-1].verdict == "chosen":
                break
        return tried

    def _prove(self, candidate: Candidate, base: Candidate | None) -> Candidate:
        search = self.search
        self.staged.write(search.lab.explicit(candidate.recipe))
        found = self._quality(candidate, base)
        assert found.loss is not None
        if not choose.within(found, search.max_loss):
            reason = f"loss up to {found.loss.high:+.2%} on the text kept for the proof, {search.max_loss:.2%} allowed"
            return replace(candidate, verdict="rejected", reason=reason, final=found)
        timed = self._time(candidate, base)
        # All figures of speed are the new ones.
        same = {"name": candidate.name, "recipe": candidate.recipe, "search": candidate.search, "final": found}
        judged = choose.confirm(replace(timed, **same), search.goal)  # type: ignore[arg-type]
        if judged.verdict != "chosen":
            return judged
        if base is not None and not choose.worthwhile(judged, search.goal):
            gain = choose.figure(judged, search.goal, "gain ")
            reason = (
                f"{gain.median:.2f}x {base.name} when timed again ({gain.low:.2f} .. {gain.high:.2f}): not worth it"
            )
            return replace(judged, verdict="slower", reason=reason)
        return replace(judged, reason=choose.proven(judged, search.goal, search.max_loss))

    def _quality(self, candidate: Candidate, base: Candidate | None) -> Quality:
        """On the final text. Only the weights and the KV cache change what a model says."""
        lab, state = self.search.lab, self.search.state
        if base is not None and base.final is not None and lab.kv_cache(candidate.recipe) == lab.kv_cache(base.recipe):
            return base.final
        confidence = choose.confidence(len(state.section("final")) + 1)
        return self.search.quality("final", candidate.name, candidate.recipe, self.final, confidence)

    def _time(self, candidate: Candidate, base: Candidate | None) -> Candidate:
        """In rounds of its own, the original's and the base's in turn."""
        search = self.search
        if search.state.get("timed again", candidate.name) is None:
            confidence = choose.confidence(len(search.state.section("timed again")) + 1)
            beside: Mapping[str, Recipe] = {} if base is None else {f"{base.name} sampled": base.recipe}
            recipes = {**beside, candidate.name: candidate.recipe}
            assert candidate.search is not None
            found = search.lab.measure(
                recipes,
                (),
                self._workloads(base),
                ROUNDS,
                dict.fromkeys((*recipes, ORIGINAL), candidate.search),
                next(iter(beside), ORIGINAL),
                confidence,
            )
            search.state.put("timed again", candidate.name, found[candidate.name])
        return build(Candidate, search.state.get("timed again", candidate.name))

    def _workloads(self, base: Candidate | None) -> Mapping[str, Workload]:
        return self.search.workloads if base is None else self.search.sampled
