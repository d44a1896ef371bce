"""The numbers that integers with a scale can stand for, and the scales that suit a group of weights best. In torch.

A number is scale * (code - zero). Symmetric codes of b bits run from -2^(b-1) to 2^(b-1) - 1 with zero 0, asymmetric
ones from 0 to 2^b - 1. Knows no method and no model; rtn.py is the same search in numpy.
"""

from dataclasses import dataclass, replace

import numpy as np
import torch
from torch import Tensor

from hasten.model.formats import Format, Weight, sparsify

# What a group's largest magnitude is mapped to, as a part of the end of the range: above 1 clips it (see rtn.py).
REACH = (0.8, 0.875, 0.94, 1.0, 1.06, 1.12, 1.2, 1.3, 1.45)

_CPU_NUMBERS, _GPU_NUMBERS = 1 << 18, 1 << 26  # that are tried at once: in a core's own cache; few launches


@dataclass(frozen=True, slots=True)
class Grid:
    """bits: of a code. symmetric: no zero points. scale_dtype: in which scales are stored."""

    bits: int
    symmetric: bool = True
    scale_dtype: torch.dtype = torch.bfloat16

    @property
    def ends(self) -> tuple[int, int]:
        """The smallest and the largest code."""
        half = 1 << (self.bits - 1)
        return (-half, half - 1) if self.symmetric else (0, 2 * half - 1)

    def codes(self, values: Tensor, scales: Tensor, zeros: Tensor) -> Tensor:
        """The nearest codes; scales and zeros broadcast."""
        low, high = self.ends
        return (torch.round(values / scales) + zeros).clamp_(low, high)

    def nearest(self, values: Tensor, scales: Tensor, zeros: Tensor) -> Tensor:
        """The numbers nearest to `values` that can be stood for."""
        return (self.codes(values, scales, zeros) - zeros) * scales

    def fit(
        self, values: Tensor, metric: Tensor | None = None, reach: tuple[float, ...] = REACH
    ) -> tuple[Tensor, Tensor]:
        """Scales and zeros [M, 1] for groups [M, g] with the least error of the numbers they give.

        metric: the error of e [g] is e.e without one, sum(metric * e^2) with one [g], and e.metric.e with one [g, g],
        such as the inputs' second moments. Of each mapping of the range to the codes, the scale of least error under
        the codes that it gives is tried.
        """
        rows = max(1, (_CPU_NUMBERS if values.device.type == "cpu" else _GPU_NUMBERS) // values.shape[1] // len(reach))
        parts = [self._fit(part, metric, reach) for part in torch.split(values, rows)]
        return torch.cat([scales for scales, _ in parts]), torch.cat([zeros for _, zeros in parts])

    def _fit(self, values: Tensor, metric: Tensor | None, reach: tuple[float, ...]) -> tuple[Tensor, Tensor]:
        """All reaches [R] at once."""
        parts = torch.tensor(reach, dtype=values.dtype).to(values.device)[:, None, None]
        scales, zeros = self._mapped(values, parts)  # [R, M, 1]
        centred = self.codes(values, scales, zeros) - zeros  # [R, M, g]
        scales = self._storable(_best_scale(values, centred, metric, scales))
        left = values - self.nearest(values, scales, zeros)
        best = (_times(left, metric) * left).sum(2, keepdim=True).argmin(0, keepdim=True)
        return scales.gather(0, best)[0], zeros.gather(0, best)[0]

    def rounded(self, weight: Tensor, group_size: int = 0, reach: tuple[float, ...] = REACH) -> Tensor:
        """A matrix [N, K] rounded to nearest, each group's range fitted to its weights."""
        grouped = weight.reshape(-1, group_size or weight.shape[1])
        return self.nearest(grouped, *self.fit(grouped, reach=reach)).reshape(weight.shape)

    def _mapped(self, values: Tensor, part: Tensor) -> tuple[Tensor, Tensor]:
        low, high = self.ends
        smallest, largest = values.amin(1, keepdim=True), values.amax(1, keepdim=True)
        if self.symmetric:
            # The range has one code more on the negative side: the largest magnitude goes there, whatever its sign.
            peak = torch.where(-smallest > largest, smallest, largest)
            scales = self._storable(peak / (low * part))
            return scales, torch.zeros_like(scales)
        smallest, largest = smallest.clamp(max=0), largest.clamp(min=0)
        scales = self._storable((largest - smallest) / (high * part))
        return scales, torch.round(high / 2 - (smallest + largest) / 2 / scales).clamp(low, high)

    def _storable(self, scales: Tensor) -> Tensor:
        rounded = scales.to(self.scale_dtype).to(scales.dtype)
        return rounded.masked_fill((rounded == 0) | ~rounded.isfinite(), 1)


def pack(fmt: Format, codes: Tensor, scales: Tensor, zeros: Tensor) -> Weight:
    """A Weight of codes [N, K], scales and zeros [N, G]."""
    if fmt.sparse24:
        return sparsify(pack(replace(fmt, sparse24=False), codes, scales, zeros))
    shape = (codes.shape[0], codes.shape[1])
    stored_scales = scales.float().cpu().numpy()
    if fmt.kind == "int8":
        return Weight(fmt, shape, codes.to(torch.int8).cpu().numpy(), stored_scales)
    numbers = (codes + 8 if fmt.symmetric else codes).to(torch.uint8)
    nibbles = (numbers[:, 0::2] | (numbers[:, 1::2] << 4)).cpu().numpy()
    stored_zeros = None if fmt.symmetric else zeros.to(torch.uint8).cpu().numpy()
    return Weight(fmt, shape, np.ascontiguousarray(nibbles), stored_scales, stored_zeros)


def spread(per_group: Tensor, group: int) -> Tensor:
    """[N, G] repeated over the columns of each group."""
    return per_group.repeat_interleave(group, dim=1)


def _best_scale(values: Tensor, centred: Tensor, metric: Tensor | None, otherwise: Tensor) -> Tensor:
    weighted = _times(centred, metric)
    size = (weighted * centred).sum(2, keepdim=True)
    fitted = (weighted * values).sum(2, keepdim=True) / size
    return torch.where((size > 0) & fitted.isfinite() & (fitted != 0), fitted, otherwise)


def _times(values: Tensor, metric: Tensor | None) -> Tensor:
    if metric is None:
        return values
    return values * metric if metric.dim() == 1 else values @ metric
