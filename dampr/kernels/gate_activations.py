"""y = x * z along one dimension, and its gradients.

    dx = dy z      dz = sum of x dy over all elements that share the gate

x is (outer, middle, n, inner) in the order of its memory. z is (n,), or (outer, n) with a row for each outer index.

The forward reads x once, the backward reads x and dy once each, so these kernels are bound by memory. z is small, and
``sample_gates_fwd_kernel`` draws it before. Channels last is (B, H W, C, 1): ``gate_columns_kernel``, with gates along
the columns of a tile. Contiguous images are (B, 1, C, H W): ``gate_rows_of_planes_kernel``, with one gate for each row
of H W elements. Both kernels serve both directions: a pointer that is None leaves that part out. Sums go through a
workspace in a fixed order, without atomics.
"""

import triton
import triton.language as tl


@triton.jit
def gate_columns_kernel(
    t_ptr, other_ptr, z_ptr, out_ptr, partial_ptr, middle, n, rows_per_split,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, PER_OUTER: tl.constexpr,
):  # fmt: skip
    """out = t z, and partial (outer, splits, n) = the sum of t * other over the rows of a split, in order; each of the
    two is optional (a pointer that is None).

    t, other: (outer, middle, n). z: (n,), or (outer, n) with PER_OUTER. A split is ``rows_per_split`` rows of middle.
    Grid: (outer * splits * column blocks,), with column blocks changing fastest.
    """
    blocks, splits = tl.cdiv(n, BLOCK_N), tl.cdiv(middle, rows_per_split)
    pid = tl.program_id(0).to(tl.int64)
    part = pid // blocks  # outer * splits + split
    outer, split = part // splits, part % splits
    col = pid % blocks * BLOCK_N + tl.arange(0, BLOCK_N)
    z = tl.load(z_ptr + (outer * n if PER_OUTER else 0) + col, mask=col < n, other=0.0)[None, :]
    # a whole tile of running sums: a sum over its rows goes through shared memory, so it is done once, at the end
    total = tl.zeros((BLOCK_M, BLOCK_N), tl.float32)
    for first in range(0, rows_per_split, BLOCK_M):
        row = split * rows_per_split + first + tl.arange(0, BLOCK_M)
        mask = (row < middle)[:, None] & (col < n)[None, :]
        offsets = (outer * middle + row)[:, None] * n + col[None, :]
        t = tl.load(t_ptr + offsets, mask=mask, other=0.0).to(tl.float32)  # [BLOCK_M, BLOCK_N]
        other = t
        if partial_ptr is not None:  # before the store: a load after it would wait for memory again
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
    """out = t z, and partial (rows,) = the sum of t * other over inner.

    t, other: (rows, inner) with rows = outer * middle * n. Grid: (row blocks,).
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
        if partial_ptr is not None:  # before the store: a load after it would wait for memory again
            other = tl.load(other_ptr + offsets, mask=mask, other=0.0).to(tl.float32)
        if out_ptr is not None:
            tl.store(out_ptr + offsets, (t * z).to(out_ptr.dtype.element_ty), mask=mask)
        if partial_ptr is not None:
            total += tl.sum(t * other, axis=1)
    if partial_ptr is not None:
        tl.store(partial_ptr + row, total, mask=row < rows)
