"""Weights of an MLP that is split into experts, cut into one piece an expert, as the compiled core takes them.

Knows names and formats, not the core.
"""

from collections.abc import Iterable, Iterator
from dataclasses import replace
from typing import Any

import numpy as np
from numpy.typing import NDArray

from hasten.errors import ModelError
from hasten.model.formats import Weight, dense_weight, densify, dequantize
from hasten.model.spec import ModelSpec

_LEAST_GROUP = 32  # of those that the core multiplies


def expert_pieces(spec: ModelSpec, weights: Iterable[tuple[str, Weight]]) -> Iterator[tuple[str, Weight]]:
    """The weights; those of a split MLP as `layers.i.gate.E`, `layers.i.up.E` and `layers.i.down.E` (rows of the first
    two and of their biases, columns of the last)."""
    for name, weight in weights:
        parts = name.split(".")
        layer = spec.layers[int(parts[1])] if parts[0] == "layers" and parts[1].isdigit() else None
        split = layer is not None and layer.experts and parts[2] in ("gate", "up", "down")
        if layer is None or not split or (parts[2] == "down" and parts[-1] == "bias"):
            yield name, weight
            continue
        if layer.rank_of(parts[2]):
            raise ModelError(
                f"layer {parts[1]}: {parts[2]} is of low rank in an MLP that is split into experts, which the CPU "
                "backend does not run together: factorise attention alone, or do not split"
            )
        if parts[2] == "down":
            weight = densify(weight)
        size = layer.intermediate_size // layer.experts
        end = ".bias" if parts[-1] == "bias" else ""
        for expert in range(layer.experts):
            piece = slice(expert * size, (expert + 1) * size)
            cut = _columns(weight, piece) if parts[2] == "down" else _rows(weight, piece)
            yield f"layers.{parts[1]}.{parts[2]}.{expert}{end}", cut


def _rows(weight: Weight, rows: slice) -> Weight:
    scales = None if weight.scales is None else weight.scales[rows]
    zeros = None if weight.zeros is None else weight.zeros[rows]
    data = weight.data[rows]
    mask = None if weight.mask is None else weight.mask[rows]
    return replace(weight, shape=(len(data), weight.shape[1]), data=data, scales=scales, zeros=zeros, mask=mask)


def _columns(weight: Weight, columns: slice) -> Weight:
    """Columns of a matrix in its format, in smaller groups where these would be cut; else in bfloat16."""
    first, last = columns.start, columns.stop
    weight = _regrouped(weight, first, last)
    fmt = weight.format
    group = fmt.group_size
    if group and (first % group or (last % group and last != weight.shape[1])):
        return dense_weight(dequantize(weight)[:, columns], "bf16")
    if weight.perm is not None or (fmt.kind == "int4" and (first % 2 or last % 2)):
        return dense_weight(dequantize(weight)[:, columns], "bf16")
    data: NDArray[Any] = weight.data
    data = data[:, first // 2 : last // 2] if fmt.kind == "int4" else data[:, columns]
    groups = slice(first // group, -(-last // group)) if group else slice(None)
    scales = None if weight.scales is None else np.ascontiguousarray(weight.scales[:, groups])
    zeros = None if weight.zeros is None else np.ascontiguousarray(weight.zeros[:, groups])
    shape = (weight.shape[0], last - first)
    return replace(weight, shape=shape, data=np.ascontiguousarray(data), scales=scales, zeros=zeros)


def _regrouped(weight: Weight, first: int, last: int) -> Weight:
    """The same numbers in groups of a half or a quarter, where only these end at both columns: scales are repeated."""
    group = small = weight.format.group_size
    while small > _LEAST_GROUP and (first % small or last % small):
        small //= 2
    if small == group or weight.scales is None:
        return weight
    groups = -(-weight.shape[1] // small)
    scales = np.repeat(weight.scales, group // small, axis=1)[:, :groups]
    zeros = None if weight.zeros is None else np.repeat(weight.zeros, group // small, axis=1)[:, :groups]
    return replace(weight, format=replace(weight.format, group_size=small), scales=scales, zeros=zeros)
