"""Compressed forms against dense: does reading fewer bytes show as more tokens a second? int8 or bf16 on a CPU, bf16 or
fp8 on a GPU, which forms_gpu.py measures.

    python benchmarks/forms.py [--layers 28] [--rounds 5] [--tokens 24] [--threads 0] [--only FORM] [--json FILE]
    python benchmarks/forms.py --format bf16 --prompt 512 [...]
    python benchmarks/forms.py --device cuda [--layers 32] [--format bf16|fp8|int8] [--batches 1,8] [...]

The Qwen3-0.6B shape with random weights, int8 with a scale a row, in these forms: dense; half of the neurons gone;
half of neurons and heads gone; the matrices of layers at half of their numbers as two thin ones; MLPs in 16 experts, 4
active; layers in which two of four weights are zero; beside bf16, layers in 8-bit floats. --prompt: how fast a prompt
is read, for which fewer bytes promise little. --only takes some of them. Printed are, for each, what it reads, the
speed-up that these promise over dense in the same round, what was measured, and the share of the promise (goal: 85 %);
last the ratio of the fastest samples, which says more on a machine that others use. On a GPU it is the shape of
Llama-3.1-8B.
"""

import argparse
import json
import statistics
import time
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import numpy as np

from hasten.backends.base import Backend, Batch
from hasten.compress.targets import matrix_shapes
from hasten.hardware import conditions, cpu_model, usable_threads, versions
from hasten.model.formats import Format, Kind, Weight, bytes_of, dense_weight, to_bf16
from hasten.model.spec import Layer, ModelSpec, spec_from_config

CONFIG = {
    "model_type": "qwen3", "vocab_size": 151936, "hidden_size": 1024, "intermediate_size": 3072,
    "num_attention_heads": 16, "num_key_value_heads": 8, "head_dim": 128, "max_position_embeddings": 4096,
    "rms_norm_eps": 1e-6, "tie_word_embeddings": True, "dtype": "bfloat16", "rope_theta": 1e6,
}  # fmt: skip
TWO_OF_FOUR, FLOAT8 = "2:4", "fp8"
PAIRS = np.array([3, 5, 6, 9, 10, 12], np.uint8)  # two of four columns, as bits
BLOCK = 16


def forms(spec: ModelSpec) -> dict[str, ModelSpec]:
    """Name -> the architecture in that form."""
    shapes = matrix_shapes(spec)

    def half(role: str) -> int:
        rows, columns = shapes[f"layers.0.{role}"]
        return int(0.5 * rows * columns / (rows + columns)) // 32 * 32

    ranks = tuple(sorted((role, half(role)) for role in ("q", "k", "v", "o", "gate", "up", "down")))

    first = spec.layers[0]

    def of(**changes: object) -> ModelSpec:
        return replace(spec, layers=tuple(replace(layer, **changes) for layer in spec.layers))

    return {
        "dense": spec,
        "neurons 50 %": of(intermediate_size=first.intermediate_size // 2),
        "neurons and heads 50 %": of(
            intermediate_size=first.intermediate_size // 2,
            num_heads=first.num_heads // 2,
            num_kv_heads=first.num_kv_heads // 2,
        ),
        "low rank 50 %": of(ranks=ranks),
        "experts 4 of 16": of(experts=16, active_experts=4),
        TWO_OF_FOUR: spec,
        FLOAT8: spec,
    }


def format_of(form: str, name: str, kind: Kind) -> Format:
    """Of a matrix; embeddings and heads keep all of their numbers, as recipes leave them."""
    if not name.startswith("layers."):
        return Format(kind)
    return Format(FLOAT8) if form == FLOAT8 else Format(kind, sparse24=form == TWO_OF_FOUR)


def weights(spec: ModelSpec, form: str, kind: Kind, seed: int = 0) -> Iterator[tuple[str, Weight]]:
    """Random weights of a form: matrices of `kind`, norms of one."""
    rng = np.random.default_rng(seed)

    def matrix(shape: tuple[int, int], fmt: Format) -> Weight:
        rows, columns = shape
        kept = columns // 2 if fmt.sparse24 else columns
        scale, scales, mask = 0.3 / 127 / columns**0.5, None, None
        if fmt.kind == "bf16":
            signs = rng.choice(np.array([0, 0x8000], np.uint16), (rows, kept))
            data = signs | to_bf16(np.full((rows, kept), 64 * scale, np.float32))
        else:
            data = rng.integers(-127, 128, (rows, kept), np.int8)
            scales = np.full((rows, 1), scale, np.float32)
            if fmt.kind == FLOAT8:
                data = data.view(np.uint8) & np.uint8(0xDF)  # at most 15
                scales *= 8
        if fmt.sparse24:
            mask = rng.choice(PAIRS, (rows, columns // 8)) | rng.choice(PAIRS, (rows, columns // 8)) << np.uint8(4)
        return Weight(fmt, shape, data, scales, mask=mask)

    for name, shape in matrix_shapes(spec).items():
        yield name, matrix(shape, format_of(form, name, kind))
    for index, layer in enumerate(spec.layers):
        for norm, width in (("attn_norm", spec.hidden_size), ("mlp_norm", spec.hidden_size),
                            ("q_norm", layer.head_dim), ("k_norm", layer.head_dim)):  # fmt: skip
            yield f"layers.{index}.{norm}", dense_weight(np.ones(width, np.float32))
        if layer.experts:
            yield (
                f"layers.{index}.router",
                dense_weight(rng.standard_normal((layer.experts, spec.hidden_size)).astype(np.float32), "bf16"),
            )
    yield "final_norm", dense_weight(np.ones(spec.hidden_size, np.float32))


def bytes_per_token(spec: ModelSpec, form: str, kind: Kind) -> int:
    """Of weights that a decoding step of one sequence reads."""
    total = 0
    for name, shape in matrix_shapes(spec).items():
        layer: Layer | None = spec.layers[int(name.split(".")[1])] if name.startswith("layers.") else None
        share = 1.0
        if layer is not None and layer.experts and name.split(".")[2] in ("gate", "up", "down"):
            share = layer.active_experts / layer.experts
        total += int(share * bytes_of(format_of(form, name, kind), shape))
    return total + sum(2 * layer.experts * spec.hidden_size for layer in spec.layers)


def decode(backend: Backend, tokens: int, start: int) -> float:
    """Tokens a second of one sequence from position `start` on."""
    table = np.arange(-(-(start + tokens) // BLOCK), dtype=np.int32)[None]
    one, row = np.ones(1, np.int32), np.zeros(1, np.int32)
    began = time.perf_counter()
    for position in range(start, start + tokens):
        where = np.array([position], np.int32)
        backend.forward(Batch(7 * one, where, where, one, where + 1, table, row))
    return tokens / (time.perf_counter() - began)


def read(backend: Backend, tokens: int) -> float:
    """Tokens a second of a prompt, read in one step."""
    places = np.arange(tokens, dtype=np.int32)
    length, table = np.array([tokens], np.int32), np.arange(-(-tokens // BLOCK), dtype=np.int32)[None]
    began = time.perf_counter()
    backend.forward(Batch(places + 7, places, places, length, length, table, length - 1))
    return tokens / (time.perf_counter() - began)


def measure(arguments: argparse.Namespace) -> dict[str, object]:
    """Every form in every round on a CPU, and what it comes to."""
    from hasten.backends.cpu import CpuBackend

    specs = forms(spec_from_config({**CONFIG, "num_hidden_layers": arguments.layers or 28}))
    kind: Kind = arguments.format or "int8"
    wanted = arguments.only or [name for name in specs if name != FLOAT8 or kind == "bf16"]
    specs = {name: spec for name, spec in specs.items() if name in ("dense", *wanted)}
    backends = {}
    for name, spec in specs.items():
        backend = CpuBackend(arguments.threads)
        backend.load(spec, weights(spec, name, kind))
        backend.allocate(max(16, -(-arguments.prompt // BLOCK)), BLOCK, "bf16")
        decode(backend, 40, 0)
        backends[name] = backend
    samples: dict[str, list[float]] = {name: [] for name in specs}
    for _ in range(arguments.rounds):
        for name, backend in backends.items():
            one = arguments.prompt
            samples[name].append(read(backend, one) if one else decode(backend, arguments.tokens or 24, 40))
    dense = bytes_per_token(specs["dense"], "dense", kind)
    rows = [
        summary(name, found, samples["dense"], bytes_per_token(specs[name], name, kind), dense)
        for name, found in samples.items()
    ]
    return {
        "layers": arguments.layers or 28,
        "format": kind,
        "prompt": arguments.prompt,
        "threads": arguments.threads or usable_threads(),
        "cpu": cpu_model(),
        "versions": versions(),
        "conditions": conditions(),
        "rows": rows,
    }


def summary(form: str, found: list[float], base: list[float], read: float, dense: float) -> dict[str, object]:
    """A row: tokens a second of a form and of dense in the same rounds, bytes that they read."""
    ratios = [value / other for value, other in zip(found, base, strict=True)]
    return {
        "form": form,
        "mb_per_token": round(read / 1e6, 1),
        "tokens_per_second": round(statistics.median(found), 2),
        "promised": round(dense / read, 3),
        "measured": round(statistics.median(ratios), 3),
        "least": round(min(ratios), 3),
        "most": round(max(ratios), 3),
        "fastest": round(max(found) / max(base), 3),
        "share": round(statistics.median(ratios) * read / dense, 3),
        "samples": [round(value, 2) for value in found],
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--layers", type=int, help="28 on a CPU, 32 on a GPU")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--tokens", type=int, help="of a sample: 24 on a CPU, 64 on a GPU")
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cpu")
    parser.add_argument(
        "--format", choices=("int8", "bf16", "fp8"), help="of the layers: int8 on a CPU, bf16 on a GPU unless given"
    )
    parser.add_argument("--prompt", type=int, default=0, metavar="N", help="read one of N tokens instead, on a CPU")
    parser.add_argument("--tune", action="store_true", help="measure tiles on the GPU before, kept in the user's cache")
    parser.add_argument("--batches", default="1,8", help="sequences of a step on a GPU")
    parser.add_argument("--threads", type=int, default=0)
    parser.add_argument("--only", action="append", metavar="FORM", help="this form beside dense; can be given again")
    parser.add_argument("--json", type=Path)
    arguments = parser.parse_args()
    if arguments.device == "cpu" and arguments.format == "fp8":
        parser.error("on a CPU fp8 is a form beside bf16, not the format of all of them")
    if arguments.device == "cuda":
        arguments.format = arguments.format or "bf16"
        from forms_gpu import measure_gpu

        found = measure_gpu(arguments)
    else:
        found = measure(arguments)
    print("| form | MB a token | tokens/s | promised | measured [least-most] | share of the promise | of the fastest |")
    print("|---|---|---|---|---|---|---|")
    for row in found["rows"]:  # type: ignore[attr-defined]
        form = f"{row['form']}, {row['batch']} sequences" if "batch" in row else row["form"]
        print(
            f"| {form} | {row['mb_per_token']} | {row['tokens_per_second']} | {row['promised']:.2f}x "
            f"| {row['measured']:.2f}x [{row['least']:.2f}-{row['most']:.2f}] | {row['share']:.0%} "
            f"| {row['fastest']:.2f}x |"
        )
    if arguments.json:
        arguments.json.write_text(json.dumps(found, indent=2, default=str) + "\n")


if __name__ == "__main__":
    main()
