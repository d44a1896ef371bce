"""Training text -> byte-level BPE tokenizer, as Transformers reads it.

Knows nothing of the model. Every string of UTF-8 survives encoding and decoding: all 256 bytes are in the vocabulary
and nothing is normalised. The split is Llama 3's: words with their space, up to three digits, newlines together.
"""

import argparse
import json
from pathlib import Path

from texts import split_books
from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers, processors, trainers

END_OF_TEXT = "<|endoftext|>"  # before every passage and after it: both BOS and EOS
CONTEXT = 1024
SPLIT = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}"
    r"| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)


def train_tokenizer(texts: list[str], vocab_size: int) -> Tokenizer:
    """BPE (Sennrich et al. 2016) over bytes, with END_OF_TEXT as token 0, put before every encoded text."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(Regex(SPLIT), behavior="isolated"),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size,
        special_tokens=[END_OF_TEXT],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(texts, trainer)
    tokenizer.post_processor = processors.TemplateProcessing(
        single=f"{END_OF_TEXT} $A",
        pair=f"{END_OF_TEXT} $A {END_OF_TEXT} $B",
        special_tokens=[(END_OF_TEXT, tokenizer.token_to_id(END_OF_TEXT))],
    )
    return tokenizer


def save(tokenizer: Tokenizer, folder: Path) -> None:
    """Writes tokenizer.json and tokenizer_config.json."""
    folder.mkdir(parents=True, exist_ok=True)
    tokenizer.save(str(folder / "tokenizer.json"))
    config = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "bos_token": END_OF_TEXT,
        "eos_token": END_OF_TEXT,
        "model_max_length": CONTEXT,
        "clean_up_tokenization_spaces": False,
    }
    (folder / "tokenizer_config.json").write_text(json.dumps(config, indent=2) + "\n")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--data", type=Path, required=True, help="folder with classic-books/ and tinyshakespeare/")
    parser.add_argument("--vocab-size", type=int, default=4096)
    parser.add_argument("--output", type=Path, required=True, help="folder to write")
    args = parser.parse_args()
    split = split_books(args.data)
    tokenizer = train_tokenizer(split.train, args.vocab_size)
    save(tokenizer, args.output)
    valid = "\n\n".join(split.valid)
    print(f"{len(valid.encode()) / len(tokenizer.encode(valid).ids):.3f} bytes a token on the validation text")


if __name__ == "__main__":
    main()
