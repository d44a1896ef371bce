"""The backend for NVIDIA GPUs, on torch and Triton. Imported only where it is used: it imports torch as it loads."""

from hasten.backends.cuda.backend import CudaBackend

__all__ = ["CudaBackend"]
