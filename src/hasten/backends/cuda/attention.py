"""The paged KV cache of every layer, and launches of the attention kernels over it."""

from dataclasses import dataclass
from functools import partial

import torch
import triton

from hasten.backends.cuda.device import Device
from hasten.backends.cuda.inputs import MAX_PROGRAMS, WORK, Inputs
from hasten.backends.cuda.kernels import attention as kernels
from hasten.backends.cuda.kernels.decode import decode
from hasten.backends.cuda.kernels.decode_few import decode_few
from hasten.backends.cuda.tuning import FEW_KEYS, decode_tile, few_tile, prefill_rows, prefill_tile
from hasten.model.rope import Rope
from hasten.model.spec import Layer, ModelSpec

KV_DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp8": torch.float8_e4m3fn}
_FILL = 4  # programs of decode attention for each processor, if keys are cut finely enough
_PREFILL_WARPS = 4


class RopeTable:
    """Cosines and sines of every position, float32 [P, rotary_dim], those for long sequences (if the rope has any)
    in P more rows."""

    def __init__(self, rope: Rope, num_positions: int, device: torch.device) -> None:
        self.rotary_dim = rope.rotary_dim
        self.num_positions = num_positions
        self.original_max = rope.original_max
        self.is_long = rope.long_inv_freq is not None
        sets = [rope.inv_freq] if rope.long_inv_freq is None else [rope.inv_freq, rope.long_inv_freq]
        positions = torch.arange(num_positions, dtype=torch.float32, device=device)[:, None]
        rows = []
        for frequencies in sets:
            angles = positions * torch.from_numpy(frequencies.copy()).to(device)[None]
            rows.append(torch.cat((angles.cos(), angles.sin()), dim=1) * rope.scale)
        self.table = torch.cat(rows).contiguous()


@dataclass(frozen=True)
class HeadNorms:
    """RMS norms over each head of queries and keys, float32 [head_dim]."""

    q: torch.Tensor
    k: torch.Tensor


class Attention:
    """Caches [blocks, kv_heads, block_size, head_dim] and attention over them."""

    def __init__(self, device: Device, spec: ModelSpec, num_blocks: int, block_size: int, dtype: str) -> None:
        self._device = device
        self._spec = spec
        self._block_size = block_size
        positions = min(spec.max_position, num_blocks * block_size)
        self._ropes = [RopeTable(rope, positions, device.handle) for rope in spec.ropes]
        self._caches = [
            torch.zeros(
                (2, num_blocks, layer.num_kv_heads, block_size, layer.head_dim),
                dtype=KV_DTYPES[dtype],
                device=device.handle,
            )
            for layer in spec.layers
        ]
        largest = max(layer.num_kv_heads * _Shape(layer).gq * (_Shape(layer).dp + 2) for layer in spec.layers)
        groups = max(layer.num_heads // _heads_at_once(layer) for layer in spec.layers)
        counted = max(MAX_PROGRAMS * max(layer.num_kv_heads for layer in spec.layers), MAX_PROGRAMS // 2 * groups)
        assert counted <= device.counters.numel(), "a counter for every head of every sequence that is cut into parts"
        self._parts = torch.empty(MAX_PROGRAMS * largest, dtype=torch.float32, device=device.handle)

    def copy_blocks(self, pairs: list[tuple[int, int]]) -> None:
        """Source to destination, one pair after the other; at once where none reads what another writes."""
        if not pairs:
            return
        sources, destinations = zip(*pairs, strict=True)
        rounds = [pairs] if set(sources).isdisjoint(destinations) else [[pair] for pair in pairs]
        for copies in rounds:
            source, destination = torch.tensor(copies, device=self._device.handle).unbind(1)
            for cache in self._caches:
                octets = cache.view(torch.uint8)  # there is no indexing of 8-bit floats
                octets.index_copy_(1, destination, octets.index_select(1, source))

    def __call__(self, index: int, qkv: torch.Tensor, inputs: Inputs, norms: HeadNorms | None) -> torch.Tensor:
        """[T, heads * head_dim] from qkv [T, (heads + 2 kv_heads) * head_dim] of layer `index`; stores keys and values,
        may overwrite qkv."""
        layer = self._spec.layers[index]
        out = torch.empty((len(qkv), layer.num_heads * layer.head_dim), dtype=qkv.dtype, device=qkv.device)
        if not inputs.alone:
            self._store(layer, index, qkv, inputs, norms)
        if inputs.num_decodes:
            self._decode(layer, index, qkv, out, inputs, norms)
        if inputs.tile_tokens is not None and len(inputs.tile_tokens):
            self._prefill(layer, index, qkv, out, inputs)
        return out

    def _rope(self, layer: Layer) -> RopeTable | None:
        return self._ropes[layer.rope] if layer.rope >= 0 else None

    def _store(self, layer: Layer, index: int, qkv: torch.Tensor, inputs: Inputs, norms: HeadNorms | None) -> None:
        shape, rope, cache = _Shape(layer), self._rope(layer), self._caches[index]
        nothing = self._device.workspace
        heads: int = triton.next_power_of_2(layer.num_heads)
        self._device.launch(
            kernels.rope_and_store, (len(qkv),),
            qkv, cache[0], cache[1], rope.table if rope else nothing, norms.q if norms else nothing,
            norms.k if norms else nothing, inputs.positions, inputs.slots, inputs.lengths, qkv.stride(0),
            rope.original_max if rope else 0, rope.num_positions if rope else 0, self._spec.norm_eps,
            HEADS=layer.num_heads, KV_HEADS=layer.num_kv_heads, D=layer.head_dim, DP=shape.dp, HP=heads,
            KP=triton.next_power_of_2(layer.num_kv_heads), ROT=rope.rotary_dim if rope else 0,
            LONG=bool(rope and rope.is_long), NORM=norms is not None, BLOCK=self._block_size,
            num_warps=max(1, min(8, heads * shape.dp // 1024)),
        )  # fmt: skip

    def _decode(
        self,
        layer: Layer,
        index: int,
        qkv: torch.Tensor,
        out: torch.Tensor,
        inputs: Inputs,
        norms: HeadNorms | None,
    ) -> None:
        shape, rope, cache = _Shape(layer), self._rope(layer), self._caches[index]
        nothing, device = self._device.workspace, self._device
        keys, values, sent, received = cache[0], cache[1], qkv, out
        few = inputs.few and _takes_few(layer, rope, qkv, cache)
        if few:  # words of two numbers
            keys, values, sent, received = (tensor.view(torch.int32) for tensor in (keys, values, qkv, out))
        part = _heads_at_once(layer)
        heads = layer.num_heads // part if few else layer.num_kv_heads
        run = partial(
            device.launch, decode_few if few else decode, (heads, len(inputs.work) // WORK),
            sent, keys, values, received, rope.table if rope else nothing, norms.q if norms else nothing,
            norms.k if norms else nothing, self._parts, device.counters, inputs.work, inputs.tables, sent.stride(0),
            rope.original_max if rope else 0, rope.num_positions if rope else 0, self._spec.attention_scale,
            self._spec.attention_softcap, layer.window, self._spec.norm_eps, HEADS=layer.num_heads,
            KV_HEADS=layer.num_kv_heads, D=layer.head_dim, ROT=rope.rotary_dim if rope else 0,
            LONG=bool(rope and rope.is_long), NORM=norms is not None, CAPPED=self._spec.attention_softcap > 0,
            BLOCK=self._block_size,
        )  # fmt: skip
        if few:
            small, words = few_tile(shape.dp), triton.next_power_of_2(layer.head_dim // 2)
            run(PART=part, WP=words, BN=small.keys, AT_ONCE=small.at_once, ASM=device.asm, num_warps=small.warps)
            return
        tile = decode_tile(inputs.num_decodes, shape.dp, cache.itemsize, shape.gq)
        run(
            DP=shape.dp, GP=shape.gp, GQ=shape.gq, BN=tile.keys, FUSED=inputs.alone, EARLY=inputs.alone and tile.early,
            AT_ONCE=tile.at_once, STAGES=tile.stages, num_warps=tile.warps,
        )  # fmt: skip

    def _prefill(self, layer: Layer, index: int, qkv: torch.Tensor, out: torch.Tensor, inputs: Inputs) -> None:
        shape, cache, device = _Shape(layer), self._caches[index], self._device
        assert inputs.tile_tokens is not None
        rows = max(16, triton.next_power_of_2(tile_tokens(self._spec) * shape.gq))
        keys, stages = prefill_tile(rows, shape.dp, qkv.itemsize, cache.itemsize, device.shared)
        device.launch(
            kernels.prefill, (len(inputs.tile_tokens), layer.num_kv_heads),
            qkv, cache[0], cache[1], out, inputs.tile_tokens, inputs.tile_counts, inputs.tile_sequences,
            inputs.positions, inputs.tables, inputs.width, qkv.stride(0), self._spec.attention_scale,
            self._spec.attention_softcap, layer.window, HEADS=layer.num_heads, KV_HEADS=layer.num_kv_heads,
            D=layer.head_dim, DP=shape.dp, GP=shape.gq, CAPPED=self._spec.attention_softcap > 0,
            WINDOWED=layer.window > 0, BLOCK=self._block_size, BM=rows, BN=keys, STAGES=stages, ASM=device.asm,
            num_warps=_PREFILL_WARPS,
        )  # fmt: skip


def _heads_at_once(layer: Layer) -> int:
    """Query heads of a program of decode_few."""
    return 1 if layer.num_heads // layer.num_kv_heads % 2 else 2


def most_few_keys(spec: ModelSpec) -> int:
    """Keys that all sequences of a step together may have for decode_few to be the faster kernel."""
    return FEW_KEYS // max(layer.num_heads // layer.num_kv_heads // _heads_at_once(layer) for layer in spec.layers)


def _takes_few(layer: Layer, rope: RopeTable | None, qkv: torch.Tensor, cache: torch.Tensor) -> bool:
    """Whether decode_few knows such heads."""
    turned = rope.rotary_dim if rope else 0
    return layer.head_dim % 4 == turned % 4 == 0 and qkv.dtype == cache.dtype == torch.bfloat16


class _Shape:
    """Sizes padded to powers of two, dp >= head_dim, gq >= query heads of a KV head; gp: what the tensor cores take."""

    def __init__(self, layer: Layer) -> None:
        self.dp: int = max(16, triton.next_power_of_2(layer.head_dim))
        self.gq: int = triton.next_power_of_2(layer.num_heads // layer.num_kv_heads)
        self.gp: int = max(16, self.gq)


def decode_programs(device: Device, spec: ModelSpec) -> int:
    """Programs of decode attention for each KV head that keep the device busy."""
    heads = min(layer.num_kv_heads for layer in spec.layers)
    return min(MAX_PROGRAMS // 2, max(1, _FILL * device.num_processors // heads))


def tile_tokens(spec: ModelSpec) -> int:
    """Tokens of an attention tile: its rows are tokens times the query heads of a KV head."""
    group: int = max(_Shape(layer).gq for layer in spec.layers)
    size = 4 if spec.dtype == "fp32" else 2
    rows = min(prefill_rows(_Shape(layer).dp * size) for layer in spec.layers)
    return max(1, rows // group)


def block_bytes(spec: ModelSpec, block_size: int, dtype: str) -> int:
    """Bytes of one block of keys and values over all layers."""
    numbers = sum(layer.num_kv_heads * layer.head_dim for layer in spec.layers)
    return 2 * block_size * numbers * KV_DTYPES[dtype].itemsize
