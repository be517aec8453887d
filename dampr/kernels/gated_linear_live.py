"""y = z_out * ((x * z_in) W^T + b) with one draw per batch, by a GEMM that neither reads nor multiplies blocks whose
gates are all closed.

x: (M, K), W: (N, K), y: (M, N). A block is BLOCK_K input features; it is live if one of its gates is open.
``live_blocks_kernel`` draws z_in and lists the live blocks in increasing order. The GEMM walks that list. The number
of steps and the index of each block are loaded from memory, so the host never waits for the device. There is no
branch around the product, because that would keep the compiler from pipelining the copies of the loop. An output
tile whose gates are all closed takes no step and stores zeros. A block that is skipped would add products with 0, so
for finite x and W the result is the same as without skipping.
"""

import triton
import triton.language as tl

from .gated_linear import tile_of
from .gates import draw_gate_vector, load_columns


@triton.jit
def any_open(z, axis: tl.constexpr):
    """1 where some gate along the axis is not 0, else 0. A NaN counts as open, so that it shows in the result."""
    return tl.max((z != 0.0).to(tl.int32), axis=axis)


@triton.jit
def live_blocks_kernel(
    log_alpha_ptr, seed_ptr, z_ptr, live_ptr, count_ptr, K,
    BLOCKS: tl.constexpr, BLOCK_K: tl.constexpr, GATE: tl.constexpr,
):  # fmt: skip
    """Draws the gates z (K,) (ones without log_alpha) and lists the blocks of BLOCK_K with an open gate: live, their
    indices, and count (1,), their number.

    Grid: one program.
    """
    count = 0
    for first in range(0, tl.cdiv(K, BLOCK_K), BLOCKS):
        block = first + tl.arange(0, BLOCKS)
        start = tl.cast(first, tl.int64) * BLOCK_K
        col = start + tl.arange(0, BLOCKS * BLOCK_K)
        if log_alpha_ptr is not None:
            z, _ = draw_gate_vector(log_alpha_ptr, seed_ptr, start, K, BLOCKS * BLOCK_K, GATE)
        else:
            z = tl.full((BLOCKS * BLOCK_K,), 1.0, tl.float32)
        tl.store(z_ptr + col, z, mask=col < K)
        live = any_open(tl.reshape(tl.where(col < K, z, 0.0), (BLOCKS, BLOCK_K)), 1)
        tl.store(live_ptr + count + tl.cumsum(live, axis=0) - 1, block, mask=live != 0)
        count += tl.sum(live, axis=0)
    tl.store(count_ptr, count)


@triton.jit
def gated_linear_live_fwd_kernel(
    x_ptr, w_ptr, bias_ptr, z_ptr, out_log_alpha_ptr, out_seed_ptr, live_ptr, count_ptr, y_ptr,
    M, N, K, stride_xm, stride_wn,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr, GROUP: tl.constexpr, EVEN: tl.constexpr,
    PRECISION: tl.constexpr, GATE: tl.constexpr,
):  # fmt: skip
    """y (M, N) from the ``count`` blocks of K whose indices are listed in ``live``.

    z: (K,), float32, the input gates, which ``live_blocks_kernel`` has drawn. Output gates are drawn here. GROUP and
    PRECISION: see gated_linear.py. EVEN: K is a multiple of BLOCK_K.
    """
    tile_m, tile_n = tile_of(tl.program_id(0), tl.cdiv(M, BLOCK_M), tl.cdiv(N, BLOCK_N), GROUP)
    row, col = tile_m * BLOCK_M + tl.arange(0, BLOCK_M), tile_n * BLOCK_N + tl.arange(0, BLOCK_N)
    count = tl.load(count_ptr)
    if out_log_alpha_ptr is not None:
        z_out, _ = draw_gate_vector(out_log_alpha_ptr, out_seed_ptr, tile_n * BLOCK_N, N, BLOCK_N, GATE)
        z_out = tl.where(col < N, z_out, 0.0)
        count *= any_open(z_out, 0)  # a tile whose output gates are all closed runs no step of the loop
    # Rows beyond the edge read row 0 instead of being masked; their results are not stored.
    x_rows = x_ptr + tl.where(row < M, row, 0)[:, None] * stride_xm
    w_rows = w_ptr + tl.where(col < N, col, 0)[None, :] * stride_wn
    acc = tl.zeros((BLOCK_M, BLOCK_N), tl.float32)
    for i in range(0, count):
        k = tl.load(live_ptr + i) * BLOCK_K + tl.arange(0, BLOCK_K)
        if EVEN:
            # [M, K], [K, N] and [K] of a block
            x, w, z = tl.load(x_rows + k[None, :]), tl.load(w_rows + k[:, None]), tl.load(z_ptr + k)
        else:
            x = tl.load(x_rows + k[None, :], mask=(k < K)[None, :], other=0.0)
            w = tl.load(w_rows + k[:, None], mask=(k < K)[:, None], other=0.0)
            z = tl.load(z_ptr + k, mask=k < K, other=0.0)
        acc = tl.dot((x * z[None, :]).to(x.dtype), w, acc, input_precision=PRECISION)
    if bias_ptr is not None:
        acc += load_columns(bias_ptr, tile_n * BLOCK_N, N, BLOCK_N)[None, :]
    if out_log_alpha_ptr is not None:
        acc = tl.where((z_out == 0.0)[None, :], 0.0, acc * z_out[None, :])  # +0, whether the tile was skipped or not
    tl.store(
        y_ptr + row[:, None] * N + col[None, :],
        acc.to(y_ptr.dtype.element_ty),
        mask=(row < M)[:, None] & (col < N)[None, :],
    )
