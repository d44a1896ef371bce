"""The slow, clear backend in numpy: what others must agree with, and a device for an engine without a compiler.

Computes in float32, one token and one head after the other, so that no result depends on what shares the batch. Knows
the whole of ModelSpec, every Format and the three kinds of KV cache; knows no speed.
"""

from collections.abc import Iterable, Sequence

import numpy as np
from numpy.typing import NDArray

from hasten.backends.base import Batch, DeviceMemory, Float32, Int32, Sampled, SamplingBatch, StepLimits
from hasten.backends.reference_math import activate, choose_experts, layer_norm, rms_norm, rotate, softcap, softmax
from hasten.backends.reference_sampling import sample_rows
from hasten.errors import ModelError, ResourceError
from hasten.hardware import memory_available
from hasten.model.formats import (
    Weight,
    activation_bits,
    dequantize,
    from_bf16,
    product,
    quantize_activations,
    to_bf16,
)
from hasten.model.spec import Layer, ModelSpec

KV_BYTES = {"fp32": 4, "bf16": 2, "int8": 1}


class ReferenceBackend:
    """See backends.base.Backend.

    act_quant: multiply quantised weights by activations rounded to 8 or 16 bits a group, as fast backends do; without
    it quantised weights act as the numbers that they stand for.
    """

    kv_dtypes: tuple[str, ...] = tuple(KV_BYTES)
    overlaps = False
    usual = StepLimits(max_tokens=512, max_sequences=64, max_rows=128)

    def __init__(self, act_quant: bool = False) -> None:
        self._act_quant = act_quant
        self._spec: ModelSpec | None = None
        self._weights: dict[str, Weight] = {}
        self._dense: dict[str, Float32] = {}
        self._cache: list[tuple[_Store, _Store]] = []
        self._block_size = 0

    def beside(self) -> "ReferenceBackend":
        """Another model's backend."""
        return ReferenceBackend(self._act_quant)

    def load(self, spec: ModelSpec, weights: Iterable[tuple[str, Weight]]) -> None:
        """Take the weights, in any order. Raises ModelError for an integer format of a matrix that has none, such as a
        norm's."""
        self._spec = spec
        for name, weight in weights:
            if self._act_quant and weight.scales is not None:
                self._weights[name] = weight
            dense = np.ascontiguousarray(dequantize(weight))
            self._dense[name] = dense[:, 0] if weight.shape[1] == 1 else dense
        if "embed" not in self._dense:
            raise ModelError("the weights hold no 'embed' matrix")
        if spec.tied_head:
            self._dense["head"] = self._dense["embed"]
            if "embed" in self._weights:
                self._weights["head"] = self._weights["embed"]

    def memory(self, limits: StepLimits) -> DeviceMemory:
        """What is free in this machine now."""
        free = memory_available()
        return DeviceMemory(total=free, free=free)

    def block_bytes(self, block_size: int, dtype: str) -> int:
        """Bytes of one KV block over all layers: keys, values and, for int8, a float32 scale a token and head."""
        numbers = sum(layer.num_kv_heads * layer.head_dim for layer in self._model.layers)
        heads = sum(layer.num_kv_heads for layer in self._model.layers)
        return 2 * block_size * (numbers * _kv_bytes(dtype) + (4 * heads if dtype == "int8" else 0))

    def allocate(self, num_blocks: int, block_size: int, dtype: str) -> None:
        """Make the KV cache, all zeros; an earlier one is dropped."""
        _kv_bytes(dtype)
        if block_size < 16 or block_size % 16:
            raise ResourceError(f"KV block size is {block_size}, expected a multiple of 16")
        self._block_size = block_size
        slots = num_blocks * block_size
        self._cache = [
            (
                _Store(slots, layer.num_kv_heads, layer.head_dim, dtype),
                _Store(slots, layer.num_kv_heads, layer.head_dim, dtype),
            )
            for layer in self._model.layers
        ]

    def forward(self, batch: Batch) -> Float32:
        """Run one step; logits float32 [R, vocab_size] of `batch.rows`."""
        spec = self._model
        x = self._embed(batch)
        lengths = np.repeat(batch.context_lens, batch.query_lens)
        tables = np.repeat(batch.block_tables, batch.query_lens, axis=0)
        for index, layer in enumerate(spec.layers):
            x = self._layer(index, layer, x, batch, lengths, tables)
        logits = np.empty((len(batch.rows), spec.vocab_size), np.float32)
        for out, row in zip(logits, batch.rows, strict=True):
            hidden = self._norm("final_norm", x[row])
            out[:] = self._linear("head", hidden) * np.float32(spec.logit_scale)
        return softcap(logits, spec.final_softcap)

    def sample(self, logits: Float32, params: SamplingBatch) -> Sampled:
        """Choose one token a row; see SamplingBatch for the order of its parts."""
        return sample_rows(logits, params)

    def fetch(self, logits: Float32) -> Float32:
        """Themselves: they are on the host."""
        return logits

    def copy_blocks(self, pairs: Sequence[tuple[int, int]]) -> None:
        """Copy KV blocks (source, destination), one pair after the other."""
        size = self._block_size
        for source, destination in pairs:
            for stores in self._cache:
                for store in stores:
                    store.copy(source * size, destination * size, size)

    @property
    def _model(self) -> ModelSpec:
        if self._spec is None:
            raise ModelError("no model is loaded: call load() first")
        return self._spec

    def _embed(self, batch: Batch) -> Float32:
        x = self._dense["embed"][batch.tokens] * np.float32(self._model.embedding_scale)
        if self._model.learned_positions:
            x = x + self._dense["position_embed"][batch.positions]
        return x  # [T, H]

    def _layer(self, index: int, layer: Layer, x: Float32, batch: Batch, lengths: Int32, tables: Int32) -> Float32:
        name = f"layers.{index}"
        queries = np.empty((len(x), layer.num_heads, layer.head_dim), np.float32)
        normed = [self._pre_norm(f"{name}.attn_norm", row) for row in x]
        for t, row in enumerate(normed):
            q, k, v = self._project(name, layer, row, int(batch.positions[t]), int(lengths[t]))
            queries[t] = q
            keys, values = self._cache[index]
            keys.write(int(batch.slots[t]), k)
            values.write(int(batch.slots[t]), v)
        out = np.empty_like(x)
        for t in range(len(x)):
            context = self._attend(index, layer, queries[t], int(batch.positions[t]), tables[t])
            out[t] = self._finish(name, x[t], self._linear(f"{name}.o", context.reshape(-1)))
        return out

    def _finish(self, name: str, x: Float32, attention: Float32) -> Float32:
        """Residual, MLP, residual of one token."""
        spec = self._model
        scale = np.float32(spec.residual_scale)
        added = scale * self._post_norm(f"{name}.attn_post_norm", attention)
        source = x if spec.parallel_residual else x + added
        mlp = self._mlp(name, self._pre_norm(f"{name}.mlp_norm", source))
        mlp = scale * self._post_norm(f"{name}.mlp_post_norm", mlp)
        return mlp + added + x if spec.parallel_residual else source + mlp

    def _project(
        self, name: str, layer: Layer, x: Float32, position: int, length: int
    ) -> tuple[Float32, Float32, Float32]:
        """q [heads, d], k and v [kv_heads, d] of one token; norms, then rotary positions."""
        q, k, v = (self._linear(f"{name}.{matrix}", x) for matrix in "qkv")
        eps = self._model.norm_eps
        q_weight, k_weight = self._dense.get(f"{name}.q_norm"), self._dense.get(f"{name}.k_norm")
        if self._model.qk_norm == "full":
            q, k = rms_norm(q, q_weight, eps), rms_norm(k, k_weight, eps)
        q, k, v = (part.reshape(-1, layer.head_dim) for part in (q, k, v))
        if self._model.qk_norm == "head":
            q, k = rms_norm(q, q_weight, eps), rms_norm(k, k_weight, eps)
        if layer.rope >= 0:
            rope = self._model.ropes[layer.rope]
            q, k = rotate(q, rope, position, length), rotate(k, rope, position, length)
        return q, k, v

    def _attend(self, index: int, layer: Layer, q: Float32, position: int, table: Int32) -> Float32:
        """Attention of one token's query [heads, d] to the cached keys up to its position -> [heads, d]."""
        first = max(0, position + 1 - layer.window) if layer.window else 0
        seen = np.arange(first, position + 1)
        slots = table[seen // self._block_size].astype(np.int64) * self._block_size + seen % self._block_size
        keys, values = (store.read(slots) for store in self._cache[index])  # [S, kv_heads, d]
        group = layer.num_heads // layer.num_kv_heads
        out = np.empty_like(q)
        for head in range(layer.num_heads):
            k, v = keys[:, head // group], values[:, head // group]
            scores = (k * q[head]).sum(axis=1) * np.float32(self._model.attention_scale)
            weights = softmax(softcap(scores, self._model.attention_softcap))
            out[head] = (weights[:, None] * v).sum(axis=0)
        return out

    def _mlp(self, name: str, x: Float32) -> Float32:
        up = self._linear(f"{name}.up", x)
        if self._model.gated_mlp:
            hidden = activate(self._model.activation, self._linear(f"{name}.gate", x)) * up
        else:
            hidden = activate(self._model.activation, up)
        layer = self._model.layers[int(name.split(".")[1])]
        if layer.experts:
            chosen = choose_experts(self._linear(f"{name}.router", x), layer.active_experts)
            hidden = hidden * np.repeat(chosen, len(hidden) // layer.experts)
        return self._linear(f"{name}.down", hidden)

    def _pre_norm(self, name: str, x: Float32) -> Float32:
        return self._norm(name, x) if self._model.pre_norm else x

    def _post_norm(self, name: str, x: Float32) -> Float32:
        return self._norm(name, x) if self._model.post_norm else x

    def _norm(self, name: str, x: Float32) -> Float32:
        weight = self._dense[name]
        if self._model.norm == "layer":
            return layer_norm(x, weight, self._dense[f"{name}.bias"], self._model.norm_eps)
        return rms_norm(x, weight, self._model.norm_eps)

    def _linear(self, name: str, x: Float32) -> Float32:
        """One row x [K] -> [N]: a matrix-vector product each, for BLAS sums a row of a matrix differently."""
        if f"{name}.a" in self._dense:
            return self._linear(f"{name}.b", self._linear(f"{name}.a", x))
        quantised = self._weights.get(name)
        if quantised is None:
            y = self._dense[name] @ x
        else:
            bits = activation_bits(quantised.format, name, self._model.hidden_size)
            y = product(x[None], quantised, bits)[0]
        bias = self._dense.get(f"{name}.bias")
        return y if bias is None else y + bias


class _Store:
    """Keys or values of one layer, [slots, kv_heads, d], as their dtype keeps them."""

    def __init__(self, slots: int, heads: int, head_dim: int, dtype: str) -> None:
        kinds = {"fp32": np.float32, "bf16": np.uint16, "int8": np.int8}
        self._dtype = dtype
        self._data: NDArray[np.generic] = np.zeros((slots, heads, head_dim), kinds[dtype])
        self._scales = np.zeros((slots, heads), np.float32)  # int8 only

    def write(self, slot: int, x: Float32) -> None:
        if self._dtype == "int8":
            self._data[slot], scales = quantize_activations(x, x.shape[1])
            self._scales[slot] = scales[:, 0]
        else:
            self._data[slot] = to_bf16(x) if self._dtype == "bf16" else x

    def read(self, slots: NDArray[np.int64]) -> Float32:
        data = self._data[slots]
        if self._dtype == "int8":
            return data.astype(np.float32) * self._scales[slots][..., None]
        return from_bf16(data.astype(np.uint16)) if self._dtype == "bf16" else data.astype(np.float32)

    def copy(self, source: int, destination: int, count: int) -> None:
        for array in (self._data, self._scales):
            array[destination : destination + count] = array[source : source + count]


def _kv_bytes(dtype: str) -> int:
    if dtype not in KV_BYTES:
        raise ResourceError(f"KV cache dtype {dtype!r} is not supported; supported: {', '.join(KV_BYTES)}")
    return KV_BYTES[dtype]
