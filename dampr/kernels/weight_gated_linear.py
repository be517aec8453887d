"""y = x (W * Z)^T + b, a gate for each weight or for each block of R x C weights, drawn per batch. x: (M, K), W: (N,
K), y: (M, N).

Weight (n, k) has gate n K + k. Where the weights of a block share a gate, it has gate (n // R) ceil(K / C) + k // C;
blocks at the edges may be partial. In the equations, z' is the slope dz/dlog_alpha of a gate.

    dW = Z * G,  G = dy^T x (vendor GEMM)    dlog_alpha = z' sum of W * G over the weights of the gate
    dx = dy (W * Z)    db = sum_m dy

Both directions are one pass over the weight that computes t * Z: the forward with t = W, the backward with t = G,
where it also sums W * t. One kernel for weights and one for blocks therefore serve both directions. The passes go
over the flat weight in multiples of four, because Philox makes four random words at a time.

For a small M there is no pass: the GEMM draws the gates of its tile of W. It computes y^T = W~ x^T with W~ = W * Z,
because the A operand of an MMA may come from registers, where the gated tile is. Every tile of rows of x draws the
gates again, so this route is for an M of one tile.
"""

import triton
import triton.language as tl

from .gated_linear import tile_of
from .gates import draw_gate, draw_gate_vector, load_columns, load_seed


@triton.jit
def gate_weights_kernel(
    t_ptr, w_ptr, log_alpha_ptr, seed_ptr, gated_ptr, dlog_alpha_ptr, size, BLOCK: tl.constexpr, GATE: tl.constexpr
):  # fmt: skip
    """gated = t * z and dlog_alpha = w * t * z', with one gate for each weight; every array is flat, (size,).

    The forward calls it with t = W and without dlog_alpha, to fold the gates into the weight. The backward calls it
    with t = G, the gradient of the gated weight, and gets dW in ``gated``. Absent outputs are None. grid: (cdiv(size,
    BLOCK),).
    """
    start = tl.program_id(0).to(tl.int64) * BLOCK
    offs = start + tl.arange(0, BLOCK)
    t = load_columns(t_ptr, start, size, BLOCK)
    w = t
    if dlog_alpha_ptr is not None:  # before the store: a load after it would wait for memory again
        w = load_columns(w_ptr, start, size, BLOCK)
    z, slope = draw_gate_vector(log_alpha_ptr, seed_ptr, start, size, BLOCK, GATE)
    if gated_ptr is not None:
        tl.store(gated_ptr + offs, (t * z).to(gated_ptr.dtype.element_ty), mask=offs < size)
    if dlog_alpha_ptr is not None:
        tl.store(dlog_alpha_ptr + offs, w * t * slope, mask=offs < size)


@triton.jit
def gate_blocks_kernel(
    t_ptr, w_ptr, z_ptr, gated_ptr, partial_ptr, N, K, stride_tn, stride_wn, rows_per_split,
    R: tl.constexpr, C: tl.constexpr, BLOCK_R: tl.constexpr, BLOCK_G: tl.constexpr, BLOCK_C: tl.constexpr,
):  # fmt: skip
    """gated (N, K) = t * z, with z (gates,), float32, the gate of each block, and partial (splits, gates) = sum of w *
    t over the rows of one split of each block, in a fixed order.

    The forward calls it with t = W, the backward with t = G, the gradient of the gated weight. Absent outputs are
    None. A program handles BLOCK_G neighbouring blocks: all their columns, and the rows of one split. grid: (block
    rows * block groups, splits).
    """
    across = tl.cdiv(K, C)
    groups = tl.cdiv(across, BLOCK_G)
    pid, split = tl.program_id(0).to(tl.int64), tl.program_id(1).to(tl.int64)
    n0, gate = pid // groups * R, pid % groups * BLOCK_G + tl.arange(0, BLOCK_G)
    index = pid // groups * across + gate
    z = tl.load(z_ptr + index, mask=gate < across, other=0.0)[None, :, None]
    total = tl.zeros((BLOCK_R, BLOCK_G, BLOCK_C), tl.float32)
    for first in range(0, rows_per_split, BLOCK_R):
        r = split * rows_per_split + first + tl.arange(0, BLOCK_R)
        row, row_mask = (n0 + r)[:, None, None], ((r < R) & (n0 + r < N))[:, None, None]
        for c0 in range(0, C, BLOCK_C):
            c = c0 + tl.arange(0, BLOCK_C)[None, :]
            col = gate[:, None] * C + c
            mask = row_mask & ((c < C) & (col < K))[None, :, :]
            col = col[None, :, :]
            # [BLOCK_R, BLOCK_G, BLOCK_C]
            t = tl.load(t_ptr + row * stride_tn + col, mask=mask, other=0.0).to(tl.float32)
            w = t
            if partial_ptr is not None:
                w = tl.load(w_ptr + row * stride_wn + col, mask=mask, other=0.0).to(tl.float32)
            if gated_ptr is not None:
                tl.store(gated_ptr + row * K + col, (t * z).to(gated_ptr.dtype.element_ty), mask=mask)
            if partial_ptr is not None:
                total += w * t
    if partial_ptr is not None:
        tl.store(
            partial_ptr + split * tl.cdiv(N, R) * across + index,
            tl.sum(tl.sum(total, axis=2), axis=0),
            mask=gate < across,
        )


@triton.jit
def weight_gated_linear_fwd_kernel(
    x_ptr, w_ptr, bias_ptr, log_alpha_ptr, seed_ptr, y_ptr, M, N, K, stride_xm, k_per_split,
    BLOCK_N: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_K: tl.constexpr, GROUP: tl.constexpr, EVEN: tl.constexpr,
    GROUPED: tl.constexpr, PRECISION: tl.constexpr, GATE: tl.constexpr,
):  # fmt: skip
    """y (splits, M, N) = x W~^T over one split of K each; the first split adds the bias. grid: (tiles, splits).

    W and log_alpha are contiguous, (N, K). EVEN: K equals splits * k_per_split, so that loads need no mask.
    """
    tile_n, tile_m = tile_of(tl.program_id(0), tl.cdiv(N, BLOCK_N), tl.cdiv(M, BLOCK_M), GROUP)
    split = tl.program_id(1).to(tl.int64)
    row, col = tile_n * BLOCK_N + tl.arange(0, BLOCK_N), tile_m * BLOCK_M + tl.arange(0, BLOCK_M)
    k = split * k_per_split + tl.arange(0, BLOCK_K)
    # Rows beyond the edge read row 0 instead of being masked, because their results are not stored.
    first_gate = (tl.where(row < N, row, 0) * K + split * k_per_split)[:, None]
    offs = first_gate + tl.arange(0, BLOCK_K)[None, :]
    w_ptrs, log_alpha_ptrs = w_ptr + offs, log_alpha_ptr + offs
    x_ptrs = x_ptr + tl.where(col < M, col, 0)[None, :] * stride_xm + k[:, None]
    seed = load_seed(seed_ptr, GATE)
    acc = tl.zeros((BLOCK_N, BLOCK_M), tl.float32)
    for first in range(0, k_per_split, BLOCK_K):
        if EVEN:
            # [BLOCK_N, BLOCK_K] twice, [BLOCK_K, BLOCK_M]
            w, log_alpha, x = tl.load(w_ptrs), tl.load(log_alpha_ptrs), tl.load(x_ptrs)
        else:
            mask = k + first < K
            w = tl.load(w_ptrs, mask=mask[None, :], other=0.0)
            log_alpha = tl.load(log_alpha_ptrs, mask=mask[None, :], other=0.0)
            x = tl.load(x_ptrs, mask=mask[:, None], other=0.0)
        z, _ = draw_gate(log_alpha, seed, first_gate + first, BLOCK_K, GROUPED, GATE)
        acc = tl.dot((w * z).to(x.dtype), x, acc, input_precision=PRECISION)
        w_ptrs += BLOCK_K
        log_alpha_ptrs += BLOCK_K
        x_ptrs += BLOCK_K
    if bias_ptr is not None:
        bias = load_columns(bias_ptr, tile_n * BLOCK_N, N, BLOCK_N)
        acc += tl.where(split == 0, bias, 0.0)[:, None]
    y_ptrs = y_ptr + split * M * N + col[None, :] * N + row[:, None]
    tl.store(y_ptrs, acc.to(y_ptr.dtype.element_ty), mask=(row < N)[:, None] & (col < M)[None, :])
