"""The decoder: one step of any ModelSpec as a chain of products, attention and the small kernels between them.

A norm is done by the product that follows where that can (one row), else by the kernel that adds to the residual what
the product before has made; a residual is added by the product where that can (few rows), else with the next norm.
"""

from collections.abc import Iterable, Mapping
from dataclasses import dataclass

import torch

from hasten.backends.cuda.attention import Attention, HeadNorms
from hasten.backends.cuda.device import Device
from hasten.backends.cuda.inputs import Inputs
from hasten.backends.cuda.linear import ACTIVATIONS, Linear
from hasten.backends.cuda.matrix import Norm
from hasten.backends.cuda.ops import NormWeights, Ops
from hasten.model.spec import ModelSpec


@dataclass(frozen=True)
class LayerWeights:
    """gate_up holds only `up` where the MLP is not gated. Norms are None where the model has none there."""

    qkv: Linear
    o: Linear
    gate_up: Linear
    down: Linear
    attn_norm: NormWeights | None
    attn_post_norm: NormWeights | None
    mlp_norm: NormWeights | None
    mlp_post_norm: NormWeights | None
    q_norm: torch.Tensor | None
    k_norm: torch.Tensor | None


@dataclass(frozen=True)
class Weights:
    """All of a model on the device. embed, position_embed: dense, in the dtype that activations have."""

    embed: torch.Tensor
    position_embed: torch.Tensor | None
    layers: list[LayerWeights]
    final_norm: NormWeights
    head: Linear


@dataclass(frozen=True)
class Hidden:
    """The residual x [T, H], and delta [T, H] that is still to be added to it (by `post`, if that is a norm)."""

    x: torch.Tensor
    delta: torch.Tensor | None = None
    post: NormWeights | None = None


@dataclass(frozen=True)
class _Normed:
    """What a product is given: rows, and how to read them (see Linear.__call__)."""

    x: torch.Tensor
    scales: torch.Tensor | None = None
    norm: Norm | None = None


class Decoder:
    """Runs steps. sampled int32: what the last step chose, see ops.embed."""

    def __init__(self, device: Device, ops: Ops, spec: ModelSpec, weights: Weights, sampled: torch.Tensor) -> None:
        self.device = device
        self._ops = ops
        self._spec = spec
        self._weights = weights
        self._sampled = sampled
        self.attention: Attention | None = None

    def __call__(self, inputs: Inputs) -> torch.Tensor:
        """Logits float32 [R, V]."""
        return self.logits(self.hidden(inputs), inputs.rows)

    @property
    def num_weights(self) -> int:
        """Numbers in the layers' matrices."""
        return sum(
            linear.num_weights
            for layer in self._weights.layers
            for linear in (layer.qkv, layer.o, layer.gate_up, layer.down)
        )

    def shapes(self) -> list[Linear]:
        """One product of each kind and shape among those that one kernel does, the head last."""
        found: dict[tuple[object, ...], Linear] = {}
        for layer in self._weights.layers:
            for linear in (layer.qkv, layer.o, layer.gate_up, layer.down):
                if linear.is_whole:
                    found.setdefault((*linear.matrices[0].layout, linear.gated), linear)
        return [*found.values(), self._weights.head]

    def products(self) -> list[Linear]:
        """One of each kind and shape among the layers', those of several matrices too."""
        found: dict[tuple[object, ...], Linear] = {}
        for layer in self._weights.layers:
            for linear in (layer.qkv, layer.o, layer.gate_up, layer.down):
                layouts = tuple(matrix.layout for matrix in linear.matrices)
                found.setdefault((linear.n, linear.k, linear.gated, *layouts), linear)
        return list(found.values())

    def limit_rows(self, few_rows: Mapping[str, int]) -> None:
        """Up to how many rows our own kernels do the layers' plain products, by Matrix.stored, in place of what is
        usual. For factors and experts more than speed decides which kernel runs."""
        for layer in self._weights.layers:
            for linear in (layer.qkv, layer.o, layer.gate_up, layer.down):
                if type(linear) is Linear:
                    linear.few_rows = few_rows

    def warm_products(self) -> None:
        """Have libraries make what they keep for a thread and a stream."""
        x = torch.zeros((64, 64), dtype=self._weights.embed.dtype, device=self.device.handle)
        torch.nn.functional.linear(x, x)
        if x.dtype != torch.float32:
            torch.mm(x, x, out_dtype=torch.float32)
        if self.device.fp8_products:
            one = torch.ones(64, 1, device=self.device.handle)
            y = x.to(torch.float8_e4m3fn)
            torch._scaled_mm(y, y.t(), one, one.t(), out_dtype=torch.bfloat16)

    def hidden(self, inputs: Inputs) -> Hidden:
        """All layers, without the last norm and the head."""
        return self._through(range(len(self._weights.layers)), inputs)

    def rehearse(self, inputs: Inputs, rows: torch.Tensor | None) -> torch.Tensor:
        """For Device.rehearse: launch each kernel of a step, with two layers of each kind, for the first is given no
        delta."""
        kinds: dict[tuple[object, ...], list[int]] = {}
        for index, (layer, found) in enumerate(zip(self._spec.layers, self._weights.layers, strict=True)):
            linears = (found.qkv, found.o, found.gate_up, found.down)
            layouts = tuple(matrix.layout for linear in linears for matrix in linear.matrices)
            kinds.setdefault((layer, layouts), []).append(index)
        chosen = sorted(index for alike in kinds.values() for index in alike[:2])
        return self.logits(self._through(chosen, inputs), rows)

    def _through(self, indices: Iterable[int], inputs: Inputs) -> Hidden:
        """The embedding and these layers."""
        spec, weights = self._spec, self._weights
        assert self.attention is not None
        x = self._ops.embed(
            weights.embed, weights.position_embed, inputs.tokens, inputs.sources, self._sampled, inputs.positions,
            spec.embedding_scale,
        )  # fmt: skip
        hidden = Hidden(x)
        for index in indices:
            hidden = self._layer(index, weights.layers[index], hidden, inputs)
        return hidden

    def _layer(self, index: int, layer: LayerWeights, hidden: Hidden, inputs: Inputs) -> Hidden:
        spec = self._spec
        assert self.attention is not None
        x, normed = self._normed(hidden, layer.attn_norm, layer.qkv)
        qkv = layer.qkv(normed.x, x_scales=normed.scales, norm=normed.norm, dtype=x.dtype)
        norms = None
        if layer.q_norm is not None and layer.k_norm is not None:
            if spec.qk_norm == "head":
                norms = HeadNorms(layer.q_norm, layer.k_norm)
            else:
                width = len(layer.q_norm)
                self._ops.norm_in_place(qkv[:, :width], layer.q_norm)
                self._ops.norm_in_place(qkv[:, width : width + len(layer.k_norm)], layer.k_norm)
        attended = self.attention(index, qkv, inputs, norms)
        after = self._added(layer.o, attended, x, layer.attn_post_norm)
        if spec.parallel_residual:
            # x + attention + mlp(norm(x)): the MLP reads what the attention read.
            _, normed = self._normed(Hidden(x), layer.mlp_norm, layer.gate_up)
            after = self._settled(after)
            return self._added(layer.down, self._mlp(layer, normed, x.dtype), after.x, layer.mlp_post_norm)
        x, normed = self._normed(after, layer.mlp_norm, layer.gate_up)
        return self._added(layer.down, self._mlp(layer, normed, x.dtype), x, layer.mlp_post_norm)

    def _mlp(self, layer: LayerWeights, normed: _Normed, dtype: torch.dtype) -> torch.Tensor | tuple[torch.Tensor, ...]:
        """What `down` multiplies: rows, or (rows of 8 bits, scales)."""
        activation, eight = self._spec.activation, layer.down.takes_eight(len(normed.x))
        if layer.gate_up.fuses_residual(len(normed.x)) or eight is None:
            return layer.gate_up(normed.x, x_scales=normed.scales, norm=normed.norm, activation=activation, dtype=dtype)
        raw = layer.gate_up(normed.x, x_scales=normed.scales, norm=normed.norm, dtype=dtype)
        return self._ops.activate_eight(raw, ACTIVATIONS[activation], layer.gate_up.gated, eight)

    def _added(
        self, linear: Linear, given: torch.Tensor | tuple[torch.Tensor, ...], x: torch.Tensor, post: NormWeights | None
    ) -> Hidden:
        """x + residual_scale * post(linear(given)), at once or left to whoever reads it next."""
        rows, scales = given if isinstance(given, tuple) else (given, None)
        if post is None and linear.fuses_residual(len(rows)):
            scale = self._spec.residual_scale
            return Hidden(linear(rows, x_scales=scales, residual=x, scale=scale, dtype=x.dtype))
        return Hidden(x, linear(rows, x_scales=scales, dtype=x.dtype), post)

    def _settled(self, hidden: Hidden) -> Hidden:
        if hidden.delta is None:
            return hidden
        x, _, _ = self._ops.add_norm(hidden.x, hidden.delta, hidden.post, None, self._spec.residual_scale)
        return Hidden(x)

    def _normed(self, hidden: Hidden, norm: NormWeights | None, linear: Linear) -> tuple[torch.Tensor, _Normed]:
        """The residual with all added, and its norm as `linear` takes it."""
        rows = len(hidden.x)
        if norm is None:
            x = self._settled(hidden).x
            return x, _Normed(x)
        if hidden.delta is None and self._spec.norm == "rms" and linear.fuses_norm(rows, hidden.x.dtype, norm.weight):
            return hidden.x, _Normed(hidden.x, norm=Norm(norm.weight, self._spec.norm_eps))
        eight = linear.takes_eight(rows)
        x, normed, scales = self._ops.add_norm(
            hidden.x, hidden.delta, hidden.post, norm, self._spec.residual_scale, eight
        )
        return x, _Normed(normed, scales)

    def logits(self, hidden: Hidden, rows: torch.Tensor | None) -> torch.Tensor:
        """Logits float32 of these rows, or of all."""
        spec, weights = self._spec, self._weights
        if rows is not None:
            delta = None if hidden.delta is None else hidden.delta.index_select(0, rows)
            hidden = Hidden(hidden.x.index_select(0, rows), delta, hidden.post)
        if len(hidden.x) == 0:
            return torch.empty((0, spec.vocab_size), dtype=torch.float32, device=hidden.x.device)
        _, normed = self._normed(hidden, weights.final_norm, weights.head)
        logits = weights.head(
            normed.x, x_scales=normed.scales, norm=normed.norm, scale=spec.logit_scale, dtype=torch.float32
        )
        if spec.final_softcap:
            logits = spec.final_softcap * torch.tanh(logits / spec.final_softcap)
        return logits
