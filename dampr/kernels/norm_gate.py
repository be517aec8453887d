"""y = act(z (gain (x - mean) rstd + bias)), the statistics of x, and the gradients.

    h = (x - mean) rstd    v = z (gain h + bias)    y = act(v), a ReLU or nothing
    dp = dy, or 0 where the ReLU cuts v off    S0 = sum dp, S1 = sum dp h, for each gate
    dz = gain S1 + bias S0    dgain = sum over draws of z S1    dbias = sum over draws of z S0
    dx = gain rstd (z dp - dbias / N - h dgain / N) with N elements per channel; without the last two terms if the
    statistics are running ones

x is (outer, middle, n, inner) in the order of its memory, with channels on n. z are values of gates, float32, which
another kernel has drawn: (n,) for a draw per batch, or (outer, n), with PER_OUTER, for a draw per sample. So the
gradient dz is with respect to these values; ``sample_gates_bwd_kernel`` (gates.py) makes dlog_alpha of it. gain, bias,
mean and var are (n,), float32.

The kernels are bound by memory: the forward reads x twice and writes y, the backward reads x and dy twice and writes
dx. Layouts are those of gate_activations.py: channels along the columns of a tile if inner = 1 (channels last), else
one channel for each row of inner elements. A program sums over one axis of its tile, and the parts are joined in a
fixed order, without atomics.

Each part of the variance has a mean of its own (Chan, Golub, LeVeque 1983), so few digits are lost if the mean is large
against the standard deviation. In the code, ``spread`` is a sum of squared distances from a mean. Statistics are
divided with tl.div_rn, which rounds correctly. The operator / is off by up to two units in the last place on a GPU; for
a mean of 100 that is six times the allowed error of y.
"""

import triton
import triton.language as tl


@triton.jit
def _channel(ptr, channel, mask, DEFAULT: tl.constexpr):
    """The entries ``channel`` of a vector, float32; DEFAULT if there is no vector."""
    if ptr is None:
        return tl.full(channel.shape, DEFAULT, tl.float32)
    else:
        return tl.load(ptr + channel, mask=mask, other=DEFAULT)


@triton.jit
def _activated(v, RELU: tl.constexpr):
    """v, or its ReLU. A NaN stays a NaN."""
    if RELU:
        return tl.where(v < 0.0, 0.0, v)
    else:
        return v


@triton.jit
def _let_through(dy, v, RELU: tl.constexpr):
    """dy, or 0 where the ReLU cut v off."""
    if RELU:
        return tl.where(v <= 0.0, 0.0, dy)
    else:
        return dy


@triton.jit
def _join(mean, spread, seen, tile_mean, tile_spread, count):
    """(mean, sum of squared distances) of two sets of elements together.

    The first set has ``seen`` elements, the second ``count``, which may be 0 unless ``seen`` is 0 too.
    """
    gap, share = tile_mean - mean, tl.div_rn(count.to(tl.float32), (seen + count).to(tl.float32))
    return mean + gap * share, spread + tile_spread + gap * gap * (seen * share)


@triton.jit
def norm_stats_columns_kernel(
    x_ptr, mean_ptr, spread_ptr, rows, n, rows_per_split, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr
):
    """Means and sums of squared distances from them, (splits, n) each, of x (rows, n).

    Grid: (splits * column blocks,), with column blocks changing fastest.
    """
    blocks = tl.cdiv(n, BLOCK_N)
    pid = tl.program_id(0)
    split, col = (pid // blocks).to(tl.int64), (pid % blocks).to(tl.int64) * BLOCK_N + tl.arange(0, BLOCK_N)
    start, end = split * rows_per_split, tl.minimum((split + 1) * rows_per_split, rows)
    # Sum distances from ``near``, the mean of the first tile, and not the elements: if these have a large mean and a
    # small variance, the difference of their sums would lose digits. Each element of the tile has running sums of its
    # own, in registers, so shared memory is used only at the beginning and at the end.
    row = start + tl.arange(0, BLOCK_M)
    x = tl.load(x_ptr + row[:, None] * n + col[None, :], mask=(row < end)[:, None] & (col < n)[None, :], other=0.0).to(
        tl.float32
    )
    near = tl.div_rn(tl.sum(x, axis=0), tl.maximum(tl.minimum(end - start, BLOCK_M), 1).to(tl.float32))
    near = tl.where(tl.abs(near) < float("inf"), near, 0.0)  # a mean that is NaN or infinite helps nothing
    moved, spread = tl.zeros((BLOCK_M, BLOCK_N), tl.float32), tl.zeros((BLOCK_M, BLOCK_N), tl.float32)
    for first in range(0, rows_per_split, BLOCK_M):
        row = start + first + tl.arange(0, BLOCK_M)
        mask = (row < end)[:, None] & (col < n)[None, :]
        x = tl.load(x_ptr + row[:, None] * n + col[None, :], mask=mask, other=0.0).to(tl.float32)  # [BLOCK_M, BLOCK_N]
        distance = tl.where(mask, x - near[None, :], 0.0)
        moved += distance
        spread += distance * distance
    total = tl.sum(moved, axis=0)
    mean = tl.div_rn(total, tl.maximum(end - start, 1).to(tl.float32))
    tl.store(mean_ptr + split * n + col, near + mean, mask=col < n)
    squares = tl.sum(spread, axis=0) - total * mean
    # where() and not maximum(), so that a NaN stays a NaN
    tl.store(spread_ptr + split * n + col, tl.where(squares < 0.0, 0.0, squares), mask=col < n)


@triton.jit
def norm_stats_rows_kernel(
    x_ptr, mean_ptr, spread_ptr, rows, n, inner, per_piece, pieces, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr
):
    """Means and sums of squared distances from them, (B, pieces, n) each, of x (rows, inner) with rows = (B, n).

    Each row is divided into pieces. Grid: (row blocks * pieces,), with pieces changing fastest.
    """
    pid = tl.program_id(0)
    row, piece = (pid // pieces).to(tl.int64) * BLOCK_M + tl.arange(0, BLOCK_M), (pid % pieces).to(tl.int64)
    mean, spread = tl.zeros((BLOCK_M,), tl.float32), tl.zeros((BLOCK_M,), tl.float32)
    for first in range(0, per_piece, BLOCK_N):
        col = piece * per_piece + first + tl.arange(0, BLOCK_N)
        count = tl.maximum(tl.minimum(inner - (piece * per_piece + first), BLOCK_N), 0)
        mask = (row < rows)[:, None] & (col < inner)[None, :]
        # [BLOCK_M, BLOCK_N]
        x = tl.load(x_ptr + row[:, None] * inner + col[None, :], mask=mask, other=0.0).to(tl.float32)
        centre = tl.div_rn(tl.sum(x, axis=1), tl.maximum(count, 1).to(tl.float32))
        distance = tl.where(mask, x - centre[:, None], 0.0)
        mean, spread = _join(mean, spread, first, centre, tl.sum(distance * distance, axis=1), count)
    place = (row // n * pieces + piece) * n + row % n
    tl.store(mean_ptr + place, mean, mask=row < rows)
    tl.store(spread_ptr + place, spread, mask=row < rows)


@triton.jit
def norm_stats_join_kernel(
    part_mean_ptr, part_spread_ptr, mean_ptr, var_ptr, running_mean_ptr, running_var_ptr, updates_ptr,
    parts, n, length, per_piece, pieces, count, stays, mean_share, var_share,
    BLOCK_S: tl.constexpr, BLOCK_N: tl.constexpr,
):  # fmt: skip
    """mean and biased variance (n,) of ``count`` elements per channel, from the parts (parts, n); grid: (column
    blocks,).

    Part i has the elements from i % pieces * per_piece on, up to per_piece of ``length``. Means are joined as distances
    from the first one, then squared distances from the joined mean. Running statistics, if there are any, are updated:
    running = stays * running + mean_share * mean, or + var_share * var. ``updates``, the count of batches, is increased
    by 1.
    """
    col = tl.program_id(0).to(tl.int64) * BLOCK_N + tl.arange(0, BLOCK_N)
    whole = tl.zeros((BLOCK_N,), tl.float32) + count
    start = tl.load(part_mean_ptr + col, mask=col < n, other=0.0)
    moved, spread = tl.zeros((BLOCK_N,), tl.float32), tl.zeros((BLOCK_N,), tl.float32)
    for first in range(0, parts, BLOCK_S):
        part = first + tl.arange(0, BLOCK_S)
        mask = (part < parts)[:, None] & (col < n)[None, :]
        size = tl.minimum(length - part % pieces * per_piece, per_piece).to(tl.float32)[:, None]
        place = part.to(tl.int64)[:, None] * n + col[None, :]
        gap = tl.load(part_mean_ptr + place, mask=mask, other=0.0) - start[None, :]
        moved += tl.sum(tl.where(mask, gap * size, 0.0), axis=0)
    mean = start + tl.div_rn(moved, whole)
    for first in range(0, parts, BLOCK_S):
        part = first + tl.arange(0, BLOCK_S)
        mask = (part < parts)[:, None] & (col < n)[None, :]
        size = tl.minimum(length - part % pieces * per_piece, per_piece).to(tl.float32)[:, None]
        place = part.to(tl.int64)[:, None] * n + col[None, :]
        gap = tl.load(part_mean_ptr + place, mask=mask, other=0.0) - mean[None, :]
        within = tl.load(part_spread_ptr + place, mask=mask, other=0.0)
        spread += tl.sum(tl.where(mask, within + gap * gap * size, 0.0), axis=0)
    var = tl.div_rn(spread, whole)
    tl.store(mean_ptr + col, mean, mask=col < n)
    tl.store(var_ptr + col, var, mask=col < n)
    if running_mean_ptr is not None:
        moved = tl.load(running_mean_ptr + col, mask=col < n, other=0.0) * stays + mean * mean_share
        tl.store(running_mean_ptr + col, moved, mask=col < n)
    if running_var_ptr is not None:
        moved = tl.load(running_var_ptr + col, mask=col < n, other=0.0) * stays + var * var_share
        tl.store(running_var_ptr + col, moved, mask=col < n)
    if updates_ptr is not None:  # noqa: SIM102 (the outer condition is static, the inner one is not)
        if tl.program_id(0) == 0:
            tl.store(updates_ptr, tl.load(updates_ptr) + 1)


@triton.jit
def norm_gate_columns_kernel(
    x_ptr, dy_ptr, z_ptr, gain_ptr, bias_ptr, mean_ptr, var_ptr, sums_ptr, out_ptr, partial_ptr,
    middle, n, rows_per_split, count,
    EPS: tl.constexpr, RELU: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, PER_OUTER: tl.constexpr,
):  # fmt: skip
    """One of three passes over x (outer, middle, n); the pointers that are None say which.

    1. Forward, without dy: out = y.
    2. First pass of the backward, with dy and partial: partial (outer, splits, 2, n) = S0 and S1 of the rows of a
       split, in order.
    3. Second pass of the backward, with dy and out: out = dx. sums (2, n) are dbias and dgain, which dx needs if the
       statistics are those of x; None for running statistics. ``count``: the elements per channel, N in the equation.

    Grid: (outer * splits * column blocks,), with column blocks changing fastest.
    """
    blocks, splits = tl.cdiv(n, BLOCK_N), tl.cdiv(middle, rows_per_split)
    pid = tl.program_id(0)
    part = pid // blocks  # outer * splits + split
    outer, split, part = (part // splits).to(tl.int64), (part % splits).to(tl.int64), part.to(tl.int64)
    col = (pid % blocks).to(tl.int64) * BLOCK_N + tl.arange(0, BLOCK_N)
    inside = col < n
    z = tl.load(z_ptr + (outer * n if PER_OUTER else 0) + col, mask=inside, other=0.0)[None, :]
    gain, bias = _channel(gain_ptr, col, inside, 1.0)[None, :], _channel(bias_ptr, col, inside, 0.0)[None, :]
    mean = _channel(mean_ptr, col, inside, 0.0)[None, :]
    rstd = (1.0 / tl.sqrt_rn(_channel(var_ptr, col, inside, 1.0) + EPS))[None, :]
    if sums_ptr is not None:  # dbias / N and dgain / N, the parts of dx that flow through mean and variance
        by_bias = _channel(sums_ptr, col, inside, 0.0)[None, :] / count
        by_gain = _channel(sums_ptr + n, col, inside, 0.0)[None, :] / count
    # Whole tiles of running sums: a sum over their rows goes through shared memory, so it is done once, at the end.
    total, product = tl.zeros((BLOCK_M, BLOCK_N), tl.float32), tl.zeros((BLOCK_M, BLOCK_N), tl.float32)
    for first in range(0, rows_per_split, BLOCK_M):
        row = split * rows_per_split + first + tl.arange(0, BLOCK_M)
        mask = (row < middle)[:, None] & inside[None, :]
        offsets = (outer * middle + row)[:, None] * n + col[None, :]
        h = (tl.load(x_ptr + offsets, mask=mask, other=0.0).to(tl.float32) - mean) * rstd  # [BLOCK_M, BLOCK_N]
        v = z * (gain * h + bias)
        if dy_ptr is None:
            tl.store(out_ptr + offsets, _activated(v, RELU).to(out_ptr.dtype.element_ty), mask=mask)
        else:
            dp = _let_through(tl.load(dy_ptr + offsets, mask=mask, other=0.0).to(tl.float32), v, RELU)
            if partial_ptr is not None:
                total += dp
                product += dp * h
            else:
                dh = z * dp
                if sums_ptr is not None:
                    dh = dh - by_bias - h * by_gain
                tl.store(out_ptr + offsets, (gain * rstd * dh).to(out_ptr.dtype.element_ty), mask=mask)
    if partial_ptr is not None:
        tl.store(partial_ptr + part * 2 * n + col, tl.sum(total, axis=0), mask=inside)
        tl.store(partial_ptr + (part * 2 + 1) * n + col, tl.sum(product, axis=0), mask=inside)


@triton.jit
def norm_gate_rows_kernel(
    x_ptr, dy_ptr, z_ptr, gain_ptr, bias_ptr, mean_ptr, var_ptr, sums_ptr, out_ptr, partial_ptr,
    rows, middle, n, inner, per_piece, pieces, count,
    EPS: tl.constexpr, RELU: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, PER_OUTER: tl.constexpr,
):  # fmt: skip
    """The three passes of :func:`norm_gate_columns_kernel` over (rows, inner), with rows = (outer, middle, n).

    Each row is divided into pieces; partial is (outer, middle, pieces, 2, n). Grid: (row blocks * pieces,), with pieces
    changing fastest.
    """
    pid = tl.program_id(0)
    row, piece = (pid // pieces).to(tl.int64) * BLOCK_M + tl.arange(0, BLOCK_M), (pid % pieces).to(tl.int64)
    channel, inside = row % n, row < rows
    gate = channel
    if PER_OUTER:
        gate += row // (middle * n) * n
    z = tl.load(z_ptr + gate, mask=inside, other=0.0)[:, None]
    gain, bias = _channel(gain_ptr, channel, inside, 1.0)[:, None], _channel(bias_ptr, channel, inside, 0.0)[:, None]
    mean = _channel(mean_ptr, channel, inside, 0.0)[:, None]
    rstd = (1.0 / tl.sqrt_rn(_channel(var_ptr, channel, inside, 1.0) + EPS))[:, None]
    if sums_ptr is not None:  # dbias / N and dgain / N, the parts of dx that flow through mean and variance
        by_bias = _channel(sums_ptr, channel, inside, 0.0)[:, None] / count
        by_gain = _channel(sums_ptr + n, channel, inside, 0.0)[:, None] / count
    total, product = tl.zeros((BLOCK_M,), tl.float32), tl.zeros((BLOCK_M,), tl.float32)
    for first in range(0, per_piece, BLOCK_N):
        col = piece * per_piece + first + tl.arange(0, BLOCK_N)
        mask = inside[:, None] & (col < inner)[None, :]
        offsets = row[:, None] * inner + col[None, :]
        h = (tl.load(x_ptr + offsets, mask=mask, other=0.0).to(tl.float32) - mean) * rstd  # [BLOCK_M, BLOCK_N]
        v = z * (gain * h + bias)
        if dy_ptr is None:
            tl.store(out_ptr + offsets, _activated(v, RELU).to(out_ptr.dtype.element_ty), mask=mask)
        else:
            dp = _let_through(tl.load(dy_ptr + offsets, mask=mask, other=0.0).to(tl.float32), v, RELU)
            if partial_ptr is not None:
                total += tl.sum(dp, axis=1)
                product += tl.sum(dp * h, axis=1)
            else:
                dh = z * dp
                if sums_ptr is not None:
                    dh = dh - by_bias - h * by_gain
                tl.store(out_ptr + offsets, (gain * rstd * dh).to(out_ptr.dtype.element_ty), mask=mask)
    if partial_ptr is not None:
        place = (row // n * pieces + piece) * 2 * n + channel
        tl.store(partial_ptr + place, total, mask=inside)
        tl.store(partial_ptr + place + n, product, mask=inside)


@triton.jit
def norm_gate_finish_kernel(
    sums_ptr, z_ptr, gain_ptr, bias_ptr, dz_ptr, partial_ptr, outer, parts, n, outer_per_split,
    BLOCK_S: tl.constexpr, BLOCK_N: tl.constexpr,
):  # fmt: skip
    """From the sums S0 and S1 of the first pass (outer, parts, 2, n): dz (outer, n), and partial (splits, 2, n), which
    added up over the splits is (dbias, dgain).

    A split is ``outer_per_split`` consecutive outer indices. With a draw per batch, outer is 1. Grid: (splits * column
    blocks,), with column blocks changing fastest.
    """
    blocks = tl.cdiv(n, BLOCK_N)
    pid = tl.program_id(0)
    split, col = (pid // blocks).to(tl.int64), (pid % blocks).to(tl.int64) * BLOCK_N + tl.arange(0, BLOCK_N)
    gain, bias = _channel(gain_ptr, col, col < n, 1.0)[None, :], _channel(bias_ptr, col, col < n, 0.0)[None, :]
    dbias, dgain = tl.zeros((BLOCK_N,), tl.float32), tl.zeros((BLOCK_N,), tl.float32)
    for first in range(0, outer_per_split, BLOCK_S):
        row = split * outer_per_split + first + tl.arange(0, BLOCK_S)
        mask = (row < outer)[:, None] & (col < n)[None, :]
        s0, s1 = tl.zeros((BLOCK_S, BLOCK_N), tl.float32), tl.zeros((BLOCK_S, BLOCK_N), tl.float32)
        place = (row * parts * 2 * n)[:, None] + col[None, :]
        for _ in range(0, parts):
            s0 += tl.load(sums_ptr + place, mask=mask, other=0.0)
            s1 += tl.load(sums_ptr + n + place, mask=mask, other=0.0)
            place += 2 * n
        offsets = row[:, None] * n + col[None, :]
        z = tl.load(z_ptr + offsets, mask=mask, other=0.0)  # [BLOCK_S, BLOCK_N]
        if dz_ptr is not None:
            tl.store(dz_ptr + offsets, gain * s1 + bias * s0, mask=mask)
        dbias += tl.sum(z * s0, axis=0)
        dgain += tl.sum(z * s1, axis=0)
    tl.store(partial_ptr + split * 2 * n + col, dbias, mask=col < n)
    tl.store(partial_ptr + (split * 2 + 1) * n + col, dgain, mask=col < n)
