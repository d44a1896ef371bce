"""Energy of a stretch of work, from counters that the hardware keeps: RAPL's of the processor packages, NVML's of an
NVIDIA GPU. Nothing is estimated; whatever else runs there meanwhile counts too."""

from collections.abc import Callable
from pathlib import Path
from typing import Protocol

from hasten.errors import ResourceError
from hasten.hardware import energy_counters


class Meter(Protocol):
    """Reads one kind of counter."""

    def start(self) -> None:
        """Measure from now on."""

    def stop(self) -> float:
        """Joules since start()."""


class Rapl:
    """All processor packages together. Raises ResourceError where the system does not let their counters be read."""

    def __init__(self) -> None:
        self._counters = energy_counters()
        if not self._counters:
            raise ResourceError("energy counters (RAPL) are not readable here")

    def start(self) -> None:
        self._before = [_microjoules(path) for path in self._counters]

    def stop(self) -> float:
        used = 0.0
        for path, first in zip(self._counters, self._before, strict=True):
            change = _microjoules(path) - first
            if change < 0:  # the counter wrapped
                change += int((path.parent / "max_energy_range_uj").read_text())
            used += change
        return used / 1e6


class Nvml:
    """The board of one GPU, by its UUID as NVML writes it ("GPU-..."). The driver updates the counter some ten times a
    second: measure for a second or more. Raises ResourceError where nvidia-ml-py is not installed, or the driver or the
    GPU does not tell."""

    def __init__(self, uuid: str) -> None:
        try:
            import pynvml
        except ImportError:
            raise ResourceError("nvidia-ml-py is not installed: pip install 'hasten[cuda]'") from None
        try:
            pynvml.nvmlInit()
            handle = pynvml.nvmlDeviceGetHandleByUUID(uuid)
            pynvml.nvmlDeviceGetTotalEnergyConsumption(handle)
        except pynvml.NVMLError as error:
            raise ResourceError(f"NVML does not tell the energy of {uuid}: {error}") from None
        self._read: Callable[[], int] = lambda: pynvml.nvmlDeviceGetTotalEnergyConsumption(handle)

    def start(self) -> None:
        self._before = self._read()

    def stop(self) -> float:
        return (self._read() - self._before) / 1e3


def open_meter(device: str = "cpu") -> Meter:
    """The meter of a device: "cuda" is the GPU that torch takes, else the processor. Raises ResourceError with the
    reason where its energy cannot be read."""
    if device != "cuda":
        return Rapl()
    import torch

    # NVML counts every GPU of the machine, torch only those that CUDA_VISIBLE_DEVICES leaves: the UUID is the same.
    return Nvml(f"GPU-{torch.cuda.get_device_properties(torch.cuda.current_device()).uuid}")


def _microjoules(path: Path) -> int:
    return int(path.read_text())
