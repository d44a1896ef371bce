"""generation_config.json and the end-of-sequence ids: how a model's makers want it sampled, as sampling parameters."""

import warnings
from pathlib import Path
from typing import Any

from hasten.errors import ModelError
from hasten.model.jsonfile import read_json

_SAMPLING = ("temperature", "top_k", "top_p", "min_p")
_TRANSFORMERS_TOP_K = 50  # what Transformers takes where a sampling model does not say
# Settings of Transformers' generate that change its tokens and that we do not have; values that change nothing.
_UNSUPPORTED: dict[str, tuple[Any, ...]] = {
    "num_beams": (1, None), "penalty_alpha": (None,), "typical_p": (1.0, None), "epsilon_cutoff": (0.0, None),
    "eta_cutoff": (0.0, None), "no_repeat_ngram_size": (0, None), "encoder_repetition_penalty": (1.0, None),
    "bad_words_ids": (None,), "force_words_ids": (None,), "suppress_tokens": (None, []), "sequence_bias": (None,),
    "begin_suppress_tokens": (None, []), "forced_bos_token_id": (None,), "forced_eos_token_id": (None,),
    "exponential_decay_length_penalty": (None,), "guidance_scale": (1.0, None), "top_h": (None,),
    "min_length": (0, None), "min_new_tokens": (None,), "watermarking_config": (None,), "dola_layers": (None,),
}  # fmt: skip


def generation_defaults(path: str | Path) -> dict[str, Any]:
    """Sampling parameters that generation_config.json sets, by our names, and "eos_token_ids", a set (empty where
    neither it nor config.json names any).

    Without do_sample there are none: such a model is greedy. With it, what is not given is Transformers' own default.
    Raises ModelError for a damaged file; warns of settings that we do not have.
    """
    folder = Path(path)
    generation = read_json(folder / "generation_config.json") or {}
    config = read_json(folder / "config.json") or {}
    text = config.get("text_config")
    named = generation.get("eos_token_id", config.get("eos_token_id"))
    if named is None and isinstance(text, dict):
        named = text.get("eos_token_id")
    found: dict[str, Any] = {"eos_token_ids": _ids(named, folder)}
    for key, harmless in _UNSUPPORTED.items():
        if generation.get(key) not in harmless and key in generation:
            warnings.warn(f"generation_config.json: {key} = {generation[key]!r} is not supported", stacklevel=2)
    if generation.get("repetition_penalty") is not None:
        found["repetition_penalty"] = _real(generation, "repetition_penalty")
    if not generation.get("do_sample"):
        return found
    given = {"temperature": 1.0, "top_k": _TRANSFORMERS_TOP_K, **{k: v for k, v in generation.items() if v is not None}}
    for key in _SAMPLING:
        if key in given:
            found[key] = int(_real(given, key)) if key == "top_k" else _real(given, key)
    return found


def _ids(value: Any, folder: Path) -> set[int]:
    ids = [] if value is None else value if isinstance(value, list) else [value]
    if not all(type(item) is int for item in ids):
        raise ModelError(f"{folder}: eos_token_id is {value!r}, expected a number or a list of numbers")
    return set(ids)


def _real(values: dict[str, Any], key: str) -> float:
    value = values[key]
    if isinstance(value, bool) or not isinstance(value, int | float):
        raise ModelError(f"generation_config.json: {key} is {value!r}, expected a number")
    return float(value)
