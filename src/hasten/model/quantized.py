"""Quantised tensors of a checkpoint -> Weights, by what `quantization_config` says of each module. (Dense only so far.)"""

from collections.abc import Mapping
from typing import Any

from numpy.typing import NDArray

from hasten.errors import ModelError
from hasten.model.formats import Format, Weight
from hasten.model.tensors import TensorInfo


class Quantization:
    """How a checkpoint's modules are stored. This one: all dense."""

    def format_of(self, module: str) -> Format | None:
        return None

    def parameters(self, module: str) -> tuple[str, ...]:
        return ()

    def optional(self, module: str) -> tuple[str, ...]:
        return ()

    def shapes(self, module: str, shape: tuple[int, int]) -> dict[str, tuple[int, ...]]:
        return {}

    def read(self, module: str, shape: tuple[int, int], read: Mapping[str, NDArray[Any]], where: str) -> Weight:
        raise NotImplementedError


def quantization_of(config: Mapping[str, Any], infos: Mapping[str, TensorInfo]) -> Quantization:
    if config.get("quantization_config"):
        raise ModelError("quantised checkpoints are not read yet")
    return Quantization()
