"""Words of two bfloat16, loads into the threads that want the numbers, fetches into the L2 cache."""

import triton
import triton.language as tl


@triton.jit
def low_of(word):
    return (word << 16).to(tl.float32, bitcast=True)


@triton.jit
def high_of(word):
    return (word & -65536).to(tl.float32, bitcast=True)


@triton.jit
def two_bfloat16(low, high):
    """Two numbers, rounded to bfloat16, as one word."""
    low_bits = low.to(tl.bfloat16).to(tl.int16, bitcast=True).to(tl.int32)
    return (low_bits & 0xFFFF) | high.to(tl.bfloat16).to(tl.int16, bitcast=True).to(tl.int32) << 16


@triton.jit
def fetched(at, ASM: tl.constexpr):
    """Numbers of 4, 2 or 1 bytes at these addresses, in the threads that want them: a load of Triton's own would put
    them into others, and they, or all that they meet, would have to travel."""
    T: tl.constexpr = at.dtype.element_ty
    if ASM and tl.float32 == T:
        found = tl.inline_asm_elementwise(
            "ld.global.nc.f32 $0, [$1];", "=f,l", [at.to(tl.int64)], dtype=tl.float32, is_pure=True, pack=1
        )
    elif ASM and tl.int32 == T:
        found = tl.inline_asm_elementwise(
            "ld.global.b32 $0, [$1];", "=r,l", [at.to(tl.int64)], dtype=tl.int32, is_pure=True, pack=1
        )
    elif ASM and T.primitive_bitwidth == 16:
        bits = tl.inline_asm_elementwise(
            "ld.global.nc.u16 $0, [$1];", "=h,l", [at.to(tl.int64)], dtype=tl.int16, is_pure=True, pack=1
        )
        found = bits.to(T, bitcast=True)
    elif ASM:
        found = tl.inline_asm_elementwise(
            "ld.global.nc.u8 $0, [$1];", "=r,l", [at.to(tl.int64)], dtype=tl.int32, is_pure=True, pack=1
        )
    else:
        found = tl.load(at)
    return found


@triton.jit
def fetch_ahead(at):
    """Ask for the line of 128 bytes that each of these addresses lies in, for the L2 cache; nothing waits for them."""
    tl.inline_asm_elementwise(
        "prefetch.global.L2 [$1]; mov.b32 $0, 0;", "=r,l", [at.to(tl.int64)], dtype=tl.int32, is_pure=False, pack=1
    )
