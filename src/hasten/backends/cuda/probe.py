"""What a GPU can do, measured in about a second: a large copy and large products. Knows nothing of models."""

import time
from collections.abc import Callable
from typing import Any

import torch

from hasten.backends.cuda.device import CAPTURING, open_device
from hasten.errors import ResourceError
from hasten.hardware import Gpu

_COPY_BYTES = 4 << 30
_LEAST_BYTES = 256 << 20  # several times what caches hold
_ROWS = 8192  # of the matrices that are multiplied
_LEAST_RUNS = 5


def probe_gpu(seconds: float = 0.3) -> Gpu:
    """Measure the current GPU, `seconds` for each of five measurements, in memory that is free. Raises ResourceError
    where there is too little of it, or for a GPU that is too old."""
    handle = open_device("cuda").handle
    with CAPTURING:
        torch.cuda.empty_cache()
        return _measured(handle, seconds)


def _measured(handle: torch.device, seconds: float) -> Gpu:
    free, total = torch.cuda.mem_get_info(handle)
    facts = torch.cuda.get_device_properties(handle)
    kinds = ("bf16", "fp32", "int8", *(("fp8",) if (facts.major, facts.minor) >= (8, 9) else ()))
    gpu = Gpu(
        name=facts.name,
        capability=f"{facts.major}.{facts.minor}",
        processors=facts.multi_processor_count,
        cuda=torch.version.cuda,
        memory_total=total,
        memory_available=free,
        bandwidth=_copy_bandwidth(handle, free, seconds),
        peak_ops={kind: _peak(handle, kind, free, seconds) for kind in kinds},
    )
    torch.cuda.empty_cache()
    return gpu


def _copy_bandwidth(handle: torch.device, free: int, seconds: float) -> float:
    size = min(_COPY_BYTES, free // 4)
    if size < _LEAST_BYTES:
        raise ResourceError(
            f"{free / 1e9:.2f} GB of GPU memory are free, expected {4 * _LEAST_BYTES / 1e9:.1f} GB to measure its "
            "bandwidth: end what else runs there, or use --device cpu"
        )
    source = torch.empty(size, dtype=torch.uint8, device=handle).random_()
    target = torch.empty_like(source)
    return _best_rate(lambda: target.copy_(source), 2 * size, seconds)


def _peak(handle: torch.device, kind: str, free: int, seconds: float) -> float:
    dtype = {"bf16": torch.bfloat16, "fp32": torch.float32, "int8": torch.int8, "fp8": torch.float8_e4m3fn}[kind]
    rows = _ROWS
    while 3 * rows * rows * 4 > free // 2:
        rows //= 2
    left, right = (torch.randn(rows, rows, device=handle).mul_(16).to(dtype) for _ in range(2))
    return _best_rate(_product(left, right.t()), 2 * rows**3, seconds)


def _product(left: torch.Tensor, right: torch.Tensor) -> Callable[[], object]:
    if left.dtype == torch.int8:
        return lambda: torch._int_mm(left, right)
    if left.dtype == torch.float8_e4m3fn:
        scales = torch.ones(len(left), 1, device=left.device)
        return lambda: torch._scaled_mm(left, right, scales, scales.t(), out_dtype=torch.bfloat16)
    return lambda: torch.mm(left, right)


def _best_rate(work: Callable[[], object], amount: int, seconds: float) -> float:
    """`amount` over the shortest time: a limit is what is reached when nothing else disturbs."""
    new_event: Any = torch.cuda.Event
    work()
    end = time.perf_counter() + seconds
    times: list[float] = []
    while len(times) < _LEAST_RUNS or time.perf_counter() < end:
        start, stop = (new_event(enable_timing=True) for _ in range(2))
        start.record()
        work()
        stop.record()
        stop.synchronize()
        times.append(start.elapsed_time(stop) / 1e3)
    return amount / min(times)
