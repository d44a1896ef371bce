"""Scales of keys and values for a cache of 8-bit floats: the largest magnitude of each layer's, as they are cached
(keys after their rotary positions), becomes the largest float."""

import inspect
from typing import Any

import numpy as np
import torch
from torch import Tensor

from hasten.compress.blocks import Block, Inputs
from hasten.compress.stage import Context, change_block
from hasten.model.formats import Format, Weight
from hasten.model.fp8 import LARGEST
from hasten.steps import QuantizeKv

_LEAST = 1e-6


class _Cache:
    """Stands in for Transformers' cache: looks at what would be kept."""

    def __init__(self) -> None:
        self.largest = {"k_scale": 0.0, "v_scale": 0.0}

    def update(self, keys: Tensor, values: Tensor, *arguments: Any, **named: Any) -> tuple[Tensor, Tensor]:
        for name, found in (("k_scale", keys), ("v_scale", values)):
            self.largest[name] = max(self.largest[name], float(found.abs().max()))
        return keys, values


@change_block.register
@torch.no_grad()
def _(step: QuantizeKv, block: Block, inputs: Inputs, context: Context) -> None:
    cache = _Cache()
    args, named = block.call
    forward = inspect.signature(block.module.forward)
    for x in inputs.batches():
        call = forward.bind(x, *args, **named)  # the cache is called by its name in some architectures
        call.arguments["past_key_values"] = cache
        block.module(*call.args, **call.kwargs)
    for name, largest in cache.largest.items():
        scale = torch.tensor(max(largest / LARGEST, _LEAST)).bfloat16().float().reshape(1, 1).numpy()
        block.scales[name] = Weight(Format("fp32"), (1, 1), np.ascontiguousarray(scale))
