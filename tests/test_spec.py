"""config.json -> ModelSpec: against Transformers' own classes, in old and new spellings, and what is refused."""

import dataclasses
import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import tiny_models

from hasten.errors import ModelError
from hasten.model.families import FAMILIES, known_keys
from hasten.model.spec import ModelSpec, spec_from_config

CLASSES = {
    "llama": "LlamaConfig", "mistral": "MistralConfig", "qwen2": "Qwen2Config", "qwen3": "Qwen3Config",
    "smollm3": "SmolLM3Config", "phi3": "Phi3Config", "olmo2": "Olmo2Config", "granite": "GraniteConfig",
    "gemma2": "Gemma2Config", "gemma3_text": "Gemma3TextConfig", "gpt2": "GPT2Config", "gpt_neox": "GPTNeoXConfig",
}  # fmt: skip


def equal(a: Any, b: Any) -> bool:
    if dataclasses.is_dataclass(a):
        return type(a) is type(b) and all(equal(getattr(a, f.name), getattr(b, f.name)) for f in dataclasses.fields(a))
    if isinstance(a, tuple):
        return len(a) == len(b) and all(equal(x, y) for x, y in zip(a, b, strict=True))
    return np.array_equal(a, b) if isinstance(a, np.ndarray) else a == b


@pytest.mark.parametrize("name", FAMILIES)
def test_defaults_and_keys_are_those_of_transformers(name: str) -> None:
    transformers = pytest.importorskip("transformers")
    written = getattr(transformers, CLASSES[name])()
    config = json.loads(written.to_json_string(use_diff=False))
    base = {field.name for field in dataclasses.fields(transformers.PreTrainedConfig)}
    own = {field.name for field in dataclasses.fields(written)} - base
    ignored = {key for key in own if key not in known_keys(FAMILIES[name])}
    assert not ignored, "keys that Transformers reads and we neither read, guard nor know to be harmless"
    assert equal(spec_from_config({"model_type": name}), spec_from_config(config))


@pytest.mark.parametrize("name", [n for n in tiny_models.FAMILIES if "gpt2" not in n])
def test_rope_frequencies_are_those_of_transformers(name: str) -> None:
    pytest.importorskip("torch")
    model = tiny_models.make(name, num_hidden_layers=4) if name != "gemma3" else tiny_models.make(name)
    spec = spec_from_config(json.loads(model.config.to_json_string(use_diff=False)))
    buffers = {key.rsplit(".", 1)[-1]: value.numpy() for key, value in model.named_buffers() if "inv_freq" in key}
    names = ["inv_freq"] if "inv_freq" in buffers else ["full_attention_inv_freq", "sliding_attention_inv_freq"]
    for rope, key in zip(spec.ropes, names, strict=True):
        np.testing.assert_allclose(rope.inv_freq, buffers[key], rtol=3e-7)


def old(name: str, **changes: Any) -> ModelSpec:
    base = {"model_type": name, "hidden_size": 64, "num_attention_heads": 4, "head_dim": 16, "num_hidden_layers": 4}
    return spec_from_config({**base, "num_key_value_heads": 2, "max_position_embeddings": 8192, **changes})


def test_transformers_4_spellings() -> None:
    new = {"rope_type": "llama3", "rope_theta": 5e5, "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0,
           "original_max_position_embeddings": 8192}  # fmt: skip
    scaling = {("type" if key == "rope_type" else key): value for key, value in new.items() if key != "rope_theta"}
    a = old("llama", rope_theta=5e5, rope_scaling=scaling, torch_dtype="bfloat16")
    b = old("llama", rope_parameters=new, dtype="bfloat16")
    assert equal(a, b)
    assert a.dtype == "bf16"
    assert equal(
        old("llama", rope_theta=5e5, rope_scaling=None), old("llama", rope_parameters={"rope_theta": 5e5}, head_dim=16)
    )
    sets = {"full_attention": {"rope_type": "linear", "factor": 8.0, "rope_theta": 1e6},
            "sliding_attention": {"rope_type": "default", "rope_theta": 1e4}}  # fmt: skip
    assert equal(
        old(
            "gemma3_text", rope_theta=1e6, rope_local_base_freq=1e4, rope_scaling={"rope_type": "linear", "factor": 8.0}
        ),
        old("gemma3_text", rope_parameters=sets),
    )
    assert equal(
        old("gpt_neox", rotary_pct=0.5, rotary_emb_base=1e5),
        old("gpt_neox", rope_parameters={"partial_rotary_factor": 0.5, "rope_theta": 1e5}),
    )
    assert equal(
        spec_from_config({"model_type": "gpt2", "n_embd": 64, "n_head": 4, "n_layer": 2, "n_positions": 32}),
        spec_from_config({"model_type": "gpt2", "hidden_size": 64, "num_attention_heads": 4, "num_hidden_layers": 2,
                          "max_position_embeddings": 32, "n_inner": 256}),
    )  # fmt: skip


def test_windows() -> None:
    def windows(name: str, **changes: Any) -> list[int]:
        return [layer.window for layer in old(name, **changes).layers]

    assert windows("mistral", sliding_window=100) == [100] * 4
    assert windows("mistral", sliding_window=None) == [0] * 4
    assert windows("mistral", sliding_window=8192) == [0] * 4, "a window as long as any sequence is none"
    assert windows("qwen2", use_sliding_window=False, sliding_window=100, max_window_layers=1) == [0] * 4
    assert windows("qwen2", use_sliding_window=True, sliding_window=100, max_window_layers=1) == [0, 100, 100, 100]
    assert windows("gemma2", sliding_window=100) == [100, 0, 100, 0]
    assert windows("gemma3_text", sliding_window=100, sliding_window_pattern=3) == [100, 100, 0, 100]
    kinds = ["full_attention", "sliding_attention"] * 2
    assert windows("gemma3_text", sliding_window=100, layer_types=kinds) == [0, 100, 0, 100]
    assert [layer.rope for layer in old("gemma3_text", layer_types=kinds).layers] == [0, 1, 0, 1]
    assert [layer.rope for layer in old("smollm3").layers] == [0, 0, 0, -1]
    assert [layer.rope for layer in old("smollm3", no_rope_layers=[1, 0, 1, 0]).layers] == [0, -1, 0, -1]


def test_multimodal_gemma3_is_its_text_part() -> None:
    text = {"model_type": "gemma3_text", "hidden_size": 64, "num_attention_heads": 4, "num_hidden_layers": 6}
    outer = {"model_type": "gemma3", "text_config": text, "vision_config": {"hidden_size": 9}, "eos_token_id": [1, 106],
             "torch_dtype": "bfloat16"}  # fmt: skip
    spec = spec_from_config(outer)
    assert (spec.family, spec.eos_token_ids, spec.dtype, spec.tied_head) == ("gemma3_text", (1, 106), "bf16", True)
    with pytest.raises(ModelError, match="no text_config"):
        spec_from_config({"model_type": "gemma3"})


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"model_type": "mixtral"}, "architecture 'mixtral' is not supported; supported: llama, mistral"),
        ({"model_type": None}, "architecture None is not supported"),
        ({"hidden_act": "relu"}, "activation 'relu' is not supported; supported: silu"),
        ({"rope_parameters": {"rope_type": "spiral"}}, "rope type 'spiral' is not supported; supported: default"),
        ({"rope_scaling": {"type": "linear"}}, "rope parameter factor is None"),
        ({"rope_parameters": {"full_attention": {"rope_type": "default"}}}, "each type of layer"),
        ({"partial_rotary_factor": 0.5}, "partial_rotary_factor 0.5 is not supported"),
        ({"hidden_size": 65, "head_dim": None}, "hidden_size 65 is not a multiple"),
        ({"num_key_value_heads": 3}, "num_attention_heads 4 is not a multiple of num_key_value_heads 3"),
        ({"num_hidden_layers": 0}, "num_hidden_layers is 0, expected a positive"),
        ({"vocab_size": "many"}, "vocab_size is 'many'"),
        ({"head_dim": 2**33}, "head_dim is 8589934592, expected at most 65536"),
        ({"head_dim": None, "hidden_size": 2**30}, "head_dim is 268435456, expected at most 65536"),
        ({"hidden_size": 10**400}, "hidden_size is 10+, expected at most 2147483647"),
        ({"num_hidden_layers": 10**9}, "num_hidden_layers is 1000000000, expected at most 16384"),
        ({"rms_norm_eps": 10**400}, "rms_norm_eps is 1000"),
        ({"rope_parameters": {"rope_theta": 10**400}}, "rope_theta is 1000"),
        ({"model_type": "gpt_neox", "rotary_pct": 1e30}, "partial_rotary_factor|rotary dimension"),
        ({"rms_norm_eps": float("nan")}, "rms_norm_eps is nan"),
        ({"model_type": "granite", "attention_multiplier": -0.1}, "attention_multiplier is -0.1, expected a positive"),
        ({"model_type": "gemma2", "query_pre_attn_scalar": 0}, "query_pre_attn_scalar is 0, expected a positive"),
        ({"dtype": "float8_e4m3fn"}, "dtype 'float8_e4m3fn' is not supported"),
        ({"eos_token_id": "</s>"}, "eos_token_id is '</s>'"),
        ({"is_encoder_decoder": True}, "is_encoder_decoder = True is not supported"),
        ({"per_layer_config": {"0": {}}}, "per_layer_config"),
        ({"architectures": ["LlamaForSequenceClassification"]}, "does not generate text"),
        ({"model_type": "gpt2", "scale_attn_by_inverse_layer_idx": True}, "scale_attn_by_inverse_layer_idx = True"),
        ({"model_type": "gemma3_text", "attn_logit_softcapping": 50.0}, "attn_logit_softcapping"),
        ({"model_type": "gemma2", "use_bidirectional_attention": True}, "use_bidirectional_attention"),
        ({"model_type": "qwen2", "layer_types": ["sliding_attention"] * 4}, "no sliding window in use"),
        ({"model_type": "gemma2", "layer_types": ["chunked_attention"] * 4}, "chunked_attention"),
        ({"model_type": "gemma2", "layer_types": ["full_attention"]}, "must list 4 layers"),
        (
            {"model_type": "phi3", "rope_scaling": {"type": "su", "short_factor": [1], "long_factor": [1]}},
            "short_factor",
        ),
    ],
)
def test_what_is_refused(changes: dict[str, Any], message: str) -> None:
    with pytest.raises(ModelError, match=message.replace("(", r"\(")):
        old(**{"name": "llama", **{("name" if key == "model_type" else key): v for key, v in changes.items()}})


def test_unknown_rope_parameters_are_not_dropped_in_silence() -> None:
    with pytest.warns(UserWarning, match="mrope_section"):
        old("llama", rope_parameters={"rope_theta": 1e4, "mrope_section": [1, 2, 3]})


def test_import_is_light() -> None:
    import subprocess
    import sys

    code = (
        "import sys, hasten.model.spec, hasten.model.checkpoint, hasten.model.writer, hasten.model.tokenizer, "
        "hasten.model.hub, hasten.model.formats; "
        "heavy = {'torch', 'transformers', 'tokenizers', 'huggingface_hub', 'jinja2'} & set(sys.modules); "
        "assert not heavy, heavy"
    )
    source = Path(__file__).parents[1] / "src"
    subprocess.run([sys.executable, "-c", code], check=True, env={"PYTHONPATH": str(source)})
