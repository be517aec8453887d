"""y = z_out * ((x * z_in) W^T + b) and its gradients.

x: (M, K), W: (N, K), b: (N,), z_in: K gates, z_out: N gates, y: (M, N).

With one draw per batch, a gate scales a row or a column of W. One pass multiplies the gates into W, which gives W~, and
the library's GEMM does the rest. In the backward, the library's GEMM computes G = dy^T x, and one pass over G and W
gives every gradient, because gates commute with the sum over the batch:

    W~ = z_out[n] z_in[k] W                              dW = z_out[n] z_in[k] G
    dz_out[n] = sum_k z_in[k] W G + b[n] sum_m dy        dz_in[k] = sum_n z_out[n] W G

With a draw per sample, every row has gates of its own. In a small problem the GEMM draws them: for the A tile, in
registers, and in the epilogue. Every output tile draws them again, so in a large problem separate passes multiply x, y
and dy by gates (``gate_rows_*``), around the library's GEMM.

    dx = ((dy z_out) W) z_in    dW = (dy z_out)^T (x z_in)    db = sum_m dy z_out
    dlog_alpha_out = sum_m dy pre z_out',  pre = (x z_in) W^T + b    dlog_alpha_in = sum_m x ((dy z_out) W) z_in'

Here z' is the slope dz/dlog_alpha. Gates are drawn again wherever they are needed and never stored. Products with a
gate are computed in float32 and rounded once. Column sums go through a (splits, n) workspace and ``reduce_kernel``,
always in the same order, without atomics. Innermost strides are 1; ``stride_xm`` is the distance between rows m of x in
elements, and so on. A missing gate, bias or output is a pointer that is None. Indices that are multiplied by a size or
a stride are int64.

Compile-time arguments that many kernels have: ``GATE`` is the GateSpec of all gates of the layer. ``GROUPED``
(``IN_GROUPED``, ``OUT_GROUPED``) says that the rows of gates have a multiple of 4 elements (gates.py, ``draw_words``).
``GROUP`` has nothing to do with that; it is the order of tiles (:func:`tile_of`). ``EVEN`` says that loads along the
summed dimension need no mask. ``PRECISION`` is the ``input_precision`` of ``tl.dot``.
"""

import triton
import triton.language as tl

from .gates import draw_gate, draw_gate_vector, load_columns, load_seed


@triton.jit
def tile_of(pid, num_rows, num_cols, GROUP: tl.constexpr):
    """(row, column) of output tile ``pid``. Tiles are numbered so that GROUP rows of tiles are computed at about the
    same time and share operands in L2.
    """
    width = GROUP * num_cols
    first = pid // width * GROUP
    height = tl.minimum(num_rows - first, GROUP)
    return (first + pid % width % height).to(tl.int64), (pid % width // height).to(tl.int64)


@triton.jit
def gate_tile(
    tile, log_alpha_ptr, seed_ptr, row, col, n, BLOCK: tl.constexpr, GROUPED: tl.constexpr, GATE: tl.constexpr
):
    """tile * z for a tile [BLOCK_M, BLOCK] of a matrix (M, n) with a draw for each row.

    It has the rows ``row`` [BLOCK_M] and the columns col .. col + BLOCK - 1. Gate ``row * n + col`` is drawn for an
    element. The product is computed in float32 and rounded once to the tile's dtype.
    """
    log_alpha = load_columns(log_alpha_ptr, col, n, BLOCK)[None, :]
    z, _ = draw_gate(log_alpha, load_seed(seed_ptr, GATE), (row * n + col)[:, None], BLOCK, GROUPED, GATE)
    return (tile * z).to(tile.dtype)  # [BLOCK_M, BLOCK]


@triton.jit
def quarters(tile, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr):
    """The four column blocks of a tile, [BLOCK_M, BLOCK_N / 4] each, from left to right.

    Epilogues draw gates for one block after the other, because the gates of a whole accumulator would spill registers.
    """
    left, right = tl.split(tl.permute(tl.reshape(tile, (BLOCK_M, 2, BLOCK_N // 2)), (0, 2, 1)))
    q0, q1 = tl.split(tl.permute(tl.reshape(left, (BLOCK_M, 2, BLOCK_N // 4)), (0, 2, 1)))
    q2, q3 = tl.split(tl.permute(tl.reshape(right, (BLOCK_M, 2, BLOCK_N // 4)), (0, 2, 1)))
    return q0, q1, q2, q3


@triton.jit
def weight_tile(K, BLOCK_K: tl.constexpr):
    """(row, column) of this program's tile of a weight with K columns, counted in tiles.

    The grid has one dimension, because the second one of a CUDA grid has at most 65,535 programs.
    """
    pid, width = tl.program_id(0), tl.maximum(tl.cdiv(K, BLOCK_K), 1)
    return (pid // width).to(tl.int64), (pid % width).to(tl.int64)


@triton.jit
def fold_fwd_kernel(
    w_ptr, bias_ptr, in_log_alpha_ptr, out_log_alpha_ptr, in_seed_ptr, out_seed_ptr, folded_ptr, folded_bias_ptr,
    N, K, stride_wn, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr, GATE: tl.constexpr,
):  # fmt: skip
    """folded (N, K) = W z_out[n] z_in[k] and folded_bias (N,) = b z_out, with one draw per batch, in the dtypes of the
    outputs; grid: (tiles,).

    Without output gates, folded_bias is not written: the bias is used as it is.
    """
    tile_n, tile_k = weight_tile(K, BLOCK_K)
    n0, k0 = tile_n * BLOCK_N, tile_k * BLOCK_K
    row, col = n0 + tl.arange(0, BLOCK_N), k0 + tl.arange(0, BLOCK_K)
    mask = (row < N)[:, None] & (col < K)[None, :]
    # [BLOCK_N, BLOCK_K]
    w = tl.load(w_ptr + row[:, None] * stride_wn + col[None, :], mask=mask, other=0.0).to(tl.float32)
    if out_log_alpha_ptr is not None:
        z_out, _ = draw_gate_vector(out_log_alpha_ptr, out_seed_ptr, n0, N, BLOCK_N, GATE)
        w *= z_out[:, None]
        if folded_bias_ptr is not None:  # noqa: SIM102 (the outer condition is static, the inner one is not)
            if k0 == 0:
                bias = load_columns(bias_ptr, n0, N, BLOCK_N) * z_out
                tl.store(folded_bias_ptr + row, bias.to(folded_bias_ptr.dtype.element_ty), mask=row < N)
    if in_log_alpha_ptr is not None:
        z_in, _ = draw_gate_vector(in_log_alpha_ptr, in_seed_ptr, k0, K, BLOCK_K, GATE)
        w *= z_in[None, :]
    tl.store(folded_ptr + row[:, None] * K + col[None, :], w.to(folded_ptr.dtype.element_ty), mask=mask)


@triton.jit
def fold_bwd_kernel(
    g_ptr, w_ptr, in_log_alpha_ptr, out_log_alpha_ptr, in_seed_ptr, out_seed_ptr,
    dw_ptr, in_partial_ptr, out_partial_ptr,
    N, K, stride_wn, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr, GATE: tl.constexpr,
):  # fmt: skip
    """The gradients of the fold from G = dy^T x and W, both (N, K), in one pass; grid: (tiles,).

    dw (N, K) = z_out z_in G. in_partial (N tiles, K): the sum of z_out W G over this tile's n. out_partial (K tiles,
    N): the sum of z_in W G over its k. ``fold_gate_bwd_kernel`` adds up the partial sums and multiplies them by z'.
    """
    tile_n, tile_k = weight_tile(K, BLOCK_K)
    n0, k0 = tile_n * BLOCK_N, tile_k * BLOCK_K
    row, col = n0 + tl.arange(0, BLOCK_N), k0 + tl.arange(0, BLOCK_K)
    mask = (row < N)[:, None] & (col < K)[None, :]
    # Both loads come before any store, because a load after a store would wait for memory a second time.
    g = tl.load(g_ptr + row[:, None] * K + col[None, :], mask=mask, other=0.0).to(tl.float32)  # [BLOCK_N, BLOCK_K]
    w = tl.load(w_ptr + row[:, None] * stride_wn + col[None, :], mask=mask, other=0.0).to(tl.float32)
    g_in, g_out = g, g  # G with the input gates, and with the output gates
    if in_log_alpha_ptr is not None:
        z_in, _ = draw_gate_vector(in_log_alpha_ptr, in_seed_ptr, k0, K, BLOCK_K, GATE)
        g_in = g * z_in[None, :]
    dw = g_in
    if out_log_alpha_ptr is not None:
        z_out, _ = draw_gate_vector(out_log_alpha_ptr, out_seed_ptr, n0, N, BLOCK_N, GATE)
        g_out = g * z_out[:, None]
        dw = g_in * z_out[:, None]
    if dw_ptr is not None:
        tl.store(dw_ptr + row[:, None] * K + col[None, :], dw.to(dw_ptr.dtype.element_ty), mask=mask)
    if in_partial_ptr is not None:
        tl.store(in_partial_ptr + tile_n * K + col, tl.sum(w * g_out, axis=0), mask=col < K)
    if out_partial_ptr is not None:
        tl.store(out_partial_ptr + tile_k * N + row, tl.sum(w * g_in, axis=1), mask=row < N)


@triton.jit
def fold_gate_bwd_kernel(
    partial_ptr, bias_ptr, dy_sum_ptr, log_alpha_ptr, seed_ptr, dlog_alpha_ptr, dbias_ptr,
    splits, n, BLOCK_S: tl.constexpr, BLOCK_N: tl.constexpr, GATE: tl.constexpr,
):  # fmt: skip
    """The end of the backward of the fold, for the input gates (n = K, without bias) or the output gates (n = N).

    dlog_alpha (n,) = (sum over splits of partial (splits, n) + b dy_sum) z', and dbias (n,) = z dy_sum, with dy_sum
    (n,) = sum_m dy. Grid: (column blocks,).
    """
    start = tl.program_id(0).to(tl.int64) * BLOCK_N
    cols = start + tl.arange(0, BLOCK_N)
    z, slope = draw_gate_vector(log_alpha_ptr, seed_ptr, start, n, BLOCK_N, GATE)
    if dbias_ptr is not None:
        dbias = z * load_columns(dy_sum_ptr, start, n, BLOCK_N)
        tl.store(dbias_ptr + cols, dbias.to(dbias_ptr.dtype.element_ty), mask=cols < n)
    if dlog_alpha_ptr is not None:
        dz = tl.zeros((BLOCK_N,), tl.float32)
        for first in range(0, splits, BLOCK_S):
            split = first + tl.arange(0, BLOCK_S).to(tl.int64)
            mask = (split < splits)[:, None] & (cols < n)[None, :]
            dz += tl.sum(tl.load(partial_ptr + split[:, None] * n + cols[None, :], mask=mask, other=0.0), axis=0)
        if bias_ptr is not None:
            dz += load_columns(bias_ptr, start, n, BLOCK_N) * load_columns(dy_sum_ptr, start, n, BLOCK_N)
        tl.store(dlog_alpha_ptr + cols, dz * slope, mask=cols < n)


@triton.jit
def gate_rows_fwd_kernel(
    t_ptr, log_alpha_ptr, seed_ptr, gated_ptr, M, n, stride_tm,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, GROUPED: tl.constexpr, GATE: tl.constexpr,
):  # fmt: skip
    """gated (M, n) = t z, with a draw for each row; grid: (row blocks * column blocks,), with column blocks changing
    fastest.
    """
    pid, blocks = tl.program_id(0).to(tl.int64), tl.cdiv(n, BLOCK_N)
    start, row = pid % blocks * BLOCK_N, pid // blocks * BLOCK_M + tl.arange(0, BLOCK_M)
    col = start + tl.arange(0, BLOCK_N)
    mask = (row < M)[:, None] & (col < n)[None, :]
    t = tl.load(t_ptr + row[:, None] * stride_tm + col[None, :], mask=mask, other=0.0)  # [BLOCK_M, BLOCK_N]
    t = gate_tile(t, log_alpha_ptr, seed_ptr, row, start, n, BLOCK_N, GROUPED, GATE)
    tl.store(gated_ptr + row[:, None] * n + col[None, :], t, mask=mask)


@triton.jit
def gate_rows_bwd_kernel(
    g_ptr, t_ptr, log_alpha_ptr, seed_ptr, gated_ptr, gate_partial_ptr, sum_partial_ptr,
    M, n, stride_gm, stride_tm, rows_per_split,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, GROUPED: tl.constexpr, GATE: tl.constexpr,
):  # fmt: skip
    """The backward of ``gate_rows_fwd_kernel``, for the gradient g (M, n) of t z, with a draw for each row.

    gated (M, n) = g z is the gradient of t. gate_partial (splits, n) = the sum of g t z' over the rows of a split, in
    order; added up over the splits it is dlog_alpha. sum_partial (splits, n) = the sum of g z over the same rows, from
    which follows dbias. Each of the three is optional. Grid: (column blocks, splits).
    """
    start, split = tl.program_id(0).to(tl.int64) * BLOCK_N, tl.program_id(1).to(tl.int64)
    col = start + tl.arange(0, BLOCK_N)
    seed = load_seed(seed_ptr, GATE)
    log_alpha = load_columns(log_alpha_ptr, start, n, BLOCK_N)[None, :]
    # Whole tiles of running sums: a sum over their rows goes through shared memory, so it is done once, at the end.
    dlog_alpha, dsum = tl.zeros((BLOCK_M, BLOCK_N), tl.float32), tl.zeros((BLOCK_M, BLOCK_N), tl.float32)
    for first in range(0, rows_per_split, BLOCK_M):
        row = split * rows_per_split + first + tl.arange(0, BLOCK_M)
        mask = (row < M)[:, None] & (col < n)[None, :]
        # [BLOCK_M, BLOCK_N]
        g = tl.load(g_ptr + row[:, None] * stride_gm + col[None, :], mask=mask, other=0.0).to(tl.float32)
        t = g
        if gate_partial_ptr is not None:  # before the store: a load after it would wait for memory again
            t = tl.load(t_ptr + row[:, None] * stride_tm + col[None, :], mask=mask, other=0.0).to(tl.float32)
        z, slope = draw_gate(log_alpha, seed, (row * n + start)[:, None], BLOCK_N, GROUPED, GATE)
        if gated_ptr is not None:
            tl.store(gated_ptr + row[:, None] * n + col[None, :], (g * z).to(gated_ptr.dtype.element_ty), mask=mask)
        if gate_partial_ptr is not None:
            dlog_alpha += g * t * slope
        if sum_partial_ptr is not None:
            dsum += g * z
    if gate_partial_ptr is not None:
        tl.store(gate_partial_ptr + split * n + col, tl.sum(dlog_alpha, axis=0), mask=col < n)
    if sum_partial_ptr is not None:
        tl.store(sum_partial_ptr + split * n + col, tl.sum(dsum, axis=0), mask=col < n)


@triton.jit
def gated_linear_fwd_kernel(
    x_ptr, w_ptr, bias_ptr, in_log_alpha_ptr, out_log_alpha_ptr, in_seed_ptr, out_seed_ptr, y_ptr, pre_ptr,
    M, N, K, stride_xm, stride_wn,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr, GROUP: tl.constexpr, EVEN: tl.constexpr,
    IN_GROUPED: tl.constexpr, OUT_GROUPED: tl.constexpr, PRECISION: tl.constexpr, GATE: tl.constexpr,
):  # fmt: skip
    """y (M, N), with a draw for each row; pre (M, N) = (x z_in) W^T + b, y before the output gates, for the backward.

    A program computes one tile [BLOCK_M, BLOCK_N] of y. Grid: (tiles,), in the order of ``tile_of``. EVEN: K is a
    multiple of BLOCK_K. IN_GROUPED, OUT_GROUPED: K, or N, is a multiple of 4.
    """
    tile_m, tile_n = tile_of(tl.program_id(0), tl.cdiv(M, BLOCK_M), tl.cdiv(N, BLOCK_N), GROUP)
    row, col = tile_m * BLOCK_M + tl.arange(0, BLOCK_M), tile_n * BLOCK_N + tl.arange(0, BLOCK_N)
    k = tl.arange(0, BLOCK_K)
    # Rows beyond the edge read row 0 instead of being masked; their results are not stored.
    x_ptrs = x_ptr + tl.where(row < M, row, 0)[:, None] * stride_xm + k[None, :]
    w_ptrs = w_ptr + tl.where(col < N, col, 0)[None, :] * stride_wn + k[:, None]
    acc = tl.zeros((BLOCK_M, BLOCK_N), tl.float32)
    for k0 in range(0, K, BLOCK_K):
        if EVEN:
            x, w = tl.load(x_ptrs), tl.load(w_ptrs)  # [BLOCK_M, BLOCK_K], [BLOCK_K, BLOCK_N]
        else:
            x = tl.load(x_ptrs, mask=(k < K - k0)[None, :], other=0.0)
            w = tl.load(w_ptrs, mask=(k < K - k0)[:, None], other=0.0)
        if in_log_alpha_ptr is not None:
            x = gate_tile(x, in_log_alpha_ptr, in_seed_ptr, row, k0, K, BLOCK_K, IN_GROUPED, GATE)
        acc = tl.dot(x, w, acc, input_precision=PRECISION)
        x_ptrs += BLOCK_K
        w_ptrs += BLOCK_K
    parts = quarters(acc, BLOCK_M, BLOCK_N)
    WIDTH: tl.constexpr = BLOCK_N // 4
    for i in tl.static_range(4):
        y, start = parts[i], tile_n * BLOCK_N + i * WIDTH
        col = start + tl.arange(0, WIDTH)
        if bias_ptr is not None:
            y += load_columns(bias_ptr, start, N, WIDTH)[None, :]
        offsets, mask = row[:, None] * N + col[None, :], (row < M)[:, None] & (col < N)[None, :]
        if pre_ptr is not None:
            tl.store(pre_ptr + offsets, y.to(pre_ptr.dtype.element_ty), mask=mask)
        if out_log_alpha_ptr is not None:
            y = gate_tile(y, out_log_alpha_ptr, out_seed_ptr, row, start, N, WIDTH, OUT_GROUPED, GATE)
        tl.store(y_ptr + offsets, y.to(y_ptr.dtype.element_ty), mask=mask)


@triton.jit
def gated_linear_bwd_dx_kernel(
    dy_ptr, x_ptr, w_ptr, in_log_alpha_ptr, out_log_alpha_ptr, in_seed_ptr, out_seed_ptr, dx_ptr, partial_ptr,
    M, N, K, stride_dym, stride_xm, stride_wn,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr, GROUP: tl.constexpr, EVEN: tl.constexpr,
    IN_GROUPED: tl.constexpr, OUT_GROUPED: tl.constexpr, PRECISION: tl.constexpr, GATE: tl.constexpr,
):  # fmt: skip
    """dx (M, K) = ((dy z_out) W) z_in, and partial (M tiles, K) = the sum of x ((dy z_out) W) z_in' over this tile's m.

    A program computes one tile [BLOCK_M, BLOCK_K] of dx. Grid: (tiles,), in the order of ``tile_of``. Without input
    gates there is no partial. EVEN: N is a multiple of BLOCK_N.
    """
    tile_m, tile_k = tile_of(tl.program_id(0), tl.cdiv(M, BLOCK_M), tl.cdiv(K, BLOCK_K), GROUP)
    row, col = tile_m * BLOCK_M + tl.arange(0, BLOCK_M), tile_k * BLOCK_K + tl.arange(0, BLOCK_K)
    n = tl.arange(0, BLOCK_N)
    dy_ptrs = dy_ptr + tl.where(row < M, row, 0)[:, None] * stride_dym + n[None, :]
    w_ptrs, w_mask = w_ptr + n.to(tl.int64)[:, None] * stride_wn + col[None, :], (col < K)[None, :]
    acc = tl.zeros((BLOCK_M, BLOCK_K), tl.float32)
    for n0 in range(0, N, BLOCK_N):
        if EVEN:
            dy, w = tl.load(dy_ptrs), tl.load(w_ptrs, mask=w_mask, other=0.0)  # [BLOCK_M, BLOCK_N], [BLOCK_N, BLOCK_K]
        else:
            dy = tl.load(dy_ptrs, mask=(n < N - n0)[None, :], other=0.0)
            w = tl.load(w_ptrs, mask=(n < N - n0)[:, None] & w_mask, other=0.0)
        if out_log_alpha_ptr is not None:
            dy = gate_tile(dy, out_log_alpha_ptr, out_seed_ptr, row, n0, N, BLOCK_N, OUT_GROUPED, GATE)
        acc = tl.dot(dy, w, acc, input_precision=PRECISION)
        dy_ptrs += BLOCK_N
        w_ptrs += BLOCK_N * tl.cast(stride_wn, tl.int64)
    parts = quarters(acc, BLOCK_M, BLOCK_K)
    WIDTH: tl.constexpr = BLOCK_K // 4
    for i in tl.static_range(4):
        dx, start = parts[i], tile_k * BLOCK_K + i * WIDTH
        col = start + tl.arange(0, WIDTH)
        mask = (row < M)[:, None] & (col < K)[None, :]
        if in_log_alpha_ptr is not None:
            log_alpha = load_columns(in_log_alpha_ptr, start, K, WIDTH)[None, :]
            z, slope = draw_gate(
                log_alpha, load_seed(in_seed_ptr, GATE), (row * K + start)[:, None], WIDTH, IN_GROUPED, GATE
            )
            if partial_ptr is not None:
                x = tl.load(x_ptr + row[:, None] * stride_xm + col[None, :], mask=mask, other=0.0)
                tl.store(partial_ptr + tile_m * K + col, tl.sum(x * dx * slope, axis=0), mask=col < K)
            dx *= z
        if dx_ptr is not None:
            tl.store(dx_ptr + row[:, None] * K + col[None, :], dx.to(dx_ptr.dtype.element_ty), mask=mask)


@triton.jit
def gated_linear_bwd_dw_kernel(
    dy_ptr, x_ptr, in_log_alpha_ptr, out_log_alpha_ptr, in_seed_ptr, out_seed_ptr, dw_ptr,
    M, N, K, stride_dym, stride_xm, rows_per_split,
    BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr, BLOCK_M: tl.constexpr, GROUP: tl.constexpr, EVEN: tl.constexpr,
    IN_GROUPED: tl.constexpr, OUT_GROUPED: tl.constexpr, PRECISION: tl.constexpr, GATE: tl.constexpr,
):  # fmt: skip
    """dw (splits, N, K) = (dy z_out)^T (x z_in), summed over the ``rows_per_split`` rows m of a split.

    A program computes one tile [BLOCK_N, BLOCK_K] of one split; ``row`` and ``col`` are indices n and k. Grid: (tiles,
    splits). EVEN: M is splits * rows_per_split.
    """
    tile_n, tile_k = tile_of(tl.program_id(0), tl.cdiv(N, BLOCK_N), tl.cdiv(K, BLOCK_K), GROUP)
    split = tl.program_id(1).to(tl.int64)
    row, col = tile_n * BLOCK_N + tl.arange(0, BLOCK_N), tile_k * BLOCK_K + tl.arange(0, BLOCK_K)
    m = split * rows_per_split + tl.arange(0, BLOCK_M)
    dy_ptrs, dy_mask = dy_ptr + m[:, None] * stride_dym + row[None, :], (row < N)[None, :]
    x_ptrs, x_mask = x_ptr + m[:, None] * stride_xm + col[None, :], (col < K)[None, :]
    acc = tl.zeros((BLOCK_N, BLOCK_K), tl.float32)
    for first in range(0, rows_per_split, BLOCK_M):
        if EVEN:
            dy = tl.load(dy_ptrs, mask=dy_mask, other=0.0)  # [BLOCK_M, BLOCK_N]
            x = tl.load(x_ptrs, mask=x_mask, other=0.0)  # [BLOCK_M, BLOCK_K]
        else:
            m_mask = (m + first < M)[:, None]
            dy, x = tl.load(dy_ptrs, mask=dy_mask & m_mask, other=0.0), tl.load(x_ptrs, mask=x_mask & m_mask, other=0.0)
        if out_log_alpha_ptr is not None:
            dy = gate_tile(
                dy, out_log_alpha_ptr, out_seed_ptr, m + first, tile_n * BLOCK_N, N, BLOCK_N, OUT_GROUPED, GATE
            )
        if in_log_alpha_ptr is not None:
            x = gate_tile(x, in_log_alpha_ptr, in_seed_ptr, m + first, tile_k * BLOCK_K, K, BLOCK_K, IN_GROUPED, GATE)
        acc = tl.dot(tl.trans(dy), x, acc, input_precision=PRECISION)
        dy_ptrs += BLOCK_M * tl.cast(stride_dym, tl.int64)
        x_ptrs += BLOCK_M * tl.cast(stride_xm, tl.int64)
    dw_ptrs = dw_ptr + split * N * K + row[:, None] * K + col[None, :]
    tl.store(dw_ptrs, acc.to(dw_ptr.dtype.element_ty), mask=(row < N)[:, None] & (col < K)[None, :])
