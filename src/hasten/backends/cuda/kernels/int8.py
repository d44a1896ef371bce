"""int8 by int8 for many rows, the sums in int32, the scales of rows and of outputs put on before they are written."""

import triton
import triton.language as tl
from triton.language.extra.cuda import gdc_launch_dependents, gdc_wait


@triton.jit
def product8(
    x, x_scales, w, scales, y, M, N, K,
    BM: tl.constexpr, BN: tl.constexpr, BK: tl.constexpr, TALL: tl.constexpr,
    STAGES: tl.constexpr, EVEN: tl.constexpr, PDL: tl.constexpr,
):  # fmt: skip
    """y [M, N] = x_scales [M] * scales [N] * (x [M, K] W [N, K].T).

    Programs that run at once are TALL blocks of x by some of W, so that each is read from memory few times.
    """
    block, wide = tl.program_id(0), tl.cdiv(N, BN)
    first = block // (TALL * wide) * TALL
    tall = tl.minimum(tl.cdiv(M, BM) - first, TALL)
    within = block % (TALL * wide)
    out_rows = (first + within % tall) * BM + tl.arange(0, BM)
    out_cols = within // tall * BN + tl.arange(0, BN)
    rows, cols = tl.minimum(out_rows, M - 1), tl.minimum(out_cols, N - 1)
    ks = tl.arange(0, BK)
    xs = x + rows[:, None].to(tl.int64) * K + ks[None, :]
    ws = w + cols[None, :].to(tl.int64) * K + ks[:, None]
    if PDL:
        gdc_wait()
        gdc_launch_dependents()
    acc = tl.zeros([BM, BN], tl.int32)
    for k in tl.range(0, K, BK, num_stages=STAGES):
        inside = k + ks < K
        x_tile = tl.load(xs + k, mask=None if EVEN else inside[None, :], other=None if EVEN else 0)
        w_tile = tl.load(ws + k, mask=None if EVEN else inside[:, None], other=None if EVEN else 0)
        acc = tl.dot(x_tile, w_tile, acc, out_dtype=tl.int32)
    out = acc.to(tl.float32) * tl.load(x_scales + rows)[:, None] * tl.load(scales + cols)[None, :]
    at = y + out_rows[:, None].to(tl.int64) * N + out_cols[None, :]
    mask = (out_rows < M)[:, None] & (out_cols < N)[None, :]
    tl.store(at, out.to(y.dtype.element_ty), mask=mask)
