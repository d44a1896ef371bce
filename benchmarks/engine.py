"""What the engine itself costs: microseconds a step on the host, over a backend that computes nothing.

    python benchmarks/engine.py [--steps 400]

A step schedules, builds the batch and the sampling rows, takes the tokens into the books and turns them into text. The
median over the steps of decoding is shown, for plain greedy requests and for requests that draw (seed, temperature,
top-p).
"""

import argparse
import time
from collections.abc import Sequence
from statistics import median

import numpy as np

from hasten.backends.base import Batch, DeviceMemory, Float32, Sampled, SamplingBatch, StepLimits
from hasten.engine.config import EngineConfig
from hasten.engine.engine import Engine
from hasten.engine.request import SamplingParams

VOCAB = 151_936
BLOCK_SIZE = 32
BATCHES = (1, 8, 64, 256)
KINDS = {"greedy": {}, "sampled": {"temperature": 0.8, "top_p": 0.95}}


class Nothing:
    """A backend that costs nothing and always says token 7."""

    kv_dtypes: tuple[str, ...] = ("fp32",)
    usual = StepLimits(8192, BATCHES[-1], 2 * BATCHES[-1])

    def __init__(self, overlaps: bool) -> None:
        self.overlaps = overlaps
        self._tokens = {count: np.full(count, 7, np.int32) for count in range(BATCHES[-1] + 1)}

    def beside(self) -> "Nothing":
        return Nothing(self.overlaps)

    def load(self, spec: object, weights: object) -> None:
        raise AssertionError("has no weights")

    def memory(self, limits: StepLimits) -> DeviceMemory:
        return DeviceMemory(1 << 40, 1 << 40)

    def block_bytes(self, block_size: int, dtype: str) -> int:
        return 1

    def allocate(self, num_blocks: int, block_size: int, dtype: str) -> None:
        pass

    def forward(self, batch: Batch) -> int:
        return len(batch.rows)

    def sample(self, logits: int, params: SamplingBatch) -> Sampled:
        return Sampled(self._tokens[logits])

    def fetch(self, logits: int) -> Float32:
        return np.zeros((logits, VOCAB), np.float32)

    def copy_blocks(self, pairs: Sequence[tuple[int, int]]) -> None:
        pass


class Words:
    """A decoder that costs nothing: what real detokenisation costs is the tokenizer's."""

    def push(self, token: int) -> str:
        return " so"

    def finish(self) -> str:
        return ""


def microseconds_a_step(streams: int, num_steps: int, overlaps: bool, params: dict[str, float]) -> float:
    """Median over the steps in which `streams` sequences decode."""
    num_blocks = streams * -(-(num_steps + 64) // BLOCK_SIZE)
    config = EngineConfig(
        vocab_size=VOCAB, num_blocks=num_blocks, block_size=BLOCK_SIZE, max_len=num_steps + 64,
        max_step_tokens=8192, max_sequences=streams,
    )  # fmt: skip
    engine = Engine(Nothing(overlaps), config, new_decoder=lambda prompt, skip: Words())
    for index in range(streams):
        engine.add([index, *range(16)], SamplingParams(max_tokens=num_steps, seed=index, **params))  # type: ignore[arg-type]
    engine.step()
    times = []
    while engine.num_unfinished:
        start = time.perf_counter()
        engine.step()
        times.append(time.perf_counter() - start)
    return 1e6 * median(times)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--steps", type=int, default=400)
    steps = parser.parse_args().steps
    print(f"{'microseconds a step':24s}" + "".join(f"{count:>9d}" for count in BATCHES) + "  sequences")
    for overlaps in (False, True):
        for name, params in KINDS.items():
            row = [microseconds_a_step(count, steps, overlaps, params) for count in BATCHES]
            label = f"{name}, {'overlapped' if overlaps else 'one by one'}"
            print(f"{label:24s}" + "".join(f"{value:9.0f}" for value in row))


if __name__ == "__main__":
    main()
