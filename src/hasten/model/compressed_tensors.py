"""The compressed-tensors scheme, read: config groups, targets, and their packed tensors -> Weights.

Supported: weights of 4 bits (symmetric and asymmetric) and 8 bits (symmetric), a scale for each row or group, stored as
pack-quantized, naive-quantized or int-quantized; floats of 8 bits (e4m3) with a scale for the whole, each row, group or
block, stored as float-quantized or naive-quantized; several groups with different formats. Activations may be quantised
to 8 bits, static ones to floats only; scales of keys and values are passed over: backends do both of their own accord.
The writer's side is in writer.py.
"""

import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from hasten.errors import ModelError
from hasten.model.formats import Activations, Format, Kind, Weight
from hasten.model.fp8 import NAN
from hasten.model.names import Source
from hasten.model.quantized import (
    FLOATS,
    Arrays,
    Expected,
    block_of,
    floats,
    group_of,
    regular_groups,
    sort_columns,
    spread_groups,
)

PACKED = "pack-quantized"
INTEGERS, FLOATS8 = "int-quantized", "float-quantized"
UNPACKED = ("naive-quantized", INTEGERS, FLOATS8)
KV_SCALES = ("k_scale", "v_scale")
_CHUNK = 1 << 17
# A module that Transformers keeps as a Conv1D (GPT-2) is not one that compressed-tensors knows. It is stored as the
# Linear that it stands for, under a format name that makes Transformers refuse the folder, not load half of it.
CONV1D_PACKED = "hasten-conv1d"
# A config group of this format names modules that are stored as two thin matrices. It says nothing of numbers: without
# it Transformers would fill those modules with random ones.
LOW_RANK = "hasten-low-rank"


@dataclass(frozen=True, slots=True)
class _Scheme:
    """One config group. group_size: as stored, None for one scale a row; block_rows: rows that share a scale, 0 is all.
    floats: e4m3 rather than integers."""

    name: str
    bits: int
    symmetric: bool
    group_size: int | None
    packed: bool
    by_activation: bool
    floats: bool = False
    block_rows: int = 1
    activations: Activations | None = None


class CompressedTensors:
    """See quantized.Quantization."""

    def __init__(self, settings: Mapping[str, Any]) -> None:
        where = "config.json: quantization_config"
        if settings.get("transform_config"):
            raise ModelError(f"{where}.transform_config is not supported")
        self.kv_scales: tuple[str, ...] = ()
        if kv := _mapping(settings, "kv_cache_scheme", where):
            if kv.get("type") != "float" or kv.get("num_bits") != 8 or kv.get("dynamic"):
                raise ModelError(f"{where}.kv_cache_scheme is not supported: {dict(kv)!r:.120}")
            self.kv_scales = KV_SCALES
        sparsity = _mapping(settings, "sparsity_config", where)
        if sparsity.get("format", "dense") != "dense":
            raise ModelError(f"config.json: sparse weights ({sparsity['format']}) are not supported")
        self._ignore = _names(settings, "ignore", where)
        self._targets: dict[str, _Scheme] = {}
        for name, group in _mapping(settings, "config_groups", where).items():
            if isinstance(group, Mapping) and group.get("format") == LOW_RANK:
                continue
            scheme = _read_scheme(str(name), group, str(settings.get("format")))
            if scheme is not None:
                targets = _names(group, "targets", f"{where}.config_groups.{name}")
                self._targets.update(dict.fromkeys(targets, scheme))

    def format_of(self, source: Source) -> Format | None:
        scheme = self._scheme(source)
        if scheme is None:
            return None
        if scheme.bits == 4 and source.shape[1] % 2:
            raise ModelError(f"{source.module}: 4 bits need an even number of inputs, found {source.shape[1]}")
        group = group_of(scheme.group_size, source.shape[1], source.module)
        kind: Kind = "fp8" if scheme.floats else "int8" if scheme.bits == 8 else "int4"
        return Format(kind, group, scheme.symmetric, activations=scheme.activations)

    def expected(self, source: Source) -> Expected:
        scheme = self._scheme(source)
        assert scheme is not None
        rows, columns = source.shape
        groups = -(-columns // scheme.group_size) if scheme.group_size else 1
        scaled_rows = -(-rows // scheme.block_rows) if scheme.block_rows else 1
        # One scale for the whole matrix has one dimension.
        tensors: Expected = {"weight_scale": (FLOATS, (scaled_rows, groups) if scheme.block_rows else (1,))}
        if scheme.activations == "fp8-static":
            tensors["input_scale"] = (FLOATS, (1,))
        if scheme.floats:
            tensors["weight"] = (("F8_E4M3",), (rows, columns))
        elif scheme.packed:
            per_word = 32 // scheme.bits
            tensors["weight_packed"] = (("I32",), (rows, -(-columns // per_word)))
            tensors["weight_shape"] = (("I64", "I32"), (2,))
        else:
            tensors["weight"] = (("I8",), (rows, columns))
        if not scheme.symmetric:
            packed = (("I32",), (-(-rows // 8), groups))
            tensors["weight_zero_point"] = packed if scheme.packed else (("I8",), (rows, groups))
        if scheme.by_activation:
            tensors["weight_g_idx"] = (("I32",), (columns,))
        return tensors

    def optional(self, source: Source) -> tuple[str, ...]:
        return ("weight_zero_point",)  # symmetric ones, all zero, as older versions wrote them

    def read(self, source: Source, arrays: Arrays, where: str) -> Weight:
        scheme, format = self._scheme(source), self.format_of(source)
        assert scheme is not None
        assert format is not None
        rows, columns = source.shape
        if scheme.floats:
            return read_floats(scheme.block_rows, scheme.group_size or 0, format, source.shape, arrays, where)
        if scheme.packed and tuple(arrays["weight_shape"]) != source.shape:
            found = arrays["weight_shape"].tolist()
            raise ModelError(f"{where}: weight_shape is {found}, expected {list(source.shape)}")
        data = _packed_data(arrays["weight_packed"], scheme.bits, columns) if scheme.packed else arrays["weight"]
        if not scheme.packed and scheme.bits == 4:
            data = _pack_signed(data, where)
        scales, zeros = floats(arrays["weight_scale"]), None
        if not scheme.symmetric:
            zeros = _zeros(arrays["weight_zero_point"], rows, scheme.packed)
        elif "weight_zero_point" in arrays and arrays["weight_zero_point"].any():
            raise ModelError(f"{where}: zero points other than 0, though the scheme is symmetric")
        perm = None
        if scheme.by_activation and scheme.group_size:
            index = arrays["weight_g_idx"]
            if not regular_groups(index, scheme.group_size, where):
                data, perm = sort_columns(data, index, scheme.bits)
        stored, group = scheme.group_size or columns, format.group_size
        scales = spread_groups(scales, stored, group, columns)
        zeros = None if zeros is None else spread_groups(zeros, stored, group, columns)
        return Weight(format, source.shape, data, scales, zeros, perm)

    def _scheme(self, source: Source) -> _Scheme | None:
        """Exact names come before expressions, expressions before class names, each in alphabetical order."""
        if source.role == "norm":
            return None
        names = {source.module, "lm_head"} if source.module == "embed_out" else {source.module}
        kind = "Embedding" if source.role == "embedding" else "Conv1D" if source.transposed else "Linear"
        if any(_matches(names, ignored) or ignored == kind for ignored in self._ignore):
            return None
        ordered = sorted(self._targets, key=lambda target: (target.startswith("re:"), target))
        found = next((t for t in ordered if _matches(names, t)), kind if kind in self._targets else None)
        return self._targets[found] if found is not None else None


def read_floats(
    block_rows: int, block_columns: int, format: Format, shape: tuple[int, int], arrays: Arrays, where: str
) -> Weight:
    """A matrix of 8-bit floats with a weight_scale for each block; 0 is all rows, or all columns."""
    rows, columns = shape
    data = arrays["weight"]
    if ((data & np.uint8(NAN)) == NAN).any():
        raise ModelError(f"{where}: weight holds NaN: the checkpoint is damaged")
    scales = floats(arrays["weight_scale"])
    scales = np.repeat(scales.reshape(len(scales), -1), block_rows or rows, axis=0)[:rows]
    scales = np.ascontiguousarray(spread_groups(scales, block_columns or columns, format.group_size, columns))
    given = floats(arrays["input_scale"]) if "input_scale" in arrays else None
    return Weight(format, shape, data, scales, input_scale=given)


def _mapping(settings: Mapping[str, Any], key: str, where: str) -> Mapping[str, Any]:
    """An object of the configuration, empty where it has none."""
    value = settings.get(key) or {}
    if not isinstance(value, Mapping):
        raise ModelError(f"{where}.{key} is {value!r:.80}, expected an object")
    return value


def _names(settings: Mapping[str, Any], key: str, where: str) -> tuple[str, ...]:
    """A list of names of modules, classes, and regular expressions behind "re:"."""
    value = settings.get(key) or []
    if not isinstance(value, list) or not all(isinstance(name, str) for name in value):
        raise ModelError(f"{where}.{key} is {value!r:.80}, expected a list of names")
    for name in value:
        try:
            re.compile(name.removeprefix("re:"))  # a plain name is one as well
        except re.error as error:
            raise ModelError(f"{where}.{key}: {name!r:.80} is no regular expression: {error}") from None
    return tuple(value)


def _matches(names: set[str], target: str) -> bool:
    if target.startswith("re:"):
        return any(re.match(target[3:], name) for name in names)
    return target in names


def _read_scheme(name: str, group: Any, format: str) -> _Scheme | None:
    where = f"config.json: quantization_config.config_groups.{name}"
    if not isinstance(group, Mapping):
        raise ModelError(f"{where}: a named preset is not supported, expected the scheme written out")
    format = str(group.get("format") or format)
    weights = _mapping(group, "weights", where)
    if not weights or format == "dense":
        return None
    if format not in (PACKED, CONV1D_PACKED, *UNPACKED):
        raise ModelError(f"{where}: format {format!r} is not supported; supported: {', '.join((PACKED, *UNPACKED))}")
    bits, kind, strategy = weights.get("num_bits", 0), weights.get("type", "int"), weights.get("strategy")
    symmetric = bool(weights.get("symmetric", True))
    eight_bit_float = kind == "float" and bits == 8 and symmetric
    if not eight_bit_float and (kind != "int" or bits not in (4, 8) or (bits == 8 and not symmetric)):
        sign = "symmetric" if symmetric else "asymmetric"
        raise ModelError(
            f"{where}: {sign} {kind} weights of {bits} bits; supported: int of 4 bits, symmetric int or float of 8"
        )
    size = weights.get("group_size")
    if strategy is None:
        strategy = "group" if isinstance(size, int) and size > 0 else "channel" if size == -1 else "tensor"
    known = ("group", "channel", *(("tensor", "block") if eight_bit_float else ()))
    if strategy not in known:
        raise ModelError(f"{where}: strategy {strategy!r} is not supported; supported: {', '.join(known)}")
    block_rows = 0 if strategy == "tensor" else 1
    if strategy == "block":
        block_rows, size = block_of(weights.get("block_structure"), f"{where}.weights.block_structure")
    if weights.get("dynamic"):
        raise ModelError(f"{where}: weights quantised dynamically are not supported")
    return _Scheme(
        name,
        bits,
        symmetric,
        size if strategy in ("group", "block") else None,
        packed=format not in UNPACKED and not eight_bit_float,
        by_activation=weights.get("actorder") in (True, "group", "dynamic"),
        floats=eight_bit_float,
        block_rows=block_rows,
        activations=_read_activations(group, where),
    )


def _read_activations(group: Mapping[str, Any], where: str) -> Activations | None:
    inputs = _mapping(group, "input_activations", where)
    if group.get("output_activations"):
        raise ModelError(f"{where}: quantised output activations are not supported")
    if not inputs:
        return None
    kind, dynamic = inputs.get("type", "int"), inputs.get("dynamic") is True
    if inputs.get("num_bits") == 8 and kind == "int" and dynamic:
        return "int8"
    if inputs.get("num_bits") == 8 and kind == "float" and (dynamic or inputs.get("strategy") == "tensor"):
        return "fp8" if dynamic else "fp8-static"
    raise ModelError(
        f"{where}: input activations must be dynamic int8 or float8, or float8 with one static scale, "
        f"found {dict(inputs)!r:.120}"
    )


def _packed_data(words: NDArray[Any], bits: int, columns: int) -> NDArray[Any]:
    """int32 [N, words], element i at bit i * bits, as value + 2^(bits - 1). Four bits are our own layout already."""
    octets = words.view(np.uint8)
    if bits == 4:
        return octets if 2 * octets.shape[1] == columns else np.ascontiguousarray(octets[:, : columns // 2])
    return np.bitwise_xor(octets[:, :columns], np.uint8(0x80)).view(np.int8)


def _pack_signed(values: NDArray[np.int8], where: str) -> NDArray[np.uint8]:
    """int8 [N, K] of -8..7 -> nibbles of value + 8. Two columns at a time, a piece that stays in cache at a time: the
    largest matrix of a model comes this way, when it starts."""
    rows, columns = values.shape
    packed = np.empty((rows, columns // 2), np.uint8)
    step = max(1, _CHUNK // columns)
    for first in range(0, rows, step):
        part = values[first : first + step]
        if (part + np.int8(8)).view(np.uint8).max() > 15:
            raise ModelError(f"{where}: values outside -8..7 in weights of 4 bits")
        pairs = part.view("<u2")
        packed[first : first + step] = ((pairs & 0x000F) | ((pairs >> 4) & 0x00F0)) ^ 0x88
    return packed


def _zeros(stored: NDArray[Any], rows: int, packed: bool) -> NDArray[np.uint8]:
    """Zero points 0..15 [N, G]: packed along the rows as the weights are along the columns, or int8 of -8..7."""
    if not packed:
        return (stored + np.int8(8)).astype(np.uint8) & np.uint8(15)
    words = stored.astype(np.uint32)
    shifts = np.arange(0, 32, 4, dtype=np.uint32)
    values = (words[:, None, :] >> shifts[None, :, None]) & np.uint32(15)
    return np.ascontiguousarray(values.reshape(-1, stored.shape[1])[:rows].astype(np.uint8))
