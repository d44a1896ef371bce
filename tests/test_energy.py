"""Meters of energy. NVML's is read through nvidia-ml-py itself, over a library in C in the place of the driver's."""

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest

from hasten.errors import ResourceError
from hasten.measure import energy
from hasten.recipe import Recipe
from hasten.tune.lab import Lab

UUID = "GPU-01234567-89ab-cdef-0123-456789abcdef"

# What the driver's library answers, by NVML's header. Its counter is a file, in millijoules.
DRIVER = r"""
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
static int failing(const char *call) { const char *f = getenv("FAILS"); return f && !strcmp(f, call); }
int nvmlInitWithFlags(unsigned flags) { return failing("init") ? 9 : 0; }
const char *nvmlErrorString(int code) {
    return code == 9 ? "Driver Not Loaded" : code == 6 ? "Not Found" : "Not Supported";
}
int nvmlDeviceGetHandleByUUID(const char *uuid, void **device) {
    static int board;
    if (strcmp(uuid, getenv("BOARD"))) return 6;
    *device = &board;
    return 0;
}
int nvmlDeviceGetTotalEnergyConsumption(void *device, unsigned long long *millijoules) {
    if (failing("energy")) return 3;
    FILE *file = fopen(getenv("COUNTER"), "r");
    int found = file ? fscanf(file, "%llu", millijoules) : 0;
    if (file) fclose(file);
    return found == 1 ? 0 : 999;
}
"""

MEASURE = """
import json, sys
from pathlib import Path
from hasten.errors import ResourceError
from hasten.measure.energy import Nvml
counter, uuid = Path(sys.argv[1]), sys.argv[2]
try:
    meter = Nvml(uuid)
except ResourceError as error:
    print(json.dumps(str(error)))
    sys.exit()
found = []
for used in (250, 4_000_000_000):
    meter.start()
    counter.write_text(str(int(counter.read_text()) + used))
    found.append(meter.stop())
print(json.dumps(found))
"""


@pytest.fixture(scope="module")
def driver(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with libnvidia-ml.so.1."""
    pytest.importorskip("pynvml")
    compiler = shutil.which("cc") or pytest.skip("needs a C compiler")
    folder = tmp_path_factory.mktemp("driver")
    (folder / "nvml.c").write_text(DRIVER)
    library = folder / "libnvidia-ml.so.1"
    subprocess.run([compiler, "-shared", "-fPIC", "-o", library, folder / "nvml.c"], check=True)
    return folder


def measured(driver: Path, tmp_path: Path, uuid: str = UUID, fails: str = "") -> object:
    """Joules that a process of its own measures, or why it cannot."""
    counter = tmp_path / "counter"
    counter.write_text("123456")
    env = {**os.environ, "LD_LIBRARY_PATH": str(driver), "BOARD": UUID, "COUNTER": str(counter), "FAILS": fails}
    command = [sys.executable, "-c", MEASURE, str(counter), uuid]
    return json.loads(subprocess.run(command, env=env, capture_output=True, text=True, check=True).stdout)


def test_nvml_counts_millijoules_past_32_bits(driver: Path, tmp_path: Path) -> None:
    assert measured(driver, tmp_path) == [0.25, 4e6]


def test_what_nvml_refuses_is_a_reason(driver: Path, tmp_path: Path) -> None:
    assert "Not Found" in str(measured(driver, tmp_path, uuid=UUID.replace("0", "f")))
    assert "Driver Not Loaded" in str(measured(driver, tmp_path, fails="init"))
    assert str(measured(driver, tmp_path, fails="energy")) == f"NVML does not tell the energy of {UUID}: Not Supported"


def test_without_nvidia_ml_py_the_extra_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    from hasten.measure.energy import Nvml

    monkeypatch.setitem(sys.modules, "pynvml", None)
    with pytest.raises(ResourceError, match=r"nvidia-ml-py is not installed: pip install 'hasten\[cuda\]'"):
        Nvml(UUID)


def test_work_whose_energy_cannot_be_read_is_not_run(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(energy, "energy_counters", list)
    with pytest.raises(ResourceError, match="RAPL"):
        energy.open_meter()
    idle = SimpleNamespace(load=lambda recipes: pytest.fail("it was run"), device="cpu")
    with pytest.raises(ResourceError, match="RAPL"):
        Lab.energy(idle, Recipe(), {})  # type: ignore[arg-type]
