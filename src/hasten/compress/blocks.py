"""A model's decoder blocks one at a time: Transformers' own layers, filled with a checkpoint's weights as they are due.

The Transformers model is built without memory for its matrices. Calibration tokens run once through its embedding; each
layer is then filled, changed by whoever asks, run on what the (changed) layers before it gave, and dropped. How a layer
is called (masks, rotary positions, which differ by layer in some families) is recorded from the model itself. Modules
that Transformers fuses or transposes are put apart, so that every matrix is a Linear of its own. Knows no method
(gptq.py, ...) and no recipe.
"""

import copy
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any, cast

import numpy as np
import torch
import transformers
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from hasten.compress.tensors import TORCH_DTYPES, to_tensor, to_weight
from hasten.model.checkpoint import Checkpoint
from hasten.model.formats import Weight
from hasten.model.names import Source, sources
from hasten.model.spec import Layer, ModelSpec, config_of_text

Call = tuple[tuple[Any, ...], dict[str, Any]]

_BATCH_TOKENS = {"cpu": 2048}  # of one run of a block on the device
_MOST_TOKENS = 16384  # elsewhere


@dataclass(eq=False)
class Block:
    """One decoder block in memory. Changing `linears` and `norms` changes what it computes.

    module: Transformers' decoder layer. linears: by role (q, k, v, o, gate, up, down), each with a weight [N, K].
    norms: by role (attn_norm, ...); the model adds spec.norm_offset to their weights. stored: matrices that have their
    final form already; their linears hold the numbers that these stand for.
    """

    index: int
    layer: Layer
    spec: ModelSpec
    module: nn.Module
    linears: dict[str, nn.Linear]
    norms: dict[str, nn.Module]
    call: Call
    stored: dict[str, Weight] = field(default_factory=dict)

    def __call__(self, x: Tensor) -> Tensor:
        """Hidden states [b, T, H] -> those that the block gives."""
        args, named = self.call
        out = self.module(x, *args, **named)
        return cast(Tensor, out[0] if isinstance(out, tuple) else out)

    def name(self, role: str) -> str:
        """The canonical name of a role's weight."""
        return f"layers.{self.index}.{role}"

    def store(self, role: str, weight: Weight, numbers: Tensor | None = None) -> None:
        """Give a matrix its final form. What runs from now on are the numbers [N, K] that it stands for, exactly those
        that formats.dequantize gives."""
        self.stored[role] = weight
        target = self.linears[role].weight
        target.data = to_tensor(weight, target.device, target.dtype) if numbers is None else numbers.to(target.dtype)

    def weights(self) -> Iterator[tuple[str, Weight]]:
        """Everything that the block holds, by canonical name; what is not stored, in the model's dtype."""
        for role, norm in self.norms.items():
            weight, bias = cast(Tensor, norm.weight), cast(Tensor | None, getattr(norm, "bias", None))
            yield self.name(role), to_weight(weight.float() + self.spec.norm_offset, "fp32")
            if bias is not None:
                yield self.name(f"{role}.bias"), to_weight(bias, "fp32")
        for role, linear in self.linears.items():
            yield self.name(role), self.stored.get(role) or to_weight(linear.weight, self.spec.dtype)
            if linear.bias is not None:
                yield self.name(f"{role}.bias"), to_weight(linear.bias, "fp32")

    def settle(self) -> None:
        """Round what is not stored to numbers of the model's dtype: what runs is what is written."""
        kept = {id(self.linears[role].weight) for role in self.stored}
        for parameter in self.module.parameters():
            if id(parameter) not in kept:
                parameter.data = parameter.data.to(TORCH_DTYPES[self.spec.dtype]).to(parameter.dtype)


@dataclass(eq=False)
class Inputs:
    """Hidden states [n, T, H] of all calibration sequences, those that go into the block at hand.

    They lie where `states` lies and are taken to the device a few sequences at a time. targets [n, T, H]: what the
    block at hand gives in the unchanged model, where a step asks for it.
    """

    states: Tensor
    device: torch.device
    batch_size: int
    targets: Tensor | None = None

    def batches(self) -> Iterator[Tensor]:
        """[b, T, H] on the device."""
        for start in range(0, len(self.states), self.batch_size):
            yield self.states[start : start + self.batch_size].to(self.device)

    @torch.no_grad()
    def advance(self, block: Block) -> None:
        """Put the block's outputs in place of its inputs."""
        for start in range(0, len(self.states), self.batch_size):
            part = self.states[start : start + self.batch_size]
            part.copy_(block(part.to(self.device)))


class Skeleton:
    """A checkpoint's Transformers model without its matrices: gives the inputs, then a block at a time.

    dtype: of what is computed; None is float32 on a CPU and the model's own elsewhere.
    """

    def __init__(self, checkpoint: Checkpoint, device: str = "cpu", dtype: torch.dtype | None = None) -> None:
        self.checkpoint = checkpoint
        self.spec = checkpoint.spec
        self.device = torch.device(device)
        self.dtype = dtype or (torch.float32 if self.device.type == "cpu" else TORCH_DTYPES[self.spec.dtype])
        self._model = _empty_model(checkpoint, self.device)
        children = dict(self._model.base_model.named_children())
        (self._layers,) = [child for child in children.values() if isinstance(child, nn.ModuleList)]
        self._sources: dict[int, list[Source]] = {}
        for source in sources(self.spec, checkpoint.config):
            name = source.parts[0].name
            index = int(name.split(".")[1]) if name.startswith("layers.") else -1
            self._sources.setdefault(index, []).append(source)
        self._calls: list[Call] = []

    @torch.no_grad()
    def inputs(self, tokens: Tensor, states: Tensor | None = None) -> Inputs:
        """The embedded sequences [n, T]; learns on the way how each layer is called.

        states: where to keep them, [n, T, H] in the skeleton's dtype; a tensor in memory if not given.
        """
        num, length = tokens.shape
        if states is None:
            states = torch.empty((num, length, self.spec.hidden_size), dtype=self.dtype)
        batch_size = max(1, _BATCH_TOKENS.get(self.device.type, _MOST_TOKENS) // length)
        self._fill_outside(("embed", "position_embed"))
        layers = list(self._layers)
        recorders = [_Recorder(layer) for layer in layers]
        for index, recorder in enumerate(recorders):
            self._layers[index] = recorder
        recorders[-1].last = True
        self._embed(tokens[:1])
        recorders[0].last = True
        for start in range(0, num, batch_size):
            self._embed(tokens[start : start + batch_size])
            states[start : start + batch_size].copy_(recorders[0].states)
        for index, layer in enumerate(layers):
            self._layers[index] = layer
        self._calls = [recorder.call for recorder in recorders]
        for source in self._sources[-1]:
            _forget(_module_of(self._model, source))
        return Inputs(states, self.device, batch_size)

    def block(self, index: int, weights: Mapping[str, Weight] | None = None) -> Block:
        """The block on the device, with these weights by canonical name, or the checkpoint's. `inputs` must have been
        asked for."""
        weights = weights or dict(self.checkpoint.weights(f"layers.{index}."))
        module = copy.deepcopy(self._layers[index])
        block = Block(index, self.spec.layers[index], self.spec, module, {}, {}, self._calls[index])
        for source in self._sources[index]:
            path = source.module.split(f".{index}.", 1)[1]
            if source.role == "norm":
                norm = module.get_submodule(path)
                self._fill_norm(norm, source, weights)
                block.norms[source.parts[0].name.rsplit(".", 1)[1]] = norm
                continue
            linears = {part.name.rsplit(".", 1)[1]: self._linear(part.name, weights) for part in source.parts}
            block.linears |= linears
            parts = list(linears.values())
            module.set_submodule(path, parts[0] if len(parts) == 1 else Joined(parts, _order(source, self.device)))
        return block

    def final_norm(self) -> nn.Module:
        """The norm behind the last block, filled."""
        (source,) = [source for source in self._sources[-1] if source.parts[0].name == "final_norm"]
        norm: nn.Module = copy.deepcopy(_module_of(self._model, source))
        self._fill_norm(norm, source, dict(self.checkpoint.weights("final_norm")))
        return norm

    def head(self) -> Tensor:
        """The matrix [V, H] that makes logits: the embedding where it is tied."""
        name = "embed" if self.spec.tied_head else "head"
        return to_tensor(dict(self.checkpoint.weights(name))[name], self.device, self.dtype)

    def _embed(self, tokens: Tensor) -> None:
        try:
            self._model.base_model(input_ids=tokens.to(self.device), use_cache=False)
        except _Stop:
            return

    def _fill_outside(self, names: tuple[str, ...]) -> None:
        for source in self._sources[-1]:
            name = source.parts[0].name
            if name in names:
                weight = dict(self.checkpoint.weights(name))[name]
                _module_of(self._model, source).weight = self._parameter(weight)

    def _fill_norm(self, norm: nn.Module, source: Source, weights: Mapping[str, Weight]) -> None:
        name = source.parts[0].name
        norm.weight = self._parameter(weights[name], -self.spec.norm_offset)
        if source.bias:
            norm.bias = self._parameter(weights[f"{name}.bias"])

    def _linear(self, name: str, weights: Mapping[str, Weight]) -> nn.Linear:
        rows, columns = weights[name].shape
        bias = weights.get(f"{name}.bias")
        linear = nn.Linear(columns, rows, bias=bias is not None, device="meta")
        linear.weight = self._parameter(weights[name])
        if bias is not None:
            linear.bias = self._parameter(bias)
        return linear

    def _parameter(self, weight: Weight, add: float = 0.0) -> nn.Parameter:
        """A matrix, or the vector that a Weight of one column stands for."""
        values = to_tensor(weight, self.device, torch.float32 if add else self.dtype)
        values = values.flatten() if weight.shape[1] == 1 else values
        return nn.Parameter((values + add if add else values).to(self.dtype), requires_grad=False)


class Joined(nn.Module):
    """Matrices that Transformers keeps as one module, apart: their outputs in the order that it expects."""

    order: Tensor | None

    def __init__(self, parts: list[nn.Linear], order: Tensor | None) -> None:
        super().__init__()
        self.parts = nn.ModuleList(parts)
        self.register_buffer("order", order, persistent=False)

    def forward(self, x: Tensor) -> Tensor:
        joined = torch.cat([part(x) for part in self.parts], dim=-1)
        return joined if self.order is None else joined[..., self.order]


class _Stop(Exception):  # noqa: N818 - no error
    """Nothing behind the recorded layer is to run."""


class _Recorder(nn.Module):
    """Stands in for a decoder layer: keeps what it was called with, and hands its input on."""

    states: Tensor

    def __init__(self, layer: nn.Module) -> None:
        super().__init__()
        self.layer = layer
        self.call: Call = ((), {})
        self.last = False

    def __getattr__(self, name: str) -> Any:
        try:
            return super().__getattr__(name)
        except AttributeError:
            return getattr(super().__getattr__("layer"), name)  # such as attention_type

    def forward(self, x: Tensor, *args: Any, **named: Any) -> Tensor:
        self.states = x
        if not self.call[0] and not self.call[1]:
            self.call = (args, named)
        if self.last:
            raise _Stop
        return x


class _MatricesOnMeta(TorchFunctionMode):
    """New parameters get no memory; buffers, which are computed and not stored, do. Modules make the first with
    torch.empty, the second otherwise."""

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if func is torch.empty and kwargs.get("device") is None:
            kwargs = {**kwargs, "device": "meta"}
        return func(*args, **kwargs)


def _empty_model(checkpoint: Checkpoint, device: torch.device) -> Any:
    text = config_of_text(checkpoint.config)
    text.pop("quantization_config", None)
    config = transformers.CONFIG_MAPPING[text["model_type"]].from_dict(text)
    with _MatricesOnMeta():
        model: Any = transformers.AutoModelForCausalLM.from_config(config)  # type: ignore[no-untyped-call]
    model.eval().requires_grad_(False)
    for module in model.modules():
        for name, buffer in module.named_buffers(recurse=False):
            setattr(module, name, buffer.to(device))
    return model


def _module_of(model: nn.Module, source: Source) -> Any:
    return model.get_output_embeddings() if source.parts[0].name == "head" else model.get_submodule(source.module)  # type: ignore[operator]


def _forget(module: nn.Module) -> None:
    for name, parameter in list(module.named_parameters(recurse=False)):
        setattr(module, name, nn.Parameter(torch.empty_like(parameter, device="meta"), requires_grad=False))


def _order(source: Source, device: torch.device) -> Tensor | None:
    """Where each output of the fused module is among its parts' outputs side by side."""
    rows = np.concatenate([np.arange(source.shape[0])[part.rows] for part in source.parts])
    if np.array_equal(rows, np.arange(len(rows))):
        return None
    return torch.from_numpy(np.argsort(rows)).to(device)
