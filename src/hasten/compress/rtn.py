"""Round to nearest, with each scale chosen for the least squared error. One weight at a time; no data, no model.

For a group of weights w and codes q, the scale with the least |w - s q|^2 is s = (w.q) / (q.q), and what remains is
|w|^2 - (w.q)^2 / (q.q). So a few ways of mapping the group's range onto the codes are tried, and the one with the
largest (w.q)^2 / (q.q) is kept together with its own best scale, as llama.cpp's quantisers do. That scale is rounded to
what a checkpoint stores, and the codes are taken again with it. formats.quantize is the slow reference.
"""

from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace

import numpy as np
from numpy.typing import NDArray

from hasten.errors import ModelError
from hasten.model import formats
from hasten.model.formats import Format, ScaleDtype, Weight

Float32 = NDArray[np.float32]

# What the largest magnitude of a group is mapped to, as a part of the end of the range; above 1 clips it. A symmetric
# range has one code more on the negative side, so the largest magnitude goes there, with a negative scale if need be;
# 7 / 8 is the usual mapping that leaves that code unused.
_REACH = {"int4": (0.875, 0.94, 1.0, 1.06, 1.12, 1.2, 1.3), "int8": (127 / 128, 1.0, 1.06, 1.15)}
_REACH_ASYMMETRIC = (1.0, 1.06, 1.12, 1.2, 1.3)
_CHUNK = 1 << 16  # elements at a time: a chunk and its temporaries stay in a core's own cache


def quantize(
    name: str,
    weight: Weight,
    fmt: Format,
    pool: ThreadPoolExecutor | None = None,
    scale_dtype: ScaleDtype = "bf16",
    bits: int | None = None,
) -> Weight:
    """`weight` [N, K] stored as `fmt`; chunks of rows run on `pool`'s threads. NaN is a ModelError.

    group_size must divide K (plan.resolve has seen to it). Scales are what scale_dtype can hold. bits: of a code, where
    they are fewer than the format's.
    """
    weight = formats.densify(weight)
    if fmt.sparse24:
        return formats.sparsify(quantize(name, weight, replace(fmt, sparse24=False), pool, scale_dtype, bits))
    if fmt.kind not in _REACH:
        return formats.quantize(formats.dequantize(weight), fmt, scale_dtype)
    num_rows, num_inputs = weight.shape
    group = fmt.group_size or num_inputs
    num_codes = 1 << (bits or (8 if fmt.kind == "int8" else 4))
    out = _empty(weight.shape, fmt)

    def work(rows: slice) -> None:
        values = formats.dequantize(_take(weight, rows)).reshape(-1, group)
        if not np.isfinite(values.min()) or not np.isfinite(values.max()):
            raise ModelError(f"{name} holds NaN or infinity: the checkpoint is damaged")
        scales, zeros = _symmetric(values, num_codes) if fmt.symmetric else _asymmetric(values, num_codes)
        scales = formats.round_to(scales, scale_dtype)
        if not np.isfinite(scales).all():
            raise ModelError(
                f"{name} has a scale that overflows {scale_dtype}: the weights are too large for {fmt.kind}"
            )
        scales[scales == 0] = 1  # a group of zeros, or of numbers too small for the scale's type
        _store(out, rows, values, scales, zeros, num_codes)

    list((pool.map if pool else map)(work, _chunks(num_rows, num_inputs)))
    return out


def _symmetric(values: Float32, num_codes: int) -> tuple[Float32, None]:
    """Scales [M] for groups [M, g]; a scale may be negative."""
    end = num_codes / 2
    low, high = values.min(axis=1), values.max(axis=1)
    peak = np.where(-low > high, low, high)  # the value of largest magnitude, with its sign
    inverse = np.divide(-end, peak, out=np.zeros_like(peak), where=peak != 0)
    best = _Best(values)
    codes = np.empty_like(values)
    for reach in _REACH["int8" if num_codes == 256 else "int4"]:
        np.multiply(values, (inverse * np.float32(reach))[:, None], out=codes)
        np.rint(codes, out=codes)
        np.clip(codes, -end, end - 1, out=codes)
        best.offer(codes)
    return best.scales, None


def _asymmetric(values: Float32, num_codes: int) -> tuple[Float32, Float32]:
    """Scales [M] and zero points [M] for groups [M, g] of codes from 0 on; both stay below num_codes."""
    top = np.float32(num_codes - 1)
    low, high = np.minimum(values.min(axis=1), 0), np.maximum(values.max(axis=1), 0)
    inverse = np.divide(top, high - low, out=np.zeros_like(high), where=high > low)
    best = _Best(values)
    codes = np.empty_like(values)
    for reach in _REACH_ASYMMETRIC:
        step = inverse * np.float32(reach)
        # The middle of the range stays in the middle of the codes, so that both ends are clipped alike.
        zeros = np.clip(np.rint(top / 2 - (low + high) / 2 * step), 0, top)
        np.multiply(values, step[:, None], out=codes)
        np.rint(codes, out=codes)
        np.clip(codes, -zeros[:, None], top - zeros[:, None], out=codes)
        best.offer(codes, zeros)
    return best.scales, best.zeros


class _Best:
    """The scale with the largest (w.q)^2 / (q.q) so far, and its zero point, of each group."""

    def __init__(self, values: Float32) -> None:
        self.values = values
        self.gain = np.zeros(len(values), np.float32)
        self.scales = np.zeros(len(values), np.float32)
        self.zeros = np.zeros(len(values), np.float32)

    def offer(self, codes: Float32, zeros: Float32 | None = None) -> None:
        """codes [M, g], less their zero points."""
        dot = np.einsum("mg,mg->m", self.values, codes)
        scales = dot / np.maximum(np.einsum("mg,mg->m", codes, codes), 1)
        gain = dot * scales
        better = gain > self.gain
        np.copyto(self.gain, gain, where=better)
        np.copyto(self.scales, scales, where=better)
        if zeros is not None:
            np.copyto(self.zeros, zeros, where=better)


def _take(weight: Weight, rows: slice) -> Weight:
    scales = None if weight.scales is None else weight.scales[rows]
    zeros = None if weight.zeros is None else weight.zeros[rows]
    shape = (rows.stop - rows.start, weight.shape[1])
    return replace(weight, shape=shape, data=weight.data[rows], scales=scales, zeros=zeros)


def _empty(shape: tuple[int, int], fmt: Format) -> Weight:
    num_rows, num_inputs = shape
    groups = formats.num_groups(fmt, num_inputs)
    scales = np.empty((num_rows, groups), np.float32)
    if fmt.kind == "int8":
        return Weight(fmt, shape, np.empty(shape, np.int8), scales)
    zeros = None if fmt.symmetric else np.empty((num_rows, groups), np.uint8)
    return Weight(fmt, shape, np.empty((num_rows, num_inputs // 2), np.uint8), scales, zeros)


def _store(out: Weight, rows: slice, values: Float32, scales: Float32, zeros: Float32 | None, num_codes: int) -> None:
    """Codes of `values` [M, g] with the final scales [M], into `out`'s rows."""
    num_rows = rows.stop - rows.start
    assert out.scales is not None
    out.scales[rows] = scales.reshape(num_rows, -1)
    codes = values * (1 / scales)[:, None]  # a new array: `values` may be a view of the checkpoint
    np.rint(codes, out=codes)
    if out.format.kind == "int8":
        np.clip(codes, -128, 127, out=codes)
        out.data[rows] = codes.reshape(num_rows, -1).astype(np.int8)
        return
    if zeros is None:
        np.clip(codes, -num_codes / 2, num_codes / 2 - 1, out=codes)
        codes += np.float32(8)
    else:
        codes += zeros[:, None]
        np.clip(codes, 0, num_codes - 1, out=codes)
    out.data[rows] = formats.pack_nibbles(codes.astype(np.uint8).reshape(num_rows, -1))
    if zeros is not None and out.zeros is not None:
        out.zeros[rows] = zeros.astype(np.uint8).reshape(num_rows, -1)


def _chunks(num_rows: int, num_inputs: int) -> Iterator[slice]:
    step = max(1, _CHUNK // num_inputs)
    for start in range(0, num_rows, step):
        yield slice(start, min(start + step, num_rows))
