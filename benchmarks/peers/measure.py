"""One process of a benchmark: load a system, time it, print one line of JSON.

Knows no system: a driver beside this file gives `load`, everything else is the same for all. Every prompt is fresh
random ids, so that no prefix cache helps; a decoding speed is a difference of two runs, so that prefill does not count.
"""

import argparse
import json
import math
import os
import random
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass, field

from machine import ForeignLoad, peak_memory_mib, wait_until_quiet

PROMPT_LEN, DECODE_LEN = 32, 128
BATCH_SIZE, BATCH_DECODE_LEN = 8, 64
PREFILL_LEN = 512
QUIET_CORES = 0.1
TASKS = ("decode", "batch", "prefill", "busy")

Prompts = list[list[int]]


@dataclass(frozen=True)
class System:
    """What a driver loads.

    generate(prompts, n) runs all prompts, of equal length, at once, greedily, n tokens each whatever the end-of-text
    ids, and returns how many tokens it made. versions: package -> version. weight_bytes: what a decoding step reads.
    """

    generate: Callable[[Prompts, int], int]
    versions: dict[str, str]
    weight_bytes: int


@dataclass
class Timer:
    """Takes samples on as quiet a machine as `patience` seconds of waiting allow."""

    repetitions: int
    patience: float
    min_seconds: float = 0.4
    foreign: dict[str, list[float]] = field(default_factory=dict)

    def samples(self, task: str, once: Callable[[], tuple[float, float]], known: int | None = None) -> list[float]:
        """`repetitions` rates, those with the least foreign load of at most three times as many tries.

        once() returns (work, seconds). A sample repeats it until min_seconds are timed: load comes in ticks of 10 ms.
        """
        taken: list[tuple[float, float]] = []
        for _ in range(3 * self.repetitions):
            if known is None:
                self.patience -= wait_until_quiet(max(0.0, self.patience), QUIET_CORES)
            load, work, seconds = ForeignLoad(known), 0.0, 0.0
            while seconds < self.min_seconds:
                done, took = once()
                work, seconds = work + done, seconds + took
            taken.append((load.cores(), work / seconds))
            quiet = sum(cores < QUIET_CORES for cores, _ in taken)
            if quiet >= self.repetitions or (self.patience <= 0 and len(taken) >= self.repetitions):
                break
        taken = sorted(taken)[: self.repetitions]
        self.foreign[task] = [round(cores, 3) for cores, _ in taken]
        return [rate for _, rate in taken]


def random_prompts(rng: random.Random, count: int, length: int) -> Prompts:
    return [[rng.randrange(10, 3000) for _ in range(length)] for _ in range(count)]


def generate(system: System, prompts: Prompts, num_tokens: int) -> float:
    """Seconds of one call, checked to have made every token."""
    start = time.perf_counter()
    made = system.generate(prompts, num_tokens)
    seconds = time.perf_counter() - start
    if made != len(prompts) * num_tokens:
        raise RuntimeError(f"{made} tokens were made, {len(prompts) * num_tokens} asked for")
    return seconds


def decode_once(system: System, rng: random.Random, streams: int, length: int) -> tuple[float, float]:
    """(tokens, seconds) of decoding alone: a run of 1 + length tokens less a run of 1."""
    first = generate(system, random_prompts(rng, streams, PROMPT_LEN), 1)
    whole = generate(system, random_prompts(rng, streams, PROMPT_LEN), 1 + length)
    return streams * length, whole - first


def prefill_once(system: System, rng: random.Random) -> tuple[float, float]:
    return PREFILL_LEN, generate(system, random_prompts(rng, 1, PREFILL_LEN), 1)


def decode_beside_neighbour(system: System, rng: random.Random, timer: Timer) -> dict[str, object]:
    """Decoding quiet, then beside one endless loop on the same cores, in one process."""
    quiet = timer.samples("busy_quiet", lambda: decode_once(system, rng, 1, DECODE_LEN))
    neighbour = subprocess.Popen([sys.executable, "-c", "while True: pass"])
    try:
        time.sleep(0.5)
        busy = timer.samples("busy", lambda: decode_once(system, rng, 1, DECODE_LEN), known=neighbour.pid)
    finally:
        neighbour.kill()
        neighbour.wait()
    return {"busy_quiet": quiet, "busy": busy, "busy_kept": statistics.median(busy) / statistics.median(quiet)}


def measure(system: System, tasks: list[str], timer: Timer, seed: int) -> dict[str, object]:
    """tokens/s of each task, a list of samples each. The first call of each shape is not counted."""
    rng = random.Random(seed)
    result: dict[str, object] = {}
    if "decode" in tasks:
        decode_once(system, rng, 1, 8)
        result["decode"] = timer.samples("decode", lambda: decode_once(system, rng, 1, DECODE_LEN))
        result["peak_mib_decode"] = peak_memory_mib()
    if "batch" in tasks:
        decode_once(system, rng, BATCH_SIZE, 4)
        result["batch"] = timer.samples("batch", lambda: decode_once(system, rng, BATCH_SIZE, BATCH_DECODE_LEN))
    if "prefill" in tasks:
        prefill_once(system, rng)
        result["prefill"] = timer.samples("prefill", lambda: prefill_once(system, rng))
    if "busy" in tasks:
        decode_once(system, rng, 1, 8)
        result.update(decode_beside_neighbour(system, rng, timer))
    return result


def main(load: Callable[[str, int], System]) -> None:
    """A driver's main: load(model, threads) gives the System. BENCHMARK_START is when the process was started."""
    parser = argparse.ArgumentParser()
    parser.add_argument("model")
    parser.add_argument("--threads", type=int, default=len(os.sched_getaffinity(0)))
    parser.add_argument("--tasks", default="", help=f"some of {','.join(TASKS)}; none: only the first token")
    parser.add_argument("--repetitions", type=int, default=3)
    parser.add_argument("--patience", type=float, default=60.0)
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args()
    unknown = set(filter(None, args.tasks.split(","))) - set(TASKS)
    if unknown:
        parser.error(f"unknown tasks {sorted(unknown)}")

    start = float(os.environ.get("BENCHMARK_START", math.nan))
    load_average = ForeignLoad()
    system = load(args.model, args.threads)
    ready = time.time()
    generate(system, random_prompts(random.Random(args.seed - 1), 1, PROMPT_LEN), 1)
    timer = Timer(args.repetitions, args.patience)
    result: dict[str, object] = {
        "ready_s": ready - start,
        "first_token_s": time.time() - start,
        "first_token_foreign": round(load_average.cores(), 3),
        "versions": system.versions,
        "weight_bytes": system.weight_bytes,
    }
    result.update(measure(system, args.tasks.split(","), timer, args.seed))
    result["peak_mib"] = peak_memory_mib()
    result["foreign_cores"] = timer.foreign
    print("RESULT " + json.dumps(result), flush=True)
