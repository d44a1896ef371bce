"""How one weight matrix is stored: a Format says how, a Weight holds the numbers.

Knows nothing of files (checkpoint.py) nor of the interleaved layouts that kernels read (csrc/matrix.h). Every function
here is the slow numpy reference of what a backend does fast.
"""

from collections.abc import Iterator
from dataclasses import dataclass, field, replace
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray

from hasten.errors import ModelError, RecipeError
from hasten.model import sparse
from hasten.model.fp8 import LARGEST, from_fp8, to_fp8

Kind = Literal["fp32", "fp16", "bf16", "fp8", "int8", "int4"]
Activations = Literal["int8", "fp8", "fp8-static"]
ScaleDtype = Literal["fp32", "fp16", "bf16"]
Floats = NDArray[np.float32]

DENSE_BYTES = {"fp32": 4, "fp16": 2, "bf16": 2}
GROUP_SIZES = (0, 32, 64, 128)  # columns that share a scale in what backends multiply; 0 is one scale a row
# Models of up to this many hidden units are narrow: 8 bits disturb them more than wide ones (docs/log.md).
NARROW, VERY_NARROW = 256, 128
_CHUNK = 1 << 22  # numbers handled at once, so that quantising a large matrix needs little memory beside it


@dataclass(frozen=True, slots=True)
class Format:
    """How one matrix is stored and multiplied.

    group_size: input columns that share a scale; 0 means one scale per output row ("channel"). Dense kinds have none.
    symmetric: int4 only; False stores a zero point beside each scale.
    sparse24: of each four successive columns at most two are not zero; only two are kept (sparse.py).
    activations: how a folder says that the product's inputs are to be quantised: to integers or floats of 8 bits as
    they come, or to such floats with a scale that is known beforehand. Others go by it; our backends do as suits them.
    It is no part of how the matrix is stored, and does not count when two Formats are compared.
    """

    kind: Kind
    group_size: int = 0
    symmetric: bool = True
    sparse24: bool = False
    activations: Activations | None = field(default=None, compare=False)


@dataclass(frozen=True, slots=True)
class Weight:
    """One weight matrix `[N, K]`: N outputs, K inputs; `y = x @ W.T`.

    data:   fp32 float32 [N, K]; fp16 float16 [N, K]; bf16 uint16 bits [N, K]; int8 int8 [N, K];
            fp8 uint8 [N, K], bits of e4m3; int4 uint8 [N, K / 2], column 2j in the low nibble of byte j, values 0..15.
            sparse24: the same of the K / 2 columns that each row keeps, in their order.
    scales: float32 [N, G], G = ceil(K / group_size) (1 where group_size is 0); None for dense kinds.
    zeros:  uint8 [N, G], values 0..15, for asymmetric int4; None otherwise (symmetric int4 has zero 8, int8 zero 0).
    perm:   int32 [K] or None: column j of `data` multiplies input x[perm[j]] (GPTQ checkpoints with act-order).
    mask:   sparse24: uint8 [N, ceil(K / 8)], the columns that are kept, low bit first; None otherwise.
    input_scale: of activations "fp8-static": float32 [1], an input is this times an e4m3 number.
    A number is scale * (value - zero).
    """

    format: Format
    shape: tuple[int, int]
    data: NDArray[np.generic]
    scales: NDArray[np.float32] | None = None
    zeros: NDArray[np.uint8] | None = None
    perm: NDArray[np.int32] | None = None
    mask: NDArray[np.uint8] | None = None
    input_scale: NDArray[np.float32] | None = None


def to_bf16(values: Floats) -> NDArray[np.uint16]:
    """float32 -> the bits of bfloat16, rounded to nearest even; NaN stays NaN."""
    bits = np.ascontiguousarray(values, np.float32).view(np.uint32)
    rounded = (bits + 0x7FFF + ((bits >> 16) & 1)) >> 16
    return np.where((bits & 0x7FFFFFFF) > 0x7F800000, (bits >> 16) | 0x40, rounded).astype(np.uint16)


def from_bf16(bits: NDArray[np.uint16]) -> Floats:
    """The bits of bfloat16 -> float32, exactly."""
    return (bits.astype(np.uint32) << 16).view(np.float32)


def round_to(values: Floats, dtype: ScaleDtype) -> Floats:
    """float32 values rounded to what `dtype` can hold, as float32."""
    if dtype == "bf16":
        return from_bf16(to_bf16(values))
    if dtype == "fp16":
        with np.errstate(over="ignore"):
            return values.astype(np.float16).astype(np.float32)
    return values


def dense_weight(values: NDArray[Any], kind: Kind = "fp32") -> Weight:
    """A dense Weight of float values [N, K], or of a vector [N], which becomes [N, 1]."""
    matrix = values.reshape(len(values), -1)
    data: NDArray[Any]
    if kind == "bf16":
        data = to_bf16(matrix)
    else:
        data = np.ascontiguousarray(matrix, np.float16 if kind == "fp16" else np.float32)
    return Weight(Format(kind), (matrix.shape[0], matrix.shape[1]), data)


def pack_nibbles(values: NDArray[np.uint8]) -> NDArray[np.uint8]:
    """uint8 [N, K] of values 0..15 -> uint8 [N, K / 2], column 2j in the low nibble of byte j."""
    packed: NDArray[np.uint8] = values[:, 0::2] | (values[:, 1::2] << np.uint8(4))
    return packed


def unpack_nibbles(packed: NDArray[np.uint8]) -> NDArray[np.uint8]:
    """The inverse of pack_nibbles."""
    values = np.empty((packed.shape[0], 2 * packed.shape[1]), np.uint8)
    values[:, 0::2] = packed & 15
    values[:, 1::2] = packed >> 4
    return values


def check_format(format: Format, shape: tuple[int, int]) -> None:
    """Raise RecipeError where a matrix of this shape cannot be stored so."""
    columns = shape[1]
    if format.sparse24 and columns % 4:
        raise RecipeError(f"2:4 does not fit a matrix of {columns} columns: a multiple of 4 is needed")
    if format.kind in DENSE_BYTES:
        return
    if format.group_size not in GROUP_SIZES:
        raise RecipeError(
            f"group size {format.group_size} is not supported; supported: 32, 64, 128, or 0 for one scale a row"
        )
    if format.group_size and columns % format.group_size:
        raise RecipeError(
            f"{format.kind} with groups of {format.group_size} does not fit a matrix of {columns} columns: "
            f"{format.group_size} does not divide {columns}; take another group size, or one scale a row"
        )
    if format.kind == "int4" and columns % 2:
        raise RecipeError(f"int4 does not fit a matrix of {columns} columns: an even number is needed; take int8")
    if format.kind != "int4" and not format.symmetric:
        raise RecipeError(f"{format.kind} weights are always symmetric here; take asymmetric int4")
    if format.sparse24 and not format.symmetric:
        raise RecipeError("2:4 weights are always symmetric here: a zero point would make zeros of no use")


def num_groups(format: Format, columns: int) -> int:
    """How many scales a row of `columns` columns has."""
    return -(-columns // format.group_size) if format.group_size else 1


def bytes_of(format: Format, shape: tuple[int, int]) -> int:
    """Bytes that a product reads of one matrix: numbers, scales (2 bytes each) and zero points (1 byte each)."""
    rows, columns = shape
    if format.sparse24:
        whole = bytes_of(replace(format, sparse24=False), (rows, columns // 2))
        more = num_groups(format, columns) - num_groups(format, columns // 2)  # scales are not halved
        return whole + rows * (-(-columns // 8) + (0 if format.kind in DENSE_BYTES else 2 * more))
    if format.kind in DENSE_BYTES:
        return rows * columns * DENSE_BYTES[format.kind]
    data = rows * -(-columns // 2) if format.kind == "int4" else rows * columns
    return data + rows * num_groups(format, columns) * (2 if format.symmetric else 3)


def quantize(values: Floats, format: Format, scale_dtype: ScaleDtype = "bf16", search: bool = False) -> Weight:
    """Round float32 [N, K] to the nearest values of `format`.

    Scales come from each group's range and are rounded to scale_dtype, in which a checkpoint stores them, before they
    are used: nothing is lost on saving. search: try narrower ranges for each group too, and keep the one of least
    squared error. Raises RecipeError where the format does not fit the shape, ModelError for values that are not finite
    or whose scale overflows scale_dtype.
    """
    rows, columns = values.shape
    if format.sparse24:
        return sparsify(quantize(values, replace(format, sparse24=False), scale_dtype, search))
    if format.kind in DENSE_BYTES:
        return replace(dense_weight(values, format.kind), format=format)
    check_format(format, (rows, columns))
    if format.kind == "fp8":
        return _quantize_fp8(values, format, scale_dtype)
    groups = num_groups(format, columns)
    numbers = np.empty((rows, columns), np.int8 if format.kind == "int8" else np.uint8)
    scales = np.empty((rows, groups), np.float32)
    zeros = np.empty((rows, groups), np.uint8)
    step = max(1, _CHUNK // columns)
    for first in range(0, rows, step):
        part = slice(first, min(first + step, rows))
        grouped = np.asarray(values[part], np.float32).reshape(-1, groups, columns // groups)
        q, scale, zero = _quantize_groups(grouped, format, scale_dtype, search)
        numbers[part], scales[part], zeros[part] = q.reshape(-1, columns), scale, zero
    data = pack_nibbles(numbers.view(np.uint8)) if format.kind == "int4" else numbers
    return Weight(format, (rows, columns), data, scales, None if format.symmetric else zeros)


def _quantize_fp8(values: Floats, format: Format, scale_dtype: ScaleDtype) -> Weight:
    rows, columns = values.shape
    groups = num_groups(format, columns)
    data, scales = np.empty((rows, columns), np.uint8), np.empty((rows, groups), np.float32)
    step = max(1, _CHUNK // columns)
    for first in range(0, rows, step):
        part = slice(first, min(first + step, rows))
        grouped = np.asarray(values[part], np.float32).reshape(-1, groups, columns // groups)
        reach = np.abs(grouped).max(axis=2)
        if not np.isfinite(reach).all():
            raise ModelError("cannot quantise a matrix that holds NaN or infinity")
        scale = round_to(reach / np.float32(LARGEST), scale_dtype)
        scale[scale == 0] = 1
        data[part], scales[part] = to_fp8(grouped / scale[..., None]).reshape(-1, columns), scale
    return Weight(format, (rows, columns), data, scales)


def sparsify(weight: Weight) -> Weight:
    """A Weight that holds two zeros in each four successive columns -> only the others. RecipeError for one without."""
    check_format(replace(weight.format, sparse24=True), weight.shape)
    whole = _elements(weight)
    mask = sparse.mask_of(_nonzero(weight))
    if mask is None:
        raise RecipeError("a matrix that is to be 2:4 has three numbers in four successive columns that are not zero")
    kept = sparse.take(whole, mask)
    data = pack_nibbles(kept) if weight.format.kind == "int4" else kept
    return replace(weight, format=replace(weight.format, sparse24=True), data=data, mask=mask)


def densify(weight: Weight) -> Weight:
    """The same Weight with its zeros, where it is sparse24."""
    if weight.mask is None:
        return weight
    data: NDArray[Any] = weight.data
    if weight.format.kind == "int4":  # a zero is stored as 8
        kept = unpack_nibbles(data) ^ np.uint8(8)
        whole = pack_nibbles(sparse.spread(kept, weight.mask) ^ np.uint8(8))
    else:
        whole = sparse.spread(data, weight.mask)
    return replace(weight, format=replace(weight.format, sparse24=False), data=whole, mask=None)


def _elements(weight: Weight) -> NDArray[Any]:
    """One array element a column, [N, K]."""
    return unpack_nibbles(weight.data.view(np.uint8)) if weight.format.kind == "int4" else weight.data


def _nonzero(weight: Weight) -> NDArray[np.bool_]:
    values = _elements(weight)
    match weight.format.kind:
        case "bf16":
            return np.asarray((values & np.uint16(0x7FFF)) != 0)
        case "fp8":
            return np.asarray((values & np.uint8(0x7F)) != 0)
        case "int4":
            return np.asarray(values != 8)
    return np.asarray(values != 0)


def _quantize_groups(
    grouped: Floats, format: Format, scale_dtype: ScaleDtype, search: bool
) -> tuple[Floats, Floats, Floats]:
    """[N, G, size] -> numbers as stored [N, G, size], scales [N, G], zeros [N, G]; all as float32."""
    low, high = np.asarray(grouped.min(axis=2)), np.asarray(grouped.max(axis=2))
    if not (np.isfinite(low).all() and np.isfinite(high).all()):
        raise ModelError("cannot quantise a matrix that holds NaN or infinity")
    scale, zero = _scales(low, high, format, scale_dtype)
    best = (_round(grouped, scale, zero, format), scale, zero)
    for shrink in np.arange(0.95, 0.69, -0.05, dtype=np.float32) if search else ():
        scale, zero = _scales(low * shrink, high * shrink, format, scale_dtype)
        numbers = _round(grouped, scale, zero, format)
        better = _squared_error(grouped, numbers, scale, zero) < _squared_error(grouped, *best)
        best = (
            np.where(better[..., None], numbers, best[0]),
            np.where(better, scale, best[1]),
            np.where(better, zero, best[2]),
        )
    return best


def _round(grouped: Floats, scale: Floats, zero: Floats, format: Format) -> Floats:
    smallest, largest = (-127, 127) if format.kind == "int8" else (0, 15)
    numbers: Floats = np.clip(np.rint(grouped / scale[..., None]) + zero[..., None], smallest, largest)
    return numbers


def _squared_error(grouped: Floats, numbers: Floats, scale: Floats, zero: Floats) -> Floats:
    error: Floats = np.square((numbers - zero[..., None]) * scale[..., None] - grouped).sum(axis=2)
    return error


def _scales(low: Floats, high: Floats, format: Format, scale_dtype: ScaleDtype) -> tuple[Floats, Floats]:
    if format.symmetric:
        # int4 counts from -8 to 7: dividing by 7.5 spends half a step of clipping on one side to gain finer steps.
        reach, codes = np.maximum(-low, high), 127 if format.kind == "int8" else 7.5
    else:
        low, high = np.minimum(low, np.float32(0)), np.maximum(high, np.float32(0))
        reach, codes = high - low, 15
    scale = round_to(np.asarray(reach / np.float32(codes), np.float32), scale_dtype)
    if not np.isfinite(scale).all():
        raise ModelError(f"a scale overflows {scale_dtype}; store scales as fp32 or bf16")
    scale[scale == 0] = 1
    if format.symmetric:
        return scale, np.full_like(scale, 0 if format.kind == "int8" else 8)
    return scale, np.clip(np.rint(-low / scale), 0, 15).astype(np.float32)


def dequantize(weight: Weight) -> Floats:
    """The numbers a Weight stands for, float32 [N, K], columns in the order of the input (perm undone)."""
    weight = densify(weight)
    kind = weight.format.kind
    data: NDArray[Any] = weight.data
    if kind == "fp32":
        return np.asarray(data, np.float32)
    if kind == "fp16":
        return data.astype(np.float32)
    if kind == "bf16":
        return from_bf16(data)
    values = np.empty(weight.shape, np.float32)
    for part, chunk in _integer_chunks(weight):
        values[part] = chunk
    if weight.perm is None:
        return values
    ordered = np.empty_like(values)
    ordered[:, weight.perm] = values
    return ordered


def _integer_chunks(weight: Weight) -> Iterator[tuple[slice, Floats]]:
    assert weight.scales is not None
    rows, columns = weight.shape
    group = weight.format.group_size or columns
    step = max(1, _CHUNK // columns)
    for first in range(0, rows, step):
        part = slice(first, min(first + step, rows))
        if weight.format.kind == "fp8":
            numbers = from_fp8(weight.data.view(np.uint8)[part])
        else:
            numbers = centred(weight, part).astype(np.float32)
        yield part, numbers * np.repeat(weight.scales[part], group, axis=1)[:, :columns]


def centred(weight: Weight, rows: slice = slice(None)) -> NDArray[np.int8]:
    """The integers of a quantised Weight less their zero points, int8 [n, K], columns in the order of `data`."""
    assert weight.mask is None
    data: NDArray[Any] = weight.data[rows]
    if weight.format.kind == "int8":
        return data
    numbers = unpack_nibbles(data).astype(np.int8)
    if weight.zeros is None:
        return numbers - np.int8(8)
    group = weight.format.group_size or weight.shape[1]
    return numbers - np.repeat(weight.zeros[rows], group, axis=1)[:, : weight.shape[1]].astype(np.int8)


def activation_group(format: Format) -> int:
    """Input columns that share an activation scale in products with this format: min(group, 128), 128 for one a row."""
    return min(format.group_size, 128) if format.group_size else 128


def activation_bits(format: Format, name: str, hidden_size: int) -> int:
    """Bits of an activation in the product with matrix `name` stored so: 16 with int8 in a very narrow model, or in a
    narrow one where the product goes to the residual stream or to the logits; else 8."""
    sensitive = name.rsplit(".", 1)[-1] in ("o", "down", "head", "embed")
    return 16 if format.kind == "int8" and hidden_size <= (NARROW if sensitive else VERY_NARROW) else 8


def quantize_activations(x: Floats, group: int, bits: int = 8) -> tuple[NDArray[Any], Floats]:
    """Rows [T, K] -> int8 or int16 [T, K] and scales float32 [T, ceil(K / group)]: a group's max|x| becomes 127, or at
    16 bits 32258, the largest 254 * high + low of two bytes up to +-127; rounded to nearest even."""
    largest = 127 if bits == 8 else 32258
    rows, columns = x.shape
    groups = -(-columns // group)
    padded = np.zeros((rows, groups * group), np.float32)
    padded[:, :columns] = x
    grouped = padded.reshape(rows, groups, group)
    scales = np.abs(grouped).max(axis=2) / np.float32(largest)
    inverse = np.divide(1, scales, out=np.zeros_like(scales), where=scales > 0)
    q = np.clip(np.rint(grouped * inverse[..., None]), -largest, largest).astype(np.int8 if bits == 8 else np.int16)
    return q.reshape(rows, -1)[:, :columns], scales


def product(x: Floats, weight: Weight, input_bits: int | None = 8) -> Floats:
    """x [T, K] times W.T -> float32 [T, N]: what a backend's product must give, up to the rounding of its sums.

    Integer formats multiply inputs quantised to 8 or 16 bits by group (input_bits None: as they are); the sums of each
    group are exact integers, scaled and added in float64. Others multiply inputs as they are.
    """
    weight = densify(weight)
    if weight.scales is None or input_bits is None or weight.format.kind == "fp8":
        return x @ dequantize(weight).T
    columns = weight.shape[1]
    size = activation_group(weight.format)
    q, x_scales = quantize_activations(x if weight.perm is None else x[:, weight.perm], size, input_bits)
    numbers = centred(weight)
    scales = np.repeat(weight.scales, weight.format.group_size or columns, axis=1)[:, :columns]
    total = np.zeros((len(x), weight.shape[0]), np.float64)
    for group, first in enumerate(range(0, columns, size)):
        part = slice(first, min(first + size, columns))
        sums = q[:, part].astype(np.int32) @ numbers[:, part].T.astype(np.int32)
        total += sums * x_scales[:, group, None].astype(np.float64) * scales[:, first]
    return total.astype(np.float32)
