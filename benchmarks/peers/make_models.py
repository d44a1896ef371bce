"""Makes the benchmark models: real shapes with seeded random weights, as Hugging Face folders in bf16.

Speed does not depend on the values of weights; text from these models is noise. The tokenizer is a small byte-level BPE
that every peer can convert; prompts are token ids, so it takes no part in what is measured.
"""

import sys
import sysconfig
from pathlib import Path

import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import (
    GenerationConfig,
    LlamaConfig,
    LlamaForCausalLM,
    PreTrainedModel,
    PreTrainedTokenizerFast,
    Qwen3Config,
    Qwen3ForCausalLM,
)

SPECIAL_IDS = {"bos_token_id": 0, "eos_token_id": 0, "pad_token_id": 0}


def llama_15m() -> PreTrainedModel:
    """The shape of stories15M (llama2.c): 15,191,712 parameters."""
    config = LlamaConfig(
        hidden_size=288,
        num_hidden_layers=6,
        num_attention_heads=6,
        num_key_value_heads=6,
        intermediate_size=768,
        vocab_size=32000,
        max_position_embeddings=2048,
        tie_word_embeddings=True,
        **SPECIAL_IDS,
    )
    return LlamaForCausalLM(config)


def qwen3_06b() -> PreTrainedModel:
    """The shape of Qwen3-0.6B: 596,049,920 parameters."""
    config = Qwen3Config(
        hidden_size=1024,
        num_hidden_layers=28,
        num_attention_heads=16,
        num_key_value_heads=8,
        head_dim=128,
        intermediate_size=3072,
        vocab_size=151936,
        max_position_embeddings=4096,
        tie_word_embeddings=True,
        **SPECIAL_IDS,
    )
    return Qwen3ForCausalLM(config)


SHAPES = {"llama-15m": llama_15m, "qwen3-0.6b": qwen3_06b}


def byte_level_tokenizer(vocab_size: int = 4000) -> PreTrainedTokenizerFast:
    """A BPE trained on Python's standard library, the one text that is on every machine."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    files = sorted(str(path) for path in Path(sysconfig.get_path("stdlib")).glob("*.py"))[:150]
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size,
        special_tokens=["<|endoftext|>", "<|im_start|>", "<|im_end|>"],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
    )
    tokenizer.train(files, trainer)
    end = "<|endoftext|>"
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token=end, bos_token=end, pad_token=end)


def main(out: Path, names: list[str]) -> None:
    tokenizer = byte_level_tokenizer()
    for name in names:
        torch.manual_seed(0)
        torch.set_default_dtype(torch.bfloat16)
        model = SHAPES[name]()
        model.generation_config = GenerationConfig(**SPECIAL_IDS)
        model.save_pretrained(out / name)
        tokenizer.save_pretrained(out / name)
        print(name, sum(weight.numel() for weight in model.parameters()))


if __name__ == "__main__":
    main(Path(sys.argv[1]), sys.argv[2:])
