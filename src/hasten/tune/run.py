"""`tune`: from a model to a faster folder with its receipt. The order of work; each part is elsewhere."""

import hashlib
import time
from collections.abc import Callable, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

from hasten.backends import choose_device, open_backend
from hasten.backends.base import Backend
from hasten.checks import did_you_mean
from hasten.compress.folder import ProgressCallback, check_out, hashes, made_from, requantised
from hasten.compress.plan import resolve
from hasten.errors import HastenError, RecipeError
from hasten.goals import GOALS, Goal
from hasten.hardware import Gpu, Hardware, conditions, probe, usable_threads, versions
from hasten.measure.text import read_text
from hasten.measure.transformers_worker import TransformersWorker, available
from hasten.model.checkpoint import open_checkpoint
from hasten.model.hub import folder_beside
from hasten.model.hub import resolve as resolve_name
from hasten.model.tokenizer import Tokenizer
from hasten.receipt import SCHEMA, Candidate, Receipt, build, plain
from hasten.recipe import Recipe
from hasten.tune import choose
from hasten.tune.budget import Budget, Progress
from hasten.tune.finish import finish
from hasten.tune.lab import ORIGINAL, TRANSFORMERS, Lab
from hasten.tune.proof import ROUNDS as PROOF_ROUNDS
from hasten.tune.proof import Proof
from hasten.tune.search import Search
from hasten.tune.staged import Staged
from hasten.tune.state import State
from hasten.tune.texts import HeldOut, held_out, workload_sizes, workloads

_LEAST_ROUNDS = 3
_ROUNDS_SHARE = 0.2  # of the time allowed, that timing may take
_TIMED = 11  # models that are timed in a search, about
_TRANSFORMERS_ROUNDS = 3
_TRANSFORMERS_TOKENS = 16  # a stream; it is slow, and its speed steady


def tune(
    model: str | Path,
    out: str | Path | None = None,
    *,
    max_loss: float = 0.01,
    goal: Goal = "latency",
    data: str | Path | None = None,
    minutes: float = 5,
    rounds: int = 5,
    threads: int | None = None,
    device: str = "auto",
    transformers: bool = True,
    make_backend: Callable[[int], Backend] | None = None,
    progress: ProgressCallback | None = None,
) -> Receipt:
    """Measure `model` here, try ways to make it faster, and write what is measured faster within the allowed loss.

    out: a new folder; by default the model's name with "-tuned" in the current one. max_loss: the most that bits per
    byte on held-out text may rise, relative, at the upper end of a 95 % interval. goal: speed of one stream, of eight
    (of 64 on a GPU), or bytes. data: a UTF-8 file of held-out text; else see tune/texts.py. minutes: that the search is
    fitted to; a model so slow that they do not suffice for the least that says something takes longer. rounds: of
    interleaved timing in the search, at most; the proof has its own. device: "auto", "cpu" or "cuda" (a GPU).
    transformers: measure the original through Transformers too, where it is installed. make_backend: for tests.
    progress(done, 100, what) is told of each piece of work, in percent of the time expected.

    An interrupted run leaves `OUT.tune.json`, from which the same call goes on. Raises HastenError's kinds.
    """
    begin = time.monotonic()
    _check(max_loss, goal, minutes, rounds)
    out = default_out(model) if out is None else out
    check_out(out)
    out = Path(out)
    given = None if data is None else (Path(data).name, read_text(data))
    checkpoint = open_checkpoint(resolve_name(str(model)))
    threads, device = threads or usable_threads(), choose_device(device)
    before = made_from(checkpoint.path)
    settings = {"max_loss": max_loss, "goal": goal, "rounds": rounds, "threads": threads, "device": device}
    hardware, inputs = _limits(device, threads), hashes(checkpoint)
    state = State(out.with_name(out.name + ".tune.json"), _key(inputs, settings, hardware, given))
    budget = Budget(60 * minutes, state.seconds_before + time.monotonic() - begin)
    counter = Progress(progress, budget)
    if state.ignored:
        counter.tick(state.ignored)
    make_backend = make_backend or (lambda threads: open_backend(device, threads=threads))
    lab = Lab(checkpoint, hardware, threads, make_backend, counter.tick, device)
    text = _text(lab, state, budget, given)
    search = _search(lab, state, budget, counter, text, settings)
    with Staged(out, lab) as staged:
        receipt = _measure(str(model), search, text, staged, inputs, {**settings, "minutes": minutes}, transformers)
        receipt = finish(staged, search, replace(receipt, made_from=before), text)
    state.remove()
    return receipt


def _measure(
    model: str,
    search: Search,
    text: HeldOut,
    staged: Staged,
    inputs: Mapping[str, str],
    settings: dict[str, Any],
    transformers: bool,
) -> Receipt:
    """The whole search, and its receipt but for what comes with the folder."""
    reference, notes = _through_transformers(search) if transformers else (None, ())
    candidates, chosen = search.run(Proof(search, text.final, staged))
    lab, goal = search.lab, search.goal
    return Receipt(
        what="tune",
        model=model,
        created=time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime()),
        versions=versions(),
        hardware=plain(lab.hardware),
        conditions=conditions(),
        inputs={**inputs, "text": text.sha256},
        recipe=lab.explicit(chosen.recipe if chosen else Recipe()),
        settings={**settings, **_measured_on(search, text)},
        original=search.original(),
        reference=reference,
        candidates=tuple(candidates),
        choice=chosen.name if chosen else ORIGINAL,
        reason=chosen.reason if chosen else _kept(goal, search.max_loss),
        by_batch=choose.by_batch(chosen, search.original()),
        quality=chosen.final if chosen else None,
        sensitivity=search.sensitivity(),
        notes=(*notes, *search.notes, *_notes(lab, chosen)),
    )


def _key(
    inputs: Mapping[str, str], settings: Mapping[str, Any], hardware: Hardware | Gpu, given: tuple[str, str] | None
) -> dict[str, object]:
    """What numbers must have in common to be compared: an interrupted run of anything else is not gone on with."""
    digest = None if given is None else hashlib.sha256(given[1].encode()).hexdigest()
    return {
        "inputs": inputs,
        "settings": settings,
        "machine": hardware.key,
        "versions": versions(),
        "schema": SCHEMA,
        "text": digest,
    }


def _text(lab: Lab, state: State, budget: Budget, given: tuple[str, str] | None) -> HeldOut:
    """The held-out text, the same windows when a run goes on. given: name and content."""
    if state.get("plan", "text") is None:
        state.put(
            "plan", "text", held_out(lab, Tokenizer(lab.checkpoint.path), budget.seconds, *(given or ())).to_dict()
        )
    return HeldOut.from_dict(state.get("plan", "text"))


def _search(
    lab: Lab, state: State, budget: Budget, counter: Progress, text: HeldOut, settings: Mapping[str, Any]
) -> Search:
    if state.get("plan", "sizes") is None:
        state.put("plan", "sizes", workload_sizes(lab.predict(Recipe()), lab.spec.max_position))
    sizes = state.get("plan", "sizes")
    works = workloads(text.tokens, sizes, sampled=False, streams=lab.streams)
    lab.time({ORIGINAL: Recipe()}, works, 0)
    if state.get("plan", "rounds") is None:
        fitting = int(_ROUNDS_SHARE * budget.seconds / (_TIMED * lab.pace.timing)) - 1
        state.put("plan", "rounds", min(settings["rounds"], max(_LEAST_ROUNDS, fitting)))
    return Search(
        lab=lab,
        state=state,
        budget=budget,
        progress=counter,
        windows=text.search,
        workloads=works,
        sampled=workloads(text.tokens, sizes, sampled=True, streams=lab.streams),
        goal=settings["goal"],
        max_loss=settings["max_loss"],
        rounds=state.get("plan", "rounds"),
        notes=[state.ignored] if state.ignored else [],
    )


def _through_transformers(search: Search) -> tuple[Candidate | None, tuple[str, ...]]:
    """The original as users run it today, or a note on why it was not measured."""
    found = search.state.get("reference", TRANSFORMERS)
    if found is not None:
        return build(Candidate, found), ()
    if not available():
        return None, ("Transformers is not installed: the original was measured through hasten only",)
    works = {
        key: replace(work, num_tokens=min(work.num_tokens, _TRANSFORMERS_TOKENS))
        for key, work in search.workloads.items()
    }
    search.progress.expect(search.cost_of_uniform() + search.cost_of_rest())
    search.progress.tick("Transformers is loaded in a process of its own")
    try:
        with TransformersWorker(search.lab.checkpoint.path, search.lab.threads, search.lab.device) as worker:
            candidate = search.lab.compare_transformers(worker, works, min(search.rounds, _TRANSFORMERS_ROUNDS))
    except HastenError as error:
        return None, (str(error),)
    search.state.put("reference", TRANSFORMERS, candidate)
    return candidate, ()


def _measured_on(search: Search, text: HeldOut) -> dict[str, Any]:
    """What the numbers stand on: sizes that were fitted to the time allowed."""
    sizes = search.state.get("plan", "sizes")
    return {
        "text": text.source,
        "passages": {"search": len(text.search), "proof": len(text.final)},
        "passage_tokens": max(len(window.tokens) for window in text.search),
        "rounds": search.rounds,
        "proof": {
            "rounds": PROOF_ROUNDS,
            "tried_on_text": len(search.state.section("final")),
            "timed_again": len(search.state.section("timed again")),
        },
        "timed_tokens": {key: len(work.prompts) * work.num_tokens for key, work in search.workloads.items()},
        "prefill_tokens": sizes["prompt"],
    }


def _kept(goal: Goal, max_loss: float) -> str:
    return (
        f"nothing measured surely beats the original for {goal} with at most {max_loss:.2%} loss: it is kept as it is"
    )


def _notes(lab: Lab, chosen: Candidate | None) -> tuple[str, ...]:
    plan = resolve(chosen.recipe if chosen else Recipe(), lab.spec, lab.found)
    notes = [*plan.notes, *requantised(plan, lab.found)]
    if chosen is not None and (slower := choose.slower_at(chosen)):
        notes.append(f"{chosen.name} reaches {choose.in_words(chosen, slower)}: use the original where that matters")
    return tuple(notes)


def _check(max_loss: float, goal: str, minutes: float, rounds: int) -> None:
    if goal not in GOALS:
        raise RecipeError(f"goal is {goal!r}{did_you_mean(str(goal), GOALS)}")
    if not 0 <= max_loss <= 1:
        raise RecipeError(f"max_loss is {max_loss!r}, expected a share from 0 to 1, such as 0.01 for 1 %")
    if not minutes > 0:
        raise RecipeError(f"minutes is {minutes!r}, expected more than 0")
    if rounds < 1:
        raise RecipeError(f"rounds is {rounds}, expected at least 1")


def default_out(model: str | Path) -> Path:
    """Where the result goes where nobody says."""
    return folder_beside(model, "tuned")


def _limits(device: str, threads: int) -> Hardware | Gpu:
    """What bounds a model's speed on the device, measured now."""
    if device != "cuda":
        return probe(threads=threads)
    from hasten.backends.cuda.probe import probe_gpu

    return probe_gpu()
