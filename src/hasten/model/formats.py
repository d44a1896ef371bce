"""How one weight matrix is stored: a Format says how, a Weight holds the numbers.

Knows nothing of files (checkpoint.py) nor of the interleaved layouts that kernels read (csrc/matrix.h). Every function
here is the slow numpy reference of what a backend does fast.
"""

from dataclasses import dataclass
from typing import Literal

import numpy as np
from numpy.typing import NDArray

Kind = Literal["fp32", "fp16", "bf16", "int8", "int4"]


@dataclass(frozen=True, slots=True)
class Format:
    """How one matrix is stored and multiplied.

    group_size: input columns that share a scale; 0 means one scale per output row ("channel"). Dense kinds have none.
    symmetric: int4 only; False stores a zero point beside each scale.
    """

    kind: Kind
    group_size: int = 0
    symmetric: bool = True


@dataclass(frozen=True, slots=True)
class Weight:
    """One weight matrix `[N, K]`: N outputs, K inputs; `y = x @ W.T`.

    data:   fp32 float32 [N, K]; fp16 float16 [N, K]; bf16 uint16 bits [N, K]; int8 int8 [N, K];
            int4 uint8 [N, K / 2], column 2j in the low nibble of byte j, values 0..15.
    scales: float32 [N, G], G = ceil(K / group_size) (1 where group_size is 0); None for dense kinds.
    zeros:  uint8 [N, G], values 0..15, for asymmetric int4; None otherwise (symmetric int4 has zero 8, int8 zero 0).
    perm:   int32 [K] or None: column j of `data` multiplies input x[perm[j]] (GPTQ checkpoints with act-order).
    A number is scale * (value - zero).
    """

    format: Format
    shape: tuple[int, int]
    data: NDArray[np.generic]
    scales: NDArray[np.float32] | None = None
    zeros: NDArray[np.uint8] | None = None
    perm: NDArray[np.int32] | None = None
