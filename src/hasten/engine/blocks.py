"""Paged KV blocks: who holds which, and which can be reused because their tokens are known.

Knows block numbers and hashes, not what is in a block nor where it lies. Every block is in exactly one state:

    free     holds nothing of use
    used     held by `ref_count` sequences
    cached   held by none, but its hash is known: reused on a match, or evicted, least recently used first
"""

import hashlib
from array import array
from collections import OrderedDict
from collections.abc import Sequence


def block_hash(parent: bytes, tokens: Sequence[int]) -> bytes:
    """128-bit name of a full block: its tokens and, through `parent`, all tokens before it. BLAKE2b, so that no prompt
    can be made to collide with another's."""
    return hashlib.blake2b(parent + array("i", tokens).tobytes(), digest_size=16).digest()


class BlockPool:
    """Counts of references to `num_blocks` blocks, and the cache of those that are full."""

    def __init__(self, num_blocks: int, block_size: int) -> None:
        self.num_blocks = num_blocks
        self.block_size = block_size
        self.clear()

    def clear(self) -> None:
        """Forget everything: all blocks are free. Only when nothing runs."""
        self._ref_counts = [0] * self.num_blocks
        self._hashes: list[bytes | None] = [None] * self.num_blocks
        self._by_hash: dict[bytes, int] = {}
        # Low numbers are handed out first, which keeps the touched part of a lazily backed cache small.
        self._free = list(range(self.num_blocks - 1, -1, -1))
        self._cached: OrderedDict[int, None] = OrderedDict()  # oldest first

    @property
    def num_free(self) -> int:
        return len(self._free)

    @property
    def num_cached(self) -> int:
        return len(self._cached)

    @property
    def num_used(self) -> int:
        return self.num_blocks - len(self._free) - len(self._cached)

    @property
    def num_available(self) -> int:
        """Blocks that allocate() can still hand out."""
        return len(self._free) + len(self._cached)

    def allocate(self) -> int | None:
        """A block for one holder; evicts the least recently used cached one if it must. None when all are used."""
        if self._free:
            block = self._free.pop()
        elif self._cached:
            block, _ = self._cached.popitem(last=False)
            self._forget(block)
        else:
            return None
        self._ref_counts[block] = 1
        return block

    def match(self, hashes: Sequence[bytes]) -> list[int]:
        """Blocks of the longest known prefix of `hashes`, each now held once more."""
        blocks = []
        for name in hashes:
            block = self._by_hash.get(name)
            if block is None:
                break
            if self._ref_counts[block] == 0:
                del self._cached[block]
            self._ref_counts[block] += 1
            blocks.append(block)
        return blocks

    def publish(self, block: int, name: bytes) -> None:
        """A held block is full and computed: others may share it. Where a twin is known already, that one stays."""
        if self._hashes[block] is None and name not in self._by_hash:
            self._hashes[block] = name
            self._by_hash[name] = block

    def release(self, blocks: Sequence[int]) -> None:
        """One holder gives up `blocks`, which are in sequence order. The last become the oldest in the cache: a prefix
        is of use without its tail, a tail never without its prefix."""
        for block in reversed(blocks):
            self._ref_counts[block] -= 1
            if self._ref_counts[block] > 0:
                continue
            assert self._ref_counts[block] == 0, f"block {block} released twice"
            if self._hashes[block] is None:
                self._free.append(block)
            else:
                self._cached[block] = None

    def check(self, holders: Sequence[Sequence[int]]) -> None:
        """Assert that the books agree with `holders`, the block lists of all running sequences. For tests."""
        held = [0] * self.num_blocks
        for blocks in holders:
            for block in blocks:
                held[block] += 1
        assert held == self._ref_counts, "reference counts differ from what sequences hold"
        free, cached = set(self._free), set(self._cached)
        assert len(free) == len(self._free), "a block is free twice"
        used = {block for block, count in enumerate(held) if count}
        assert not free & cached
        assert not free & used
        assert not cached & used
        assert len(free) + len(cached) + len(used) == self.num_blocks, "a block is lost"
        assert all(self._hashes[block] is None for block in free)
        assert all(self._hashes[block] is not None for block in cached)
        named = {name: block for block, name in enumerate(self._hashes) if name is not None}
        assert named == self._by_hash, "hashes and blocks disagree"

    def _forget(self, block: int) -> None:
        name = self._hashes[block]
        assert name is not None
        del self._by_hash[name]
        self._hashes[block] = None
