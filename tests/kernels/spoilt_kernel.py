"""A kernel that fails when its integer is 1, to show that `dry_launch.py` finds such faults."""

import triton
import triton.language as tl


@triton.jit
def spoilt_kernel(out_ptr, size):
    tl.store(out_ptr, size.to(tl.int64))
