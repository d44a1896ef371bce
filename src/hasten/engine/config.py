"""The sizes of an engine."""

from dataclasses import dataclass

from hasten.engine.request import whole


@dataclass(frozen=True, slots=True, kw_only=True)
class EngineConfig:
    """Sizes of one engine. Lengths in tokens.

    num_blocks, block_size: the KV cache, already allocated by the backend. max_len: prompt and output of one sequence.
    max_step_tokens: tokens of one step; a longer prompt runs in chunks. max_sequences: that run at once.
    max_extra_rows: rows of logits in a step beyond one a sequence (a row takes 4 * vocab_size bytes).
    Raises RequestError, naming the size, for one that is not a whole number of at least 1 (0 for max_extra_rows).
    """

    vocab_size: int
    num_blocks: int
    block_size: int
    max_len: int
    eos_token_ids: tuple[int, ...] = ()
    max_step_tokens: int = 512
    max_sequences: int = 64
    max_extra_rows: int = 64

    def __post_init__(self) -> None:
        for name in ("vocab_size", "num_blocks", "block_size", "max_len", "max_step_tokens", "max_sequences"):
            whole(name, getattr(self, name), 1)
        whole("max_extra_rows", self.max_extra_rows, 0)

    @property
    def max_blocks(self) -> int:
        """Blocks of the longest sequence."""
        return min(self.num_blocks, -(-self.max_len // self.block_size))
