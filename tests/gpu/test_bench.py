"""bench and inspect on the GPU, as a user runs them."""

import importlib.util
import json

import pytest

torch = pytest.importorskip("torch")
pytest.importorskip("typer")
if not torch.cuda.is_available():
    pytest.skip("needs an NVIDIA GPU", allow_module_level=True)

from command_line import hasten  # noqa: E402

from hasten.backends.cuda.probe import probe_gpu  # noqa: E402

WITH_NVML = importlib.util.find_spec("pynvml") is not None


def test_bench_reports_speed_memory_and_energy() -> None:
    flags = ["--device", "cuda", "--prefill", 256, "--decode", 64, "--batch", 1, "--batch", 8, "--rounds", 2]
    data = json.loads(hasten("bench", "demo", *flags, "--json").good.stdout)
    conditions = data["conditions"]
    assert conditions["device"] == "cuda"
    assert conditions["gpu"] == torch.cuda.get_device_name()
    assert conditions["read_bandwidth"] > 1e11
    memory = data["device_memory"]
    assert 0 < memory["taken"] < memory["total"]
    assert memory["total"] == pytest.approx(torch.cuda.get_device_properties(0).total_memory, rel=0.01)
    reading, *writing = data["results"]
    assert reading["ttft"]["median"] > 0
    assert [row["streams"] for row in writing] == [1, 8]
    assert all(0 < row["of_bandwidth"] < 1 for row in writing)
    assert writing[1]["speed"]["median"] > writing[0]["speed"]["median"] > 0
    if not WITH_NVML:
        assert data["notes"] == ["no energy: nvidia-ml-py is not installed: pip install 'hasten[cuda]'"]
        return
    assert data["notes"] == []
    assert all(10 < row["energy"]["watts"] < 1500 for row in data["results"])
    # A step with eight streams takes little more than one with one.
    assert 0 < writing[1]["energy"]["joules_per_token"] < writing[0]["energy"]["joules_per_token"]


def test_bench_shows_energy_in_the_table() -> None:
    flags = ["--device", "cuda", "--prefill", 32, "--decode", 8, "--batch", 1, "--rounds", 1]
    table = hasten("bench", "demo", *flags).good.stdout
    assert "copies" in table
    assert ("J/token" in table) == WITH_NVML


def test_inspect_measures_the_gpu() -> None:
    data = json.loads(hasten("inspect", "demo", "--device", "cuda", "--json").good.stdout)
    assert data["device"] == "cuda"
    assert data["machine"]["name"] == torch.cuda.get_device_name()
    assert data["machine"]["peak_ops"]["bf16"] > data["machine"]["peak_ops"]["fp32"] > 1e12
    stored = data["predictions"]["as stored"]
    assert stored["fits"]
    assert stored["decode"]["1"] == pytest.approx(data["machine"]["bandwidth"] / stored["token_bytes"])
    assert "kv_cache is int8, expected" in hasten("inspect", "--device", "cuda", "--kv-cache", "int8").complaint


def test_the_probe_gives_back_what_it_took() -> None:
    probe_gpu(0.05)
    before = torch.cuda.memory_reserved()
    first, second = probe_gpu(0.2), probe_gpu(0.2)
    assert torch.cuda.memory_reserved() <= before
    assert 0.8 < first.bandwidth / second.bandwidth < 1.25
