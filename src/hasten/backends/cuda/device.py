"""What one device can do, and the buffers that all its kernels share."""

import threading
from dataclasses import dataclass, field

import torch

from hasten.backends.cuda.measured import Measured, read_measured
from hasten.backends.cuda.tuning import Tile
from hasten.errors import ResourceError

_MIN_CAPABILITY = (8, 0)
_WORKSPACE_BYTES = 64 << 20
_NUM_COUNTERS = 1 << 16


@dataclass
class Device:
    """One device. pdl: kernels are launched while the one before still runs (compute capability 9.0). asm: packed
    weights are unpacked by inline assembly. Both are off in Triton's interpreter, where `handle` is the CPU.

    workspace: partial sums of the kernel that runs. counters: int32 zeros that kernels leave as zeros. measured: what a
    tuner has found out about this GPU.
    """

    handle: torch.device
    num_processors: int
    pdl: bool
    asm: bool
    workspace: torch.Tensor
    counters: torch.Tensor
    fp8_products: bool = False
    launch: dict[str, bool] = field(default_factory=dict)  # options of every launch
    measured: Measured = field(default_factory=Measured)
    capturing: threading.Lock = field(default_factory=threading.Lock)  # one graph at a time, of several models too

    @property
    def tiles(self) -> dict[str, Tile]:
        return self.measured.tiles

    @property
    def is_cuda(self) -> bool:
        return self.handle.type == "cuda"


def open_device(name: str) -> Device:
    """ "cuda" (or "cuda:1"), or "cpu" for Triton's interpreter. Raises ResourceError for a GPU that is too old."""
    handle = torch.device(name)
    if handle.type != "cuda":
        return _device(handle, 4, (0, 0))
    torch.cuda.init()  # type: ignore[no-untyped-call]
    handle = torch.device("cuda", torch.cuda.current_device() if handle.index is None else handle.index)
    capability = torch.cuda.get_device_capability(handle)
    if capability < _MIN_CAPABILITY:
        raise ResourceError(
            f"{torch.cuda.get_device_name(handle)} has compute capability {capability[0]}.{capability[1]}, "
            f"expected {_MIN_CAPABILITY[0]}.{_MIN_CAPABILITY[1]} or newer: use --device cpu"
        )
    return _device(handle, torch.cuda.get_device_properties(handle).multi_processor_count, capability)


def _device(handle: torch.device, num_processors: int, capability: tuple[int, int]) -> Device:
    pdl = capability >= (9, 0)
    return Device(
        handle=handle,
        num_processors=num_processors,
        pdl=pdl,
        asm=handle.type == "cuda",
        workspace=torch.empty(_WORKSPACE_BYTES // 4, dtype=torch.float32, device=handle),
        counters=torch.zeros(_NUM_COUNTERS, dtype=torch.int32, device=handle),
        fp8_products=capability >= (8, 9),
        launch={"launch_pdl": True} if pdl else {},
        measured=read_measured(torch.cuda.get_device_name(handle)) if handle.type == "cuda" else Measured(),
    )
