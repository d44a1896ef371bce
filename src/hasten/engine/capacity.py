"""How many KV blocks to make: arithmetic on bytes and lengths. Knows no backend, no model.

The cache's memory is touched only as it fills, so room that is never used costs nothing.
"""

from hasten.errors import ResourceError

# By default: one sequence of full length, or four of this many tokens.
_USUAL_LEN = 8192
_SEQUENCES = 4
# Of the memory that is free; the rest is for activations and logits.
_SHARE = 0.9


def plan_cache(
    block_bytes: int, block_size: int, max_position: int, max_len: int | None, memory: int | None, free: int
) -> tuple[int, int]:
    """(num_blocks, max_len in tokens). max_position: the longest that the model knows. memory: bytes for the cache as
    the user set it. free: bytes free on this machine.

    Raises ResourceError where a sequence of the max_len asked for does not fit, or hardly anything does.
    """
    if max_len is not None and not 1 <= max_len <= max_position:
        raise ResourceError(f"max_len is {max_len}, expected 1 to {max_position}, the longest that this model knows")
    if memory is not None and memory > free:
        raise ResourceError(f"memory is {_size(memory)} for the KV cache, but {_size(free)} are free: lower memory")
    budget = memory if memory is not None else int(_SHARE * free)
    fitting = budget // block_bytes
    longest = max_len if max_len is not None else min(max_position, max(fitting, 1) * block_size)
    least = -(-longest // block_size)
    if fitting < least:
        limit = f"memory allows {_size(memory)}" if memory is not None else f"{_size(free)} free"
        flag = f"lower max_len (now {longest})" if max_len is not None else "free some"
        more = ", raise memory" if memory is not None else ""
        needed = f"KV cache needs {_size(least * block_bytes)} for {longest} tokens"
        raise ResourceError(f"{needed}, {limit}: {flag}{more} or use kv_cache int8")
    if memory is not None:
        return fitting, longest
    usual = -(-_SEQUENCES * min(longest, _USUAL_LEN) // block_size)
    return min(fitting, max(least, usual)), longest


def _size(num_bytes: int) -> str:
    return f"{num_bytes / 1e9:.1f} GB" if num_bytes >= 1e8 else f"{num_bytes / 1e6:.2f} MB"
