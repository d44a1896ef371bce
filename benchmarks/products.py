"""Speed of the compiled core's matrix products alone, beside the machine's limits measured in the same run.

    python benchmarks/products.py [--threads N] [--isa NAME] [--kinds int4g32,bf16] [--json FILE]

For each format and number of rows: GB/s of packed weights and their part of the read bandwidth (decode is bound by it),
GOPS and their part of the arithmetic peak (prefill is bound by it), and the time over the larger of the two limits. The
matrices together are larger than the caches and are used in turn, as the layers of a model are. Median of the rounds.
"""

import argparse
import json
import statistics
import sys
from pathlib import Path

import numpy as np

from hasten import _core
from hasten.model.formats import Format, Weight, dense_weight

FORMATS = {
    "int4g32": Format("int4", 32),
    "int4g128": Format("int4", 128),
    "int4g32z": Format("int4", 32, symmetric=False),
    "int8g32": Format("int8", 32),
    "int8": Format("int8"),
    "bf16": Format("bf16"),
    "fp16": Format("fp16"),
    "fp32": Format("fp32"),
}
DENSE_BYTES = {"bf16": 2.0, "fp16": 2.0, "fp32": 4.0}
ROWS = (1, 2, 4, 8, 32, 512)
OUTPUTS, INPUTS = 3072, 1024  # the MLP of a 0.6B Qwen3
TOTAL_BYTES = 200e6  # of all matrices together


def weight(format: Format, rng: np.random.Generator) -> Weight:
    shape = (OUTPUTS, INPUTS)
    if format.kind in DENSE_BYTES:
        return dense_weight((rng.standard_normal(shape) * 0.05).astype(np.float32), format.kind)
    groups = INPUTS // format.group_size if format.group_size else 1
    scales = rng.integers(128, 256, (OUTPUTS, groups)).astype(np.float32) / 2**14
    if format.kind == "int8":
        return Weight(format, shape, rng.integers(-128, 128, shape).astype(np.int8), scales)
    zeros = None if format.symmetric else rng.integers(0, 16, (OUTPUTS, groups)).astype(np.uint8)
    return Weight(format, shape, rng.integers(0, 256, (OUTPUTS, INPUTS // 2)).astype(np.uint8), scales, zeros)


def packed_bytes(format: Format) -> float:
    """Of one matrix as the kernels read it: numbers, f16 scales, u8 zero points."""
    if format.kind in DENSE_BYTES:
        return OUTPUTS * INPUTS * DENSE_BYTES[format.kind]
    groups = INPUTS / format.group_size if format.group_size else 1
    return OUTPUTS * (INPUTS * (0.5 if format.kind == "int4" else 1.0) + groups * (2 if format.symmetric else 3))


def measure(name: str, args: argparse.Namespace, pool: "_core.Pool") -> list[dict[str, float | str]]:
    format = FORMATS[name]
    one = weight(format, np.random.default_rng(0))
    size = packed_bytes(format)
    matrices = [_core.Linear(pool, [one]) for _ in range(max(2, round(TOTAL_BYTES / size)))]
    bandwidth = _core.read_bandwidth(args.threads, 256 << 20, 0.3)
    peak = _core.arithmetic_peak("bf16" if format.kind in DENSE_BYTES else "int8", args.threads, 0.2)
    if format.kind in ("fp32", "fp16"):
        peak /= 2  # one multiply-add a lane, where bf16 has two
    results: list[dict[str, float | str]] = []
    for rows in ROWS:
        used = matrices if rows <= 32 else matrices[:4]
        times = [statistics.fmean(m.time(rows, 1, args.isa)[0] for m in used) for _ in range(args.rounds)]
        seconds = statistics.median(times)
        operations = 2.0 * rows * OUTPUTS * INPUTS
        limit = max(size / bandwidth, operations / peak)
        results.append({
            "kind": name, "rows": rows, "microseconds": seconds * 1e6,
            "gb_per_second": size / seconds / 1e9, "of_bandwidth": size / seconds / bandwidth,
            "gops": operations / seconds / 1e9, "of_peak": operations / seconds / peak,
            "over_limit": seconds / limit, "bandwidth": bandwidth, "peak": peak,
        })  # fmt: skip
    return results


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--threads", type=int, default=0, help="0: one a usable core")
    parser.add_argument("--isa", default=None, help=f"one of {', '.join(_core.isas())}")
    parser.add_argument("--kinds", default=",".join(FORMATS))
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--json", type=Path)
    args = parser.parse_args()
    unknown = [kind for kind in args.kinds.split(",") if kind not in FORMATS]
    if unknown:
        sys.exit(f"--kinds names {', '.join(unknown)}; known are {', '.join(FORMATS)}")
    pool = _core.Pool(args.threads)
    args.threads = pool.size
    print(f"{_core.isa(args.isa)}, {args.threads} threads, weights [{OUTPUTS}, {INPUTS}]")
    print(f"{'kind':9} {'rows':>4} {'us':>9} {'GB/s':>6} {'of read':>8} {'GOPS':>6} {'of peak':>8} {'x limit':>8}")
    results = []
    for name in args.kinds.split(","):
        for r in measure(name, args, pool):
            print(
                f"{r['kind']:9} {r['rows']:4} {r['microseconds']:9.1f} {r['gb_per_second']:6.1f} "
                f"{r['of_bandwidth']:8.0%} {r['gops']:6.0f} {r['of_peak']:8.0%} {r['over_limit']:8.2f}",
                flush=True,
            )
            results.append(r)
    if args.json:
        args.json.write_text(json.dumps(results, indent=1) + "\n")


if __name__ == "__main__":
    main()
