"""`tune`: from a model to a faster folder with its receipt. The order of work; each part is elsewhere."""

import os
import shutil
import time
from collections.abc import Callable, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

from hasten.backends.base import Backend
from hasten.compress.folder import ProgressCallback, hashes, requantised, write_folder
from hasten.compress.plan import resolve
from hasten.engine.request import SamplingParams
from hasten.errors import HastenError, RecipeError, ResourceError
from hasten.hardware import conditions, probe, usable_threads, versions
from hasten.measure.memory import peak_memory
from hasten.measure.speed import make_engine
from hasten.measure.transformers_worker import TransformersWorker, available
from hasten.model.checkpoint import open_checkpoint
from hasten.model.hub import resolve as resolve_name
from hasten.model.tokenizer import Tokenizer
from hasten.receipt import SCHEMA, Candidate, Receipt, Sample, build, plain
from hasten.recipe import Recipe, did_you_mean
from hasten.tune import choose
from hasten.tune.choose import Goal
from hasten.tune.lab import ORIGINAL, TRANSFORMERS, Lab
from hasten.tune.search import Progress, Search
from hasten.tune.state import State
from hasten.tune.texts import HeldOut, held_out, workloads

GOALS = ("latency", "throughput", "memory")
_TRANSFORMERS_ROUNDS = 3
_TRANSFORMERS_TOKENS = 16  # a stream; it is slow, and its speed steady
_SAMPLE_TOKENS = 48


def tune(
    model: str | Path,
    out: str | Path | None = None,
    *,
    max_loss: float = 0.01,
    goal: Goal = "latency",
    data: str | Path | None = None,
    rounds: int = 5,
    threads: int | None = None,
    transformers: bool = True,
    make_backend: Callable[[int], Backend] | None = None,
    progress: ProgressCallback | None = None,
) -> Receipt:
    """Measure `model` here, try ways to make it faster, and write what is measured faster within the allowed loss.

    out: a new folder; by default the model's name with "-tuned" in the current one. max_loss: the most that bits per
    byte on held-out text may rise, relative, at the upper end of a 95 % interval. goal: speed of one stream, of eight,
    or bytes. data: a UTF-8 file of held-out text; else see tune/texts.py. rounds: of interleaved timing. transformers:
    measure the original through Transformers too, where it is installed. make_backend: for tests.
    progress(done, total, what) is told of each piece of work; total grows as more is planned.

    An interrupted run leaves `OUT.tune.json`, from which the same call goes on. Raises HastenError's kinds.
    """
    _check(max_loss, goal, rounds)
    out = Path(out) if out is not None else Path(f"{Path(str(model)).name}-tuned")
    _check_out(out)
    checkpoint = open_checkpoint(resolve_name(str(model)))
    threads = threads or usable_threads()
    counter = Progress(progress)
    lab = Lab(checkpoint, probe(threads=threads), threads, make_backend or _cpu_backend, counter.tick)
    tokenizer = Tokenizer(checkpoint.path)
    text = held_out(lab, tokenizer, data)
    settings = {"max_loss": max_loss, "goal": goal, "rounds": rounds, "threads": threads, "text": text.source}
    inputs = {**hashes(checkpoint), "text": text.sha256}
    key = {
        "inputs": inputs,
        "settings": settings,
        "machine": lab.hardware.key,
        "versions": versions(),
        "schema": SCHEMA,
    }
    state = State(out.with_name(out.name + ".tune.json"), key)
    search = _search(lab, state, counter, text, settings)
    reference, notes = _through_transformers(search) if transformers else (None, ())
    candidates, chosen = search.run(text.final)
    receipt = Receipt(
        what="tune",
        model=str(model),
        created=time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime()),
        versions=versions(),
        hardware=plain(lab.hardware),
        conditions=conditions(),
        inputs=inputs,
        recipe=_explicit(lab, chosen.recipe if chosen else Recipe()),
        settings=settings,
        original=search.original(),
        reference=reference,
        candidates=tuple(candidates),
        choice=chosen.name if chosen else ORIGINAL,
        reason=_reason(chosen, goal, max_loss),
        by_batch=choose.by_batch(chosen, ORIGINAL),
        quality=chosen.final if chosen else None,
        sensitivity=search.sensitivity(),
        notes=(*notes, *_notes(lab, chosen)),
    )
    receipt = _write(out, search, _with_samples(receipt, lab, tokenizer, text), text)
    state.remove()
    return receipt


def _search(lab: Lab, state: State, counter: Progress, text: HeldOut, settings: Mapping[str, Any]) -> Search:
    prediction, longest = lab.predict(Recipe()), lab.spec.max_position
    return Search(
        lab=lab,
        state=state,
        progress=counter,
        windows=text.search,
        workloads=workloads(text.tokens, prediction, longest, sampled=False),
        sampled=workloads(text.tokens, prediction, longest, sampled=True),
        goal=settings["goal"],
        max_loss=settings["max_loss"],
        rounds=settings["rounds"],
    )


def _through_transformers(search: Search) -> tuple[Candidate | None, tuple[str, ...]]:
    """The original as users run it today, or a note on why it was not measured."""
    found = search.state.get("reference", TRANSFORMERS)
    if found is not None:
        return build(Candidate, found), ()
    if not available():
        return None, ("Transformers is not installed: the original was measured through hasten only",)
    search.progress.plan(_TRANSFORMERS_ROUNDS)
    works = {
        key: replace(work, num_tokens=min(work.num_tokens, _TRANSFORMERS_TOKENS))
        for key, work in search.workloads.items()
    }
    try:
        with TransformersWorker(search.lab.checkpoint.path, search.lab.threads) as worker:
            candidate = search.lab.compare_transformers(worker, works, _TRANSFORMERS_ROUNDS)
    except HastenError as error:
        return None, (str(error),)
    search.state.put("reference", TRANSFORMERS, candidate)
    return candidate, ()


def _explicit(lab: Lab, recipe: Recipe) -> Recipe:
    """The recipe with the KV cache that it was measured with spelt out; threads stay the machine's to choose."""
    return replace(recipe, run=replace(recipe.run, kv_cache=lab.kv_cache(recipe)))


def _reason(chosen: Candidate | None, goal: Goal, max_loss: float) -> str:
    if chosen is None:
        return f"nothing measured beats the original for {goal} with at most {max_loss:.2%} loss: it is kept as it is"
    assert chosen.final is not None
    assert chosen.final.loss is not None
    loss = chosen.final.loss
    return (
        f"{choose.words(chosen, goal)}; loss {loss.median:+.2%} (up to {loss.high:+.2%}, {max_loss:.2%} allowed) "
        "on text kept for the proof"
    )


def _notes(lab: Lab, chosen: Candidate | None) -> tuple[str, ...]:
    plan = resolve(chosen.recipe if chosen else Recipe(), lab.spec)
    slower = [size for size, name in choose.by_batch(chosen, ORIGINAL).items() if chosen and name == ORIGINAL]
    beside = (f"with {' and '.join(slower)} streams the original is faster: use it there",) if slower else ()
    return (*lab.hardware.notes, *beside, *plan.notes, *requantised(plan, lab.found))


def _with_samples(receipt: Receipt, lab: Lab, tokenizer: Tokenizer, text: HeldOut) -> Receipt:
    """Greedy continuations of the beginning of the text by the original and by the chosen one."""
    prompt = text.tokens[:16]
    length = min(_SAMPLE_TOKENS, lab.spec.max_position - len(prompt))
    samples = []
    for name in dict.fromkeys((ORIGINAL, receipt.choice or ORIGINAL)):
        recipe = Recipe() if name == ORIGINAL else receipt.recipe or Recipe()
        backend = lab.original if name == ORIGINAL else lab.load(recipe)
        engine = make_engine(lab.spec, backend, recipe.run, 1, len(prompt) + length)
        engine.add(prompt, SamplingParams(max_tokens=length, temperature=0.0))
        tokens: list[int] = []
        while engine.num_unfinished:
            for delta in engine.step():
                tokens += delta.token_ids
        samples.append(Sample(name, tokenizer.decode(prompt), tokenizer.decode(tokens)))
    return replace(receipt, samples=tuple(samples))


def _write(out: Path, search: Search, receipt: Receipt, text: HeldOut) -> Receipt:
    """The folder under its name, whole: written beside, run in a fresh process for its peak memory, then renamed."""
    lab, prompt = search.lab, text.tokens[:16]
    staged = out.with_name(f".{out.name}.staged-{os.getpid()}")
    assert receipt.recipe is not None
    try:
        write_folder(staged, lab.checkpoint, receipt.recipe, {})
        search.progress.plan(2)
        peaks = {}
        for name, folder in ((ORIGINAL, lab.checkpoint.path), (receipt.choice, staged)):
            peaks[name] = peak_memory(folder, prompt, lab.threads)
            search.progress.tick(f"{name}: memory in a fresh process")
        receipt = _with_peaks(receipt, peaks)
        receipt.save(staged / "receipt.json")
        os.rename(staged, out)
    except OSError as error:
        raise ResourceError(f"{out} cannot be written: {error.strerror or error}") from None
    finally:
        shutil.rmtree(staged, ignore_errors=True)
    return receipt


def _with_peaks(receipt: Receipt, peaks: Mapping[str | None, int]) -> Receipt:
    def add(candidate: Candidate) -> Candidate:
        peak = peaks.get(candidate.name)
        return candidate if peak is None else replace(candidate, memory={**candidate.memory, "peak": peak})

    assert receipt.original is not None
    return replace(
        receipt, original=add(receipt.original), candidates=tuple(add(candidate) for candidate in receipt.candidates)
    )


def _check(max_loss: float, goal: str, rounds: int) -> None:
    if goal not in GOALS:
        raise RecipeError(f"goal is {goal!r}{did_you_mean(str(goal), GOALS)}")
    if not 0 <= max_loss <= 1:
        raise RecipeError(f"max_loss is {max_loss!r}, expected a share from 0 to 1, such as 0.01 for 1 %")
    if rounds < 1:
        raise RecipeError(f"rounds is {rounds}, expected at least 1")


def _check_out(out: Path) -> None:
    """Fail before the work rather than after it."""
    if out.exists():
        raise ResourceError(f"{out} exists already: remove it or choose another folder")
    parent = out.absolute().parent
    if not parent.is_dir() or not os.access(parent, os.W_OK):
        raise ResourceError(f"no permission to write in {parent}, or it does not exist: choose another folder")


def _cpu_backend(threads: int) -> Backend:
    from hasten.backends.cpu import CpuBackend

    return CpuBackend(threads)
