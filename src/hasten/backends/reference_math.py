"""The pieces of a decoder layer as pure functions of numpy arrays. Know no weights by name, no cache, no batch."""

import math

import numpy as np

from hasten.backends.base import Float32
from hasten.model.rope import Rope
from hasten.model.spec import Activation

# numpy has no erf: the standard library's, element by element.
_erf = np.vectorize(math.erf, otypes=[np.float64])


def rms_norm(x: Float32, weight: Float32 | None, eps: float) -> Float32:
    """x / root(mean(x^2) + eps) * weight over the last axis (Zhang and Sennrich 2019)."""
    normed: Float32 = x / np.sqrt(np.mean(np.square(x), axis=-1, keepdims=True) + np.float32(eps))
    return normed if weight is None else normed * weight


def layer_norm(x: Float32, weight: Float32, bias: Float32, eps: float) -> Float32:
    """(x - mean) / root(variance + eps) * weight + bias over the last axis (Ba et al. 2016)."""
    centred: Float32 = x - np.mean(x, axis=-1, keepdims=True)
    variance: Float32 = np.mean(np.square(centred), axis=-1, keepdims=True)
    normed: Float32 = centred / np.sqrt(variance + np.float32(eps))
    return normed * weight + bias


def rotate(x: Float32, rope: Rope, position: int, length: int) -> Float32:
    """Rotate heads x [heads, d] of the token at `position` in a sequence that is now `length` long."""
    long = rope.long_inv_freq is not None and length > rope.original_max
    frequencies = rope.long_inv_freq if long and rope.long_inv_freq is not None else rope.inv_freq
    angles = np.float32(position) * frequencies
    cosine, sine = np.cos(angles) * np.float32(rope.scale), np.sin(angles) * np.float32(rope.scale)
    half = rope.rotary_dim // 2
    first, second, rest = x[:, :half], x[:, half : 2 * half], x[:, 2 * half :]
    return np.concatenate([first * cosine - second * sine, second * cosine + first * sine, rest], axis=1)


def activate(kind: Activation, x: Float32) -> Float32:
    """SiLU, exact GELU, or GELU's tanh approximation (Hendrycks and Gimpel 2016)."""
    if kind == "silu":
        with np.errstate(over="ignore"):
            out = x / (1 + np.exp(-x))
    elif kind == "gelu":
        out = 0.5 * x * (1 + _erf(x / math.sqrt(2)))
    else:
        inner = np.float32(math.sqrt(2 / math.pi)) * (x + np.float32(0.044715) * x * x * x)
        out = np.float32(0.5) * x * (1 + np.tanh(inner))
    return np.asarray(out, np.float32)


def softcap(x: Float32, cap: float) -> Float32:
    """cap * tanh(x / cap); 0 is off (Gemma 2)."""
    return x if cap == 0 else np.asarray(np.float32(cap) * np.tanh(x / np.float32(cap)))


def softmax(scores: Float32) -> Float32:
    """Over the last axis, shifted by the maximum."""
    weights: Float32 = np.exp(scores - scores.max(axis=-1, keepdims=True))
    total: Float32 = weights.sum(axis=-1, keepdims=True)
    return weights / total


def choose_experts(scores: Float32, active: int) -> Float32:
    """1 for the experts with the `active` largest scores [E], the first ones where they are equal; 0 for others."""
    chosen = np.zeros_like(scores)
    chosen[np.argsort(-scores, kind="stable")[:active]] = 1
    return chosen
