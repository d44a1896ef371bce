"""The shape of the models that the examples train: a small Llama with tied embeddings."""

import argparse

from torch import nn
from transformers import LlamaConfig, LlamaForCausalLM

BOS = 0  # ends a text, too


def small_llama(args: argparse.Namespace, context: int) -> LlamaForCausalLM:
    """A Llama of the given size, for `context` tokens. What layers add to the residual stream starts at zero, for
    stability."""
    config = LlamaConfig(
        vocab_size=args.vocab_size,
        hidden_size=args.hidden_size,
        intermediate_size=args.intermediate_size,
        num_hidden_layers=args.layers,
        num_attention_heads=args.heads,
        num_key_value_heads=args.kv_heads,
        head_dim=args.hidden_size // args.heads,
        max_position_embeddings=context,
        rope_theta=10000.0,
        tie_word_embeddings=True,
        bos_token_id=BOS,
        eos_token_id=BOS,
        pad_token_id=None,
    )
    model = LlamaForCausalLM(config)
    for layer in model.model.layers:
        nn.init.zeros_(layer.self_attn.o_proj.weight)
        nn.init.zeros_(layer.mlp.down_proj.weight)
    return model
