"""Shows a run of cpu.py as Markdown: ratios to the peers first, then every figure. Measures nothing.

A ratio is taken round by round (both systems of one round ran minutes apart) and then its median; a figure is the
median of all samples with its extremes.
"""

import json
import statistics
import sys
from collections.abc import Iterable
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
# Least fraction of the measured read bandwidth, and of the quiet speed beside a busy neighbour.
BANDWIDTH_LIMITS = {"hasten int4": 0.85, "hasten int8": 0.90, "hasten bf16": 0.90}
BUSY_LIMITS = {"hasten int4": 0.70}


def as_list(value: Any) -> list[float]:
    return value if isinstance(value, list) else [value]


def samples(runs: Iterable[Run], metric: str) -> list[float]:
    return [value for run in runs if metric in run for value in as_list(run[metric])]


def of(report: dict[str, Any], shape: str, system: str) -> list[Run]:
    return [run for run in report["runs"] if run["shape"] == shape and run["system"] == system and "error" not in run]


def bandwidth_fractions(runs: Iterable[Run]) -> list[float]:
    """Of each round: weight bytes a token x tokens/s over the mean of the bandwidth measured just before and after.

    Reading the KV cache is not counted (a few per cent here), so the fraction errs low.
    """
    return [
        statistics.median(run["decode"]) * run["weight_bytes"] / statistics.mean(run["bandwidth"])
        for run in runs
        if "decode" in run
    ]


def spread(values: list[float], digits: int) -> str:
    if not values:
        return "-"
    middle, low, high = statistics.median(values), min(values), max(values)
    return f"{middle:,.{digits}f} [{low:,.{digits}f}-{high:,.{digits}f}]"


def verdict(value: float, limit: float, at_most: bool = False) -> str:
    return "reached" if (value <= limit if at_most else value >= limit) else "**not reached**"


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
            sign = "<=" if comparison.at_most else ">="
            result = verdict(statistics.median(ratios), comparison.limit, comparison.at_most)
            pair = f"{comparison.ours} / {comparison.peer}"
            figure = f"{spread(ratios, 2)} | {sign} {comparison.limit:g}"
            rows.append(f"| {comparison.shape}: {comparison.what} | {pair} | {figure} | {result} |")
    for system, limit in BANDWIDTH_LIMITS.items():
        if fractions := bandwidth_fractions(of(report, LARGE, system)):
            figure = f"{spread(fractions, 2)} | >= {limit:g} | {verdict(statistics.median(fractions), limit)}"
            rows.append(f"| {LARGE}: decode, 1 stream | {system} / read bandwidth | {figure} |")
    for system, limit in BUSY_LIMITS.items():
        if kept := samples(of(report, LARGE, system), "busy_kept"):
            figure = f"{spread(kept, 2)} | >= {limit:g} | {verdict(statistics.median(kept), limit)}"
            rows.append(f"| {LARGE}: decode beside a busy process | {system} / itself, quiet | {figure} |")
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
        spread([100 * kept for kept in samples(runs, "busy_kept")], 0),
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
    isa = " ".join(machine["isa"])
    bandwidths = [value / 1e9 for run in runs for value in run["bandwidth"]]
    versions = {name: version for run in runs for name, version in run.get("versions", {}).items()}
    lines = [
        f"{machine['cpu']} ({isa}), {machine['cores_used']} of {machine['cores_of_machine']} cores, {machine['date']}; "
        f"read bandwidth {spread(bandwidths, 1)} GB/s; median [least-most].",
        ", ".join(f"{name} {version}" for name, version in sorted(versions.items()) if len(version) < 40),
    ]
    if rows := ratio_rows(report):
        lines += ["", "| what | ratio of | measured | wanted | |", "|---|---|---|---|---|", *rows]
    for shape in dict.fromkeys(run["shape"] for run in runs):
        lines += shape_table(report, shape)
    errors = [f"{run['shape']} {run['system']}: {run['error']}" for run in runs if "error" in run]
    return "\n".join([*lines, *(["", "Failed:", *errors] if errors else [])])


if __name__ == "__main__":
    print(render(json.loads(Path(sys.argv[1]).read_text())))
