"""Weights to torch tensors and back."""

import numpy as np
import torch
from torch import Tensor

from hasten.model import formats
from hasten.model.formats import Format, Kind, Weight

TORCH_DTYPES = {"fp32": torch.float32, "fp16": torch.float16, "bf16": torch.bfloat16}


def to_tensor(weight: Weight, device: torch.device | str = "cpu", dtype: torch.dtype | None = None) -> Tensor:
    """The numbers that a Weight stands for [N, K], a copy; in its own dtype where it is dense and none is asked for."""
    weight = formats.densify(weight)
    kind = weight.format.kind
    if kind == "bf16":
        values = torch.from_numpy(np.array(weight.data).view(np.int16)).view(torch.bfloat16)
    elif kind in TORCH_DTYPES:
        values = torch.from_numpy(np.array(weight.data))
    else:
        values = torch.from_numpy(formats.dequantize(weight))
    return values.to(device, dtype)


def to_weight(values: Tensor, kind: Kind) -> Weight:
    """A dense Weight of a matrix, or of a vector [N] as one of one column."""
    matrix = values.detach().reshape(len(values), -1).to(TORCH_DTYPES[kind]).contiguous().cpu()
    data = matrix.view(torch.int16).numpy().view(np.uint16) if kind == "bf16" else matrix.numpy()
    return Weight(Format(kind), (matrix.shape[0], matrix.shape[1]), data)
