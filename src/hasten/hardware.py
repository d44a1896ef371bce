"""What this machine is and what it can do: read from the system, and measured by the compiled core in about a second.

Knows nothing of models. Each fact that the system does not tell is None, and `notes` says so.
"""

import os
import platform
import sys
from collections.abc import Callable
from dataclasses import dataclass
from functools import lru_cache
from importlib import metadata
from pathlib import Path
from typing import Any, Protocol

from hasten.errors import ResourceError

_CPU = Path("/sys/devices/system/cpu")
# Of what the compiled core and its callers agree upon; the core's own is in csrc/binding.cpp. Both are raised together.
_INTERFACE = 2
_TAKEN = ("fp8", "int8-2of4", "int8-g-2of4", "bf16-2of4")
_POWERCAP = Path("/sys/class/powercap")
_CGROUP = Path("/sys/fs/cgroup")
# Packages whose version changes a number in a receipt.
_PACKAGES = ("hasten", "numpy", "safetensors", "tokenizers", "torch", "triton", "transformers", "compressed-tensors")


class Limits(Protocol):
    """What bounds a model's speed on some device, as measured there. memory_available: bytes."""

    @property
    def memory_available(self) -> int: ...

    @property
    def bandwidth(self) -> float:
        """Bytes/s."""

    def peak(self, kind: str) -> float:
        """Operations/s of products with weights of this kind of format."""

    @property
    def takes(self) -> tuple[str, ...]:
        """Formats that are multiplied as they are stored where a device can: "fp8", and 2:4 as "bf16-2of4", "int8-2of4"
        or, in groups, "int8-g-2of4". Elsewhere 8-bit floats become bf16, and what is 2:4 gets its zeros back."""


@dataclass(frozen=True, slots=True)
class Hardware:
    """A machine. Sizes in bytes, bandwidth in bytes/s, peaks in operations/s (multiply and add are two).

    cores: processors that this process may use (affinity). cpu_quota: cores' worth of time that the control group
    allows, None for no limit. caches: size by level, of one core's view. read_bandwidth: by number of threads.
    peak_ops: measured arithmetic peak of all threads by kind ("int8", "bf16"). energy: how energy can be read, or None.
    takes: see Limits.
    """

    cpu: str
    architecture: str
    isa: str
    cores: int
    cpu_quota: float | None
    caches: dict[str, int]
    memory_total: int
    memory_available: int
    numa_nodes: int
    huge_pages: str | None
    read_bandwidth: dict[str, float]
    peak_ops: dict[str, float]
    energy: str | None
    notes: tuple[str, ...] = ()
    takes: tuple[str, ...] = ()

    @property
    def threads(self) -> int:
        """Worker threads that this machine has room for."""
        return usable_threads()

    @property
    def bandwidth(self) -> float:
        """The best read bandwidth measured, bytes/s."""
        return max(self.read_bandwidth.values())

    def peak(self, kind: str) -> float:
        """Operations/s of products with weights of this kind: int8 and bf16 as measured, the rest as fp32."""
        if kind in ("int8", "int4"):
            return self.peak_ops["int8"]
        # Where the processor multiplies bf16 pairs, it does twice as many of them as of fp32.
        halved = kind not in ("bf16", "fp8") and "bf16" in self.isa
        return self.peak_ops["bf16"] / (2 if halved else 1)

    @property
    def key(self) -> str:
        """What makes numbers comparable: the processor, its instructions, its cores. Not what changes by the minute."""
        return f"{self.cpu} {self.isa} {self.cores} {self.cpu_quota}"


@dataclass(frozen=True, slots=True)
class Gpu:
    """An NVIDIA GPU. Sizes in bytes.

    bandwidth: bytes/s of a large copy on the device, read and written. peak_ops: operations/s of large products by
    kind ("bf16", "fp32", and where the GPU has them "fp8", "int8").
    """

    name: str
    capability: str
    processors: int
    cuda: str | None
    memory_total: int
    memory_available: int
    bandwidth: float
    peak_ops: dict[str, float]

    def peak(self, kind: str) -> float:
        """Operations/s of products with weights of this kind: what has none of its own is widened to 16 bits."""
        return self.peak_ops.get(kind, self.peak_ops["bf16"])

    @property
    def takes(self) -> tuple[str, ...]:
        """See Limits."""
        return ("fp8", *(f"{kind}-2of4" for kind in ("fp16", "bf16", "fp8", "int8")))

    @property
    def key(self) -> str:
        """What makes numbers comparable."""
        return f"{self.name} {self.capability} {self.cuda}"


def load_core() -> Any:
    """hasten._core. Raises ResourceError where it is missing or was built from another version of the source."""
    try:
        from hasten import _core
    except ImportError as error:
        raise ResourceError(
            f"the compiled core hasten._core is not usable here ({error}): install with pip, or run scripts/build.sh"
        ) from None
    found = getattr(_core, "interface", 1)
    if found != _INTERFACE:
        raise ResourceError(
            f"the compiled core hasten._core is {'older' if found < _INTERFACE else 'newer'} than this copy of hasten "
            f"(interface {found}, expected {_INTERFACE}): build it again by scripts/build.sh, or install with pip"
        )
    return _core


def probe(seconds: float = 0.4, threads: int | None = None) -> Hardware:
    """Look at this machine and measure it, `seconds` for each of four measurements, with `threads` or all it has."""
    core = load_core()
    threads = threads or usable_threads()
    caches = cache_sizes()
    size = max(256 << 20, 4 * max(caches.values(), default=0))
    size = min(size, memory_available() // 4)
    # The best of its passes; making the buffer takes longer than they do.
    bandwidth = {str(count): core.read_bandwidth(count, size, seconds) for count in sorted({1, threads})}
    peaks = {
        kind: _best(lambda part, k=kind: core.arithmetic_peak(k, threads, part), seconds)  # type: ignore[misc]
        for kind in ("int8", "bf16")
    }
    notes = [] if energy_counters() else ["energy counters (RAPL) are not readable here"]
    return Hardware(
        cpu=cpu_model(),
        architecture=platform.machine(),
        isa=core.isa(),
        cores=len(affinity()),
        cpu_quota=cpu_quota(),
        caches=caches,
        memory_total=_meminfo("MemTotal"),
        memory_available=memory_available(),
        numa_nodes=numa_nodes(),
        huge_pages=huge_pages(),
        read_bandwidth=bandwidth,
        peak_ops={kind: value for kind, value in peaks.items() if value},
        energy="RAPL" if energy_counters() else None,
        notes=tuple(notes),
        takes=tuple(name for name in _TAKEN if core.takes(name.replace("-g", ""))),
    )


def _best(measure: Callable[[float], float], seconds: float) -> float:
    """The best of four measurements of a quarter each: a limit is what is reached when nothing else disturbs."""
    return max(measure(seconds / 4) for _ in range(4))


def conditions() -> dict[str, Any]:
    """What may disturb a measurement, now: load, frequency governor, free memory."""
    governor = _read(_CPU / "cpu0" / "cpufreq" / "scaling_governor")
    return {
        "load_average": [round(value, 2) for value in os.getloadavg()],
        "governor": governor or "not readable here",
        "memory_available": memory_available(),
        "environment": {key: value for key, value in os.environ.items() if key.startswith(("HASTEN_", "OMP_"))},
    }


def versions() -> dict[str, str]:
    """Versions of this program, Python, the system, and the packages that matter, without importing them."""
    found = {"python": sys.version.split()[0], "system": f"{platform.system()} {platform.release()}"}
    for name in _PACKAGES:
        try:
            found[name] = metadata.version(name)
        except metadata.PackageNotFoundError:
            continue
    if "hasten" not in found:
        from hasten import __version__

        found["hasten"] = __version__
    return found


def affinity() -> list[int]:
    """Processors that this process may run on."""
    if hasattr(os, "sched_getaffinity"):
        return sorted(os.sched_getaffinity(0))
    return list(range(os.cpu_count() or 1))


def usable_threads() -> int:
    """Worker threads where nobody says how many: HASTEN_THREADS, else one for each physical core that this process may
    run on, no more than the control group gives time for. Raises ResourceError for a HASTEN_THREADS that is no
    number."""
    text = os.environ.get("HASTEN_THREADS", "0")
    if not text.isdecimal():
        raise ResourceError(f"HASTEN_THREADS is {text!r}, expected a whole number (0 is all cores)")
    try:
        from hasten import _core

        cores = _core.available_cores()
    except ImportError:  # the numpy backend runs without it
        cores = len(affinity())
    quota = cpu_quota()
    return int(text) or (cores if quota is None else max(1, min(cores, int(quota))))


def cpu_quota() -> float | None:
    """Cores' worth of time that the control group allows (version 2, then 1), or None for no limit."""
    limits = [_read(path / "cpu.max") for path in _cgroup_paths("")]
    shares = [float(text.split()[0]) / float(text.split()[1]) for text in limits if text and not text.startswith("max")]
    for path in _cgroup_paths("cpu"):
        quota, period = _read(path / "cpu.cfs_quota_us"), _read(path / "cpu.cfs_period_us")
        if quota and period and int(quota) > 0:
            shares.append(int(quota) / int(period))
    return min(shares, default=None)


def memory_available() -> int:
    """Bytes that can be taken now without swapping, within the control group's limit."""
    available = _meminfo("MemAvailable")
    pairs = [(_cgroup_paths(""), "memory.max", "memory.current")]
    pairs.append((_cgroup_paths("memory"), "memory.limit_in_bytes", "memory.usage_in_bytes"))
    for paths, limit_name, usage_name in pairs:
        for path in paths:
            limit, usage = _read(path / limit_name), _read(path / usage_name)
            if limit and usage and limit != "max":
                available = min(available, max(0, int(limit) - int(usage)))
    return available


def cache_sizes() -> dict[str, int]:
    """Data and unified caches that one core sees, by level ("L1d", "L2", "L3")."""
    sizes = {}
    for path in sorted((_CPU / "cpu0" / "cache").glob("index*")):
        level, kind, size = (_read(path / name) for name in ("level", "type", "size"))
        if level and size and kind in ("Data", "Unified"):
            sizes[f"L{level}" + ("d" if kind == "Data" else "")] = _bytes(size)
    return sizes


def numa_nodes() -> int:
    return max(1, len(list(Path("/sys/devices/system/node").glob("node[0-9]*"))))


def huge_pages() -> str | None:
    """The system's way with transparent huge pages: "always", "madvise" or "never"; None where it has none."""
    text = _read(Path("/sys/kernel/mm/transparent_hugepage/enabled"))
    return text[text.index("[") + 1 : text.index("]")] if text and "[" in text else None


def energy_counters() -> list[Path]:
    """Readable package energy counters (RAPL): files of microjoules since some start, wrapping."""
    found = []
    for path in sorted(_POWERCAP.glob("*-rapl:[0-9]*")):
        counter = path / "energy_uj"
        # Packages only (intel-rapl:0); their parts (intel-rapl:0:1) are contained in them.
        if path.name.count(":") == 1 and os.access(counter, os.R_OK) and _read(counter):
            found.append(counter)
    return found


@lru_cache(maxsize=1)
def cpu_model() -> str:
    for line in (_read(Path("/proc/cpuinfo")) or "").splitlines():
        if line.startswith(("model name", "Model")):
            return line.split(":", 1)[1].strip()
    return platform.processor() or platform.machine()


def _cgroup_paths(controller: str) -> list[Path]:
    """This process's control group and its ancestors; controller "" is version 2's one tree."""
    paths = []
    for line in (_read(Path("/proc/self/cgroup")) or "").splitlines():
        _, names, place = line.split(":", 2)
        if controller in names.split(","):
            root = _CGROUP / controller
            here = root / place.lstrip("/")
            paths += [path for path in (here, *here.parents) if path == root or root in path.parents]
    return paths


def _meminfo(key: str) -> int:
    for line in (_read(Path("/proc/meminfo")) or "").splitlines():
        if line.startswith(key + ":"):
            return int(line.split()[1]) * 1024
    return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")


def _bytes(text: str) -> int:
    factor = {"K": 1 << 10, "M": 1 << 20, "G": 1 << 30}.get(text[-1], 1)
    return int(text.rstrip("KMG")) * factor


def _read(path: Path) -> str | None:
    try:
        return path.read_text().strip()
    except (OSError, UnicodeDecodeError):
        return None
