"""GPTQ and AWQ checkpoints as found on the hub -> Weights. Both keep inputs in rows, eight 4-bit numbers to a word.

GPTQ (Frantar et al. 2022; AutoGPTQ, GPTQModel): 4 or 8 bits, packed along the inputs; its first format stores zero
points less one. AWQ (Lin et al. 2023; AutoAWQ's GEMM version): 4 bits, packed along the outputs in the order
0 2 4 6 1 3 5 7. Which modules are quantised is told by their tensors.
"""

from collections.abc import Mapping
from typing import Any

import numpy as np
from numpy.typing import NDArray

from hasten.errors import ModelError
from hasten.model.formats import Format, Weight, pack_nibbles
from hasten.model.names import Source
from hasten.model.quantized import (
    Arrays,
    Expected,
    floats,
    group_of,
    regular_groups,
    sort_columns,
    spread_groups,
)

AWQ_ORDER = (0, 2, 4, 6, 1, 3, 5, 7)  # nibble i of a word holds output 8 * word + AWQ_ORDER[i]
_SCALES = ("F16", "BF16", "F32")


class Gptq:
    """See quantized.Quantization."""

    kv_scales: tuple[str, ...] = ()

    def __init__(self, settings: Mapping[str, Any], tensor_names: frozenset[str]) -> None:
        self._names = tensor_names
        self._bits = settings.get("bits")
        self._group = settings.get("group_size", -1)
        self._symmetric = bool(settings.get("sym", True))
        version = settings.get("checkpoint_format") or settings.get("format") or "gptq"
        if self._bits not in (4, 8):
            raise ModelError(f"config.json: GPTQ with {self._bits} bits is not supported; supported: 4, 8")
        if version not in ("gptq", "gptq_v2") or settings.get("is_marlin_format"):
            raise ModelError(f"config.json: GPTQ format {version!r} is not supported; supported: gptq, gptq_v2")
        if settings.get("dynamic"):
            raise ModelError("config.json: GPTQ with other settings for some modules ('dynamic') is not supported")
        self._zeros_less_one = version == "gptq"

    def format_of(self, source: Source) -> Format | None:
        if f"{source.module}.qweight" not in self._names:
            return None
        group = group_of(self._group, source.shape[1], source.module)
        return Format("int8" if self._bits == 8 else "int4", group, self._symmetric or self._bits == 8)

    def expected(self, source: Source) -> Expected:
        rows, columns = source.shape
        groups, per_word = self._num_groups(columns), 32 // int(self._bits or 4)
        return {
            "qweight": (("I32",), (columns // per_word, rows)),
            "qzeros": (("I32",), (groups, -(-rows // per_word))),
            "scales": (_SCALES, (groups, rows)),
        }

    def optional(self, source: Source) -> tuple[str, ...]:
        return ("g_idx", "bias")  # older packers gave every module a bias, of zeros

    def read(self, source: Source, arrays: Arrays, where: str) -> Weight:
        rows, columns = source.shape
        bits, stored = int(self._bits or 4), self._stored_group(columns)
        octets = np.ascontiguousarray(arrays["qweight"].T).view(np.uint8)  # [N, K * bits / 8], inputs in order
        zeros = self._zeros(arrays["qzeros"], rows)
        scales = np.ascontiguousarray(floats(arrays["scales"]).T)
        data, perm = octets, None
        index = arrays.get("g_idx")
        if index is not None and not regular_groups(index, stored, where):
            data, perm = sort_columns(octets, index, bits)
        if not source.bias and "bias" in arrays and arrays["bias"].any():
            raise ModelError(f"{where}: a bias that is not zero, though the architecture has none here")
        format = self.format_of(source)
        assert format is not None
        scales = spread_groups(scales, stored, format.group_size, columns)
        if bits == 8:
            if (zeros != 128).any():
                raise ModelError(
                    f"{where}: asymmetric GPTQ of 8 bits is not supported; supported: symmetric, or 4 bits"
                )
            return Weight(format, source.shape, (data ^ np.uint8(0x80)).view(np.int8), scales, None, perm)
        if (zeros == 8).all():
            return Weight(Format("int4", format.group_size), source.shape, data, scales, None, perm)
        zeros = spread_groups(zeros, stored, format.group_size, columns)
        return Weight(Format("int4", format.group_size, False), source.shape, data, scales, zeros, perm)

    def _zeros(self, stored: NDArray[Any], rows: int) -> NDArray[np.uint8]:
        """[G, words] -> zero points [N, G]. One is added to each packed word as a whole, carries included: what the
        packers subtract."""
        bits = int(self._bits or 4)
        words = stored.view(np.uint32)
        if self._zeros_less_one:
            words = words + np.uint32(0x11111111 if bits == 4 else 0x01010101)
        shifts = np.arange(0, 32, bits, dtype=np.uint32)
        values = (words[:, :, None] >> shifts) & np.uint32((1 << bits) - 1)
        return np.ascontiguousarray(values.reshape(len(stored), -1)[:, :rows].T.astype(np.uint8))

    def _stored_group(self, columns: int) -> int:
        return self._group if isinstance(self._group, int) and self._group > 0 else columns

    def _num_groups(self, columns: int) -> int:
        return -(-columns // self._stored_group(columns))


class Awq:
    """See quantized.Quantization."""

    kv_scales: tuple[str, ...] = ()

    def __init__(self, settings: Mapping[str, Any], tensor_names: frozenset[str]) -> None:
        self._names = tensor_names
        bits = settings.get("bits", settings.get("w_bit", 4))
        version = str(settings.get("version", "gemm")).lower()
        if bits != 4 or version != "gemm":
            raise ModelError(f"config.json: AWQ {version!r} with {bits} bits is not supported; supported: gemm, 4 bits")
        self._group = settings.get("group_size", settings.get("q_group_size", 128))
        self._symmetric = settings.get("zero_point", True) is False

    def format_of(self, source: Source) -> Format | None:
        if f"{source.module}.qweight" not in self._names:
            return None
        return Format("int4", group_of(self._group, source.shape[1], source.module), self._symmetric)

    def expected(self, source: Source) -> Expected:
        rows, columns = source.shape
        groups = -(-columns // self._stored_group(columns))
        zeros: Expected = {} if self._symmetric else {"qzeros": (("I32",), (groups, rows // 8))}
        return {"qweight": (("I32",), (columns, rows // 8)), "scales": (_SCALES, (groups, rows)), **zeros}

    def optional(self, source: Source) -> tuple[str, ...]:
        return ("qzeros",)

    def read(self, source: Source, arrays: Arrays, where: str) -> Weight:
        columns = source.shape[1]
        format, stored = self.format_of(source), self._stored_group(columns)
        assert format is not None
        data = pack_nibbles(np.ascontiguousarray(_unpack_awq(arrays["qweight"]).T))
        scales = spread_groups(np.ascontiguousarray(floats(arrays["scales"]).T), stored, format.group_size, columns)
        zeros = None
        if not self._symmetric:
            zeros = np.ascontiguousarray(_unpack_awq(arrays["qzeros"]).T)
            zeros = spread_groups(zeros, stored, format.group_size, columns)
        return Weight(format, source.shape, data, scales, zeros)

    def _stored_group(self, columns: int) -> int:
        return self._group if isinstance(self._group, int) and self._group > 0 else columns


def _unpack_awq(words: NDArray[Any]) -> NDArray[np.uint8]:
    """int32 [rows, words] -> uint8 [rows, 8 * words]."""
    values = np.empty((words.shape[0], words.shape[1], 8), np.uint8)
    unsigned = words.view(np.uint32)
    for nibble, column in enumerate(AWQ_ORDER):
        values[:, :, column] = (unsigned >> np.uint32(4 * nibble)) & np.uint32(15)
    return values.reshape(words.shape[0], -1)
