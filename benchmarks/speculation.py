"""Speculation on a GPU: a model with drafts against the same model without, in interleaved rounds. On text:

    python benchmarks/speculation.py --model FOLDER --text FILE [--drafter FOLDER ...] [--streams 1,4,16] [--tokens 256]

continues passages of the text, which the model should not have seen, greedily and at temperature 1. Without --model, at
the shape of an 8B model:

    python benchmarks/speculation.py [--tokens 256] [--rounds 5] [--out benchmarks/results]

Weights are random there, but for the head: it makes the model go round in circles of 64 tokens, as text does that
repeats itself, and its layers disturb it little. Greedy, it keeps to its circle; at temperatures 6 and 20 it hardly
does. The drafter is the model's own first two layers, and "other" has another head: always wrong, but where a high
temperature lets the random numbers choose, which both share. Nothing is simulated: drafts are made, verified and
counted by the engine. Each way writes one JSON file.
"""

import argparse
import json
import statistics
from collections.abc import Iterator, Mapping
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from gpu import CONFIGS, random_weights

from hasten.backends import open_backend
from hasten.backends.base import Backend
from hasten.backends.cuda import CudaBackend
from hasten.engine.config import EngineConfig
from hasten.engine.draft_model import ModelDrafter
from hasten.engine.engine import Engine
from hasten.engine.request import SamplingParams
from hasten.engine.speculate import Speculator
from hasten.measure.speed import Workload, interleave, prompts_from, time_workload
from hasten.model.checkpoint import open_checkpoint
from hasten.model.formats import Weight
from hasten.model.settings import default_kv_cache
from hasten.model.spec import ModelSpec, spec_from_config
from hasten.model.tokenizer import Tokenizer

CIRCLE = 64
BLOCK = 16
PROMPT = 64  # tokens of a passage
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
    main: Backend, spec: ModelSpec, config: EngineConfig, way: str, drafters: Mapping[str, Backend]
) -> Engine:
    if way == "plain":
        return Engine(main, config)
    drafter = ModelDrafter(drafters[way], config) if way in drafters else None
    return Engine(main, config, speculator=Speculator(drafter))


def circles(streams: int) -> tuple[tuple[int, ...], ...]:
    return tuple(tuple(CIRCLE * (7 * stream + 3) + i % CIRCLE for i in range(2 * CIRCLE)) for stream in range(streams))


def measure(text: str, work: Workload, ways: list[str], loaded: Any, rounds: int, kv: str = "bf16") -> dict[str, Any]:
    """Tokens/s of decoding by way, ratios to plain in the same round, and what became of drafts in one more run."""
    main, spec, drafters = loaded
    streams = len(work.prompts)
    longest = len(work.prompts[0]) + work.num_tokens
    config = EngineConfig(
        vocab_size=spec.vocab_size, num_blocks=streams * (longest // BLOCK + 2), block_size=BLOCK, max_len=longest,
        max_sequences=streams, max_step_tokens=2048, max_extra_rows=15 * streams,
    )  # fmt: skip
    for backend in (main, *drafters.values()):
        backend.allocate(config.num_blocks, BLOCK, kv)
    engines = {way: engine_of(main, spec, config, way, drafters) for way in ways}
    for engine in engines.values():
        time_workload(engine, work)  # compiles, captures, learns what steps cost
    timings = interleave({way: partial(time_workload, engine, work) for way, engine in engines.items()}, rounds)
    found: dict[str, Any] = {"streams": streams, "text": text, "tokens": work.num_tokens, "ways": {}}
    for way in ways:
        rates = [timing.decode for timing in timings[way]]
        ratios = [rate / base.decode for rate, base in zip(rates, timings["plain"], strict=True)]
        drafted, accepted = drafts_of(engines[way], work)
        found["ways"][way] = {"tokens_per_s": rates, "ratio": ratios, "drafted": drafted, "accepted": accepted}
        share = f", {accepted / drafted:.0%} of {drafted} drafts kept" if drafted else ""
        print(
            f"{streams:2} streams, {text:15}: {way:12} {statistics.median(rates):8.0f} tokens/s, "
            f"{statistics.median(ratios):.2f}x plain [{min(ratios):.2f}-{max(ratios):.2f}]{share}",
            flush=True,
        )
    return found


def drafts_of(engine: Engine, work: Workload) -> tuple[int, int]:
    """How many tokens were drafted, and how many of them stayed, in one run."""
    engine.abort()
    for stream, prompt in enumerate(work.prompts):
        seed = stream if work.temperature else None
        engine.add(
            prompt, SamplingParams(max_tokens=work.num_tokens, ignore_eos=True, temperature=work.temperature, seed=seed)
        )
    done = []
    while engine.num_unfinished:
        done += [delta.output.metrics for delta in engine.step() if delta.output is not None]
    return sum(one.num_drafted for one in done), sum(one.num_accepted for one in done)


def load(spec: ModelSpec, layers: int, other: bool, beside: CudaBackend | None) -> CudaBackend:
    backend = CudaBackend() if beside is None else beside.beside()
    backend.load(replace(spec, layers=spec.layers[:layers]), weights_of(spec, layers, other))
    return backend


def on_circles(options: argparse.Namespace, summary: dict[str, Any]) -> Iterator[None]:
    """Measures the constructed model, into the summary."""
    spec = replace(spec_from_config(CONFIGS["8b"]), residual_scale=QUIET, embedding_scale=50.0)
    model = load(spec, len(spec.layers), False, None)
    drafters = {"draft": load(spec, 2, False, model), "other": load(spec, 2, True, model)}
    for streams, text in [*((1, text) for text in TEMPERATURES), (8, "circles"), (8, "temperature 20")]:
        work = Workload(circles(streams), options.tokens, TEMPERATURES[text])
        ways = ["plain", "ngram", *drafters]
        summary["runs"].append(measure(text, work, ways, (model, spec, drafters), options.rounds))
        yield


def on_text(options: argparse.Namespace, summary: dict[str, Any]) -> Iterator[None]:
    """Measures a model that was trained, into the summary."""
    checkpoint = open_checkpoint(options.model)
    model = open_backend(options.device)
    model.load(checkpoint.spec, checkpoint.weights())
    drafters: dict[str, Backend] = {}
    for folder in options.drafter:
        drafters[folder.name] = model.beside()
        found = open_checkpoint(folder)
        drafters[folder.name].load(found.spec, found.weights())
    tokens = Tokenizer(options.model).encode_plain(options.text.read_text(encoding="utf-8"))
    kv = default_kv_cache(checkpoint.spec, model.kv_dtypes)
    summary["model"], summary["drafters"] = options.model.name, [folder.name for folder in options.drafter]
    for streams in map(int, options.streams.split(",")):
        for text, temperature in {"greedy": 0.0, "temperature 1": 1.0}.items():
            work = Workload(prompts_from(tokens, streams, PROMPT), options.tokens, temperature)
            ways = ["plain", "ngram", *drafters]
            loaded = (model, checkpoint.spec, drafters)
            summary["runs"].append(measure(text, work, ways, loaded, options.rounds, kv))
            yield


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--model", type=Path, help="a folder of a trained model")
    parser.add_argument("--text", type=Path, help="with --model: text that it has not seen")
    parser.add_argument("--drafter", type=Path, action="append", default=[], help="with --model: a folder that drafts")
    parser.add_argument("--streams", default="1,4,16", help="with --model")
    parser.add_argument("--device", default="cuda", help="with --model")
    parser.add_argument("--tokens", type=int, default=256)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--out", type=Path, default=Path("benchmarks/results"))
    options = parser.parse_args()
    if (options.model is None) != (options.text is None):
        parser.error("--model and --text go together")
    gpu = torch.cuda.get_device_name() if torch.cuda.is_available() else "cpu"
    summary: dict[str, Any] = {"gpu": gpu, "torch": torch.__version__, "runs": []}
    options.out.mkdir(parents=True, exist_ok=True)
    kind = "speculation" if options.model is None else "speculation-text"
    path = options.out / f"{kind}-{gpu.replace('NVIDIA ', '').lower().split()[0]}.json"
    for _ in on_circles(options, summary) if options.model is None else on_text(options, summary):
        path.write_text(json.dumps(summary, indent=1) + "\n")


if __name__ == "__main__":
    main()
