"""Triton kernels: device code only. Launch grids, tile sizes and the choice among kernels are in the modules above.

Every kernel takes PDL: with it (compute capability 9.0 and newer) it is launched while the kernel before still runs,
may fetch weights at once, and calls gdc_wait() before it touches anything that another kernel writes. Only then does it
let the next one launch: with three kernels under way at once results were wrong now and then (docs/log.md; the cause
was not isolated), and the times are the same. Of every launch at least one program must wait: the next kernel waits for
this one, not for the one before. All also run in Triton's interpreter on a CPU, without PDL and ASM.
"""
