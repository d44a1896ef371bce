"""Shows a run of cpu.py as Markdown: ratios to the peers first, then every figure. Measures nothing.

A ratio is taken round by round (both systems of one round ran minutes apart) and then its median; a figure is the
median of all samples with its extremes.
"""

import json
import statistics
import sys
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

Run = dict[str, Any]
QUIET_CORES = 0.1


@dataclass(frozen=True)
class Comparison:
    """hasten's figure over a peer's on one shape. limit: what it must reach; at_most where less is better."""

    what: str
    metric: str
    shape: str
    ours: str
    peer: str
    limit: float
    at_most: bool = False


LARGE, SMALL = "qwen3-0.6b", "llama-15m"
COMPARISONS = (
    Comparison("decode, 1 stream", "decode", LARGE, "hasten int4", "llama.cpp Q4_0", 1.4),
    Comparison("decode, 1 stream", "decode", LARGE, "hasten int8", "llama.cpp Q8_0", 1.2),
    Comparison("decode, 1 stream", "decode", LARGE, "hasten bf16", "llama.cpp BF16", 1.0),
    Comparison("decode, 8 streams", "batch", LARGE, "hasten int4", "OpenVINO int4", 1.4),
    Comparison("decode, 8 streams", "batch", LARGE, "hasten int8", "OpenVINO int8", 1.2),
    Comparison("prefill 512", "prefill", LARGE, "hasten int4", "OpenVINO int4", 1.15),
    Comparison("prefill 512", "prefill", LARGE, "hasten int8", "OpenVINO int8", 1.15),
    Comparison("prefill 512", "prefill", LARGE, "hasten bf16", "llama.cpp BF16", 1.0),
    Comparison("first token", "starts_s", LARGE, "hasten int4", "llama.cpp Q4_0", 1.0, at_most=True),
    Comparison("peak memory, 1 stream", "peak_mib_decode", LARGE, "hasten int4", "llama.cpp Q4_0", 1.0, at_most=True),
    Comparison("decode, 1 stream", "decode", SMALL, "hasten int4", "ONNX Runtime int4", 2.0),
    Comparison("decode, 1 stream", "decode", LARGE, "hasten bf16", "Transformers bf16", 1.0),
    Comparison("decode, 8 streams", "batch", LARGE, "hasten bf16", "Transformers bf16", 1.0),
)
KV_BYTES_A_TOKEN = 114_688  # Qwen3-0.6B in bf16: 2 x 28 layers x 8 heads x 128 x 2 bytes
LONGEST_DECODE = 161


def as_list(value: Any) -> list[float]:
    return value if isinstance(value, list) else [value]


def samples(runs: Iterable[Run], metric: str) -> list[float]:
    return [value for run in runs if metric in run for value in as_list(run[metric])]


def of(report: dict[str, Any], shape: str, system: str) -> list[Run]:
    return [run for run in report["runs"] if run["shape"] == shape and run["system"] == system and "error" not in run]


def bandwidth_fractions(runs: Iterable[Run]) -> list[float]:
    """Of each round: weight bytes a token x tokens/s over the median of the bandwidths measured just before and after.

    Reading the KV cache is not counted (a few per cent here), so the fraction errs low.
    """
    return [
        statistics.median(run["decode"]) * run["weight_bytes"] / statistics.median(run["bandwidth"])
        for run in runs
        if "decode" in run
    ]


def memory_ratios(runs: Iterable[Run]) -> list[float]:
    """Of each round: peak memory of decoding one stream over weights and the KV cache of that stream."""
    cache = KV_BYTES_A_TOKEN * LONGEST_DECODE
    return [run["peak_mib_decode"] * 2**20 / (run["weight_bytes"] + cache) for run in runs if "peak_mib_decode" in run]


def busy_kept(runs: Iterable[Run]) -> list[float]:
    """Of each round: speed beside one busy process over the quiet speed just before."""
    return samples(runs, "busy_kept")


@dataclass(frozen=True)
class Limit:
    """A figure of hasten's on the large shape that needs no peer. figure: runs -> one value a round."""

    what: str
    ours: str
    of: str
    figure: Callable[[Iterable[Run]], list[float]]
    limit: float
    at_most: bool = False


LIMITS = (
    Limit("decode, 1 stream", "hasten int4", "read bandwidth", bandwidth_fractions, 0.85),
    Limit("decode, 1 stream", "hasten int8", "read bandwidth", bandwidth_fractions, 0.90),
    Limit("decode, 1 stream", "hasten bf16", "read bandwidth", bandwidth_fractions, 0.90),
    Limit("decode beside a busy process", "hasten int4", "itself, quiet", busy_kept, 0.70),
    Limit("peak memory, 1 stream", "hasten int4", "weights + KV", memory_ratios, 1.15, at_most=True),
)


def spread(values: list[float], digits: int) -> str:
    if not values:
        return "-"
    middle, low, high = statistics.median(values), min(values), max(values)
    return f"{middle:,.{digits}f} [{low:,.{digits}f}-{high:,.{digits}f}]"


def target(values: list[float], limit: float, at_most: bool) -> str:
    """The last three cells of a row: measured, wanted, verdict on the median."""
    middle = statistics.median(values)
    reached = middle <= limit if at_most else middle >= limit
    return (
        f"{spread(values, 2)} | {'<=' if at_most else '>='} {limit:g} | {'reached' if reached else '**not reached**'} |"
    )


def paired_ratios(report: dict[str, Any], comparison: Comparison) -> list[float]:
    peers = {run["round"]: run for run in of(report, comparison.shape, comparison.peer)}
    return [
        statistics.median(as_list(run[comparison.metric])) / statistics.median(as_list(peer[comparison.metric]))
        for run in of(report, comparison.shape, comparison.ours)
        if (peer := peers.get(run["round"])) and comparison.metric in run and comparison.metric in peer
    ]


def ratio_rows(report: dict[str, Any]) -> list[str]:
    rows = []
    for comparison in COMPARISONS:
        if ratios := paired_ratios(report, comparison):
            cells = target(ratios, comparison.limit, comparison.at_most)
            rows.append(f"| {comparison.shape}: {comparison.what} | {comparison.ours} / {comparison.peer} | {cells}")
    for limit in LIMITS:
        if values := limit.figure(of(report, LARGE, limit.ours)):
            cells = target(values, limit.limit, limit.at_most)
            rows.append(f"| {LARGE}: {limit.what} | {limit.ours} / {limit.of} | {cells}")
    return rows


def system_row(system: str, runs: list[Run]) -> str:
    loads = [load for run in runs for task in run["foreign_cores"].values() for load in task]
    disturbed = f"{100 * sum(load >= QUIET_CORES for load in loads) / len(loads):.0f} %" if loads else "-"
    cells = [
        system,
        f"{runs[0]['weight_bytes'] / 1e6:,.0f}",
        spread(samples(runs, "decode"), 1),
        spread([100 * fraction for fraction in bandwidth_fractions(runs)], 0),
        spread(samples(runs, "batch"), 0),
        spread(samples(runs, "prefill"), 0),
        spread(samples(runs, "starts_s"), 2),
        spread(samples(runs, "peak_mib_decode"), 0),
        spread(samples(runs, "peak_mib"), 0),
        spread([100 * kept for kept in busy_kept(runs)], 0),
        str(len(samples(runs, "decode"))),
        disturbed,
    ]
    return "| " + " | ".join(cells) + " |"


def shape_table(report: dict[str, Any], shape: str) -> list[str]:
    names = list(dict.fromkeys(run["system"] for run in report["runs"] if run["shape"] == shape))
    found = [(name, runs) for name in names if (runs := of(report, shape, name))]
    if not found:
        return []
    columns = (
        "system, weights MB, decode tokens/s, % of bandwidth, 8 streams tokens/s, prefill 512 tokens/s, first token s, "
        "peak MiB 1 stream, peak MiB all, % kept beside a busy process, n, disturbed samples"
    )
    header = [f"| {' | '.join(columns.split(', '))} |", "|" + "---|" * len(columns.split(", "))]
    return ["", f"### {shape}", "", *header, *(system_row(name, runs) for name, runs in found)]


def render(report: dict[str, Any]) -> str:
    """The whole report as Markdown."""
    machine, runs = report["conditions"], report["runs"]
    processor = f"{machine['cpu']}, family/model {machine['cpu_family_model']}, {' '.join(machine['isa'])}"
    bandwidths = [value / 1e9 for run in runs for value in run["bandwidth"]]
    versions = {name: version for run in runs for name, version in run.get("versions", {}).items()}
    lines = [
        f"{processor}; {machine['cores_used']} of {machine['cores_of_machine']} cores; {machine['date']}; "
        f"hasten at {machine.get('commit', 'unknown')}; "
        f"read bandwidth {spread(bandwidths, 1)} GB/s. Median [least-most].",
        ", ".join(f"{name} {version}" for name, version in sorted(versions.items()) if name != "ggml"),
    ]
    if rows := ratio_rows(report):
        lines += ["", "| what | ratio of | measured | wanted | |", "|---|---|---|---|---|", *rows]
    for shape in dict.fromkeys(run["shape"] for run in runs):
        lines += shape_table(report, shape)
    errors = [f"{run['shape']} {run['system']}: {run['error']}" for run in runs if "error" in run]
    return "\n".join([*lines, *(["", "Failed:", *errors] if errors else [])])


if __name__ == "__main__":
    print(render(json.loads(Path(sys.argv[1]).read_text())))
