"""What simpler models make of the held-out text: compressors, and a Kneser-Ney n-gram over the same tokens.

All may look at the training text first, as the model did.
"""

import argparse
import bz2
import gzip
import lzma
import math
from collections.abc import Callable
from pathlib import Path

import numpy as np
from numpy.typing import NDArray
from texts import split_books
from tokenizers import Tokenizer

ORDER = 4
TOKEN_BITS = 12  # ORDER tokens fit an int64


def pack(tokens: NDArray[np.int64], n: int) -> NDArray[np.int64]:
    """One integer for each run of n tokens; the first token has the highest bits."""
    count = len(tokens) - n + 1
    return sum((tokens[i : i + count] << (TOKEN_BITS * (n - 1 - i)) for i in range(n)), np.zeros(count, np.int64))


def look_up(keys: NDArray[np.int64], values: NDArray[np.int64], wanted: NDArray[np.int64]) -> NDArray[np.int64]:
    """values of the sorted keys that are wanted; 0 where there is none."""
    at = np.minimum(np.searchsorted(keys, wanted), len(keys) - 1)
    return np.where(keys[at] == wanted, values[at], 0)


def kneser_ney(train: NDArray[np.int64], text: NDArray[np.int64], vocab_size: int) -> float:
    """Bits to code `text` after `train`, by interpolated Kneser-Ney (Chen and Goodman 1999), one discount an order."""
    text = np.concatenate([train[-(ORDER - 1) :], text])
    probability = np.full(len(text) - ORDER + 1, 1 / vocab_size)
    grams, counts = {}, {}
    for n in range(1, ORDER + 1):
        grams[n], counts[n] = np.unique(pack(train, n), return_counts=True)
    for n in range(1, ORDER):  # lower orders count the distinct tokens seen before a gram, not its occurrences
        before, distinct = np.unique(grams[n + 1] & ((1 << (TOKEN_BITS * n)) - 1), return_counts=True)
        grams[n], counts[n] = before, distinct
    for n in range(1, ORDER + 1):
        ones, twos = (counts[n] == 1).sum(), (counts[n] == 2).sum()
        discount = ones / (ones + 2 * twos)
        histories, first = np.unique(grams[n] >> TOKEN_BITS, return_index=True)
        totals = np.add.reduceat(counts[n], first)
        distinct = np.diff(np.append(first, len(grams[n])))
        wanted = pack(text, n)[ORDER - n :]
        seen = look_up(grams[n], counts[n], wanted)
        total = look_up(histories, totals, wanted >> TOKEN_BITS)
        spread = discount * look_up(histories, distinct, wanted >> TOKEN_BITS)
        share = (np.maximum(seen - discount, 0) + spread * probability) / np.maximum(total, 1)
        probability = np.where(total > 0, share, probability)
    return float(-np.log2(probability).sum())


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--data", type=Path, required=True, help="folder with classic-books/ and tinyshakespeare/")
    parser.add_argument("--tokenizer", type=Path, required=True, help="tokenizer.json")
    args = parser.parse_args()
    split = split_books(args.data)
    train, text = "\n\n".join(split.train).encode(), "\n\n".join(split.heldout).encode()
    compressors: dict[str, Callable[[bytes], bytes]] = {
        "gzip -9": gzip.compress,
        "bzip2 -9": bz2.compress,
        "xz -9e": lambda data: lzma.compress(data, preset=9 | lzma.PRESET_EXTREME),
    }
    for name, compress in compressors.items():
        alone, after = len(compress(text)), len(compress(train + text)) - len(compress(train))
        print(f"{name:12s} {8 * alone / len(text):.3f} alone, {8 * after / len(text):.3f} after the training text")
    tokenizer = Tokenizer.from_file(str(args.tokenizer))
    ids = [np.asarray(tokenizer.encode(t.decode(), add_special_tokens=False).ids) for t in (train, text)]
    bits = kneser_ney(ids[0], ids[1], tokenizer.get_vocab_size())
    perplexity = math.exp(bits * math.log(2) / len(ids[1]))
    print(f"{ORDER}-gram        {bits / len(text):.3f} bits per byte, perplexity {perplexity:.1f}")


if __name__ == "__main__":
    main()
