"""The end of a tune: what both models say, their energy, and the folder, run once before it has its name."""

import os
import shutil
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path

from hasten.compress.folder import ProgressCallback, write_folder
from hasten.engine.request import SamplingParams
from hasten.errors import ResourceError
from hasten.measure.memory import peak_memory
from hasten.measure.speed import make_engine
from hasten.model.tokenizer import Tokenizer
from hasten.receipt import Candidate, Receipt, Sample
from hasten.recipe import Recipe
from hasten.tune.lab import ORIGINAL, Lab, now_and_then
from hasten.tune.search import Search
from hasten.tune.texts import HeldOut

_PROMPT_TOKENS = 16
_SAMPLE_TOKENS = 48


def finish(out: Path, search: Search, receipt: Receipt, tokenizer: Tokenizer, text: HeldOut) -> Receipt:
    """The receipt with samples, energy, peak memory and time taken; the folder under its name, whole or not at all."""
    search.progress.expect(search.cost_of_end())
    receipt = _with_samples(receipt, search.lab, tokenizer, text)
    search.progress.tick("samples of both models")
    receipt = _with_energy(receipt, search)
    return _write(out, search, receipt, text)


def _models(receipt: Receipt) -> dict[str, Recipe]:
    """What was chosen, which is loaded still, and the original where that is another, by name."""
    chosen = {receipt.choice: receipt.recipe} if receipt.choice and receipt.recipe else {}
    return {**chosen, ORIGINAL: Recipe()}


def _with_samples(receipt: Receipt, lab: Lab, tokenizer: Tokenizer, text: HeldOut) -> Receipt:
    """Greedy continuations of the beginning of the text by the original and by the chosen one."""
    prompt = text.tokens[:_PROMPT_TOKENS]
    length = min(_SAMPLE_TOKENS, lab.spec.max_position - len(prompt))
    samples = []
    for name, recipe in _models(receipt).items():
        engine = make_engine(lab.spec, lab.load({name: recipe})[name], recipe.run, 1, len(prompt) + length)
        engine.add(prompt, SamplingParams(max_tokens=length, temperature=0.0))
        tokens: list[int] = []
        while engine.num_unfinished:
            for delta in engine.step():
                tokens += delta.token_ids
        samples.append(Sample(name, tokenizer.decode(prompt), tokenizer.decode(tokens)))
    return replace(receipt, samples=tuple(reversed(samples)))


def _with_energy(receipt: Receipt, search: Search) -> Receipt:
    """Joules a token of both models, or a note on why there are none."""
    found = {name: search.lab.energy(recipe, search.workloads) for name, recipe in _models(receipt).items()}
    if any(energy is None for energy in found.values()):
        return replace(receipt, notes=(*receipt.notes, "energy was not measured: its counters (RAPL) are not readable"))
    return _changed(receipt, {name: {"energy": energy} for name, energy in found.items()})


def _write(out: Path, search: Search, receipt: Receipt, text: HeldOut) -> Receipt:
    """The folder: written beside, run in a fresh process for its peak memory, then renamed."""
    lab = search.lab
    staged = out.with_name(f".{out.name}.staged-{os.getpid()}")
    assert receipt.recipe is not None
    try:
        write_folder(staged, lab.checkpoint, receipt.recipe, {}, _told(search))
        for name, folder in {receipt.choice: staged, ORIGINAL: lab.checkpoint.path}.items():
            peak = peak_memory(folder, text.tokens[:_PROMPT_TOKENS], lab.threads)
            receipt = _with_peak(receipt, str(name), peak)
            search.progress.tick(f"{name}: memory in a fresh process")
        receipt = replace(receipt, settings={**receipt.settings, "seconds": round(search.budget.spent, 1)})
        receipt.save(staged / "receipt.json")
        os.rename(staged, out)
    except OSError as error:
        raise ResourceError(f"{out} cannot be written: {error.strerror or error}") from None
    finally:
        shutil.rmtree(staged, ignore_errors=True)
    return receipt


def _told(search: Search) -> ProgressCallback:
    tick = search.progress.tick
    return now_and_then(lambda done, total: tick(f"the folder is written: {done} of {total} matrices"))


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
