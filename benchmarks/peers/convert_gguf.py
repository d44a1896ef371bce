"""Runs llama.cpp's own converter on a folder whose tokenizer it has never met.

The converter recognises a BPE tokenizer by a hash of its output and refuses others. The benchmark models have a
tokenizer of their own and are prompted with token ids, so any pre-tokenizer name will do; nothing else is changed.
"""

from typing import Any

# Both from llama.cpp's source folder, on PYTHONPATH.
import convert_hf_to_gguf
from conversion.base import TextModel


def gpt2_pre_tokenizer(*_: Any) -> str:
    return "gpt-2"


if __name__ == "__main__":
    TextModel.get_vocab_base_pre = gpt2_pre_tokenizer
    convert_hf_to_gguf.main()
