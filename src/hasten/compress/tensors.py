"""Weights to torch tensors and back, as backends/torch has them."""

from hasten.backends.torch.tensors import TORCH_DTYPES, to_tensor, to_weight

__all__ = ["TORCH_DTYPES", "to_tensor", "to_weight"]
