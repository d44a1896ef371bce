"""What one device can do, and the buffers that all its kernels share."""

import os
import threading
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from contextvars import ContextVar, copy_context
from dataclasses import dataclass, field, replace
from typing import Any

import torch
import triton

from hasten.backends.cuda.measured import Measured, read_measured
from hasten.backends.cuda.tuning import Tile
from hasten.errors import ResourceError

_MIN_CAPABILITY = (8, 0)
_FP8_CAPABILITY = (8, 9)
_WORKSPACE_BYTES = 64 << 20
_NUM_COUNTERS = 1 << 18

# Held while a graph is captured, by whichever model of the process, and by all who need memory that torch has cached:
# its allocator, one for all, gives nothing back meanwhile.
CAPTURING = threading.Lock()

_REHEARSING = ContextVar("rehearsing", default=False)


@dataclass
class Device:
    """One device. pdl: kernels are launched while the one before still runs (compute capability 9.0). asm: packed
    weights are unpacked by inline assembly. Both are off in Triton's interpreter, where `handle` is the CPU.

    shared: bytes of shared memory that a program may have. fp8: it has numbers of 8 bits; fp8_products: and multiplies
    them.
    workspace: partial sums of the kernel that runs. counters: int32 zeros that kernels leave as zeros. measured: what a
    tuner has found out about this GPU.
    """

    handle: torch.device
    num_processors: int
    pdl: bool
    asm: bool
    workspace: torch.Tensor
    counters: torch.Tensor
    shared: int = 227 << 10
    fp8: bool = True
    fp8_products: bool = False
    measured: Measured = field(default_factory=Measured)

    @property
    def tiles(self) -> dict[str, Tile]:
        return self.measured.tiles

    @property
    def is_cuda(self) -> bool:
        return self.handle.type == "cuda"

    def launch(self, kernel: Any, grid: tuple[int, ...], *args: Any, **constants: Any) -> None:
        """Launch a kernel of the package `kernels`, told of PDL; in a rehearsal only compile it."""
        options = {"launch_pdl": True} if self.pdl else {}
        if not _REHEARSING.get():
            kernel[grid](*args, PDL=self.pdl, **constants, **options)
        elif self.is_cuda:
            kernel.warmup(*args, grid=grid, PDL=self.pdl, **constants, **options)

    def rehearse(self, run: Callable[[], object]) -> None:
        """Have the kernels that `run` launches compiled, several at a time; nothing else is done. What does not compile
        says so where it is launched. In Triton's interpreter nothing is compiled."""
        # In a context of its own: an interrupt would leave Triton's mode on.
        copy_context().run(self._rehearse, run)

    def _rehearse(self, run: Callable[[], object]) -> None:
        _REHEARSING.set(True)
        if not self.is_cuda:
            run()
            return
        with _Compilers(self.handle) as pool, triton.AsyncCompileMode(pool, ignore_errors=True):
            run()


class _Compilers(ThreadPoolExecutor):
    """Compile kernels, and the host code that launches each, which Triton leaves to the first launch."""

    def __init__(self, handle: torch.device) -> None:
        super().__init__(min(8, os.cpu_count() or 1), initializer=torch.cuda.set_device, initargs=(handle,))

    def submit(self, fn: Callable[[], Any], /) -> Future[Any]:  # type: ignore[override]
        def launchable() -> Any:
            kernel = fn()
            _ = kernel.run
            return kernel

        return super().submit(launchable)

    def __exit__(self, kind: type[BaseException] | None, *_: object) -> None:
        self.shutdown(cancel_futures=kind is not None)  # an interrupt waits for what is under way only


def open_device(name: str) -> Device:
    """ "cuda" (or "cuda:1"), or "cpu" for Triton's interpreter. Raises ResourceError for a GPU that is too old, that
    others have to themselves, or whose memory they have taken."""
    handle = torch.device(name)
    if handle.type != "cuda":
        return _device(handle, 4, (0, 0))
    try:
        torch.cuda.init()  # type: ignore[no-untyped-call]
        handle = torch.device("cuda", torch.cuda.current_device() if handle.index is None else handle.index)
        capability = torch.cuda.get_device_capability(handle)
        if capability >= _MIN_CAPABILITY:
            opened = _device(handle, torch.cuda.get_device_properties(handle).multi_processor_count, capability)
            limits = triton.runtime.driver.active.utils.get_device_properties(handle.index)
            return replace(opened, shared=int(limits["max_shared_mem"]))
    except RuntimeError as error:  # that its memory is full is one of them
        reason = str(error).strip().split("\n")[0]
        raise ResourceError(f"the GPU cannot be used: {reason:.160}: see nvidia-smi, or use --device cpu") from None
    raise ResourceError(
        f"{torch.cuda.get_device_name(handle)} has compute capability {capability[0]}.{capability[1]}, "
        f"expected {_MIN_CAPABILITY[0]}.{_MIN_CAPABILITY[1]} or newer: use --device cpu"
    )


def check_fp8(device: Device, what: str) -> None:
    """Raises ResourceError where the device has no 8-bit floats."""
    if not device.fp8:
        raise ResourceError(
            f"{what} needs a GPU of compute capability {_FP8_CAPABILITY[0]}.{_FP8_CAPABILITY[1]} or newer: use int8,"
            " int4 or the unquantised model"
        )


def _device(handle: torch.device, num_processors: int, capability: tuple[int, int]) -> Device:
    pdl = capability >= (9, 0)
    return Device(
        handle=handle,
        num_processors=num_processors,
        pdl=pdl,
        asm=handle.type == "cuda",
        workspace=torch.empty(_WORKSPACE_BYTES // 4, dtype=torch.float32, device=handle),
        counters=torch.zeros(_NUM_COUNTERS, dtype=torch.int32, device=handle),
        fp8=handle.type != "cuda" or capability >= _FP8_CAPABILITY,
        fp8_products=capability >= _FP8_CAPABILITY,
        measured=read_measured(torch.cuda.get_device_name(handle)) if handle.type == "cuda" else Measured(),
    )
