"""A model's decoder blocks one at a time: Transformers' own layers, filled with a checkpoint's weights as they are due.

The Transformers model is built without memory for its matrices. Calibration tokens run once through its embedding; each
layer is then filled, changed by whoever asks, run on what the (changed) layers before it gave, and dropped. How a layer
is called (masks, rotary positions, which differ by layer in some families) is recorded from the model itself. Modules
that Transformers fuses or transposes are put apart, so that every matrix is a Linear of its own. Knows no method
(gptq.py, ...) and no recipe.
"""

import copy
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field, replace
from typing import Any, cast

import numpy as np
import torch
from torch import Tensor, nn

from hasten.backends.torch.load import empty_model, fill_norm, make_linear, make_parameter, module_of
from hasten.backends.torch.modules import install
from hasten.backends.torch.tensors import TORCH_DTYPES, to_tensor, to_weight
from hasten.model.checkpoint import Checkpoint
from hasten.model.formats import Format, Weight
from hasten.model.names import layer_sources, sources
from hasten.model.spec import Layer, ModelSpec

Call = tuple[tuple[Any, ...], dict[str, Any]]

_BATCH_TOKENS = {"cpu": 2048}  # of one run of a block on the device
_MOST_TOKENS = 16384  # elsewhere


@dataclass(eq=False)
class Block:
    """One decoder block in memory. Changing `linears` and `norms` changes what it computes; `reshape` its form.

    module: Transformers' decoder layer. linears: by role (q, k, v, o, gate, up, down), each with a weight [N, K].
    norms: by role (attn_norm, ...); the model adds spec.norm_offset to their weights. stored: matrices that have their
    final form already; their linears hold the numbers that these stand for. config: the model's. scales: k_scale and
    v_scale, of a cache of 8-bit floats: the checkpoint's, or new ones. found: matrices that the checkpoint does not
    store in the model's dtype.
    """

    index: int
    layer: Layer
    spec: ModelSpec
    module: nn.Module
    linears: dict[str, nn.Linear]
    norms: dict[str, nn.Module]
    call: Call
    stored: dict[str, Weight] = field(default_factory=dict)
    config: Mapping[str, Any] = field(default_factory=dict)
    scales: dict[str, Weight] = field(default_factory=dict)
    found: dict[str, Weight] = field(default_factory=dict)

    def __call__(self, x: Tensor) -> Tensor:
        """Hidden states [b, T, H] -> those that the block gives."""
        args, named = self.call
        out = self.module(x, *args, **named)
        return cast(Tensor, out[0] if isinstance(out, tuple) else out)

    def name(self, role: str) -> str:
        """The canonical name of a role's weight."""
        return f"layers.{self.index}.{role}"

    def reshape(self, layer: Layer, linears: dict[str, nn.Linear]) -> None:
        """Give the block other ranks, or experts, and the matrices that go with them."""
        self.layer, self.linears = layer, linears
        install(self.module, layer, layer_sources(self.spec, self.config, self.index, layer), linears)

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
        for name, scale in self.scales.items():
            yield self.name(name), scale

    def settle(self) -> None:
        """Round what is not stored to numbers of the model's dtype: what runs is what is written. Matrices that were
        quantised, and that nothing changed, stay so."""
        for role, was in self.found.items():
            now = self.linears[role].weight if role in self.linears and role not in self.stored else None
            if now is not None and torch.equal(now, to_tensor(was, now.device, now.dtype)):
                self.stored[role] = was
        kept = {id(self.linears[role].weight) for role in self.stored}
        for parameter in self.module.parameters():
            if id(parameter) not in kept:
                parameter.data = parameter.data.to(TORCH_DTYPES[self.spec.dtype]).to(parameter.dtype)
        for norm in self.norms.values():  # kept with the offset added, which swallows what is tiny beside it
            weight, offset = cast(Tensor, norm.weight), self.spec.norm_offset
            weight.data = (weight.float() + offset - offset).to(weight.dtype)


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
        self._model = empty_model(checkpoint, self.device).requires_grad_(False)
        children = dict(self._model.base_model.named_children())
        (self._layers,) = [child for child in children.values() if isinstance(child, nn.ModuleList)]
        every = sources(self.spec, checkpoint.config)
        self._outside = [source for source in every if not source.parts[0].name.startswith("layers.")]
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
        for source in self._outside:
            _forget(module_of(self._model, source))
        return Inputs(states, self.device, batch_size)

    def block(self, index: int, weights: Mapping[str, Weight] | None = None, layer: Layer | None = None) -> Block:
        """The block on the device, with these weights by canonical name, and this form, or the checkpoint's. `inputs`
        must have been asked for."""
        # Copies: views of the files, read again after the checkpoint has let go of them, would stay in memory for good.
        found = self.checkpoint.weights(f"layers.{index}.") if weights is None else ()
        weights = weights or {name: replace(weight, data=np.array(weight.data)) for name, weight in found}
        module = copy.deepcopy(self._layers[index])
        layer = layer or self.spec.layers[index]
        block = Block(index, layer, self.spec, module, {}, {}, self._calls[index], config=self.checkpoint.config)
        for name, scale in self.checkpoint.kv_scales(f"layers.{index}."):
            block.scales[name.rpartition(".")[2]] = scale
        parts = list(layer_sources(self.spec, self.checkpoint.config, index, layer))
        for source in parts:
            if source.role == "norm":
                norm = module.get_submodule(source.module.split(f".{index}.", 1)[1])
                fill_norm(norm, self.spec, source, weights, self.dtype, self.device)
                block.norms[source.parts[0].name.split(".", 2)[2]] = norm
                continue
            for part in source.parts:
                role = part.name.split(".", 2)[2]
                block.linears[role] = make_linear(part.name, weights, self.dtype, self.device)
                if weights[part.name].format != Format(self.spec.dtype):
                    block.found[role] = weights[part.name]
        install(module, layer, parts, block.linears)
        module.requires_grad_(False)
        return block

    def final_norm(self) -> nn.Module:
        """The norm behind the last block, filled."""
        (source,) = [source for source in self._outside if source.parts[0].name == "final_norm"]
        norm: nn.Module = copy.deepcopy(module_of(self._model, source))
        fill_norm(norm, self.spec, source, dict(self.checkpoint.weights("final_norm")), self.dtype, self.device)
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
        for source in self._outside:
            name = source.parts[0].name
            if name in names:
                weight = dict(self.checkpoint.weights(name))[name]
                values = make_parameter(weight, self.dtype, self.device)
                module_of(self._model, source).weight = values.requires_grad_(False)


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


def _forget(module: nn.Module) -> None:
    for name, parameter in list(module.named_parameters(recurse=False)):
        setattr(module, name, nn.Parameter(torch.empty_like(parameter, device="meta"), requires_grad=False))
