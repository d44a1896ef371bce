"""What the machine is and what it is doing now: processor, load by others, read bandwidth.

Standard library only (numpy where bandwidth is measured), so that it runs in every peer's environment. Knows no system.
"""

import os
import platform
import resource
import threading
import time
from datetime import UTC, datetime
from pathlib import Path

ISA_FLAGS = (
    "avx2",
    "avx512f",
    "avx512_vnni",
    "avx512_bf16",
    "avx_vnni",
    "amx_int8",
    "amx_bf16",
    "asimddp",
    "i8mm",
    "bf16",
)


def busy_seconds() -> float:
    """CPU seconds that all processes have used since boot, time stolen by the host included."""
    ticks = [int(word) for word in Path("/proc/stat").read_text().split("\n", 1)[0].split()[1:]]
    user, nice, system, _idle, _iowait, irq, softirq, steal = ticks[:8]
    return (user + nice + system + irq + softirq + steal) / os.sysconf("SC_CLK_TCK")


def own_seconds() -> float:
    """CPU seconds that this process and its finished children have used."""
    usages = (resource.getrusage(resource.RUSAGE_SELF), resource.getrusage(resource.RUSAGE_CHILDREN))
    return sum(usage.ru_utime + usage.ru_stime for usage in usages)


def process_seconds(pid: int) -> float:
    """CPU seconds that another process has used."""
    fields = Path(f"/proc/{pid}/stat").read_text().rsplit(")", 1)[1].split()
    return (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK")


class ForeignLoad:
    """Cores kept busy by others between its making and `cores()`; `known` is a child whose work is not counted."""

    def __init__(self, known: int | None = None) -> None:
        self.known = known
        self.start = time.perf_counter()
        self.before = self._foreign_seconds()

    def _foreign_seconds(self) -> float:
        return busy_seconds() - own_seconds() - (process_seconds(self.known) if self.known else 0.0)

    def cores(self) -> float:
        return max(0.0, (self._foreign_seconds() - self.before) / (time.perf_counter() - self.start))


def wait_until_quiet(patience: float, limit: float = 0.1, window: float = 0.5) -> float:
    """Wait until others use fewer than `limit` cores over `window` seconds; returns the seconds waited."""
    start = time.perf_counter()
    while time.perf_counter() - start < patience:
        load = ForeignLoad()
        time.sleep(window)
        if load.cores() < limit:
            break
    return time.perf_counter() - start


def peak_memory_mib() -> float:
    """Peak resident memory of this process, mapped files included.

    From VmHWM: ru_maxrss also counts the process that started this one.
    """
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith("VmHWM:"):
            return int(line.split()[1]) / 1024
    raise RuntimeError("/proc/self/status has no VmHWM")


def read_bandwidth(threads: int, megabytes: int = 256, sweeps: int = 12) -> float:
    """Bytes a second: the best of `sweeps` in which each thread reads its own buffer once.

    Each thread runs one BLAS dot product of a buffer with itself: one stream of memory, wide loads, no stores.
    """
    os.environ["OPENBLAS_NUM_THREADS"] = "1"  # read when numpy is first imported
    import numpy as np

    buffers = [np.ones(megabytes * 2**18, np.float32) for _ in range(threads)]
    best = 0.0
    for _ in range(sweeps):
        barrier = threading.Barrier(threads + 1)

        def sweep(buffer: "np.ndarray", barrier: threading.Barrier = barrier) -> None:
            barrier.wait()
            np.dot(buffer, buffer)

        workers = [threading.Thread(target=sweep, args=(buffer,)) for buffer in buffers]
        for worker in workers:
            worker.start()
        start = time.perf_counter()
        barrier.wait()
        for worker in workers:
            worker.join()
        best = max(best, threads * buffers[0].nbytes / (time.perf_counter() - start))
    return best


def conditions() -> dict[str, object]:
    """What a reader needs to judge or repeat a measurement."""
    cpuinfo = Path("/proc/cpuinfo").read_text().splitlines()
    first = {key.strip(): value.strip() for key, _, value in (line.partition(":") for line in cpuinfo) if value}
    flags = first.get("flags", first.get("Features", "")).split()
    memory_kib = int(Path("/proc/meminfo").read_text().split()[1])
    return {
        "date": datetime.now(UTC).isoformat(timespec="seconds"),
        "cpu": first.get("model name", platform.processor()),
        "cpu_family_model": f"{first.get('cpu family', '?')}/{first.get('model', '?')}",
        "architecture": platform.machine(),
        "isa": [flag for flag in ISA_FLAGS if flag in flags],
        "cores_used": len(os.sched_getaffinity(0)),
        "cores_of_machine": os.cpu_count(),
        "memory_gib": round(memory_kib / 2**20, 1),
        "kernel": platform.release(),
        "python": platform.python_version(),
        "load_average": os.getloadavg(),
    }


if __name__ == "__main__":
    print(read_bandwidth(len(os.sched_getaffinity(0))))
