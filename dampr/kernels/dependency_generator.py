"""The generator of Dep-L0 in one launch: a_l = limit tanh(W_l a_{l-1} + b_l) with a_0 = 1, and its gradients.

    g_l = (da_l + back_l) (limit - a_l) (limit + a_l) / limit
    dW_l = g_l a_{l-1}^T    db_l = g_l    back_{l-1} = W_l^T g_l

Here da_l is the gradient of a_l from outside and back_l the one from layer l + 1. A layer needs all outputs of the one
before, so a single program computes all layers. Between them a barrier makes what its threads wrote to global memory
visible to each other. One multiprocessor reads the weights slowly, so this pays for generators of up to some hundred
thousand parameters, whose layers would otherwise cost several launches each. ``table_ptr`` points to four int64 for
each layer: the addresses of W_l and b_l and the widths of a_{l-1} and a_l. One compiled kernel therefore serves every
depth and width.
"""

import triton
import triton.language as tl

from .gates import NAN, RAMP_LIMIT, tanh_positive

COLUMNS = tl.constexpr(4)  # numbers in a row of the table


@triton.jit
def signed_tanh(x):
    """tanh(x), shaped like ``x``."""
    y = tl.minimum(tl.abs(x), RAMP_LIMIT, propagate_nan=NAN)
    t = tanh_positive(y, tl.exp(-2.0 * y))
    return tl.where(x < 0, -t, t)


@triton.jit
def load_layer(table_ptr, layer):
    """(pointer to W_l, pointer to b_l, width of a_{l-1}, width of a_l)."""
    row = table_ptr + layer * COLUMNS
    weight_ptr = tl.load(row).to(tl.pointer_type(tl.float32))
    bias_ptr = tl.load(row + 1).to(tl.pointer_type(tl.float32))
    return weight_ptr, bias_ptr, tl.load(row + 2), tl.load(row + 3)


@triton.jit
def dependency_generator_fwd_kernel(
    table_ptr, values_ptr, layers, LIMIT: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr
):
    """Writes a_1, a_2, ... to values, one after the other; grid: (1,)."""
    start = tl.zeros((), tl.int64)  # where a_l begins in values
    for layer in range(layers):
        weight_ptr, bias_ptr, K, N = load_layer(table_ptr, layer)
        for row in range(0, N, BLOCK_N):
            rows = row + tl.arange(0, BLOCK_N)
            total = tl.load(bias_ptr + rows, mask=rows < N, other=0.0)
            for col in range(0, K, BLOCK_K):
                cols = col + tl.arange(0, BLOCK_K)
                a = tl.load(values_ptr + start - K + cols, mask=(cols < K) & (layer > 0), other=1.0)
                inside = (rows < N)[:, None] & (cols < K)[None, :]
                # [BLOCK_N, BLOCK_K]
                weight = tl.load(weight_ptr + rows[:, None] * K + cols[None, :], mask=inside, other=0.0)
                total += tl.sum(weight * a[None, :], axis=1)
            tl.store(values_ptr + start + rows, LIMIT * signed_tanh(total), mask=rows < N)
        tl.debug_barrier()
        start += N


@triton.jit
def dependency_generator_bwd_kernel(
    table_ptr, values_ptr, dvalues_ptr, back_ptr, grads_ptr, layers, total, count,
    LIMIT: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr,
):  # fmt: skip
    """Writes dW_1, db_1, dW_2, ... to grads, one after the other; grid: (1,).

    total: the number of values. count: the number of elements of grads. back: workspace for ``total`` values.
    """
    end = tl.zeros((), tl.int64) + total  # where a_l ends in values
    grads_end = tl.zeros((), tl.int64) + count  # where db_l ends in grads
    for step in range(layers):
        layer = layers - 1 - step
        weight_ptr, _, K, N = load_layer(table_ptr, layer)
        start, bias_start = end - N, grads_end - N
        weight_start = bias_start - N * K
        for col in range(0, K, BLOCK_K):
            cols = col + tl.arange(0, BLOCK_K)
            a = tl.load(values_ptr + start - K + cols, mask=(cols < K) & (layer > 0), other=1.0)
            back = tl.zeros((BLOCK_K,), tl.float32)
            for row in range(0, N, BLOCK_N):
                rows = row + tl.arange(0, BLOCK_N)
                value = tl.load(values_ptr + start + rows, mask=rows < N, other=0.0)
                upstream = tl.load(dvalues_ptr + start + rows, mask=rows < N, other=0.0)
                upstream += tl.load(back_ptr + start + rows, mask=(rows < N) & (step > 0), other=0.0)
                g = upstream * ((LIMIT - value) * (LIMIT + value) / LIMIT)  # [BLOCK_N]
                inside, at = (rows < N)[:, None] & (cols < K)[None, :], rows[:, None] * K + cols[None, :]
                weight = tl.load(weight_ptr + at, mask=inside & (layer > 0), other=0.0)  # [BLOCK_N, BLOCK_K]
                back += tl.sum(weight * g[:, None], axis=0)
                tl.store(grads_ptr + weight_start + at, g[:, None] * a[None, :], mask=inside)
                tl.store(grads_ptr + bias_start + rows, g, mask=(rows < N) & (col == 0))
            tl.store(back_ptr + start - K + cols, back, mask=(cols < K) & (layer > 0))
        tl.debug_barrier()
        end, grads_end = start, weight_start
