"""The GPU's part of forms.py: compressed forms of the Llama-3.1-8B shape with random weights, decoding steps of one and
of several sequences as CUDA graphs, in interleaved rounds.

With several sequences each has experts of its own: the promise counts those that any of B sequences has, were they
drawn at random. Knows nothing of quality.
"""

import argparse
import time
from collections.abc import Iterator

import numpy as np
import torch
import triton
from forms import TWO_OF_FOUR, forms, summary
from gpu import CONFIGS, Sequences, copy_bandwidth

from hasten.backends.cuda import CudaBackend
from hasten.compress.targets import matrix_shapes
from hasten.hardware import conditions, versions
from hasten.model.formats import Format, Weight, dense_weight
from hasten.model.spec import ModelSpec, spec_from_config

FORMS = ("dense", "neurons 50 %", "low rank 50 %", "experts 4 of 16", TWO_OF_FOUR)
MASKS = np.array([a | b << 4 for a in (3, 5, 6, 9, 10, 12) for b in (3, 5, 6, 9, 10, 12)], np.uint8)
PROMPT, OUTPUT = 32, 256


class Pool:
    """Random numbers, of which matrices are views: making 16 GB of them takes no time."""

    def __init__(self, kind: str) -> None:
        rng = np.random.default_rng(0)
        size = 64_000_000
        self._kind = kind
        self._bits = ((rng.standard_normal(size, np.float32) * 0.02).view(np.uint32) >> 16).astype(np.uint16)
        self._masks = MASKS[rng.integers(0, len(MASKS), size // 4, np.uint8)]
        self._bytes = rng.integers(-127, 128, size, np.int8) if kind == "int8" else self._bits
        self._at = 0

    def dense(self, shape: tuple[int, int]) -> Weight:
        return Weight(Format("bf16"), shape, self._view(self._bits, shape))

    def matrix(self, shape: tuple[int, int], sparse: bool) -> Weight:
        rows, columns = shape
        scales = np.full((rows, 1), 0.02 / 73, np.float32) if self._kind == "int8" else None
        data = self._view(self._bytes, (rows, columns // 2 if sparse else columns))
        mask = self._view(self._masks, (rows, columns // 8)) if sparse else None
        return Weight(Format(self._kind, sparse24=sparse), shape, data, scales, mask=mask)  # type: ignore[arg-type]

    def _view(self, numbers: np.ndarray, shape: tuple[int, int]) -> np.ndarray:
        size = shape[0] * shape[1]
        self._at = (self._at + 4096 * 31) % 4_000_000
        if size + self._at > len(numbers):
            return np.resize(numbers, size).reshape(shape)
        return numbers[self._at : self._at + size].reshape(shape)


def weights(spec: ModelSpec, form: str, pool: Pool) -> Iterator[tuple[str, Weight]]:
    """Of a form; embedding and head keep all their numbers."""
    for name, shape in matrix_shapes(spec).items():
        if name.startswith("layers."):
            yield name, pool.matrix(shape, form == TWO_OF_FOUR)
        else:
            yield name, pool.dense(shape)
    ones = dense_weight(np.ones(spec.hidden_size, np.float32))
    for index, layer in enumerate(spec.layers):
        for norm in ("attn_norm", "mlp_norm"):
            yield f"layers.{index}.{norm}", ones
        if layer.experts:
            yield f"layers.{index}.router", pool.dense((layer.experts, spec.hidden_size))
    yield "final_norm", ones


def bytes_per_step(spec: ModelSpec, form: str, batch: int, itemsize: int) -> float:
    """Of weights that a step of `batch` sequences reads. itemsize: of the layers' dense numbers."""
    total = 0.0
    for name, (rows, columns) in matrix_shapes(spec).items():
        if name == "embed":
            continue  # a row of it
        if not name.startswith("layers."):
            total += 2 * rows * columns
            continue
        layer = spec.layers[int(name.split(".")[1])]
        share = 1.0
        if layer.experts and name.split(".")[2] in ("gate", "up", "down"):
            share = 1 - (1 - layer.active_experts / layer.experts) ** batch
        per = itemsize / 2 + 1 / 8 if form == TWO_OF_FOUR else itemsize
        total += share * per * rows * columns
    return total + sum(2 * layer.experts * spec.hidden_size for layer in spec.layers)


def measure_gpu(arguments: argparse.Namespace) -> dict[str, object]:
    """Every form and batch in every round."""
    batches = [int(batch) for batch in arguments.batches.split(",")]
    base = spec_from_config({**CONFIGS["8b"], "num_hidden_layers": arguments.layers or 32})
    specs = {name: spec for name, spec in forms(base).items() if name in FORMS}
    specs = {name: spec for name, spec in specs.items() if name in ("dense", *(arguments.only or specs))}
    bandwidth, tokens = copy_bandwidth(), arguments.tokens or 64
    pool = Pool("int8" if arguments.format == "int8" else "bf16")
    torch.cuda.empty_cache()
    runs: dict[tuple[str, int], Sequences] = {}
    for name, spec in specs.items():
        began = time.perf_counter()
        backend = CudaBackend(format="fp8" if arguments.format == "fp8" else None)
        backend.load(spec, weights(spec, name, pool))
        backend.allocate(max(batches) * ((PROMPT + OUTPUT) // 32 + 1), 32, "bf16")
        if arguments.tune:
            tuned = backend.tune_kernels(lambda line, name=name: print(f"{name}: {line}", flush=True), (1,))
            print(f"{name}: {tuned['step_ms']}", flush=True)
        for batch in batches:
            run = runs[name, batch] = Sequences(backend, spec.vocab_size, batch, PROMPT, OUTPUT, 8192)
            run.prefill().result()
            run.decode(3)
            backend.finish_captures()
            run.decode(3, 3)
        print(f"{name}: ready in {time.perf_counter() - began:.1f} s", flush=True)
    samples: dict[tuple[str, int], list[float]] = {key: [] for key in runs}
    for _ in range(arguments.rounds):
        for (name, batch), run in runs.items():
            torch.cuda.synchronize()
            began = time.perf_counter()
            run.decode(tokens, 16)
            samples[name, batch].append(batch * tokens / (time.perf_counter() - began))
    rows = []
    size = 2 if arguments.format == "bf16" else 1
    for (name, batch), found in samples.items():
        read = bytes_per_step(specs[name], name, batch, size)
        row = summary(name, found, samples["dense", batch], read, bytes_per_step(base, "dense", batch, size))
        rate = read * float(np.median(found)) / batch
        rows.append({**row, "batch": batch, "of_copy_bandwidth": round(rate / bandwidth, 3)})
    return {
        "gpu": torch.cuda.get_device_name(),
        "copy_bandwidth": bandwidth,
        "shape": "Llama-3.1-8B",
        "layers": len(base.layers),
        "format": arguments.format,
        "tokens": tokens,
        "torch": torch.__version__,
        "triton": triton.__version__,
        "versions": versions(),
        "conditions": conditions(),
        "rows": rows,
    }
