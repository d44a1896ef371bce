"""Tiny random Transformers models of every family, written to disk as a user would have them.

Sizes are odd on purpose (hidden 72, intermediate 172, a vocabulary that is no multiple of anything), heads are grouped,
biases and norm weights are random rather than zeros and ones, windows are shorter than the tests' prompts, so that a
feature that is left out shows in the logits.
"""

from pathlib import Path
from typing import Any

VOCAB = 307  # 256 bytes and 51 merged or special tokens

PAIRS = (
    "th", "he", "in", "er", "an", "re", "on", "at", "en", "nd", "ti", "es", "or", "te", "of", "ed", "is", "it",
    "al", "ar", "st", "to", "nt", "ng", "se", "ha", "as", "ou", "io", "le",
)  # fmt: skip

COMMON: dict[str, Any] = {
    "vocab_size": VOCAB,
    "hidden_size": 72,
    "intermediate_size": 172,
    "num_hidden_layers": 3,
    "num_attention_heads": 6,
    "num_key_value_heads": 2,
    "max_position_embeddings": 256,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "pad_token_id": None,
}
LLAMA3_ROPE = {
    "rope_type": "llama3", "rope_theta": 500000.0, "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0,
    "original_max_position_embeddings": 64,
}  # fmt: skip
LONG_FACTORS = {"short_factor": [1.0, 1.1, 1.3], "long_factor": [1.0, 2.0, 4.5]}

# name -> (configuration class, model class, changes to COMMON)
FAMILIES: dict[str, tuple[str, str, dict[str, Any]]] = {
    "llama": ("LlamaConfig", "LlamaForCausalLM", {}),
    "llama_bias": ("LlamaConfig", "LlamaForCausalLM", {"attention_bias": True, "mlp_bias": True, "head_dim": 16}),
    "llama3": ("LlamaConfig", "LlamaForCausalLM", {"rope_parameters": LLAMA3_ROPE, "tie_word_embeddings": True}),
    "llama_linear": ("LlamaConfig", "LlamaForCausalLM", {
        "rope_parameters": {"rope_type": "linear", "rope_theta": 10000.0, "factor": 2.5}}),
    "llama_dynamic": ("LlamaConfig", "LlamaForCausalLM", {
        "rope_parameters": {"rope_type": "dynamic", "rope_theta": 10000.0, "factor": 2.0}}),
    "llama_yarn": ("LlamaConfig", "LlamaForCausalLM", {
        "rope_parameters": {"rope_type": "yarn", "rope_theta": 10000.0, "factor": 4.0,
                            "original_max_position_embeddings": 64}}),
    "mistral": ("MistralConfig", "MistralForCausalLM", {"sliding_window": 20, "head_dim": 16}),
    "qwen2": ("Qwen2Config", "Qwen2ForCausalLM", {"tie_word_embeddings": True}),
    "qwen2_window": ("Qwen2Config", "Qwen2ForCausalLM", {
        "use_sliding_window": True, "sliding_window": 17, "max_window_layers": 1}),
    "qwen3": ("Qwen3Config", "Qwen3ForCausalLM", {"head_dim": 32}),
    "smollm3": ("SmolLM3Config", "SmolLM3ForCausalLM", {"num_hidden_layers": 5, "no_rope_layer_interval": 2}),
    "phi3": ("Phi3Config", "Phi3ForCausalLM", {"pad_token_id": 0, "sliding_window": 30}),
    "phi3_longrope": ("Phi3Config", "Phi3ForCausalLM", {
        "pad_token_id": 0, "original_max_position_embeddings": 48,
        "rope_parameters": {"rope_type": "longrope", "rope_theta": 10000.0, "partial_rotary_factor": 0.5,
                            **LONG_FACTORS}}),
    "olmo2": ("Olmo2Config", "Olmo2ForCausalLM", {}),
    "granite": ("GraniteConfig", "GraniteForCausalLM", {
        "embedding_multiplier": 6.0, "logits_scaling": 3.0, "residual_multiplier": 0.22, "attention_multiplier": 0.2,
        "tie_word_embeddings": True}),
    "gemma2": ("Gemma2Config", "Gemma2ForCausalLM", {
        "head_dim": 16, "sliding_window": 16, "query_pre_attn_scalar": 20, "attn_logit_softcapping": 5.0,
        "final_logit_softcapping": 8.0, "num_hidden_layers": 4}),
    "gemma3": ("Gemma3TextConfig", "Gemma3ForCausalLM", {
        "head_dim": 16, "sliding_window": 16, "query_pre_attn_scalar": 20, "num_hidden_layers": 4,
        "layer_types": ["sliding_attention", "sliding_attention", "full_attention", "sliding_attention"],
        "rope_parameters": {
            "full_attention": {"rope_type": "linear", "factor": 8.0, "rope_theta": 1000000.0},
            "sliding_attention": {"rope_type": "default", "rope_theta": 10000.0}}}),
    "gpt2": ("GPT2Config", "GPT2LMHeadModel", {}),
    "gpt_neox": ("GPTNeoXConfig", "GPTNeoXForCausalLM", {
        "rope_parameters": {"rope_type": "default", "rope_theta": 10000.0, "partial_rotary_factor": 0.5}}),
    "gpt_neox_serial": ("GPTNeoXConfig", "GPTNeoXForCausalLM", {"use_parallel_residual": False}),
}  # fmt: skip


def build(family: str, path: Path, seed: int = 0, dtype: str = "float32", **changes: Any) -> Path:
    """Write a model folder with a tokenizer; the same arguments give the same bytes. `changes` go to the configuration.

    Returns `path`. Needs torch and transformers.
    """
    import torch

    model = make(family, seed, **changes)
    model.to(getattr(torch, dtype)).save_pretrained(path)
    write_tokenizer(path)
    return path


def make(family: str, seed: int = 0, **changes: Any) -> Any:
    """The Transformers model itself, float32, in evaluation mode."""
    import torch
    import transformers

    config_class, model_class, own = FAMILIES[family]
    settings = {**COMMON, **own, **changes}
    if config_class.startswith("GPT"):
        settings.pop("num_key_value_heads")
    if config_class == "GPT2Config":
        settings["n_inner"] = settings.pop("intermediate_size")
    torch.manual_seed(seed)
    model = getattr(transformers, model_class)(getattr(transformers, config_class)(**settings))
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if parameter.ndim == 1:  # norms and biases: away from the ones and zeros of a fresh model
                parameter.add_(0.3 * torch.randn_like(parameter))
            elif "embed" not in name and "wte" not in name and "wpe" not in name:
                parameter.normal_(0, 1.5 / parameter.shape[1] ** 0.5)
            else:
                parameter.normal_(0, 0.5)
    return model.eval()


def write_tokenizer(path: Path) -> None:
    """A byte-level BPE tokenizer of VOCAB tokens with <s>, </s> and a chat template, as tokenizer.json."""
    import json

    from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers

    letters = sorted(pre_tokenizers.ByteLevel.alphabet())
    vocab = {token: index for index, token in enumerate(["<unk>", "<s>", "</s>", *letters])}
    merges: list[tuple[str, str]] = []
    for pair in PAIRS:
        vocab[pair] = len(vocab)
        merges.append((pair[0], pair[1]))
    for left, right in (("Ġ", "th"), ("Ġ", "a"), ("th", "e"), ("Ġ", "to"), ("in", "g"), ("an", "d"), ("Ġ", "of")):
        vocab[left + right] = len(vocab)
        merges.append((left, right))
    for index in range(VOCAB - len(vocab)):
        vocab[f"<extra_{index}>"] = len(vocab)
    tokenizer = Tokenizer(models.BPE(vocab=vocab, merges=merges, unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.add_special_tokens([AddedToken(t, special=True, normalized=False) for t in ("<unk>", "<s>", "</s>")])
    tokenizer.save(str(path / "tokenizer.json"))
    template = (
        "{% for m in messages %}{{ '<s>' + m['role'] + ': ' + m['content'] + '</s>\n' }}{% endfor %}"
        "{% if add_generation_prompt %}{{ '<s>assistant: ' }}{% endif %}"
    )
    settings = {
        "tokenizer_class": "PreTrainedTokenizerFast", "bos_token": "<s>", "eos_token": "</s>", "unk_token": "<unk>",
        "clean_up_tokenization_spaces": False, "chat_template": template,
    }  # fmt: skip
    (path / "tokenizer_config.json").write_text(json.dumps(settings, indent=2))
