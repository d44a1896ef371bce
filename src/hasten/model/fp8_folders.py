"""Folders whose config.json says quant_method "fp8": Linear weights as 8-bit floats with a scale for the whole matrix
or, as DeepSeek and Qwen publish them, for each block of 128 x 128. Read only; we write compressed-tensors."""

from collections.abc import Mapping
from typing import Any

import numpy as np

from hasten.errors import ModelError
from hasten.model.compressed_tensors import read_floats
from hasten.model.formats import Activations, Format, Weight
from hasten.model.names import Source
from hasten.model.quantized import FLOATS, Arrays, Expected, block_of, group_of


class Fp8:
    """See quantized.Quantization."""

    kv_scales: tuple[str, ...] = ("k_scale", "v_scale")

    def __init__(self, settings: Mapping[str, Any], tensor_names: frozenset[str]) -> None:
        self._names = tensor_names
        block = settings.get("weight_block_size")
        self._block = None if block is None else block_of(block, "config.json: weight_block_size")
        scheme = settings.get("activation_scheme", "dynamic")
        if scheme not in ("dynamic", "static"):
            raise ModelError(f"config.json: activation_scheme {scheme!r} is not supported; supported: dynamic, static")
        self._activations: Activations = "fp8" if scheme == "dynamic" else "fp8-static"

    def format_of(self, source: Source) -> Format | None:
        if source.role != "linear" or self._scale(source) is None:
            return None
        columns = source.shape[1]
        group = group_of(self._block[1], columns, source.module) if self._block else 0
        return Format("fp8", group, activations=self._activations)

    def expected(self, source: Source) -> Expected:
        rows, columns = source.shape
        scale = self._scale(source)
        assert scale is not None
        shape = (1,)
        if self._block:
            shape = (-(-rows // self._block[0]), -(-columns // self._block[1]))  # type: ignore[assignment]
        tensors: Expected = {"weight": (("F8_E4M3",), source.shape), scale: (FLOATS, shape)}
        if self._activations == "fp8-static":
            tensors["input_scale"] = (FLOATS, (1,))
        return tensors

    def optional(self, source: Source) -> tuple[str, ...]:
        return ("input_scale",)

    def read(self, source: Source, arrays: Arrays, where: str) -> Weight:
        format, scale = self.format_of(source), self._scale(source)
        assert format is not None
        assert scale is not None
        block = self._block or (0, 0)
        renamed = {("weight_scale" if key == scale else key): np.asarray(value) for key, value in arrays.items()}
        return read_floats(block[0], block[1], format, source.shape, renamed, where)

    def _scale(self, source: Source) -> str | None:
        """The scales' parameter: weight_scale_inv in folders with blocks, though nothing about it is inverse."""
        known = ("weight_scale_inv", "weight_scale")
        return next((name for name in known if f"{source.module}.{name}" in self._names), None)
