"""Text -> one long row of tokens -> sequences of one length, cut at other places every epoch.

The n-th sequence of a training is a function of the seed and of n alone, so that a training that was killed goes on
with the sequences that it would have seen. Knows no model but its tokenizer.
"""

from pathlib import Path

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import Dataset

from hasten.compress.calibration import Note, encode, read
from hasten.errors import RecipeError
from hasten.model.tokenizer import Tokenizer


def tokens_of(text: str, folder: Path, note: Note = lambda line: None) -> tuple[Tensor, int | None]:
    """All tokens [n] of a file, a folder or a data set, as the model in `folder` has them, and the token that starts a
    text (None where there is none). It stands between texts too; else the one that ends a text does. note: is told of
    text that is too long to be read whole."""
    tokenizer = Tokenizer(folder)
    bos = tokenizer.bos_token_id
    first = bos if bos is not None and tokenizer.encode("a")[:1] == [bos] else None
    between = first if first is not None else next(iter(sorted(tokenizer.eos_token_ids)), None)
    end = [] if between is None else [between]
    parts = [np.array([*encode(tokenizer, piece), *end], np.int32) for piece in read(text, note)]
    return torch.from_numpy(np.concatenate([*parts, np.zeros(0, np.int32)])), first


class Sequences(Dataset[dict[str, Tensor]]):
    """`count` sequences of `length` tokens from the row `stream` [n]; it lies where the model does, and so do they.

    first: a token put before each. shifted: an epoch begins up to a sequence later in the row, so that no token always
    comes at the same place. RecipeError where the row is shorter than one sequence.
    """

    def __init__(
        self, stream: Tensor, length: int, count: int, seed: int = 0, first: int | None = None, shifted: bool = True
    ) -> None:
        self.stream, self.count, self.seed, self.first = stream, count, seed, first
        self.own = length if first is None else length - 1
        if len(stream) < self.own:
            raise RecipeError(
                f"the training text has {len(stream)} tokens, a sequence has {length}: give more text, or lower "
                "sequence_len"
            )
        self.most_shift = min(self.own, len(stream) - self.own) if shifted else 0
        self.per_epoch = (len(stream) - self.most_shift) // self.own
        self.epoch, self.starts = -1, torch.zeros(0)

    def __len__(self) -> int:
        return self.count

    def __getitem__(self, index: int) -> dict[str, Tensor]:
        return {key: value[0] for key, value in self.__getitems__([index]).items()}

    def __getitems__(self, indices: list[int]) -> dict[str, Tensor]:
        """A whole batch [b, length]: the loader asks for it at once."""
        starts = torch.stack([self._start(index) for index in indices]).to(self.stream.device, non_blocking=True)
        rows = self.stream[starts[:, None] + torch.arange(self.own, device=self.stream.device)].long()
        if self.first is not None:
            rows = torch.nn.functional.pad(rows, (1, 0), value=self.first)
        return {"input_ids": rows, "labels": rows}

    def _start(self, index: int) -> Tensor:
        epoch, number = divmod(index, self.per_epoch)
        if epoch != self.epoch:
            generator = torch.Generator().manual_seed(self.seed * 1_000_003 + epoch)
            shift = int(torch.randint(self.most_shift + 1, (), generator=generator))
            self.starts = torch.randperm(self.per_epoch, generator=generator) * self.own + shift
            self.epoch = epoch
        return self.starts[number]
