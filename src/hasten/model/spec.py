"""An architecture as data: config.json -> ModelSpec, by a table of families rather than a class per family.

Knows nothing of files or devices. The canonical weight names that the rest of hasten uses:

    embed [V, H] · position_embed [P, H] · final_norm [H] (+ .bias) · head [V, H] (absent where tied) (+ head.bias)
    layers.{i}.{q,k,v,o,gate,up,down}            matrices [N, K]; + `.bias` [N]; `gate` absent in an ungated MLP
    layers.{i}.{attn_norm,attn_post_norm,mlp_norm,mlp_post_norm}   vectors [H] (+ .bias for layernorm)
    layers.{i}.{q_norm,k_norm}                   [head_dim], or the full width where qk_norm is "full"

Matrices come as formats.Weight; vectors too, with shape (n, 1) and kind fp32.
"""

from dataclasses import dataclass
from typing import Literal

import numpy as np
from numpy.typing import NDArray


@dataclass(frozen=True, slots=True, eq=False)
class Rope:
    """Rotary positions, half-split pairing (x[i], x[i + rotary_dim / 2]): Su et al. 2021, as Hugging Face stores it.

    inv_freq: float32 [rotary_dim / 2], scaling already applied (llama3, linear, yarn, longrope).
    scale: multiplies cos and sin (yarn, longrope). long_inv_freq is used once a sequence's length exceeds original_max
    (Phi-3 longrope); None elsewhere.
    """

    rotary_dim: int
    inv_freq: NDArray[np.float32]
    scale: float = 1.0
    long_inv_freq: NDArray[np.float32] | None = None
    original_max: int = 0


@dataclass(frozen=True, slots=True)
class Layer:
    """One decoder layer's own widths. rope: index into ModelSpec.ropes, or -1 for none. window: a query at position p sees
    keys p - window + 1 .. p; 0 means all."""

    num_heads: int
    num_kv_heads: int
    head_dim: int
    intermediate_size: int
    rope: int = 0
    window: int = 0


@dataclass(frozen=True, slots=True, eq=False)
class ModelSpec:
    """A decoder-only transformer, described. `family` is config.json's model_type, for messages only: nothing branches on it.

    norm: "rms" or "layer". norm_offset: added to norm weights (Gemma stores w - 1); the loader adds it, so backends never do.
    pre_norm / post_norm: norms before, and after (before the residual is added), each of attention and MLP.
    parallel_residual: x + attn(norm1 x) + mlp(norm2 x) (GPT-NeoX).
    qk_norm: "none"; "head", an RMS norm over each head's dims (Qwen3, Gemma 3); "full", over all heads at once (OLMo-2). Before rope.
    attention_scale multiplies q.k. softcaps: c * tanh(x / c), 0 is off. residual_scale multiplies what is added to the residual.
    embedding_scale multiplies embeddings; logit_scale multiplies logits (before the soft cap).
    """

    family: str
    vocab_size: int
    hidden_size: int
    max_position: int
    layers: tuple[Layer, ...]
    ropes: tuple[Rope, ...]
    norm: Literal["rms", "layer"]
    norm_eps: float
    norm_offset: float
    pre_norm: bool
    post_norm: bool
    parallel_residual: bool
    qk_norm: Literal["none", "head", "full"]
    activation: Literal["silu", "gelu", "gelu_tanh"]
    gated_mlp: bool
    learned_positions: bool
    attention_scale: float
    attention_softcap: float
    final_softcap: float
    embedding_scale: float
    residual_scale: float
    logit_scale: float
    tied_head: bool
    dtype: Literal["fp32", "fp16", "bf16"]
    bos_token_id: int | None = None
    eos_token_ids: tuple[int, ...] = ()
