"""y = x * z along one dimension, and its gradients: x (outer, middle, n, inner) in the order of memory, z (n,) or a row
per outer index.

    dx = dy z      dz[n] (or [outer, n]) = sum of x dy over all that shares the gate

An activation is read once forward and twice (x and dy) backward, so these are bound by memory; z is small beside it and
drawn before (``sample_gates_fwd_kernel``). Channels last is (B, H W, C, 1): ``gate_columns_kernel``, gates along the
lanes. Contiguous images are (B, 1, C, H W): ``gate_rows_of_planes_kernel``, a gate for each row of H W elements. Both
serve both directions: what is None is not there. Sums go through a workspace in a fixed order, without atomics.
"""

import triton
import triton.language as tl


@triton.jit
def gate_columns_kernel(
    t_ptr, other_ptr, z_ptr, out_ptr, partial_ptr, middle, n, rows_per_split,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, PER_OUTER: tl.constexpr,
):  # fmt: skip
    """out = t z and partial (outer, splits, n) = sum over one split's rows, in order, of t * other; t, other: (outer,
    middle, n).

    Grid: (outer * splits * column blocks,), column blocks first.
    """
    blocks, splits = tl.cdiv(n, BLOCK_N), tl.cdiv(middle, rows_per_split)
    pid = tl.program_id(0).to(tl.int64)
    part = pid // blocks  # outer * splits + split
    outer, split = part // splits, part % splits
    col = pid % blocks * BLOCK_N + tl.arange(0, BLOCK_N)
    z = tl.load(z_ptr + (outer * n if PER_OUTER else 0) + col, mask=col < n, other=0.0)[None, :]
    # summed once: over rows of a tile it would go through shared memory each time
    total = tl.zeros((BLOCK_M, BLOCK_N), tl.float32)
    for first in range(0, rows_per_split, BLOCK_M):
        row = split * rows_per_split + first + tl.arange(0, BLOCK_M)
        mask = (row < middle)[:, None] & (col < n)[None, :]
        offsets = (outer * middle + row)[:, None] * n + col[None, :]
        t = tl.load(t_ptr + offsets, mask=mask, other=0.0).to(tl.float32)  # [BLOCK_M, BLOCK_N]
        other = t
        if partial_ptr is not None:  # before the store, behind which it would wait for memory once more
            other = tl.load(other_ptr + offsets, mask=mask, other=0.0).to(tl.float32)
        if out_ptr is not None:
            tl.store(out_ptr + offsets, (t * z).to(out_ptr.dtype.element_ty), mask=mask)
        if partial_ptr is not None:
            total += t * other
    if partial_ptr is not None:
        tl.store(partial_ptr + part * n + col, tl.sum(total, axis=0), mask=col < n)


@triton.jit
def gate_rows_of_planes_kernel(
    t_ptr, other_ptr, z_ptr, out_ptr, partial_ptr, rows, middle, n, inner,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, PER_OUTER: tl.constexpr,
):  # fmt: skip
    """out = t z and partial (rows,) = sum of t * other over inner; t, other: (rows, inner), rows = outer * middle * n.

    Grid: (row blocks,).
    """
    row = tl.program_id(0).to(tl.int64) * BLOCK_M + tl.arange(0, BLOCK_M)
    gate = row % n
    if PER_OUTER:
        gate += row // (middle * n) * n
    z = tl.load(z_ptr + gate, mask=row < rows, other=0.0)[:, None]
    total = tl.zeros((BLOCK_M,), tl.float32)
    for first in range(0, inner, BLOCK_N):
        col = first + tl.arange(0, BLOCK_N)
        mask = (row < rows)[:, None] & (col < inner)[None, :]
        offsets = row[:, None] * inner + col[None, :]
        t = tl.load(t_ptr + offsets, mask=mask, other=0.0).to(tl.float32)  # [BLOCK_M, BLOCK_N]
        other = t
        if partial_ptr is not None:  # before the store, behind which it would wait for memory once more
            other = tl.load(other_ptr + offsets, mask=mask, other=0.0).to(tl.float32)
        if out_ptr is not None:
            tl.store(out_ptr + offsets, (t * z).to(out_ptr.dtype.element_ty), mask=mask)
        if partial_ptr is not None:
            total += tl.sum(t * other, axis=1)
    if partial_ptr is not None:
        tl.store(partial_ptr + row, total, mask=row < rows)
