"""Attention over the paged cache against float64: on a GPU at real sizes, in Triton's interpreter at small ones."""

from dataclasses import replace
from typing import Any

import numpy as np
import torch
from cpu_tools import BLOCK, batch

from hasten.backends.cuda.attention import KV_DTYPES, Attention, HeadNorms, decode_programs, tile_tokens
from hasten.backends.cuda.device import open_device
from hasten.backends.cuda.inputs import Sizes, Stager
from hasten.model.spec import ModelSpec, spec_from_config

TORCH_DTYPES = {"fp32": torch.float32, "fp16": torch.float16, "bf16": torch.bfloat16}
# Relative error, and that of a stored key: a bit of the last place more or less.
TOLERANCE = {"fp32": 1e-5, "fp16": 2e-3, "bf16": 1e-2}
KEY_TOLERANCE = {"fp32": 1e-5, "bf16": 6e-3, "fp8": 6e-2}


def make_spec(heads: int, kv_heads: int, head_dim: int, dtype: str, window: int, softcap: float) -> ModelSpec:
    config = {
        "model_type": "llama", "vocab_size": 8, "hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 1,
        "num_attention_heads": heads, "num_key_value_heads": kv_heads, "head_dim": head_dim, "rms_norm_eps": 1e-5,
        "max_position_embeddings": 131072, "tie_word_embeddings": True, "hidden_act": "silu",
    }  # fmt: skip
    spec = spec_from_config(config)
    layers = tuple(replace(layer, window=window) for layer in spec.layers)
    return replace(spec, dtype=dtype, layers=layers, attention_softcap=softcap)


def check_attention(
    device: str,
    runs: list[tuple[int, int]],
    *,
    heads: int = 4,
    kv_heads: int = 2,
    head_dim: int = 64,
    dtype: str = "bf16",
    kv: str = "bf16",
    window: int = 0,
    softcap: float = 0.0,
    kind: str = "general",
    first_block: int = 0,
    normed: bool = False,
) -> None:
    """Sequences of a filled cache, each of so many tokens of which the last few run now: runs (length, now). kind: how
    the step goes, "general", "decodes", "long" or "runs", see inputs.py. normed: queries and keys are, by the head.
    first_block: what lies before is not touched."""
    handle = open_device(device)
    spec = make_spec(heads, kv_heads, head_dim, dtype, window, softcap)
    rng, generator = np.random.default_rng(1), torch.Generator(handle.handle).manual_seed(1)
    width = -(-max(length for length, _ in runs) // BLOCK)
    blocks = first_block + rng.permutation(len(runs) * width).astype(np.int32)
    tables = blocks.reshape(len(runs), width)
    attention = Attention(handle, spec, first_block + len(blocks), BLOCK, kv)
    cache = attention._caches[0]
    shape = (2, len(blocks), *cache.shape[2:])
    cache[:, first_block:] = torch.randn(shape, generator=generator, device=handle.handle).to(KV_DTYPES[kv])
    slots = cache.transpose(2, 3).view(torch.uint8)
    for (length, _), row in zip(runs, tables, strict=True):  # what no token is at yet may hold anything
        for position in range(length, -(-length // BLOCK) * BLOCK):
            slots[:, int(row[position // BLOCK]), position % BLOCK] = 255  # NaN in every type
    step = batch(
        [(np.zeros(now, np.int32), length - now, row) for (length, now), row in zip(runs, tables, strict=True)]
    )
    num_tokens = len(step.tokens)
    columns = (heads + 2 * kv_heads) * head_dim
    qkv = torch.randn((num_tokens, columns), generator=generator, device=handle.handle).to(TORCH_DTYPES[dtype])
    stager = Stager(handle, BLOCK, tile_tokens(spec), decode_programs(handle, spec), False)
    if kind == "general":
        inputs = stager.general(step)
    else:
        room = num_tokens + 3
        sizes = Sizes(room, room, 0, room, room, kind == "runs", kind == "long")
        buffer = torch.zeros(stager.room(sizes, width), dtype=torch.int32, device=handle.handle)
        inputs = stager.fixed(sizes, width, buffer)
        assert stager.refill(step, sizes, width, buffer)
    given = torch.full((len(inputs.tokens), columns), float("nan"), dtype=qkv.dtype, device=handle.handle)
    given[:num_tokens] = qkv
    torch.empty_like(given[:, : heads * head_dim]).fill_(float("nan"))  # poisons what the next allocation gets
    norms = None
    rows = qkv.double().view(num_tokens, heads + 2 * kv_heads, head_dim)
    if normed:
        weights = torch.rand((2, head_dim), generator=generator, device=handle.handle) + 0.5
        norms = HeadNorms(weights[0], weights[1])
        rows[:, :heads] = _normed(rows[:, :heads], weights[0], spec.norm_eps)
        rows[:, heads : heads + kv_heads] = _normed(rows[:, heads : heads + kv_heads], weights[1], spec.norm_eps)
    got = attention(0, given, inputs, norms)[:num_tokens].double()
    want = _expected(spec, cache, rows, runs, torch.from_numpy(tables).to(handle.handle), KEY_TOLERANCE[kv])
    error = float((got - want).norm() / want.norm())
    assert error < TOLERANCE[dtype], f"relative error {error:.2e}"


def _expected(
    spec: ModelSpec,
    cache: torch.Tensor,
    qkv: torch.Tensor,
    runs: list[tuple[int, int]],
    tables: torch.Tensor,
    near: float,
) -> torch.Tensor:
    """In float64, from what the cache holds after the step; that it holds the step's keys and values is checked."""
    layer = spec.layers[0]
    heads, kv_heads, dim = layer.num_heads, layer.num_kv_heads, layer.head_dim
    outs, first = [], 0
    for (length, now), table in zip(runs, tables, strict=True):
        # As bytes: not every torch indexes 8-bit floats.
        held = (cache[i].view(torch.uint8)[table.long()].view(cache.dtype) for i in (0, 1))
        keys, values = (part.transpose(1, 2).reshape(-1, kv_heads, dim)[:length].double() for part in held)
        rows = qkv[first : first + now]
        positions = torch.arange(length - now, length, device=qkv.device)
        q, k, v = (
            _rotated(rows[:, :heads], positions, spec),
            _rotated(rows[:, heads : heads + kv_heads], positions, spec),
            rows[:, heads + kv_heads :],
        )
        assert float((keys[length - now :] - k).norm() / k.norm()) < near
        assert float((values[length - now :] - v).norm() / v.norm()) < near
        keys, values = (x.repeat_interleave(heads // kv_heads, 1) for x in (keys, values))
        scores = torch.einsum("qhd,khd->hqk", q, keys) * spec.attention_scale
        if spec.attention_softcap:
            scores = spec.attention_softcap * torch.tanh(scores / spec.attention_softcap)
        behind = positions[:, None] - torch.arange(length, device=qkv.device)[None]
        seen = (behind >= 0) & ((behind < layer.window) if layer.window else True)
        outs.append(torch.einsum("hqk,khd->qhd", scores.masked_fill(~seen, float("-inf")).softmax(-1), values))
        first += now
    return torch.cat(outs).reshape(first, heads * dim)


def _normed(x: torch.Tensor, weight: torch.Tensor, eps: float) -> torch.Tensor:
    """x [T, heads, dim], RMS-normed over each head."""
    return x * (x.square().mean(-1, keepdim=True) + eps).rsqrt() * weight


def _rotated(x: torch.Tensor, positions: torch.Tensor, spec: ModelSpec) -> torch.Tensor:
    """x [T, heads, dim], angles in float32 as Transformers has them."""
    angles = positions.float()[:, None] * torch.from_numpy(spec.ropes[0].inv_freq.copy()).to(x.device)[None]
    cosine, sine = (part.double()[:, None] for part in (angles.cos(), angles.sin()))
    left, right = x.chunk(2, -1)
    return torch.cat((left * cosine - right * sine, right * cosine + left * sine), -1)


CASES: dict[str, dict[str, Any]] = {
    "alone": {"runs": [(700, 1)], "kind": "decodes"},
    "few": {"runs": [(1, 1), (16, 1), (17, 1), (300, 1)], "kind": "decodes"},
    "many": {"runs": [(7 * i + 1, 1) for i in range(40)], "kind": "decodes"},
    "long": {"runs": [(3000, 1), (5, 1)], "kind": "long"},
    "crowd": {"runs": [(13 * i % 400 + 1, 1) for i in range(80)], "kind": "decodes"},
    "drafts": {"runs": [(100, 5), (16, 3), (33, 1), (12, 12)], "kind": "runs"},
    "prompts": {"runs": [(150, 150), (64, 1), (65, 65), (300, 40), (18, 1)]},
}
