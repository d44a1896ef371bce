"""Mechanism: run one batch on one kind of device. The one place that chooses a backend by its name.

Importing this imports no backend, and looking for a GPU imports torch only where one's driver is present: without it
a start costs nothing more.
"""

import os
import shutil
import sysconfig
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING

from hasten.errors import RequestError, ResourceError

if TYPE_CHECKING:
    from hasten.backends.base import Backend

DEVICES = ("auto", "cpu", "cuda", "reference")

# What NVIDIA's driver makes on Linux, and the device through which it is reached under WSL.
_DRIVER = (Path("/dev/nvidiactl"), Path("/dev/dxg"))
_INSTALL = "pip install 'hasten[cuda]'"


def open_backend(
    device: str = "auto", *, threads: int = 0, format: str | None = None, deterministic: bool = False
) -> "Backend":
    """An empty backend, ready to load a model.

    device: "cpu", "cuda", "reference" (numpy, slow), or "auto", which is cuda where torch sees a GPU, else cpu.
    threads: of the CPU, 0 is all. format: quantise weights on load ("fp8" on cuda); None loads them as they are stored.
    deterministic: a row's bits do not depend on its batch, as is always so on a CPU.
    Raises RequestError for a device or format that there is not, ResourceError where this machine has none such.
    """
    device = choose_device(device)
    if device == "cuda":
        from hasten.backends.cuda import CudaBackend

        backend: Backend = CudaBackend(format=format, deterministic=deterministic)
        return backend
    if format is not None:
        raise RequestError(f"format {format} on load needs a GPU (device cuda): use hasten compress, then that folder")
    if device == "reference":
        from hasten.backends.reference import ReferenceBackend

        return ReferenceBackend()
    from hasten.backends.cpu import CpuBackend

    return CpuBackend(threads=threads)


def choose_device(device: str) -> str:
    """The device that `device` stands for: "auto" becomes "cuda" or "cpu". Raises as open_backend does."""
    if device not in DEVICES:
        raise RequestError(f"device is {device!r}, expected one of {', '.join(DEVICES)}")
    if device == "auto":
        return "cpu" if missing_for_cuda() else "cuda"
    reason = missing_for_cuda() if device == "cuda" else None
    if reason is not None:
        raise ResourceError(f"device cuda cannot be used: {reason}")
    return device


def missing_for_cuda() -> str | None:
    """Why a GPU cannot be used here, in words that a person can act on; None where it can."""
    if not any(path.exists() for path in _DRIVER):
        return "no NVIDIA driver was found on this machine: use --device cpu"
    if find_spec("torch") is None or find_spec("triton") is None:
        return f"torch and Triton are not installed: {_INSTALL}"
    import torch

    if not torch.cuda.is_available():
        return f"torch {torch.__version__} sees no GPU: update the driver, or {_INSTALL} for a torch with CUDA"
    return _missing_to_compile()


def _missing_to_compile() -> str | None:
    """Triton compiles what launches a kernel as a module of Python's, when the kernel first runs."""
    compilers = [os.environ["CC"]] if "CC" in os.environ else ["gcc", "clang"]
    if not any(shutil.which(name) for name in compilers):
        return f"Triton needs a C compiler and {' or '.join(compilers)} was not found: install gcc, or name one in CC"
    include = Path(sysconfig.get_paths()["include"])
    if not (include / "Python.h").exists():
        return f"Triton needs Python's header files and {include} has none: install python3-dev or what has them"
    return None
