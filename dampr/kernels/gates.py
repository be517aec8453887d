"""Drawing gates: z = clip(s (zeta - gamma) + gamma, 0, 1), its derivative, and the kernels that only draw.

    a = exp(-log_alpha)    t = a (1 - u) / u    s = 1 / (1 + t ** (1 / beta))
    dz/dlog_alpha = (zeta - gamma) / beta s (1 - s) inside
    z = 0 <=> u (a + c0) <= a      z = 1 <=> u (a + c1) >= a

Equations, constants, evaluation rules and the other families: dampr/spec.py.

Every kernel calls ``draw_gate``, on a vector of gates or on a tile with a draw for each row. ``GATE`` is a whole
``dampr.spec.GateSpec``, known at compile time, so the family is a branch that the compiler resolves. Whether a gate is
0 or 1 is decided by single IEEE operations; therefore kernels that draw are launched with ``enable_fp_fusion=False``.
Only values in between use the hardware's approximate division and square root.
"""

import triton
import triton.language as tl

from dampr import spec

# Kernels see only constexpr globals.
HARD_CONCRETE, VALUE, RAMP, MASK = (tl.constexpr(n) for n in (spec.HARD_CONCRETE, spec.VALUE, spec.RAMP, spec.MASK))
SAMPLE, MEDIAN = tl.constexpr(spec.SAMPLE), tl.constexpr(spec.MEDIAN)
TANH, RATIO, SQUARE_RATIO = (tl.constexpr(n) for n in (spec.TANH, spec.RATIO, spec.SQUARE_RATIO))
EXPONENTIAL, CLIP, LINEAR = (tl.constexpr(n) for n in (spec.EXPONENTIAL, spec.CLIP, spec.LINEAR))
HARD, SMOOTH, EXACT_ZERO, LOGISTIC = (tl.constexpr(n) for n in (spec.HARD, spec.SMOOTH, spec.EXACT_ZERO, spec.LOGISTIC))
EDGE = tl.constexpr(spec.EDGE)
NOT_ONE = tl.constexpr(1.0 - spec.EDGE)
EXP_LIMIT = tl.constexpr(spec.EXP_LIMIT)
EXP_LOG2E, EXP_ROUND = tl.constexpr(spec.EXP_LOG2E), tl.constexpr(spec.EXP_ROUND)
EXP_LN2_HI, EXP_LN2_LO = tl.constexpr(spec.EXP_LN2_HI), tl.constexpr(spec.EXP_LN2_LO)
EXP_HIGHEST = tl.constexpr(spec.EXP_POLY[0])
EXP_POLY = tl.constexpr(spec.EXP_POLY[1:])
EXP_DEGREE = tl.constexpr(len(spec.EXP_POLY) - 1)
TANH_SMALL, TANH_HIGHEST = tl.constexpr(spec.TANH_SMALL), tl.constexpr(spec.TANH_POLY[0])
TANH_POLY, TANH_DEGREE = tl.constexpr(spec.TANH_POLY[1:]), tl.constexpr(len(spec.TANH_POLY) - 1)
RAMP_LIMIT, MASK_LIMIT = tl.constexpr(spec.RAMP_LIMIT), tl.constexpr(spec.MASK_LIMIT)
UNIFORM_SCALE = tl.constexpr(4.6566127342e-10)  # dampr.philox.UNIFORM_SCALE; that module imports torch
NAN = tl.constexpr(tl.PropagateNan.ALL)
is_two_thirds = triton.constexpr_function(spec.is_two_thirds)


@triton.jit
def exp_portable(x):
    """exp(x) in float32 by the operations of dampr.reference.exp_portable, in their order."""
    x = tl.minimum(tl.maximum(x, -EXP_LIMIT, propagate_nan=NAN), EXP_LIMIT, propagate_nan=NAN)
    n = (x * EXP_LOG2E + EXP_ROUND) - EXP_ROUND
    f = (x - n * EXP_LN2_HI) - n * EXP_LN2_LO
    p = tl.full(x.shape, EXP_HIGHEST, tl.float32)
    for i in tl.static_range(EXP_DEGREE):
        p = p * f + EXP_POLY[i]
    return p * ((n.to(tl.int32) + 127) << 23).to(tl.float32, bitcast=True)


@triton.jit
def draw_words(seed, start, BLOCK: tl.constexpr, GROUPED: tl.constexpr):
    """The Philox words of gates start .. start + BLOCK - 1: one uint32 word for each gate.

    ``start``, int64: a scalar, for a result of shape [BLOCK]; or [BLOCK_M, 1], for [BLOCK_M, BLOCK]. One Philox
    evaluation gives the four words of a group: gate i has word i % 4 of group i // 4 (dampr/philox.py). GROUPED:
    ``start`` and BLOCK are multiples of 4, so each group is evaluated once; else each gate evaluates its group anew.
    """
    if GROUPED:
        group = (start >> 2) + tl.arange(0, BLOCK // 4)
    else:
        index = start + tl.arange(0, BLOCK)
        group = index >> 2
    zero = tl.zeros(group.shape, tl.uint32)
    w0, w1, w2, w3 = tl.philox(seed, group.to(tl.uint32), (group >> 32).to(tl.uint32), zero, zero)
    if GROUPED:
        return tl.interleave(tl.interleave(w0, w2), tl.interleave(w1, w3))  # w0 w1 w2 w3 of each group in turn
    else:
        which = index & 3
        return tl.where(which < 2, tl.where(which == 0, w0, w1), tl.where(which == 2, w2, w3))


@triton.jit
def uniform(word):
    """uint32 words -> uniform float32 numbers in [2^-24, 1 - 2^-24], equal to the bit to those of dampr.philox.uniform.

    The word is read as int32, negative numbers are folded onto the others, and the result is multiplied by a number
    just below 2^-31, as ``tl.rand`` does.
    """
    word = word.to(tl.int32, bitcast=True)
    u = tl.where(word < 0, -word - 1, word).to(tl.float32) * UNIFORM_SCALE
    return tl.minimum(tl.maximum(u, EDGE), NOT_ONE)


@triton.jit
def draw_hard_concrete(log_alpha, seed, start, BLOCK: tl.constexpr, GROUPED: tl.constexpr, GATE: tl.constexpr):
    """As :func:`draw_gate`, for the hard concrete family."""
    if GATE.rule == SAMPLE:
        u = uniform(draw_words(seed, start, BLOCK, GROUPED))
        a = exp_portable(-log_alpha)  # [1, BLOCK]: all rows share it
        closed = u * (a + GATE.c0) <= a
        full = u * (a + GATE.c1) >= a
        q = a * (1.0 - u)  # t = q / u; s = 1 / (1 + t ** (1 / beta)) = sigmoid((logit u + log_alpha) / beta)
        if is_two_thirds(GATE.beta):
            power_u = u * tl.sqrt(u)
            s = power_u / (power_u + q * tl.sqrt(q))  # one division instead of two
        else:
            s = 1.0 / (1.0 + tl.exp(tl.log(q / u) / GATE.beta))
        slope = s * (1.0 - s) * ((GATE.zeta - GATE.gamma) / GATE.beta)
    else:
        closed = log_alpha <= GATE.lo
        full = log_alpha >= GATE.hi  # the binary rule has lo = hi, so every gate is 0 or 1
        if GATE.rule == MEDIAN:
            s = 1.0 / (1.0 + tl.exp(-log_alpha / GATE.beta))
            slope = s * (1.0 - s) * ((GATE.zeta - GATE.gamma) / GATE.beta)
        else:
            s = 1.0 / (1.0 + tl.exp(-log_alpha))
            slope = s * (1.0 - s) * (GATE.zeta - GATE.gamma)
    z = s * (GATE.zeta - GATE.gamma) + GATE.gamma
    z = tl.minimum(tl.maximum(z, EDGE, propagate_nan=NAN), NOT_ONE, propagate_nan=NAN)
    return tl.where(closed, 0.0, tl.where(full, 1.0, z)), tl.where(closed | full, 0.0, slope)


@triton.jit
def tanh_positive(y, t):
    """tanh(y) for y >= 0, precise also where it is small; t: exp(-2 y)."""
    yy = y * y
    p = tl.full(y.shape, TANH_HIGHEST, tl.float32)
    for i in tl.static_range(TANH_DEGREE):
        p = p * yy + TANH_POLY[i]
    return tl.where(y <= TANH_SMALL, y + y * (yy * p), (1.0 - t) / (1.0 + t))


@triton.jit
def ramp_gate(x, GATE: tl.constexpr):
    """(z, dz/dx) of a ramp, shaped like ``x``."""
    closed = x <= GATE.lo
    y = x * GATE.beta
    if GATE.rule == CLIP or GATE.rule == LINEAR:
        z, slope = y, tl.full(x.shape, 1.0, tl.float32)
    else:
        y = tl.minimum(y, RAMP_LIMIT, propagate_nan=NAN)
        if GATE.rule == TANH:
            t = tl.exp(-2.0 * y)
            r = 1.0 / (1.0 + t)
            z, slope = tanh_positive(y, t), 4.0 * t * r * r
        elif GATE.rule == RATIO:
            r = 1.0 / (1.0 + y)
            z, slope = y * r, r * r
        elif GATE.rule == SQUARE_RATIO:
            r = 1.0 / (1.0 + y * y)
            z, slope = y * y * r, 2.0 * y * r * r
        else:
            tl.static_assert(GATE.rule == EXPONENTIAL)
            slope = tl.exp(-y)
            half = tanh_positive(0.5 * y, slope)  # z = 1 - exp(-y), computed without the cancellation of that form
            z = 2.0 * half / (1.0 + half)
    z = tl.maximum(z, EDGE, propagate_nan=NAN)
    if GATE.rule == CLIP:
        full = x >= GATE.hi
        z, slope = tl.where(full, 1.0, z), tl.where(full, 0.0, slope)
    return tl.where(closed, 0.0, z), tl.where(closed, 0.0, slope * GATE.beta)


@triton.jit
def masked_gate(alpha, GATE: tl.constexpr):
    """(z, dz/dalpha) of the mask family, shaped like ``alpha``: z = alpha M and dz/dalpha = M + |alpha| dM/d|alpha|.

    With y = beta (|alpha| - lo), ``m`` is M(y) and ``steep`` is M'(y). The hard rule has a step as M, and takes M' from
    the smooth rule. Exponentials are of -|y|, so they cannot overflow.
    """
    size = tl.abs(alpha)
    closed = size <= GATE.lo
    y = (size - GATE.lo) * GATE.beta
    y = tl.minimum(tl.maximum(y, -MASK_LIMIT, propagate_nan=NAN), MASK_LIMIT, propagate_nan=NAN)
    distance = tl.abs(y)
    e = tl.exp(-distance)
    r = 1.0 / (1.0 + e)
    above, below = tl.where(y < 0, e * r, r), tl.where(y < 0, r, e * r)  # sigmoid(y), sigmoid(-y)
    m, steep = tl.where(closed, 0.0, 1.0), tl.zeros(alpha.shape, tl.float32)
    if GATE.rule == SMOOTH:
        m = above * (1.0 + y * below)
    if GATE.rule == SMOOTH or GATE.rule == HARD:
        steep = e * r * r * (2.0 - distance * ((1.0 - e) * r))
    if GATE.rule == LOGISTIC:
        m, steep = above, above * below
    if GATE.rule == EXACT_ZERO:
        ee = e * e
        rr = 1.0 / (1.0 + ee)
        m = tl.where(closed, 0.0, tl.maximum(tl.where(y < 0, 0.0, tanh_positive(y, ee)), EDGE, propagate_nan=NAN))
        steep = tl.where(closed, 0.0, 4.0 * ee * rr * rr)
    return alpha * m, m + tl.minimum(size, RAMP_LIMIT, propagate_nan=NAN) * (steep * GATE.beta)


@triton.jit
def draw_gate(log_alpha, seed, start, BLOCK: tl.constexpr, GROUPED: tl.constexpr, GATE: tl.constexpr):
    """(z, dz/dlog_alpha) of gates start .. start + BLOCK - 1, float32. The compiler drops the one that a caller does
    not use.

    ``log_alpha``: the parameters of any family, float32, [BLOCK] or [1, BLOCK]. Gates without noise have its shape;
    drawn ones have the shape that :func:`draw_words` gives for ``start``.
    """
    if GATE.family == HARD_CONCRETE:
        z, slope = draw_hard_concrete(log_alpha, seed, start, BLOCK, GROUPED, GATE)
    elif GATE.family == RAMP:
        z, slope = ramp_gate(log_alpha, GATE)
    elif GATE.family == MASK:
        z, slope = masked_gate(log_alpha, GATE)
    else:
        tl.static_assert(GATE.family == VALUE)
        z, slope = log_alpha, tl.full(log_alpha.shape, 1.0, tl.float32)
    return z, slope


@triton.jit
def load_seed(seed_ptr, GATE: tl.constexpr):
    """The int64 seed; 0 for a rule without noise, whose pointer is not read."""
    if GATE.rule == SAMPLE:
        return tl.load(seed_ptr)
    else:
        return 0


@triton.jit
def load_columns(ptr, start, n, BLOCK: tl.constexpr):
    """Values start .. start + BLOCK - 1 of a vector of n as float32; zeros beyond the end."""
    offs = start + tl.arange(0, BLOCK)
    return tl.load(ptr + offs, mask=offs < n, other=0.0).to(tl.float32)  # [BLOCK]


@triton.jit
def draw_gate_vector(log_alpha_ptr, seed_ptr, start, n, BLOCK: tl.constexpr, GATE: tl.constexpr):
    """(z, slope) of gates start .. start + BLOCK - 1 of a vector of n, [BLOCK] each, with one draw per batch.

    BLOCK and ``start`` are multiples of 4.
    """
    return draw_gate(load_columns(log_alpha_ptr, start, n, BLOCK), load_seed(seed_ptr, GATE), start, BLOCK, True, GATE)


@triton.jit
def sample_gates_fwd_kernel(
    log_alpha_ptr,
    seed_ptr,
    z_ptr,
    rows,
    n,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    GROUPED: tl.constexpr,
    GATE: tl.constexpr,
):
    """z (rows, n), float32, from log_alpha (n,); a row is one draw.

    Grid: (row blocks * column blocks,), with column blocks changing fastest. It has one dimension, because the second
    one of a CUDA grid has at most 65,535 programs. GROUPED: n is a multiple of 4.
    """
    pid, blocks = tl.program_id(0).to(tl.int64), tl.cdiv(n, BLOCK_N)
    col, row = pid % blocks * BLOCK_N, pid // blocks * BLOCK_M + tl.arange(0, BLOCK_M)
    start = (row * n + col)[:, None]
    log_alpha = load_columns(log_alpha_ptr, col, n, BLOCK_N)[None, :]
    z, _ = draw_gate(log_alpha, load_seed(seed_ptr, GATE), start, BLOCK_N, GROUPED, GATE)
    cols = tl.arange(0, BLOCK_N)[None, :]
    tl.store(
        z_ptr + start + cols, tl.broadcast_to(z, (BLOCK_M, BLOCK_N)), mask=(row < rows)[:, None] & (col + cols < n)
    )


@triton.jit
def sample_gates_bwd_kernel(
    dz_ptr, log_alpha_ptr, seed_ptr, partial_ptr, rows, n, rows_per_split,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, GROUPED: tl.constexpr, GATE: tl.constexpr,
):  # fmt: skip
    """partial (splits, n), float32 = the sum of dz z' over the rows of a split, in order, for dz (rows, n).

    A split is ``rows_per_split`` consecutive rows; ``reduce_kernel`` adds the splits. Grid: (column blocks, splits).
    GROUPED: n is a multiple of 4.
    """
    col = tl.program_id(0).to(tl.int64) * BLOCK_N
    split = tl.program_id(1).to(tl.int64)
    cols = col + tl.arange(0, BLOCK_N)
    seed = load_seed(seed_ptr, GATE)
    log_alpha = load_columns(log_alpha_ptr, col, n, BLOCK_N)[None, :]
    # a whole tile of running sums: a sum over its rows goes through shared memory, so it is done once, at the end
    total = tl.zeros((BLOCK_M, BLOCK_N), tl.float32)
    for first in range(0, rows_per_split, BLOCK_M):
        row = split * rows_per_split + first + tl.arange(0, BLOCK_M)
        start = (row * n + col)[:, None]
        _, slope = draw_gate(log_alpha, seed, start, BLOCK_N, GROUPED, GATE)
        mask = (row < rows)[:, None] & (cols < n)[None, :]
        dz = tl.load(dz_ptr + row[:, None] * n + cols[None, :], mask=mask, other=0.0)  # [BLOCK_M, BLOCK_N]
        total += dz * slope
    tl.store(partial_ptr + split * n + cols, tl.sum(total, axis=0), mask=cols < n)


@triton.jit
def reduce_kernel(partial_ptr, out_ptr, splits, n, BLOCK_S: tl.constexpr, BLOCK_N: tl.constexpr):
    """out (n,) = the sum over splits of partial (splits, n), in float32, always in the same order; grid: (column
    blocks,).
    """
    cols = tl.program_id(0).to(tl.int64) * BLOCK_N + tl.arange(0, BLOCK_N)
    total = tl.zeros((BLOCK_N,), tl.float32)
    for first in range(0, splits, BLOCK_S):
        split = first + tl.arange(0, BLOCK_S).to(tl.int64)
        mask = (split < splits)[:, None] & (cols < n)[None, :]
        total += tl.sum(tl.load(partial_ptr + split[:, None] * n + cols[None, :], mask=mask, other=0.0), axis=0)
    tl.store(out_ptr + cols, total.to(out_ptr.dtype.element_ty), mask=cols < n)
