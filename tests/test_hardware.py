"""The probe reads this machine, and parses what other machines say."""

from pathlib import Path

import pytest

from hasten import hardware
from hasten.errors import ResourceError
from hasten.measure.energy import open_meter


def test_probe_measures_and_keeps_within_limits() -> None:
    pytest.importorskip("hasten._core", reason="needs the compiled core (scripts/build.sh)")
    found = hardware.probe(seconds=0.02)
    assert 1 <= found.threads <= found.cores
    assert 0 < found.memory_available <= found.memory_total
    assert found.bandwidth > 1e8
    assert found.peak_ops["int8"] > 1e8
    assert found.isa
    assert hardware.conditions()["load_average"]
    assert {"python", "numpy", "hasten"} <= set(hardware.versions())


def test_threads_are_counted_once_for_everyone(monkeypatch: pytest.MonkeyPatch) -> None:
    core = pytest.importorskip("hasten._core", reason="needs the compiled core (scripts/build.sh)")
    from hasten.backends.cpu import CpuBackend

    monkeypatch.delenv("HASTEN_THREADS", raising=False)
    monkeypatch.setattr(hardware, "cpu_quota", lambda: None)
    assert hardware.usable_threads() == core.available_cores() == core.Pool(0).size == CpuBackend().threads
    monkeypatch.setattr(core, "available_cores", lambda: 7)  # fewer than the processors that it may run on
    assert hardware.usable_threads() == CpuBackend().threads == 7
    monkeypatch.setenv("HASTEN_THREADS", "3")
    assert hardware.usable_threads() == CpuBackend().threads == 3
    assert CpuBackend(2).threads == 2
    for wrong in ("two", "-1", "1.5", ""):
        monkeypatch.setenv("HASTEN_THREADS", wrong)
        with pytest.raises(ResourceError, match=f"HASTEN_THREADS is '{wrong}'"):
            CpuBackend()


@pytest.fixture
def sysfs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    for name in ("_CGROUP", "_POWERCAP", "_CPU"):
        monkeypatch.setattr(hardware, name, tmp_path / name)
        (tmp_path / name).mkdir()
    return tmp_path


def test_cpu_quota_of_both_versions(sysfs: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    group = sysfs / "_CGROUP" / "a" / "b"
    group.mkdir(parents=True)
    read = hardware._read
    monkeypatch.setattr(
        hardware, "_read", lambda path: "0::/a/b\n3:cpu,cpuacct:/c" if path.name == "cgroup" else read(path)
    )
    assert hardware.cpu_quota() is None
    (group / "cpu.max").write_text("max 100000\n")
    assert hardware.cpu_quota() is None
    (group.parent / "cpu.max").write_text("150000 100000\n")  # an ancestor's limit binds too
    assert hardware.cpu_quota() == 1.5
    monkeypatch.delenv("HASTEN_THREADS", raising=False)
    assert hardware.usable_threads() == 1
    old = sysfs / "_CGROUP" / "cpu" / "c"
    old.mkdir(parents=True)
    (old / "cpu.cfs_quota_us").write_text("50000")
    (old / "cpu.cfs_period_us").write_text("100000")
    assert hardware.cpu_quota() == 0.5
    (group / "memory.max").write_text("1000000")
    (group / "memory.current").write_text("400000")
    assert hardware.memory_available() == 600_000


def test_energy_is_read_across_a_wrap_or_not_at_all(sysfs: Path) -> None:
    assert hardware.energy_counters() == []
    with pytest.raises(ResourceError, match="RAPL"):
        open_meter()
    package = sysfs / "_POWERCAP" / "intel-rapl:0"
    part = sysfs / "_POWERCAP" / "intel-rapl:0:0"
    for folder in (package, part):
        folder.mkdir()
        (folder / "energy_uj").write_text("900000\n")
        (folder / "max_energy_range_uj").write_text("1000000\n")
    assert hardware.energy_counters() == [package / "energy_uj"]
    meter = open_meter()
    meter.start()
    (package / "energy_uj").write_text("400000\n")
    assert meter.stop() == pytest.approx(0.5)


def test_caches_are_those_of_data(sysfs: Path) -> None:
    rows = [("1", "Data", "32K"), ("1", "Instruction", "64K"), ("3", "Unified", "32M")]
    for index, (level, kind, size) in enumerate(rows):
        folder = sysfs / "_CPU" / "cpu0" / "cache" / f"index{index}"
        folder.mkdir(parents=True)
        for name, value in (("level", level), ("type", kind), ("size", size)):
            (folder / name).write_text(value + "\n")
    assert hardware.cache_sizes() == {"L1d": 32 << 10, "L3": 32 << 20}
