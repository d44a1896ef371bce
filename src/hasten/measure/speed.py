"""Speed of models that are loaded: decode, prefill and time to first token, through the real engine.

Several models are measured in interleaved rounds, so that what the machine does meanwhile slows all alike and ratios
hold. Knows backends and tokens; no files, no text.
"""

import math
import time
from collections.abc import Callable, Hashable, Mapping, Sequence
from dataclasses import dataclass
from statistics import median
from typing import TypeVar

from hasten.backends.base import Backend
from hasten.engine.config import EngineConfig
from hasten.engine.engine import Engine
from hasten.engine.request import RequestOutput, SamplingParams
from hasten.engine.speculate import Speculator
from hasten.measure.energy import Meter
from hasten.model.settings import default_kv_cache
from hasten.model.spec import ModelSpec
from hasten.receipt import Measurement
from hasten.recipe import Run

BLOCK_SIZE = 16

K = TypeVar("K", bound=Hashable)


@dataclass(frozen=True, slots=True)
class Timing:
    """One run: tokens/s after the first token of every stream, prompt tokens/s until then, and that time in seconds."""

    decode: float
    prefill: float
    ttft: float


@dataclass(frozen=True, slots=True)
class Workload:
    """What is timed: a prompt a stream, all sent at once, each continued by num_tokens. temperature 0 is greedy; above
    it, a seed of each stream's own makes every run draw the same tokens. min_seconds: a short run is repeated so long
    and its medians are taken."""

    prompts: tuple[tuple[int, ...], ...]
    num_tokens: int
    temperature: float = 0.0
    min_seconds: float = 0.0

    @property
    def num_counted(self) -> int:
        """Tokens that a run is for: those written, or of a run that writes one a stream, those read."""
        if self.num_tokens == 1:
            return sum(len(prompt) for prompt in self.prompts)
        return len(self.prompts) * self.num_tokens


@dataclass(frozen=True, slots=True)
class Energy:
    """Joules a token and watts on average, of a device with all that runs on it."""

    joules_per_token: float
    watts: float


def make_engine(spec: ModelSpec, backend: Backend, run: Run, streams: int, max_len: int) -> Engine:
    """An engine over a loaded backend, with KV cache for `streams` sequences of max_len tokens."""
    num_blocks = streams * -(-max_len // BLOCK_SIZE) + streams
    backend.allocate(num_blocks, BLOCK_SIZE, run.kv_cache or default_kv_cache(spec, backend.kv_dtypes))
    config = EngineConfig(
        vocab_size=spec.vocab_size,
        num_blocks=num_blocks,
        block_size=BLOCK_SIZE,
        max_len=max_len,
        max_sequences=streams,
        max_step_tokens=backend.usual.max_tokens,
    )
    return Engine(backend, config, speculator=Speculator() if run.speculation == "ngram" else None)


def time_workload(engine: Engine, work: Workload) -> Timing:
    """Run a workload, each time from an empty prefix cache."""
    end = time.perf_counter() + work.min_seconds
    timings = [_run_once(engine, work)]
    while time.perf_counter() < end:
        timings.append(_run_once(engine, work))
    return Timing(
        median(timing.decode for timing in timings),
        median(timing.prefill for timing in timings),
        median(timing.ttft for timing in timings),
    )


def energy_of(engine: Engine, work: Workload, meter: Meter, seconds: float) -> Energy:
    """A workload repeated for at least `seconds`, its prompts read each time."""
    num_runs = 0
    meter.start()
    start = time.perf_counter()
    while num_runs == 0 or time.perf_counter() - start < seconds:
        _run_once(engine, work)
        num_runs += 1
    elapsed = time.perf_counter() - start
    joules = meter.stop()
    return Energy(joules / (num_runs * work.num_counted), joules / elapsed)


def _run_once(engine: Engine, work: Workload) -> Timing:
    engine.abort()
    start = time.perf_counter()
    for stream, prompt in enumerate(work.prompts):
        seed = stream if work.temperature else None
        params = SamplingParams(
            max_tokens=work.num_tokens, ignore_eos=True, temperature=work.temperature, seed=seed, top_k=0, top_p=1.0
        )
        engine.add(prompt, params)
    outputs: list[RequestOutput] = []
    while engine.num_unfinished:
        outputs += [delta.output for delta in engine.step() if delta.output is not None]
    first = max(output.metrics.first_token_time for output in outputs)
    last = max(output.metrics.finish_time for output in outputs)
    num_prompt = sum(len(prompt) for prompt in work.prompts)
    num_after = len(work.prompts) * (work.num_tokens - 1)
    decode = num_after / (last - first) if last > first else math.nan
    return Timing(decode, num_prompt / (first - start), first - start)


def interleave(
    runs: Mapping[K, Callable[[], Timing]], rounds: int, after_round: Callable[[], None] = lambda: None
) -> dict[K, list[Timing]]:
    """`rounds` timings of each, all of them once a round; the order turns by one each round, so that none always
    comes first. One unmeasured run of each comes before."""
    names = list(runs)
    for name in names:
        runs[name]()
    timings: dict[K, list[Timing]] = {name: [] for name in names}
    for index in range(rounds):
        shift = index % len(names)
        for name in names[shift:] + names[:shift]:
            timings[name].append(runs[name]())
        after_round()
    return timings


def prompts_from(tokens: Sequence[int], streams: int, length: int) -> tuple[tuple[int, ...], ...]:
    """`streams` different prompts of `length` tokens out of a text's tokens, evenly spaced; a short text repeats."""
    enough = list(tokens) * (-(-(length + streams) // max(1, len(tokens))))
    last = len(enough) - length
    starts = [index * last // max(1, streams - 1) if streams > 1 else 0 for index in range(streams)]
    return tuple(tuple(enough[start : start + length]) for start in starts)


def notes_on_format(
    backend: Backend,
    device: str,
    measure: bool = False,
    ratios: Mapping[str, Measurement] | None = None,
    against: str = "",
) -> tuple[str, ...]:
    """Where the format of a loaded model does not pay, a line for each number of streams.

    On a GPU where its products are slower than bf16: as was measured once on this GPU, or is now (measure). On any
    device where it decodes slower than the model `against`, by more than the spread of their ratios, by streams.
    """
    slower = tuple(
        f"with {streams} stream{'s' * (streams != '1')} {ratio.median:.2f}x of {against}: this form does not pay there"
        for streams, ratio in (ratios or {}).items()
        if ratio.high < 1
    )
    return (*(_slow_products(backend, measure) if device == "cuda" else ()), *slower)


def _slow_products(backend: Backend, measure: bool) -> tuple[str, ...]:
    if measure:
        backend.compare_with_dense()  # type: ignore[attr-defined]
    slower: dict[int, float] = backend.slower_than_dense()  # type: ignore[attr-defined]
    return tuple(
        f"with {streams} stream{'s' * (streams != 1)} this model's products take {ratio:.2f} times as long as in bf16:"
        " if memory allows, use the unquantised model there"
        for streams, ratio in slower.items()
    )
