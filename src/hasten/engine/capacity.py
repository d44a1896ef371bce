"""How many KV blocks to make: arithmetic on bytes and lengths. Knows no backend, no model."""

from hasten.backends.base import DeviceMemory
from hasten.errors import ResourceError

# By default, on a device that is shared: one sequence of full length, or four of this many tokens. A CPU's cache is
# touched only as it fills, so room that is never used costs nothing.
_USUAL_LEN = 8192
_SEQUENCES = 4
# Of the device's memory that one process takes; on a CPU, of what is free.
SHARE = 0.9


def plan_cache(
    block_bytes: int,
    block_size: int,
    max_position: int,
    max_len: int | None,
    memory: int | float | None,
    device: DeviceMemory,
    max_sequences: int = 64,
) -> tuple[int, int]:
    """(num_blocks, max_len in tokens). max_position: the longest that the model knows. memory: a whole number of bytes
    for the cache, or the share of the device's memory that all of this process may take; None is SHARE of it, and on a
    shared device no more than is usual. There are never more blocks than twice what max_sequences can hold.

    Raises ResourceError where a sequence of the max_len asked for does not fit, or hardly anything does.
    """
    if max_len is not None and not 1 <= max_len <= max_position:
        raise ResourceError(f"max_len is {max_len}, expected 1 to {max_position}, the longest that this model knows")
    budget, limit = _budget(memory, device)
    fitting = budget // block_bytes
    longest = max_len if max_len is not None else min(max_position, max(fitting, 1) * block_size)
    least = -(-longest // block_size)
    if fitting < least:
        more = [] if max_len is None else [f"lower max_len (now {longest})"]
        more += ["free some"] if memory is None else ["raise memory"]
        needed = f"KV cache needs {_size(least * block_bytes)} for {longest} tokens"
        raise ResourceError(f"{needed}, {limit}: {', '.join(more)} or use kv_cache int8")
    if memory is not None or not device.shared:
        return min(fitting, 2 * max_sequences * least), longest
    usual = -(-_SEQUENCES * min(longest, _USUAL_LEN) // block_size)
    return min(fitting, max(least, usual)), longest


def _budget(memory: int | float | None, device: DeviceMemory) -> tuple[int, str]:
    """Bytes for the cache, and in words what limits them."""
    free = max(0, device.free - device.reserved)
    if isinstance(memory, int):
        if not 0 < memory <= free:
            raise ResourceError(f"memory is {_size(memory)} for the KV cache, but {_size(free)} are free: lower memory")
        return memory, f"memory allows {_size(memory)}"
    share = SHARE if memory is None else memory
    if not 0 < share <= 1:
        raise ResourceError(f"memory is {share}, expected a share above 0 up to 1, or a whole number of bytes")
    budget = min(free, max(0, int(share * device.total) - (device.total - device.free) - device.reserved))
    if memory is None and device.shared:
        return budget, f"{_size(device.free)} free"
    taken = f"{_size(device.total - device.free)} are taken and {_size(device.reserved)} kept for steps"
    return budget, f"{_size(budget)} left of {share:g} of the device's {_size(device.total)} ({taken})"


def _size(num_bytes: int) -> str:
    return f"{num_bytes / 1e9:.1f} GB" if num_bytes >= 1e8 else f"{num_bytes / 1e6:.2f} MB"
