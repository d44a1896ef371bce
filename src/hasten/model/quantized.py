"""Which tensors of a checkpoint hold a quantised matrix, and how they turn into a Weight: the choice among the schemes.

Reads compressed-tensors (compressed_tensors.py), GPTQ and AWQ (gptq_awq.py) and 8-bit floats (fp8_folders.py); anything
else is refused by name. Each
scheme answers the same four questions about a Source; what they share about integers and groups is here.
"""

from collections.abc import Mapping
from typing import Any, Protocol

import numpy as np
from numpy.typing import NDArray

from hasten.errors import ModelError
from hasten.model.formats import Format, Weight, from_bf16, pack_nibbles, unpack_nibbles
from hasten.model.names import Source

GROUP_SIZES = (32, 64, 128)  # what backends multiply; larger multiples of 128 are read as 128
Arrays = Mapping[str, NDArray[Any]]
Expected = dict[str, tuple[tuple[str, ...], tuple[int, ...]]]  # parameter -> dtypes it may have, shape

FLOATS = ("F32", "F16", "BF16")


class Quantization(Protocol):
    """How the modules of one checkpoint are stored. kv_scales: names that tensors of an attention module end in, which
    are no weights."""

    kv_scales: tuple[str, ...]

    def format_of(self, source: Source) -> Format | None:
        """The Format of a module's matrix; None where it is dense."""

    def expected(self, source: Source) -> Expected:
        """The tensors that a quantised module must have."""

    def optional(self, source: Source) -> tuple[str, ...]:
        """Parameters that a quantised module may have besides."""

    def read(self, source: Source, arrays: Arrays, where: str) -> Weight:
        """The matrix [N, K] from its tensors (bfloat16 as bits). Raises ModelError where they contradict the scheme."""


class Dense:
    """No module is quantised."""

    kv_scales: tuple[str, ...] = ()

    def format_of(self, source: Source) -> Format | None:
        return None

    def expected(self, source: Source) -> Expected:
        return {}

    def optional(self, source: Source) -> tuple[str, ...]:
        return ()

    def read(self, source: Source, arrays: Arrays, where: str) -> Weight:
        raise AssertionError("a dense checkpoint has no quantised module")


def quantization_of(config: Mapping[str, Any], tensor_names: frozenset[str]) -> Quantization:
    """The scheme that config.json's `quantization_config` names; tensor_names as in names.py, `module.parameter`.

    Raises ModelError for a scheme, or an option of one, that is not supported.
    """
    from hasten.model import compressed_tensors, fp8_folders, gptq_awq

    settings = config.get("quantization_config")
    if settings is None:
        return Dense()
    if not isinstance(settings, Mapping):
        raise ModelError(f"config.json: quantization_config is {settings!r:.80}, expected an object")
    match settings.get("quant_method"):
        case "compressed-tensors":
            return compressed_tensors.CompressedTensors(settings)
        case "gptq":
            return gptq_awq.Gptq(settings, tensor_names)
        case "awq":
            return gptq_awq.Awq(settings, tensor_names)
        case "fp8":
            return fp8_folders.Fp8(settings, tensor_names)
        case other:
            raise ModelError(
                f"quantisation method {other!r} is not supported; supported: compressed-tensors (int4, int8, fp8), "
                "gptq, awq, fp8"
            )


def group_of(size: object, columns: int, where: str) -> int:
    """A checkpoint's group size (-1 or None: one scale a row) -> Format.group_size. Raises ModelError where no backend
    multiplies such groups."""
    if size is None or size == -1:
        return 0
    if isinstance(size, int) and size > 128 and size % 128 == 0:
        return 128
    if isinstance(size, int) and size in GROUP_SIZES:
        return size
    if size == columns:
        return 0
    raise ModelError(f"{where}: group size {size!r} is not supported; supported: 32, 64, multiples of 128, whole rows")


def block_of(value: object, where: str) -> tuple[int, int]:
    """Rows and columns that share a scale."""
    sizes = list(value) if isinstance(value, list | tuple) else []
    if len(sizes) != 2 or not all(isinstance(size, int) and size > 0 for size in sizes):
        raise ModelError(f"{where} is {value!r:.80}, expected two positive numbers")
    return sizes[0], sizes[1]


def floats(values: NDArray[Any]) -> NDArray[np.float32]:
    """float32 of a tensor stored as float32, float16 or the bits of bfloat16."""
    return from_bf16(values) if values.dtype == np.uint16 else values.astype(np.float32)


def spread_groups(values: NDArray[Any], stored: int, group: int, columns: int) -> NDArray[Any]:
    """Scales or zeros [N, G] of groups of `stored` columns, repeated for smaller groups of `group`."""
    if group == 0 or stored == group:
        return values
    return np.ascontiguousarray(np.repeat(values, stored // group, axis=1)[:, : -(-columns // group)])


def sort_columns(
    packed: NDArray[np.uint8], group_index: NDArray[Any], bits: int
) -> tuple[NDArray[Any], NDArray[np.int32]]:
    """Columns of [N, K] numbers (int4 packed in bytes, int8 as they are) brought into the order of their groups.

    Returns the numbers and `perm`: column j is the original column perm[j].
    """
    perm = np.argsort(group_index, kind="stable").astype(np.int32)
    if bits == 8:
        return np.ascontiguousarray(packed[:, perm]), perm
    return pack_nibbles(unpack_nibbles(packed)[:, perm]), perm


def regular_groups(group_index: NDArray[Any], group: int, where: str) -> bool:
    """Whether columns already lie in the order of their groups. Raises ModelError where groups are not all full."""
    columns = len(group_index)
    expected = np.arange(columns) // group
    if np.array_equal(group_index, expected):
        return True
    if not np.array_equal(np.sort(group_index), expected):
        raise ModelError(f"{where}: g_idx does not split {columns} columns into groups of {group}")
    return False
