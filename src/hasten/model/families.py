"""The table of supported architectures: a row of features and config-key readers per `model_type`.

A row's `defaults` are those of Transformers' configuration class, which config.json may leave out. Every key that
Transformers reads for a family is here either read, guarded (only the named values are accepted) or listed as harmless;
a test holds this against the installed Transformers.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any, Literal

from hasten.errors import ModelError

Config = Mapping[str, Any]

SLIDING, FULL = "sliding_attention", "full_attention"

# Keys that change no logits: training, generation defaults (read elsewhere), class metadata.
HARMLESS = frozenset({
    "transformers_version", "architectures", "output_hidden_states", "output_attentions", "return_dict",
    "chunk_size_feed_forward", "id2label", "label2id", "num_labels", "problem_type", "initializer_range",
    "use_cache", "pad_token_id", "attention_dropout", "resid_pdrop", "embd_pdrop", "attn_pdrop", "hidden_dropout",
    "classifier_dropout", "pretraining_tp", "is_decoder", "summary_type", "summary_use_proj", "summary_activation",
    "summary_proj_to_labels", "summary_first_dropout", "reorder_and_upcast_attn"
})  # fmt: skip
COMMON = frozenset({
    "model_type", "dtype", "torch_dtype", "bos_token_id", "eos_token_id", "tie_word_embeddings", "vocab_size",
    "hidden_size", "num_hidden_layers", "num_attention_heads", "num_key_value_heads", "head_dim",
    "max_position_embeddings", "quantization_config", "rope_parameters", "rope_scaling", "rope_theta",
    "partial_rotary_factor", "original_max_position_embeddings"
})  # fmt: skip
GUARDS: Mapping[str, tuple[Any, ...]] = {
    "is_encoder_decoder": (False, None),
    "add_cross_attention": (False, None),
    "use_bidirectional_attention": (False, None),
    "per_layer_config": (None, {}, []),
}

LLAMA_DEFAULTS: Config = {
    "vocab_size": 32000, "hidden_size": 4096, "intermediate_size": 11008, "num_hidden_layers": 32,
    "num_attention_heads": 32, "hidden_act": "silu", "max_position_embeddings": 2048, "rms_norm_eps": 1e-6,
    "bos_token_id": 1, "eos_token_id": 2, "tie_word_embeddings": False,
}  # fmt: skip
QWEN_DEFAULTS: Config = {
    "vocab_size": 151936, "hidden_size": 4096, "intermediate_size": 22016, "num_hidden_layers": 32,
    "num_attention_heads": 32, "num_key_value_heads": 32, "hidden_act": "silu", "max_position_embeddings": 32768,
    "rms_norm_eps": 1e-6, "use_sliding_window": False, "sliding_window": 4096, "max_window_layers": 28,
    "tie_word_embeddings": False,
}  # fmt: skip
GEMMA_DEFAULTS: Config = {
    "vocab_size": 256000, "hidden_size": 2304, "intermediate_size": 9216, "num_hidden_layers": 26,
    "num_attention_heads": 8, "num_key_value_heads": 4, "head_dim": 256, "hidden_activation": "gelu_pytorch_tanh",
    "max_position_embeddings": 8192, "rms_norm_eps": 1e-6, "bos_token_id": 2, "eos_token_id": 1,
    "tie_word_embeddings": True, "query_pre_attn_scalar": 256, "sliding_window": 4096,
    "final_logit_softcapping": 30.0, "attn_logit_softcapping": 50.0,
}  # fmt: skip

ATTENTION_BIASES = dict.fromkeys("qkvo", "attention_bias")
MLP_BIASES = dict.fromkeys(("gate", "up", "down"), "mlp_bias")
QKV_BIASES = dict.fromkeys("qkv", True)
ALL_BIASES = dict.fromkeys(("q", "k", "v", "o", "up", "down"), True)


def _no_window(config: Config, layer: int) -> int:
    return 0


def _same_window(config: Config, layer: int) -> int:
    return window_size(config) if config.get("sliding_window") is not None else 0


def _qwen_window(config: Config, layer: int) -> int:
    on = bool(config.get("use_sliding_window")) and config.get("sliding_window") is not None
    late = layer >= config.get("max_window_layers", 0)
    return _typed_window(config, layer, SLIDING if on and late else FULL, on)


def _smollm3_window(config: Config, layer: int) -> int:
    on = bool(config.get("use_sliding_window")) and config.get("sliding_window") is not None
    return _typed_window(config, layer, SLIDING if on and not smollm3_has_rope(config, layer) else FULL, on)


def _gemma2_window(config: Config, layer: int) -> int:
    return _typed_window(config, layer, FULL if layer % 2 else SLIDING, True)


def _gemma3_window(config: Config, layer: int) -> int:
    return _typed_window(config, layer, gemma3_layer_type(config, layer), True)


def _typed_window(config: Config, layer: int, otherwise: str, on: bool) -> int:
    if layer_type(config, layer, otherwise) == FULL:
        return 0
    if not on:
        raise ModelError(f"layer_types[{layer}] is {SLIDING}, but the configuration has no sliding window in use")
    return window_size(config)


def window_size(config: Config) -> int:
    size = config.get("sliding_window")
    if isinstance(size, bool) or not isinstance(size, int) or size < 1:
        raise ModelError(f"sliding_window is {size!r}, expected a positive whole number")
    return size


def layer_type(config: Config, layer: int, otherwise: str) -> str:
    """`layer_types[layer]`, or `otherwise` where config.json has no such list."""
    kinds = config.get("layer_types")
    if kinds is None:
        return otherwise
    if not isinstance(kinds, list) or len(kinds) != config["num_hidden_layers"]:
        raise ModelError(f"layer_types must list {config['num_hidden_layers']} layers, found {kinds!r:.80}")
    if kinds[layer] not in (SLIDING, FULL):
        raise ModelError(f"layer_types[{layer}] is {kinds[layer]!r}; supported: {FULL}, {SLIDING}")
    return str(kinds[layer])


def smollm3_has_rope(config: Config, layer: int) -> bool:
    """`no_rope_layers` holds 1 where a layer *has* rotary positions."""
    flags = config.get("no_rope_layers")
    if flags is None:
        return (layer + 1) % int(config.get("no_rope_layer_interval", 4)) != 0
    if not isinstance(flags, list) or len(flags) < config["num_hidden_layers"]:
        raise ModelError(f"no_rope_layers must list {config['num_hidden_layers']} layers, found {flags!r:.80}")
    return bool(flags[layer])


def gemma3_layer_type(config: Config, layer: int) -> str:
    pattern = int(config.get("sliding_window_pattern") or 6)
    return layer_type(config, layer, SLIDING if (layer + 1) % pattern else FULL)


def _one_rope(config: Config) -> list[dict[str, Any]]:
    """Values that Transformers 4 kept beside `rope_scaling`, under those of the dictionary; GPT-NeoX has its own names.
    Of the two original lengths the one outside the dictionary counts, as in Transformers (Phi-3 keeps it there)."""
    names = {
        "rope_theta": ("rotary_emb_base", "rope_theta"),
        "partial_rotary_factor": ("rotary_pct", "partial_rotary_factor"),
    }
    found = {key: next((config[n] for n in spelt if config.get(n) is not None), None) for key, spelt in names.items()}
    given = config.get("rope_scaling") or config.get("rope_parameters") or {}
    merged = {**{key: value for key, value in found.items() if value is not None}, **given}
    if config.get("original_max_position_embeddings") is not None:
        merged["original_max_position_embeddings"] = config["original_max_position_embeddings"]
    return [merged]


def _no_rope(config: Config) -> list[dict[str, Any]]:
    return []


def _gemma3_ropes(config: Config) -> list[dict[str, Any]]:
    """Global layers, then sliding ones: Transformers 5 names both, 4 scales the global ones and gives two bases."""
    nested = config.get("rope_parameters") or {}
    full = {"rope_theta": config.get("rope_theta", 1e6), **(nested.get(FULL) or {})}
    sliding = {"rope_theta": config.get("rope_local_base_freq", 1e4), **(nested.get(SLIDING) or {})}
    return [{**full, **(config.get("rope_scaling") or {})}, sliding]


def _first_rope(config: Config, layer: int) -> int:
    return 0


def _head_scale(config: Config, head_dim: int) -> float:
    return float(head_dim**-0.5)


def _query_scale(config: Config, head_dim: int) -> float:
    return float(float(config["query_pre_attn_scalar"]) ** -0.5)


def root_hidden(config: Config) -> float:
    return float(config["hidden_size"] ** 0.5)


@dataclass(frozen=True, slots=True)
class Family:
    """One architecture. See ModelSpec for what the features mean.

    layout: how its checkpoints name and fuse tensors (model/names.py). biases: which matrices have one: always, or
    where a config key says so. aliases: config keys that the family spells differently. keys: config keys read beyond
    COMMON and `defaults`. guards: keys that must have one of the given values, because another would change results.
    """

    defaults: Config
    layout: Literal["llama", "phi3", "gpt2", "gpt_neox"] = "llama"
    norm: Literal["rms", "layer"] = "rms"
    eps_key: str = "rms_norm_eps"
    norm_offset: float = 0.0
    pre_norm: bool = True
    post_norm: bool = False
    qk_norm: Literal["none", "head", "full"] = "none"
    activation_key: str = "hidden_act"
    gated_mlp: bool = True
    learned_positions: bool = False
    default_theta: float = 10000.0
    partial_rotary: bool = False
    rope_aliases: Mapping[str, str] = field(default_factory=dict)
    own_head_dim: bool = True
    rope_sets: Callable[[Config], list[dict[str, Any]]] = _one_rope
    rope_index: Callable[[Config, int], int] = _first_rope
    window: Callable[[Config, int], int] = _no_window
    attention_scale: Callable[[Config, int], float] = _head_scale
    embedding_scale: Callable[[Config], float] | None = None
    biases: Mapping[str, str | bool] = field(default_factory=dict)
    aliases: Mapping[str, str] = field(default_factory=dict)
    keys: frozenset[str] = frozenset()
    guards: Mapping[str, tuple[Any, ...]] = field(default_factory=dict)


FAMILIES: Mapping[str, Family] = {
    "llama": Family(
        LLAMA_DEFAULTS,
        biases={**ATTENTION_BIASES, **MLP_BIASES},
    ),
    "mistral": Family(
        {**LLAMA_DEFAULTS, "intermediate_size": 14336, "num_key_value_heads": 8, "max_position_embeddings": 131072,
         "sliding_window": 4096},
        window=_same_window,
    ),
    "qwen2": Family(
        QWEN_DEFAULTS,
        window=_qwen_window,
        biases=QKV_BIASES,
        keys=frozenset({"layer_types"}),
    ),
    "qwen3": Family(
        {**QWEN_DEFAULTS, "head_dim": 128},
        qk_norm="head",
        window=_qwen_window,
        biases=ATTENTION_BIASES,
        keys=frozenset({"layer_types"}),
    ),
    "smollm3": Family(
        {**LLAMA_DEFAULTS, "vocab_size": 128256, "hidden_size": 2048, "num_hidden_layers": 36,
         "num_attention_heads": 16, "num_key_value_heads": 4, "max_position_embeddings": 32768,
         "bos_token_id": 128000, "eos_token_id": 128001,
         "tie_word_embeddings": True},
        default_theta=2000000.0,
        rope_index=lambda config, layer: 0 if smollm3_has_rope(config, layer) else -1,
        window=_smollm3_window,
        biases={**ATTENTION_BIASES, **MLP_BIASES},
        keys=frozenset({"use_sliding_window", "sliding_window", "no_rope_layers", "no_rope_layer_interval",
                        "layer_types"}),
    ),
    "phi3": Family(
        {**LLAMA_DEFAULTS, "vocab_size": 32064, "hidden_size": 3072, "intermediate_size": 8192, "rms_norm_eps": 1e-5,
         "max_position_embeddings": 4096, "original_max_position_embeddings": 4096, "eos_token_id": 32000},
        layout="phi3",
        partial_rotary=True,
        rope_aliases={"su": "longrope", "yarn": "longrope"},
        window=_same_window,
        keys=frozenset({"sliding_window"}),
    ),
    "olmo2": Family(
        {**LLAMA_DEFAULTS, "vocab_size": 50304, "rms_norm_eps": 1e-5, "bos_token_id": None, "eos_token_id": 50279},
        pre_norm=False,
        post_norm=True,
        qk_norm="full",
        biases=ATTENTION_BIASES,
    ),
    "granite": Family(
        {**LLAMA_DEFAULTS, "embedding_multiplier": 1.0, "logits_scaling": 1.0, "residual_multiplier": 1.0,
         "attention_multiplier": 1.0},
        attention_scale=lambda config, head_dim: float(config["attention_multiplier"]),
        embedding_scale=lambda config: float(config["embedding_multiplier"]),
        biases={**ATTENTION_BIASES, **MLP_BIASES},
    ),
    "gemma2": Family(
        GEMMA_DEFAULTS,
        norm_offset=1.0,
        post_norm=True,
        activation_key="hidden_activation",
        window=_gemma2_window,
        attention_scale=_query_scale,
        embedding_scale=root_hidden,
        biases=ATTENTION_BIASES,
        keys=frozenset({"layer_types"}),
    ),
    "gemma3_text": Family(
        {**GEMMA_DEFAULTS, "vocab_size": 262208, "max_position_embeddings": 131072, "final_logit_softcapping": None,
         "attn_logit_softcapping": None},
        norm_offset=1.0,
        post_norm=True,
        qk_norm="head",
        activation_key="hidden_activation",
        rope_sets=_gemma3_ropes,
        rope_index=lambda config, layer: int(gemma3_layer_type(config, layer) == SLIDING),
        window=_gemma3_window,
        attention_scale=_query_scale,
        embedding_scale=root_hidden,
        biases=ATTENTION_BIASES,
        keys=frozenset({"layer_types", "sliding_window_pattern", "rope_local_base_freq"}),
        guards={"attn_logit_softcapping": (None,)},  # Transformers reads the key and does not apply it
    ),
    "gpt2": Family(
        {"vocab_size": 50257, "hidden_size": 768, "num_hidden_layers": 12, "num_attention_heads": 12,
         "max_position_embeddings": 1024, "activation_function": "gelu_new", "layer_norm_epsilon": 1e-5,
         "bos_token_id": 50256, "eos_token_id": 50256, "tie_word_embeddings": True},
        layout="gpt2",
        norm="layer",
        eps_key="layer_norm_epsilon",
        activation_key="activation_function",
        gated_mlp=False,
        learned_positions=True,
        rope_sets=_no_rope,
        rope_index=lambda config, layer: -1,
        own_head_dim=False,
        biases=ALL_BIASES,
        aliases={"n_embd": "hidden_size", "n_layer": "num_hidden_layers", "n_head": "num_attention_heads",
                 "n_positions": "max_position_embeddings", "n_inner": "intermediate_size"},
        guards={"scale_attn_weights": (True,), "scale_attn_by_inverse_layer_idx": (False,)},
    ),
    "gpt_neox": Family(
        {"vocab_size": 50432, "hidden_size": 6144, "num_hidden_layers": 44, "num_attention_heads": 64,
         "intermediate_size": 24576, "hidden_act": "gelu", "max_position_embeddings": 2048, "layer_norm_eps": 1e-5,
         "bos_token_id": 0, "eos_token_id": 2, "tie_word_embeddings": False, "use_parallel_residual": True,
         "attention_bias": True, "rotary_pct": 0.25},
        layout="gpt_neox",
        norm="layer",
        eps_key="layer_norm_eps",
        gated_mlp=False,
        partial_rotary=True,
        own_head_dim=False,
        biases={**ATTENTION_BIASES, "up": True, "down": True},
        keys=frozenset({"rotary_emb_base"}),
    ),
}  # fmt: skip


def family_of(model_type: object) -> Family:
    """The row of a model_type. Raises ModelError naming what is supported."""
    if model_type in FAMILIES:
        return FAMILIES[str(model_type)]
    raise ModelError(
        f"architecture {model_type!r} is not supported; supported: {', '.join(FAMILIES)} (and the text part of gemma3)"
    )


def known_keys(family: Family) -> frozenset[str]:
    """Every config key that is read, guarded or known to be harmless for a family."""
    read = COMMON | set(family.defaults) | family.keys | set(family.aliases)
    read |= {value for value in family.biases.values() if isinstance(value, str)}
    return frozenset(read | HARMLESS | set(GUARDS) | set(family.guards))
