"""benchmarks/table.py: ratios are paired by round, failures are shown and never counted."""

import importlib
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest


@pytest.fixture
def table(monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    monkeypatch.syspath_prepend(Path(__file__).parents[1] / "benchmarks")
    return importlib.import_module("table")


def run(number: int, system: str, decode: list[float], **more: Any) -> dict[str, Any]:
    measured = {"decode": decode, "weight_bytes": 100e6, "foreign_cores": {"decode": [0.0, 0.5]}, "versions": {}}
    return {"round": number, "shape": "qwen3-0.6b", "system": system, "bandwidth": [9e9, 11e9], **measured, **more}


def report(*runs: dict[str, Any]) -> dict[str, Any]:
    machine = {"cpu": "c", "cpu_family_model": "1/2", "isa": ["avx2"], "cores_used": 2, "cores_of_machine": 4}
    return {"conditions": {**machine, "date": "2026-01-01"}, "runs": list(runs)}


def test_ratios_compare_systems_of_the_same_round(table: ModuleType) -> None:
    # The machine halves its speed between the rounds: unpaired medians would give 2.0 here by accident of order.
    runs = [
        run(0, "hasten int4", [60.0, 62.0, 58.0]),
        run(0, "llama.cpp Q4_0", [40.0]),
        run(1, "llama.cpp Q4_0", [20.0]),
        run(1, "hasten int4", [32.0]),
        run(2, "hasten int4", [90.0]),
    ]
    comparison = next(c for c in table.COMPARISONS if (c.ours, c.metric) == ("hasten int4", "decode"))
    assert table.paired_ratios(report(*runs), comparison) == pytest.approx([1.5, 1.6])
    text = table.render(report(*runs))
    assert "1.55 [1.50-1.60] | >= 1.4 | reached |" in text


def test_fraction_of_bandwidth_uses_the_measurements_around_the_run(table: ModuleType) -> None:
    assert table.bandwidth_fractions([run(0, "hasten int4", [80.0])]) == pytest.approx([0.8])
    assert "0.80 [0.80-0.80] | >= 0.85 | **not reached** |" in table.render(report(run(0, "hasten int4", [80.0])))


def test_failures_are_shown_and_not_counted(table: ModuleType) -> None:
    failed = {
        "round": 0,
        "shape": "qwen3-0.6b",
        "system": "OpenVINO int4",
        "bandwidth": [1e10, 1e10],
        "error": "exit 1: no",
    }
    text = table.render(report(failed, run(0, "llama.cpp Q4_0", [40.0])))
    assert "qwen3-0.6b OpenVINO int4: exit 1: no" in text
    assert "| OpenVINO int4 |" not in text
    assert "| llama.cpp Q4_0 | 100 | 40.0 [40.0-40.0] | 40 [40-40] |" in text
    assert text.count("50 %") == 1  # one of the two samples was disturbed
