"""How much the loss changes when a structure goes, to first order (Molchanov et al. 2019; LLM-Pruner, Ma et al. 2023).

A gate of value one multiplies what a structure gives; setting it to zero removes the structure. Its gradient is the sum
of weight times gradient over the structure's weights, so the squared gradient, averaged over batches, is the papers'
importance: the squared first-order change of the loss. Gates stand before `o` (heads), before `down` (neurons) and on
the residual stream before each layer and the final norm (hidden units). The whole model is in memory here, with the
activations of one batch.
"""

from collections.abc import Callable
from contextlib import ExitStack
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from hasten.backends.torch.load import load_torch
from hasten.backends.torch.tensors import TORCH_DTYPES
from hasten.model.checkpoint import Checkpoint
from hasten.model.names import sources
from hasten.model.spec import ModelSpec

Float64 = NDArray[np.float64]


def scores(
    checkpoint: Checkpoint, tokens: Tensor, device: str, tell: Callable[[float, str], None]
) -> tuple[list[Float64], list[Float64], Float64]:
    """Importance of the key-value groups and the neurons of each layer, and of the hidden units. tokens: [n, T]."""
    dtype = torch.float32 if device == "cpu" else TORCH_DTYPES[checkpoint.spec.dtype]
    model: Any = load_torch(checkpoint.path, dtype, device).requires_grad_(False)
    gates = Gates(checkpoint.spec, device)
    with ExitStack() as stack:
        for module, hook in gates.hooks(model, checkpoint):
            stack.callback(module.register_forward_pre_hook(hook, with_kwargs=True).remove)
        for index, sequence in enumerate(tokens):
            tell(index / len(tokens), f"sequence {index + 1} of {len(tokens)}: gradients for shrink")
            ids = sequence[None].to(device)
            model(input_ids=ids, labels=ids, use_cache=False).loss.backward()
            gates.add()
    return gates.importance()


class Gates:
    """Gates of value one, and the sums of their squared gradients over batches."""

    def __init__(self, spec: ModelSpec, device: str) -> None:
        def ones(count: int) -> Tensor:
            return torch.ones(count, device=device, requires_grad=True)

        self.groups = [ones(layer.num_kv_heads) for layer in spec.layers]
        self.neurons = [ones(layer.intermediate_size) for layer in spec.layers]
        self.hidden = ones(spec.hidden_size)
        self.count = 0
        self.sums = [torch.zeros_like(gate, dtype=torch.float64, requires_grad=False) for gate in self._all()]

    def hooks(self, model: nn.Module, checkpoint: Checkpoint) -> list[tuple[nn.Module, Any]]:
        """Modules, and what is to happen to their first input."""
        modules = {part.name: source.module for source in sources(checkpoint.spec, checkpoint.config)
                   for part in source.parts}  # fmt: skip
        found = []
        for index, (groups, neurons) in enumerate(zip(self.groups, self.neurons, strict=True)):
            o, down = modules[f"layers.{index}.o"], modules[f"layers.{index}.down"]
            found += [(model.get_submodule(o), _times(groups)), (model.get_submodule(down), _times(neurons))]
            layer = model.get_submodule(o.rsplit(".", 2)[0])
            found.append((layer, _times(self.hidden)))
        found.append((model.get_submodule(modules["final_norm"]), _times(self.hidden)))
        return found

    def add(self) -> None:
        """Take the squares of the gates' gradients, and clear them."""
        self.count += 1
        for gate, total in zip(self._all(), self.sums, strict=True):
            if gate.grad is not None:
                total += gate.grad.double().square()
                gate.grad = None

    def importance(self) -> tuple[list[Float64], list[Float64], Float64]:
        found = [(total / max(self.count, 1)).cpu().numpy() for total in self.sums]
        layers = len(self.groups)
        return found[:layers], found[layers : 2 * layers], found[-1]

    def _all(self) -> list[Tensor]:
        return [*self.groups, *self.neurons, self.hidden]


def _times(gate: Tensor) -> Callable[..., Any]:
    """A hook that multiplies the first input [..., K]; each gate stands for K / len(gate) successive numbers."""

    def multiply(module: nn.Module, args: tuple[Any, ...], named: dict[str, Any]) -> Any:
        key = None if args else "hidden_states"
        x = args[0] if key is None else named[key]
        factors = gate.repeat_interleave(x.shape[-1] // len(gate)).to(x.dtype)
        return ((x * factors, *args[1:]), named) if key is None else (args, {**named, key: x * factors})

    return multiply
