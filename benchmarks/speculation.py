"""Speculation on a GPU, at the shape of an 8B model: against the same model without, in interleaved rounds.

    python benchmarks/speculation.py [--tokens 192] [--rounds 2] [--out benchmarks/results]

Weights are random, but for the head: it makes the model go round in circles of 64 tokens, as text does that repeats
itself, and its layers disturb it little. Greedy, it keeps to its circle; at temperatures 6 and 20 it hardly does. The
drafter is the model's own first two layers, and "other" has another head: always wrong, but where a high temperature
lets the random numbers choose, which both share. Nothing is simulated: drafts are made, verified and counted by the
engine. Writes one JSON file.
"""

import argparse
import json
import statistics
from collections.abc import Iterator
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from gpu import CONFIGS, random_weights

from hasten.backends.cuda import CudaBackend
from hasten.engine.config import EngineConfig
from hasten.engine.draft_model import ModelDrafter
from hasten.engine.engine import Engine
from hasten.engine.speculate import Speculator
from hasten.measure.speed import Workload, interleave, time_workload
from hasten.model.formats import Weight
from hasten.model.spec import ModelSpec, spec_from_config

CIRCLE = 64
BLOCK = 16
QUIET = 0.05  # of what layers add to the residual
TEMPERATURES = {"circles": 0.0, "temperature 6": 6.0, "temperature 20": 20.0}


def weights_of(spec: ModelSpec, layers: int, other: bool) -> Iterator[tuple[str, Weight]]:
    """The model, or its first layers. other: with the head of a drafter that is always wrong."""
    kept: Weight | None = None
    for name, weight in random_weights(spec, "bf16"):
        if name == "embed":
            kept = weight
        if name == "head":
            assert kept is not None
            tokens = np.arange(spec.vocab_size)
            step = 7 if other else -1
            before = tokens // CIRCLE * CIRCLE + (tokens % CIRCLE + step) % CIRCLE
            weight = replace(weight, data=kept.data[np.minimum(before, spec.vocab_size - 1)])
        if not name.startswith("layers.") or int(name.split(".")[1]) < layers:
            yield name, weight


def engine_of(
    main: CudaBackend, spec: ModelSpec, config: EngineConfig, way: str, drafters: dict[str, CudaBackend]
) -> Engine:
    if way == "plain":
        return Engine(main, config)
    drafter = ModelDrafter(drafters[way], config) if way in drafters else None
    return Engine(main, config, speculator=Speculator(drafter))


def measure(streams: int, text: str, ways: list[str], loaded: Any, tokens: int, rounds: int) -> dict[str, Any]:
    """Tokens/s of decoding by way, and ratios to plain in the same round."""
    main, spec, drafters = loaded
    prompts = tuple(
        tuple(CIRCLE * (7 * stream + 3) + i % CIRCLE for i in range(2 * CIRCLE)) for stream in range(streams)
    )
    work = Workload(prompts, tokens, TEMPERATURES[text])
    longest = 2 * CIRCLE + tokens
    config = EngineConfig(
        vocab_size=spec.vocab_size, num_blocks=streams * (longest // BLOCK + 2), block_size=BLOCK, max_len=longest,
        max_sequences=streams, max_step_tokens=2048, max_extra_rows=8 * streams,
    )  # fmt: skip
    for backend in (main, *drafters.values()):
        backend.allocate(config.num_blocks, BLOCK, "bf16")
    engines = {way: engine_of(main, spec, config, way, drafters) for way in ways}
    for engine in engines.values():
        time_workload(engine, work)  # compiles, captures, learns what steps cost
    timings = interleave({way: partial(time_workload, engine, work) for way, engine in engines.items()}, rounds)
    found: dict[str, Any] = {"streams": streams, "text": text, "tokens": tokens, "ways": {}}
    for way in ways:
        rates = [timing.decode for timing in timings[way]]
        ratios = [rate / base.decode for rate, base in zip(rates, timings["plain"], strict=True)]
        found["ways"][way] = {"tokens_per_s": rates, "ratio": ratios}
        print(
            f"{streams} streams, {text:15}: {way:6} {statistics.median(rates):8.0f} tokens/s, "
            f"{statistics.median(ratios):.2f}x plain [{min(ratios):.2f}-{max(ratios):.2f}]",
            flush=True,
        )
    return found


def load(spec: ModelSpec, layers: int, other: bool, beside: CudaBackend | None) -> CudaBackend:
    backend = CudaBackend() if beside is None else beside.beside()
    backend.load(replace(spec, layers=spec.layers[:layers]), weights_of(spec, layers, other))
    return backend


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--tokens", type=int, default=192)
    parser.add_argument("--rounds", type=int, default=2)
    parser.add_argument("--out", type=Path, default=Path("benchmarks/results"))
    options = parser.parse_args()
    spec = replace(spec_from_config(CONFIGS["8b"]), residual_scale=QUIET, embedding_scale=50.0)
    model = load(spec, len(spec.layers), False, None)
    drafters = {"draft": load(spec, 2, False, model), "other": load(spec, 2, True, model)}
    ways = ["plain", "ngram", "draft", "other"]
    name = torch.cuda.get_device_name().replace("NVIDIA ", "").lower().split()[0]
    summary: dict[str, Any] = {"gpu": torch.cuda.get_device_name(), "torch": torch.__version__, "runs": []}
    options.out.mkdir(parents=True, exist_ok=True)
    for streams, text in [*((1, text) for text in TEMPERATURES), (8, "circles"), (8, "temperature 20")]:
        loaded = (model, spec, drafters)
        summary["runs"].append(measure(streams, text, ways, loaded, options.tokens, options.rounds))
        (options.out / f"speculation-{name}.json").write_text(json.dumps(summary, indent=1))


if __name__ == "__main__":
    main()
