"""What bench and inspect say of a GPU, from a model that runs here and limits that are given. tests/gpu/test_bench.py
measures them on a GPU."""

import json
import math
from pathlib import Path
from types import SimpleNamespace
from typing import cast

import pytest
from command_line import hasten

from hasten.backends.base import Backend
from hasten.cli import bench, inspect
from hasten.cli.terminal import write_json
from hasten.engine.llm import LLM
from hasten.hardware import Gpu
from hasten.measure import energy
from hasten.measure.energy import Rapl
from hasten.measure.speed import Energy, energy_of, notes_on_format
from hasten.model.checkpoint import open_checkpoint
from hasten.receipt import Measurement, Receipt
from hasten.recipe import Recipe
from hasten.tune import finish
from hasten.tune.predict import predict
from hasten.tune.search import Search

GPU = Gpu("a GPU", "9.0", 132, "13.0", 140 << 30, 100 << 20, 4e12, {"bf16": 7e14, "fp32": 5e13})


@pytest.fixture(scope="module")
def llm(shared_data: Path) -> LLM:
    pytest.importorskip("hasten._core", reason="needs the compiled core (scripts/build.sh)")
    return LLM(shared_data / "stories260K", device="cpu", threads=1)


def test_energy_is_that_of_a_token(llm: LLM, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    readings = iter([0, 6_000_000] * 2)
    monkeypatch.setattr(energy, "energy_counters", lambda: [tmp_path])
    monkeypatch.setattr(energy, "_microjoules", lambda path: next(readings))
    works = bench.workloads(llm, 24, 4, [3])
    engine = bench.engine_for(llm, works)
    reading, writing = (energy_of(engine, work, Rapl(), 0.0) for work in works.values())
    assert reading.joules_per_token == pytest.approx(6 / 24)
    assert writing.joules_per_token == pytest.approx(6 / (3 * 4))
    assert writing.watts > 6  # three streams take less than a second


def test_a_report_of_a_gpu_has_its_columns(llm: LLM, capsys: pytest.CaptureFixture[str]) -> None:
    works = bench.workloads(llm, 16, 8, [1, 2])
    timings = bench.time_all(bench.engine_for(llm, works), works, 1)
    used = {name: Energy(0.125, 640.0) for name in works}
    results = bench.summarize(llm, works, timings, used, GPU)
    single = results[1]
    size = bench.step_bytes(llm, 1, bench.START + 4, GPU.takes)
    assert single["of_bandwidth"] == pytest.approx(single["speed"]["median"] * size / GPU.bandwidth)
    assert [row["energy"] for row in results] == [{"joules_per_token": 0.125, "watts": 640.0}] * 3
    conditions = {"model": "m", "device": "cuda", "gpu": GPU.name, "capability": "9.0", "read_bandwidth": GPU.bandwidth}
    report = {"results": results, "conditions": conditions, "notes": ["a reason"], "load_seconds": 1.0}
    report |= bench.memory_of(llm, "cuda", [])
    assert 0 <= report["device_memory"]["taken"] < report["device_memory"]["total"]
    bench._write_report(report)
    shown = capsys.readouterr()
    assert "4,000.0 GB/s" in shown.out
    assert "J/token" in shown.out
    assert shown.out.count("640") == 3
    assert "note: a reason" in shown.err
    for row in results:
        del row["energy"]
    bench._write_report(report)
    assert "J/token" not in capsys.readouterr().out


def test_predictions_follow_the_limits_of_a_gpu(shared_data: Path, capsys: pytest.CaptureFixture[str]) -> None:
    checkpoint = open_checkpoint(shared_data / "stories260K")
    expected = inspect.predictions(checkpoint, GPU, "fp8", 512)
    stored = expected["as stored"]
    assert stored.decode["1"] == pytest.approx(GPU.bandwidth / stored.token_bytes)
    formats = {name: fmt for name, _, fmt in checkpoint.matrices()}
    half = predict(checkpoint.spec, formats, GPU, "bf16", 512)
    layers = checkpoint.spec.layers
    assert half.token_bytes - stored.token_bytes == 512 * sum(2 * la.num_kv_heads * la.head_dim for la in layers)
    write_json(inspect._as_data(checkpoint, "cuda", GPU, (), expected, "fp8", 512))
    data = json.loads(capsys.readouterr().out)
    assert data["machine"]["bandwidth"] == GPU.bandwidth
    assert data["predictions"]["as stored"]["fits"] is True
    assert all(math.isfinite(p["decode"]["8"]) for p in data["predictions"].values())
    assert "4,000.0 GB/s" in dict(inspect.gpu_facts(GPU))["copies"]


def test_fp32_products_have_a_peak_of_their_own() -> None:
    assert GPU.peak("fp32") == 5e13
    assert GPU.peak("int4") == GPU.peak("fp16") == GPU.peak("bf16") == 7e14


def test_kernels_are_tuned_on_a_gpu_only() -> None:
    asked = hasten("bench", "demo", "--device", "cpu", "--tune-kernels")
    assert "--tune-kernels is for an NVIDIA GPU, the device is cpu" in asked.complaint


def test_a_format_that_loses_is_noted() -> None:
    """In a receipt it is measured where it is not known; bench says what is known."""
    slower: dict[int, float] = {}
    known = SimpleNamespace(slower_than_dense=lambda: slower, compare_with_dense=lambda: slower.update({256: 1.31}))
    backend = cast(Backend, known)
    assert notes_on_format(backend, "cuda") == ()
    assert notes_on_format(backend, "cpu", measure=True) == ()
    (line,) = notes_on_format(backend, "cuda", measure=True)
    assert "with 256 streams" in line
    assert "1.31 times as long as in bf16" in line
    ratios = {"1": Measurement(1.2, 1.1, 1.3, 6, "times"), "8": Measurement(0.8, 0.78, 0.83, 6, "times")}
    ratios["16"] = Measurement(0.99, 0.97, 1.02, 6, "times")  # within the spread
    (paid,) = notes_on_format(backend, "cpu", ratios=ratios, against="original")
    assert paid == "with 8 streams 0.80x of original: this form does not pay there"
    assert notes_on_format(backend, "cuda", ratios=ratios, against="original") == (line, paid)
    lab = SimpleNamespace(device="cuda", load=lambda recipes: dict.fromkeys(recipes, backend))
    receipt = Receipt("tune", "m", "now", {}, {}, {}, {}, recipe=Recipe(), notes=("first",))
    assert finish._with_products(receipt, cast(Search, SimpleNamespace(lab=lab))).notes == ("first", line)
