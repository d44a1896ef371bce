"""The sizes of an engine."""

from dataclasses import dataclass


@dataclass(frozen=True, slots=True, kw_only=True)
class EngineConfig:
    """Sizes of one engine. Lengths in tokens.

    num_blocks, block_size: the KV cache, already allocated by the backend. max_len: prompt and output of one sequence.
    max_step_tokens: tokens of one step; a longer prompt runs in chunks. max_sequences: that run at once.
    max_extra_rows: rows of logits in a step beyond one a sequence (a row takes 4 * vocab_size bytes).
    """

    vocab_size: int
    num_blocks: int
    block_size: int
    max_len: int
    eos_token_ids: tuple[int, ...] = ()
    max_step_tokens: int = 512
    max_sequences: int = 64
    max_extra_rows: int = 64

    @property
    def max_blocks(self) -> int:
        """Blocks of the longest sequence."""
        return min(self.num_blocks, -(-self.max_len // self.block_size))
