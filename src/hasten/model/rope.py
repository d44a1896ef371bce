"""Rotary position embeddings: what config.json says of them -> the frequencies of each pair of dimensions.

Knows the spellings of Transformers 4 (`rope_theta`, `rope_scaling`) and 5 (`rope_parameters`); knows nothing of layers.
Exponents are taken in float32 and powers in double, so that frequencies are within one unit in the last place of those
that PyTorch computes; angles grow with the position, and so does any difference.
"""

import math
import warnings
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from hasten.errors import ModelError

ROPE_TYPES = ("default", "linear", "dynamic", "llama3", "yarn", "longrope")
_KNOWN_KEYS = {
    "rope_type", "type", "rope_theta", "partial_rotary_factor", "factor", "original_max_position_embeddings",
    "attention_factor", "beta_fast", "beta_slow", "low_freq_factor", "high_freq_factor", "mscale", "mscale_all_dim",
    "truncate", "short_factor", "long_factor",
}  # fmt: skip


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


def rope_from_parameters(
    parameters: Mapping[str, Any],
    *,
    head_dim: int,
    max_position: int,
    default_theta: float = 10000.0,
    partial: bool = False,
    aliases: Mapping[str, str] | None = None,
) -> Rope:
    """Frequencies for one set of rope parameters (Transformers' `rope_parameters`, missing keys defaulted).

    partial: whether the family rotates only the first `partial_rotary_factor` of each head. aliases: other names of
    rope types in this family. Raises ModelError for a rope type or value that is not supported.

    "dynamic" NTK scaling changes nothing up to max_position, and no request may be longer: it is the default there.
    """
    kind = str(parameters.get("rope_type") or parameters.get("type") or "default")
    kind = (aliases or {}).get(kind, kind)
    if kind not in ROPE_TYPES:
        raise ModelError(f"rope type {kind!r} is not supported; supported: {', '.join(ROPE_TYPES)}")
    unknown = sorted(set(parameters) - _KNOWN_KEYS)
    if unknown:
        warnings.warn(
            f"config.json: rope parameters {', '.join(unknown)} are not known and have no effect", stacklevel=2
        )
    theta = _number(parameters, "rope_theta", default_theta)
    share = _number(parameters, "partial_rotary_factor", 1.0)
    if share != 1.0 and not partial:
        raise ModelError(f"partial_rotary_factor {share} is not supported for this architecture, only 1")
    dim = int(head_dim * share)
    if dim <= 0 or dim + dim % 2 > head_dim or (dim % 2 and kind == "yarn"):
        raise ModelError(f"rotary dimension {dim} of head_dim {head_dim} is not supported, expected an even part of it")
    # An odd dimension (GPT-NeoX with small heads) rotates one more, as in Transformers; the exponents keep to `dim`.
    width = dim + dim % 2
    powers = np.float64(theta) ** (np.arange(0, dim, 2, dtype=np.float32) / np.float32(dim)).astype(np.float64)
    inv_freq = np.float32(1.0) / powers.astype(np.float32)
    original = int(_number(parameters, "original_max_position_embeddings", max_position))
    if kind == "linear":
        return Rope(width, inv_freq / np.float32(_factor(parameters)))
    if kind == "llama3":
        return Rope(width, _llama3(inv_freq, parameters, original))
    if kind == "yarn":
        return _yarn(inv_freq, parameters, theta, max_position, original)
    if kind == "longrope":
        return _longrope(powers, parameters, max_position, original)
    if kind == "dynamic":
        _factor(parameters)
    return Rope(width, inv_freq)


def _number(parameters: Mapping[str, Any], key: str, default: float | None = None) -> float:
    value = parameters.get(key)
    if value is None:
        value = default
    if isinstance(value, bool) or not isinstance(value, int | float) or not 0 < value < 1e38:
        raise ModelError(f"rope parameter {key} is {value!r:.80}, expected a positive number")
    return float(value)


def _factor(parameters: Mapping[str, Any]) -> float:
    return _number(parameters, "factor")


def _llama3(inv_freq: NDArray[np.float32], parameters: Mapping[str, Any], original: int) -> NDArray[np.float32]:
    """Llama 3.1: long wavelengths are stretched by `factor`, short ones kept, those between interpolated."""
    factor = _factor(parameters)
    low, high = _number(parameters, "low_freq_factor"), _number(parameters, "high_freq_factor")
    if high <= low:
        raise ModelError(f"rope high_freq_factor {high} is not above low_freq_factor {low}")
    wavelength = np.float32(2 * math.pi) / inv_freq
    smooth = (np.float32(original) / wavelength - np.float32(low)) / np.float32(high - low)
    stretched = inv_freq / np.float32(factor)
    middle = (1 - smooth) * stretched + smooth * inv_freq
    scaled = np.where(wavelength > original / low, stretched, middle)
    return np.where(wavelength < original / high, inv_freq, scaled).astype(np.float32)


def _yarn(
    inv_freq: NDArray[np.float32], parameters: Mapping[str, Any], theta: float, max_position: int, original: int
) -> Rope:
    """YaRN (Peng et al. 2023): a ramp between interpolated and original frequencies, and a temperature on attention."""
    dim = 2 * len(inv_freq)
    factor = _number(parameters, "factor", max_position / original)
    beta_fast, beta_slow = (parameters.get(key) or default for key, default in (("beta_fast", 32), ("beta_slow", 1)))

    def turns_to_dim(turns: float) -> float:
        return dim * math.log(original / (turns * 2 * math.pi)) / (2 * math.log(theta))

    low, high = turns_to_dim(beta_fast), turns_to_dim(beta_slow)
    if parameters.get("truncate", True):
        low, high = math.floor(low), math.ceil(high)
    low, high = max(low, 0), min(high, dim - 1)
    if low == high:
        high += 0.001
    ramp = np.clip((np.arange(dim // 2, dtype=np.float32) - np.float32(low)) / np.float32(high - low), 0, 1)
    interpolated = inv_freq / np.float32(factor)
    scaled = (interpolated * ramp + inv_freq * (1 - ramp)).astype(np.float32)
    return Rope(dim, scaled, scale=_yarn_scale(parameters, factor))


def _yarn_scale(parameters: Mapping[str, Any], factor: float) -> float:
    if parameters.get("attention_factor") is not None:
        return _number(parameters, "attention_factor")

    def mscale(weight: float) -> float:
        return 1.0 if factor <= 1 else 0.1 * weight * math.log(factor) + 1.0

    if parameters.get("mscale") and parameters.get("mscale_all_dim"):
        return mscale(_number(parameters, "mscale")) / mscale(_number(parameters, "mscale_all_dim"))
    return mscale(1.0)


def _longrope(powers: NDArray[np.float64], parameters: Mapping[str, Any], max_position: int, original: int) -> Rope:
    """LongRoPE (Ding et al. 2024): a factor for each frequency, one set for short and one for long sequences."""
    half = len(powers)
    short, long = (_factors(parameters, key, half) for key in ("short_factor", "long_factor"))
    factor = _number(parameters, "factor", max_position / original)
    if parameters.get("attention_factor") is not None:
        scale = _number(parameters, "attention_factor")
    else:
        scale = 1.0 if factor <= 1 else math.sqrt(1 + math.log(factor) / math.log(original))
    base = powers.astype(np.float32)
    one = np.float32(1)
    return Rope(2 * half, one / (short * base), scale=scale, long_inv_freq=one / (long * base), original_max=original)


def _factors(parameters: Mapping[str, Any], key: str, length: int) -> NDArray[np.float32]:
    values = parameters.get(key)
    if not isinstance(values, list) or len(values) != length or not all(isinstance(v, int | float) for v in values):
        raise ModelError(f"rope parameter {key} must be a list of {length} numbers, found {values!r:.80}")
    return np.asarray(values, np.float32)
