"""The end of a tune: energy, and the folder run once in a fresh process before it gets its name."""

from collections.abc import Mapping
from dataclasses import replace

from hasten.errors import ResourceError
from hasten.measure.memory import run_fresh
from hasten.measure.speed import notes_on_format
from hasten.model.tokenizer import Tokenizer
from hasten.receipt import Candidate, Receipt, Sample
from hasten.recipe import Recipe
from hasten.tune.lab import ORIGINAL
from hasten.tune.search import Search
from hasten.tune.staged import Staged
from hasten.tune.texts import HeldOut

_PROMPT_TOKENS = 16


def finish(staged: Staged, search: Search, receipt: Receipt, text: HeldOut) -> Receipt:
    """The receipt with energy, peak memory, samples and time taken; the folder under its name, whole or not at all."""
    assert receipt.recipe is not None
    search.progress.expect(search.cost_of_end())
    staged.write(receipt.recipe)
    receipt = _with_energy(receipt, search)
    receipt = _with_products(receipt, search)
    receipt = _with_fresh_runs(receipt, staged, search, text.tokens[:_PROMPT_TOKENS])
    receipt = replace(receipt, settings={**receipt.settings, "seconds": round(search.budget.spent, 1)})
    staged.publish(receipt)
    search.progress.finished()
    return receipt


def _with_energy(receipt: Receipt, search: Search) -> Receipt:
    """Joules a token of both models, or a note on why there are none."""
    assert receipt.recipe is not None
    models = {ORIGINAL: Recipe(), str(receipt.choice): receipt.recipe}
    # What was sampled is what speculation does in use; greedy text repeats itself, which flatters it.
    works = search.sampled if receipt.recipe.run.speculation else search.workloads
    try:
        found = {name: search.lab.energy(recipe, works) for name, recipe in models.items()}
    except ResourceError as error:
        return replace(receipt, notes=(*receipt.notes, f"energy was not measured: {error}"))
    return _changed(receipt, {name: {"energy": energy} for name, energy in found.items()})


def _with_products(receipt: Receipt, search: Search) -> Receipt:
    """With a note for each number of streams, of more than were timed, at which the chosen format loses on a GPU."""
    assert receipt.recipe is not None
    backend = search.lab.load({"": receipt.recipe})[""]
    return replace(receipt, notes=(*receipt.notes, *notes_on_format(backend, search.lab.device, measure=True)))


def _with_fresh_runs(receipt: Receipt, staged: Staged, search: Search, prompt: list[int]) -> Receipt:
    """Both models as users run them: peak memory, and how they continue the beginning of the text greedily."""
    lab, samples = search.lab, []
    tokenizer = Tokenizer(lab.checkpoint.path)
    for name, folder in {ORIGINAL: lab.checkpoint.path, str(receipt.choice): staged.path}.items():
        found = run_fresh(folder, prompt, lab.threads, device=lab.device)
        samples.append(Sample(name, tokenizer.decode(prompt), tokenizer.decode(found.tokens)))
        receipt = _with_peak(receipt, name, found.peak)
        search.progress.tick(f"{name}: run in a fresh process")
    return replace(receipt, samples=tuple(samples))


def _with_peak(receipt: Receipt, name: str, peak: int) -> Receipt:
    """The receipt with the peak memory of one candidate, or of the original."""
    known = [receipt.original, *receipt.candidates]
    memory = {c.name: {**c.memory, "peak": peak} for c in known if c is not None and c.name == name}
    return _changed(receipt, {name: {"memory": value} for name, value in memory.items()})


def _changed(receipt: Receipt, changes: Mapping[str, Mapping[str, object]]) -> Receipt:
    """The receipt with other values in some of its candidates."""

    def change(candidate: Candidate) -> Candidate:
        return replace(candidate, **changes.get(candidate.name, {}))  # type: ignore[arg-type]

    assert receipt.original is not None
    return replace(receipt, original=change(receipt.original), candidates=tuple(change(c) for c in receipt.candidates))
