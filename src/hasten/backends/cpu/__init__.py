"""The native backend for CPUs: a thin layer over the compiled core, hasten._core (sources in csrc/)."""

from hasten.backends.cpu.backend import CpuBackend

__all__ = ["CpuBackend"]
