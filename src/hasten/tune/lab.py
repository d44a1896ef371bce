"""Measures candidates beside the original: weights are made in memory, or read from where they were written.

Knows how to load a recipe's weights, and what to measure; not what to try (candidates.py), what to prefer (choose.py).
"""

import time
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

from hasten.backends.base import Backend
from hasten.compress.apply import carry_out
from hasten.compress.folder import ProgressCallback
from hasten.compress.plan import resolve
from hasten.compress.targets import total_bytes
from hasten.engine.engine import Engine
from hasten.errors import ResourceError
from hasten.hardware import Gpu, Hardware, memory_available
from hasten.measure.energy import open_meter
from hasten.measure.quality import Scores, score, summarize
from hasten.measure.speed import Timing, Workload, energy_of, interleave, make_engine, time_workload
from hasten.measure.statistics import ratio_of_rounds, spread
from hasten.measure.text import Window
from hasten.measure.transformers_worker import TransformersWorker
from hasten.model.checkpoint import Checkpoint, open_checkpoint
from hasten.model.formats import Format
from hasten.model.settings import default_kv_cache
from hasten.receipt import Candidate, Measurement, Prediction, Quality
from hasten.recipe import Recipe
from hasten.steps import Step
from hasten.tune import candidates as made
from hasten.tune.budget import Pace
from hasten.tune.predict import all_formats, kv_bytes_per_token, predict

ORIGINAL = "original"
TRANSFORMERS = "transformers"
STREAMS = {"cpu": (1, 8), "cuda": (1, 8, 64)}  # by device
CONTEXT = 256  # tokens that each stream has in a prediction
KV_TOKENS = 4096  # of KV cache that memory is stated for, or the model's length where that is shorter
_ENERGY_SECONDS = 2.0  # of a run whose energy is read; the counters move every millisecond

Timings = dict[tuple[str, str], list[Timing]]  # by model and workload
Tick = Callable[[str], None]
# What makes two backends hold the same: steps, threads, and on a GPU, whose graphs belong to its cache, the KV cache's
# format where that is not the usual one.
Loaded = tuple[tuple[Step, ...], int, str]


class Lab:
    """One model on one device of this machine, its original loaded. hardware: what bounds that device. make_backend
    gives an empty backend with some number of threads (of the host, where the device is another).

    Beside the original only what is being measured is loaded: recipes that differ in how they run, not in weights,
    share one backend. tick is told of every piece of work that is done. Workloads are named by how many streams
    decode, and "prefill".
    """

    def __init__(
        self,
        checkpoint: Checkpoint,
        hardware: Hardware | Gpu,
        threads: int,
        make_backend: Callable[[int], Backend],
        tick: Tick = lambda label: None,
        device: str = "cpu",
    ) -> None:
        self.checkpoint = checkpoint
        self.spec = checkpoint.spec
        self.hardware = hardware
        self.threads = threads
        self.device = device
        self.tick = tick
        self.pace = Pace()
        self._make_backend = make_backend
        self._loaded: dict[Loaded, Backend] = {}
        self._written: dict[tuple[Step, ...], Checkpoint] = {}
        self.found: dict[str, Format] = {name: fmt for name, _, fmt in checkpoint.matrices()}
        self.original = self.load({ORIGINAL: Recipe()})[ORIGINAL]

    def formats(self, recipe: Recipe) -> dict[str, Format]:
        """The format of every matrix under a recipe."""
        return all_formats(self.found, resolve(recipe, self.spec, self.found))

    def kv_cache(self, recipe: Recipe) -> str:
        """How keys and values are stored under a recipe."""
        return recipe.run.kv_cache or default_kv_cache(self.spec, self.original.kv_dtypes)

    @property
    def streams(self) -> tuple[int, ...]:
        """Numbers of streams that are timed. A GPU has its best with many, and int4 may lose there."""
        return STREAMS[self.device]

    def uniform(self) -> dict[str, Recipe]:
        """Recipes with one format for all layers that are worth trying on this device."""
        return made.uniform(self.spec, self.found, self.device)

    def ways_to_run(self, name: str, recipe: Recipe) -> dict[str, Recipe]:
        """Other ways of running the same weights on this device."""
        threads = self.threads if self.device == "cpu" else 1
        return made.ways_to_run(name, recipe, self.kv_cache(recipe), threads, self.original.kv_dtypes)

    def explicit(self, recipe: Recipe) -> Recipe:
        """The recipe with the KV cache that it is measured with spelt out; threads stay the machine's to choose."""
        return replace(recipe, run=replace(recipe.run, kv_cache=self.kv_cache(recipe)))

    def weight_bytes(self, recipe: Recipe) -> int:
        """Bytes of all matrices under a recipe."""
        return total_bytes(self.spec, self.formats(recipe))

    def memory(self, recipe: Recipe) -> dict[str, int]:
        """Bytes of weights, and of a KV cache of KV_TOKENS tokens."""
        tokens = min(KV_TOKENS, self.spec.max_position)
        kv = int(tokens * kv_bytes_per_token(self.spec, self.kv_cache(recipe)))
        return {"weights": self.weight_bytes(recipe), "kv_cache": kv, "kv_tokens": tokens}

    def predict(self, recipe: Recipe) -> Prediction:
        """Speed and bytes from sizes and the machine's measured limits."""
        context = min(CONTEXT, self.spec.max_position)
        return predict(self.spec, self.formats(recipe), self.hardware, self.kv_cache(recipe), context, self.streams)

    def groups(self, recipes: Mapping[str, Recipe], most: int = 3) -> list[dict[str, Recipe]]:
        """Recipes in groups of at most `most` that fit in memory together beside the original. ResourceError where one
        does not fit even alone."""
        groups: list[dict[str, Recipe]] = []
        room, used = self.room(), 0
        for name, recipe in recipes.items():
            size = self.weight_bytes(recipe)
            if size > room:
                raise ResourceError(
                    f"{name} takes {size / 1e9:.1f} GB, {room / 1e9:.1f} GB are free beside the original: free some"
                )
            if not groups or len(groups[-1]) == most or used + size > room:
                groups.append({})
                used = 0
            groups[-1][name] = recipe
            used += size
        return groups

    def room(self) -> int:
        """Bytes that candidates may take, were all but the original dropped: a part of what is free stays free for
        activations, logits and neighbours."""
        others = sum(self._bytes(key) for key in self._loaded if key != self._key(Recipe()))
        if self.device == "cpu":
            return int(0.8 * (memory_available() + others))
        found = self.original.memory(self.original.usual)
        return int(0.8 * (found.free - found.reserved + others))

    def quality(self, recipes: Mapping[str, Recipe], windows: Sequence[Window]) -> dict[str, Scores]:
        """Scores of the original and of each recipe on the same windows."""
        every = {ORIGINAL: Recipe(), **recipes}
        backends = self.load(every)
        start, what = time.perf_counter(), ", ".join(recipes) or ORIGINAL
        scores = score(
            {name: (backends[name], self.kv_cache(recipe)) for name, recipe in every.items()},
            windows,
            self.spec.vocab_size,
            now_and_then(lambda done, total: self.tick(f"{what}: quality, {done} of {total} passages")),
            self.threads,
        )
        self.pace.window = (time.perf_counter() - start) / (len(windows) * len(every))
        return scores

    def measure(
        self,
        recipes: Mapping[str, Recipe],
        windows: Sequence[Window],
        workloads: Mapping[str, Workload],
        rounds: int,
        known: Mapping[str, Quality] | None = None,
        base: str = ORIGINAL,
        confidence: float = 0.95,
    ) -> dict[str, Candidate]:
        """The original and each recipe, no verdicts: quality on `windows` where it is not `known`, speed in interleaved
        rounds. Ratios, with intervals of this confidence, are to the original; to another `base` as well, under
        "gain 1" and so on."""
        every = {ORIGINAL: Recipe(), **recipes}
        quality = dict(known or {})
        unknown = {name: recipe for name, recipe in every.items() if name not in quality}
        if unknown:
            scores = self.quality({name: recipe for name, recipe in unknown.items() if name != ORIGINAL}, windows)
            quality |= {name: summarize(scores[name], scores[ORIGINAL]) for name in unknown}
        timings = self.time(every, workloads, rounds)
        gains = None if base == ORIGINAL else (base, every[base])
        return {
            name: self._candidate(name, recipe, timings, gains, confidence, search=quality[name])
            for name, recipe in every.items()
        }

    def time(self, recipes: Mapping[str, Recipe], workloads: Mapping[str, Workload], rounds: int) -> Timings:
        """Every workload on every recipe, `rounds` times in turn."""
        backends = self.load(recipes)
        start, what = time.perf_counter(), ", ".join(name for name in recipes if name != ORIGINAL) or ORIGINAL
        runs: dict[tuple[str, str], Callable[[], Timing]] = {}
        for name, recipe in recipes.items():
            engine = self.engine(backends[name], recipe, workloads)
            for key, work in workloads.items():
                runs[name, key] = partial(self._turn, backends[name], engine, recipe, work)
        timings = interleave(runs, rounds, lambda: self.tick(f"{what}: speed"))
        self.pace.timing = (time.perf_counter() - start) / (len(recipes) * (rounds + 1))
        return timings

    def compare_transformers(
        self, worker: TransformersWorker, workloads: Mapping[str, Workload], rounds: int
    ) -> Candidate:
        """Transformers on the same workloads, in turn with the original here; its ratios are to the original here."""
        engine = self.engine(self.original, Recipe(), workloads)
        runs: dict[tuple[str, str], Callable[[], Timing]] = {}
        for key, work in workloads.items():
            runs[ORIGINAL, key] = partial(time_workload, engine, work)
            runs[TRANSFORMERS, key] = partial(worker.time, work)
        timings = interleave(runs, rounds, lambda: self.tick("Transformers, as users run it today"))
        found = self._candidate(TRANSFORMERS, Recipe(), timings)
        named = ", ".join(f"{name} {version}" for name, version in worker.versions.items())
        changes: dict[str, Any] = {"verdict": "reference", "reason": f"the original through {named}"}
        return replace(found, **changes, memory={"peak": worker.peak_memory()}, predicted=None, bandwidth_fraction=None)

    def energy(self, recipe: Recipe, workloads: Mapping[str, Workload]) -> dict[str, float]:
        """Joules a token of decoding by number of streams, of all processor packages or of the GPU's board, together
        with whatever else runs there. ResourceError where they cannot be read here."""
        meter = open_meter(self.device)
        engine = self.engine(self.load({"": recipe})[""], recipe, workloads)
        return {
            key: energy_of(engine, work, meter, _ENERGY_SECONDS).joules_per_token
            for key, work in workloads.items()
            if key != "prefill"
        }

    def load(self, recipes: Mapping[str, Recipe]) -> dict[str, Backend]:
        """A backend with each recipe's weights, made from the checkpoint on the way. What was loaded for others is
        dropped first, but for the original."""
        keys = {name: self._key(recipe) for name, recipe in recipes.items()}
        for key in self._loaded.keys() - set(keys.values()) - {self._key(Recipe())}:
            del self._loaded[key]
        for name, recipe in recipes.items():
            if keys[name] not in self._loaded:
                start = time.perf_counter()
                self._loaded[keys[name]] = self._load(recipe)
                self.pace.load = time.perf_counter() - start
                self.tick(f"{name}: loaded")
        return {name: self._loaded[key] for name, key in keys.items()}

    def read_from(self, recipe: Recipe, folder: Path) -> None:
        """From now on the recipe's weights are those of a folder that they were written to. One folder at a time."""
        self._written = {recipe.steps: open_checkpoint(folder)}
        for key in [key for key in self._loaded if key[0] == recipe.steps and recipe.steps]:
            del self._loaded[key]

    def engine(self, backend: Backend, recipe: Recipe, workloads: Mapping[str, Workload]) -> Engine:
        """An engine with room for the workloads, on a backend that is loaded."""
        streams = max(len(work.prompts) for work in workloads.values())
        longest = max(len(work.prompts[0]) + work.num_tokens for work in workloads.values())
        return make_engine(self.spec, backend, recipe.run, streams, longest)

    def _load(self, recipe: Recipe) -> Backend:
        backend = self._make_backend(recipe.run.threads or self.threads)
        if (written := self._written.get(recipe.steps)) is not None:
            backend.load(written.spec, written.weights())
            return backend
        plan = resolve(recipe, self.spec, self.found)
        with ThreadPoolExecutor(self.threads) as pool:
            backend.load(self.spec, carry_out(plan, self.checkpoint.weights(), pool))
        return backend

    def _turn(self, backend: Backend, engine: Engine, recipe: Recipe, work: Workload) -> Timing:
        """One timing. The KV cache is made anew: others may have used this backend since."""
        backend.allocate(engine.config.num_blocks, engine.config.block_size, self.kv_cache(recipe))
        return time_workload(engine, work)

    def _key(self, recipe: Recipe) -> Loaded:
        kv_cache = recipe.run.kv_cache or ""
        if self.device == "cpu" or kv_cache == default_kv_cache(self.spec, ("fp32", "bf16", "fp8")):
            kv_cache = ""
        return recipe.steps, recipe.run.threads or self.threads, kv_cache

    def _bytes(self, key: Loaded) -> int:
        return self.weight_bytes(Recipe(key[0]))

    def _candidate(
        self,
        name: str,
        recipe: Recipe,
        timings: Timings,
        base: tuple[str, Recipe] | None = None,
        confidence: float = 0.95,
        **more: Any,
    ) -> Candidate:
        """Figures of one model out of interleaved timings, which hold the original's."""
        memory = self.memory(recipe)
        decode: dict[str, Measurement] = {}
        ratio = self._ratios("", name, memory, timings, (ORIGINAL, Recipe()), confidence)
        if base is not None:
            ratio |= self._ratios("gain ", name, memory, timings, base, confidence)
        for model, key in timings:
            if model == name:
                decode[key] = spread(_rates(timings, name, key), "tokens/s")
        prediction = self.predict(recipe)
        return Candidate(
            name=name,
            recipe=recipe,
            weight_bytes=memory["weights"],
            verdict="",
            reason="",
            predicted=prediction,
            prefill=decode.pop("prefill"),
            decode=decode,
            ratio=ratio,
            ttft=spread([timing.ttft for timing in timings[name, "prefill"]], "seconds"),
            memory=memory,
            bandwidth_fraction=prediction.token_bytes * decode["1"].median / self.hardware.bandwidth,
            **more,
        )

    def _ratios(
        self,
        prefix: str,
        name: str,
        memory: Mapping[str, int],
        timings: Timings,
        base: tuple[str, Recipe],
        confidence: float,
    ) -> dict[str, Measurement]:
        """Speed over the base's in the same round, and the base's memory over this one's."""
        found = {
            prefix + key: ratio_of_rounds(_rates(timings, name, key), _rates(timings, base[0], key), confidence)
            for model, key in timings
            if model == name
        }
        share = _total(self.memory(base[1])) / _total(memory)
        return found | {f"{prefix}memory": Measurement(share, share, share, 1, "times")}


def now_and_then(tell: Callable[[int, int], None], seconds: float = 0.5) -> ProgressCallback:
    """Told of every piece, tells at most so often, and of the last."""
    last = time.monotonic()

    def told(done: int, total: int, what: str) -> None:
        nonlocal last
        if done == total or time.monotonic() - last >= seconds:
            last = time.monotonic()
            tell(done, total)

    return told


def _total(memory: Mapping[str, int]) -> int:
    return memory["weights"] + memory["kv_cache"]


def _rates(timings: Timings, name: str, key: str) -> list[float]:
    """Tokens/s in each round: of decoding, or of the prompt for the prefill workload."""
    return [timing.prefill if key == "prefill" else timing.decode for timing in timings[name, key]]
