"""Measures candidates beside the original: everything in memory, nothing written.

Knows how to load a recipe's weights, and what to measure; not what to try (candidates.py), what to prefer (choose.py).
"""

from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from functools import partial
from typing import Any

from hasten.backends.base import Backend
from hasten.compress.apply import carry_out
from hasten.compress.plan import resolve
from hasten.engine.engine import Engine
from hasten.hardware import Hardware, memory_available
from hasten.measure.energy import measure_energy
from hasten.measure.quality import BLOCK_SIZE, Scores, kv_blocks, score, summarize
from hasten.measure.speed import Timing, Workload, default_kv_cache, interleave, make_engine, time_workload
from hasten.measure.statistics import ratio_of_rounds, spread
from hasten.measure.text import Window
from hasten.measure.transformers_worker import TransformersWorker
from hasten.model.checkpoint import Checkpoint
from hasten.model.formats import Format
from hasten.receipt import Candidate, Measurement, Prediction
from hasten.recipe import Recipe
from hasten.tune.candidates import total_bytes
from hasten.tune.predict import all_formats, kv_bytes_per_token, predict

ORIGINAL = "original"
TRANSFORMERS = "transformers"
CONTEXT = 256  # tokens that each stream has in a prediction
KV_TOKENS = 4096  # of KV cache that memory is stated for, or the model's length where that is shorter

Timings = dict[tuple[str, str], list[Timing]]  # by model and workload
Tick = Callable[[str], None]


class Lab:
    """One model on this machine, its original loaded. make_backend gives an empty backend with some number of threads.

    tick is told of every piece of work that is done. Workloads are named "1" and "8" (streams decoding) and "prefill".
    """

    def __init__(
        self,
        checkpoint: Checkpoint,
        hardware: Hardware,
        threads: int,
        make_backend: Callable[[int], Backend],
        tick: Tick = lambda label: None,
    ) -> None:
        self.checkpoint = checkpoint
        self.spec = checkpoint.spec
        self.hardware = hardware
        self.threads = threads
        self.tick = tick
        self._make_backend = make_backend
        self.found: dict[str, Format] = {name: fmt for name, _, fmt in checkpoint.matrices()}
        self.original = self.load(Recipe())

    def formats(self, recipe: Recipe) -> dict[str, Format]:
        """The format of every matrix under a recipe."""
        return all_formats(self.found, resolve(recipe, self.spec))

    def kv_cache(self, recipe: Recipe) -> str:
        """How keys and values are stored under a recipe."""
        return recipe.run.kv_cache or default_kv_cache(self.spec)

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
        return predict(self.spec, self.formats(recipe), self.hardware, self.kv_cache(recipe), context)

    def groups(self, recipes: Mapping[str, Recipe], most: int = 3) -> list[dict[str, Recipe]]:
        """Recipes in groups of at most `most` that fit in memory together beside the original."""
        groups: list[dict[str, Recipe]] = []
        room, used = 0.6 * memory_available(), 0
        for name, recipe in recipes.items():
            size = self.weight_bytes(recipe)
            if not groups or len(groups[-1]) == most or used + size > room:
                groups.append({})
                used = 0
            groups[-1][name] = recipe
            used += size
        return groups

    def quality(self, recipes: Mapping[str, Recipe], windows: Sequence[Window]) -> dict[str, Scores]:
        """Scores of the original and of each recipe on the same windows. Each is loaded for it and dropped after."""
        return self._score(self._load_all(recipes), {ORIGINAL: Recipe(), **recipes}, windows)

    def measure(
        self,
        recipes: Mapping[str, Recipe],
        windows: Sequence[Window],
        workloads: Mapping[str, Workload],
        rounds: int,
        base: str = ORIGINAL,
    ) -> dict[str, Candidate]:
        """The original and each recipe, no verdicts: quality on `windows`, speed in interleaved rounds. Ratios are to
        the original; to another `base` as well, under "gain 1" and so on."""
        backends = self._load_all(recipes)
        every = {ORIGINAL: Recipe(), **recipes}
        scores = self._score(backends, every, windows)
        timings = self._time(backends, every, workloads, rounds)
        gains = None if base == ORIGINAL else (base, every[base])
        return {
            name: self._candidate(name, recipe, timings, gains, search=summarize(scores[name], scores[ORIGINAL]))
            for name, recipe in every.items()
        }

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

    def joules_per_token(self, backend: Backend, recipe: Recipe, work: Workload) -> dict[str, float] | None:
        """Energy of decoding one workload, all processor packages together; None where it cannot be read here."""
        engine = self.engine(backend, recipe, {"": work})
        found = measure_energy(lambda: time_workload(engine, work))
        if found is None:
            return None
        return {"joules_per_token": found["joules"] / (len(work.prompts) * work.num_tokens)}

    def load(self, recipe: Recipe) -> Backend:
        """A backend with the recipe's weights, made from the checkpoint on the way."""
        backend = self._make_backend(recipe.run.threads or self.threads)
        plan = resolve(recipe, self.spec)
        with ThreadPoolExecutor(self.threads) as pool:
            backend.load(self.spec, carry_out(plan, self.checkpoint.weights(), pool))
        return backend

    def _load_all(self, recipes: Mapping[str, Recipe]) -> dict[str, Backend]:
        backends = {ORIGINAL: self.original}
        for name, recipe in recipes.items():
            backends[name] = self.load(recipe)
            self.tick(f"{name}: quantised and loaded")
        return backends

    def _score(
        self, backends: Mapping[str, Backend], recipes: Mapping[str, Recipe], windows: Sequence[Window]
    ) -> dict[str, Scores]:
        for name, backend in backends.items():
            backend.allocate(kv_blocks(windows), BLOCK_SIZE, self.kv_cache(recipes[name]))
        scores = score(backends, windows, self.spec.vocab_size)
        self.tick(f"{', '.join(list(backends)[1:])}: quality")
        return scores

    def _time(
        self,
        backends: Mapping[str, Backend],
        recipes: Mapping[str, Recipe],
        workloads: Mapping[str, Workload],
        rounds: int,
    ) -> Timings:
        runs: dict[tuple[str, str], Callable[[], Timing]] = {}
        for name, backend in backends.items():
            engine = self.engine(backend, recipes[name], workloads)
            for key, work in workloads.items():
                runs[name, key] = partial(time_workload, engine, work)
        return interleave(runs, rounds, lambda: self.tick(f"{', '.join(list(backends)[1:])}: speed"))

    def engine(self, backend: Backend, recipe: Recipe, workloads: Mapping[str, Workload]) -> Engine:
        """An engine with room for the workloads, on a backend that is loaded."""
        streams = max(len(work.prompts) for work in workloads.values())
        longest = max(len(work.prompts[0]) + work.num_tokens for work in workloads.values())
        return make_engine(self.spec, backend, recipe.run, streams, longest)

    def _candidate(
        self, name: str, recipe: Recipe, timings: Timings, base: tuple[str, Recipe] | None = None, **more: Any
    ) -> Candidate:
        """Figures of one model out of interleaved timings, which hold the original's."""
        memory = self.memory(recipe)
        decode: dict[str, Measurement] = {}
        ratio = self._ratios("", name, memory, timings, (ORIGINAL, Recipe()))
        if base is not None:
            ratio |= self._ratios("gain ", name, memory, timings, base)
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
        self, prefix: str, name: str, memory: Mapping[str, int], timings: Timings, base: tuple[str, Recipe]
    ) -> dict[str, Measurement]:
        """Speed over the base's in the same round, and the base's memory over this one's."""
        found = {
            prefix + key: ratio_of_rounds(_rates(timings, name, key), _rates(timings, base[0], key))
            for model, key in timings
            if model == name
        }
        share = _total(self.memory(base[1])) / _total(memory)
        return found | {f"{prefix}memory": Measurement(share, share, share, 1, "times")}


def ticks(num_recipes: int, rounds: int) -> int:
    """How often `measure` ticks for a group of so many recipes."""
    return num_recipes + 1 + rounds


def _total(memory: Mapping[str, int]) -> int:
    return memory["weights"] + memory["kv_cache"]


def _rates(timings: Timings, name: str, key: str) -> list[float]:
    """Tokens/s in each round: of decoding, or of the prompt for the prefill workload."""
    return [timing.prefill if key == "prefill" else timing.decode for timing in timings[name, key]]
