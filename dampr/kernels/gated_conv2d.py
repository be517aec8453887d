"""y = z_out * (conv(x * z_in, W) + b) in one kernel, which neither reads nor multiplies blocks of channels whose gates
are closed.

    y[b, oh, ow, n] = z_out[n] (bias[n] + sum_{r, s, c} z_in[c] W[n, r, s, c] x[b, h, w, c])
    with h = oh SH - PH + r DH and w = ow SW - PW + s DW

x: (B, H, W, groups C), W: (groups N, R, S, C), y: (B, OH, OW, groups N), all dense (channels last); zeros outside of
x.

It is an implicit GEMM: a row of an output tile is a pixel, and a step of the loop is one tap (r, s) of one block of
BLOCK_C channels. The gates are read and not drawn, because every tap and every tile would repeat the draw, and B C
numbers are few beside the B C H W of x.

A *slab* is the set of output pixels that share their gates: the whole batch with one draw per batch, one image with
a draw per sample. No tile crosses two slabs, so a tile needs one vector of gates, multiplied in registers. Each slab
has a list of its live blocks, those with an open gate; its length and its entries are loaded from memory, as in
gated_linear_live.py. All taps of a block come one after the other, because they read almost the same pixels. A block
that is skipped would add products with 0, so for finite x and W the result is the same as without skipping.
"""

import triton
import triton.language as tl

from .gated_linear import quarters, tile_of
from .gated_linear_live import any_open
from .gates import load_columns


@triton.jit
def list_live_kernel(z_ptr, live_ptr, count_ptr, C, BLOCKS: tl.constexpr, BLOCK_C: tl.constexpr):
    """For each row of z (rows, C): the indices of its blocks with an open gate, increasing, in live (rows, blocks), and
    their number in count (rows,).

    Grid: (rows,).
    """
    row, count = tl.program_id(0).to(tl.int64), 0
    blocks = tl.cdiv(C, BLOCK_C)
    for first in range(0, blocks, BLOCKS):
        z = load_columns(z_ptr + row * C, first * BLOCK_C, C, BLOCKS * BLOCK_C)
        live = any_open(tl.reshape(z, (BLOCKS, BLOCK_C)), 1)
        tl.store(
            live_ptr + row * blocks + count + tl.cumsum(live, axis=0) - 1, first + tl.arange(0, BLOCKS), mask=live != 0
        )
        count += tl.sum(live, axis=0)
    tl.store(count_ptr + row, count)


@triton.jit
def gated_conv2d_fwd_kernel(
    x_ptr, w_ptr, bias_ptr, z_in_ptr, z_out_ptr, live_ptr, count_ptr, y_ptr,
    slabs, P, H, W, OH, OW, groups, C, N,
    R: tl.constexpr, S: tl.constexpr, SH: tl.constexpr, SW: tl.constexpr, PH: tl.constexpr, PW: tl.constexpr,
    DH: tl.constexpr, DW: tl.constexpr, IN_PER_SLAB: tl.constexpr, OUT_PER_SLAB: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_C: tl.constexpr, GROUP: tl.constexpr, EVEN: tl.constexpr,
    PRECISION: tl.constexpr,
):  # fmt: skip
    """y of ``slabs`` slabs of P pixels each.

    z_in: (slabs or 1, groups, C); live, count: the lists of :func:`list_live_kernel` for its rows of C; z_out: (slabs
    or 1, groups, N). IN_PER_SLAB, OUT_PER_SLAB: whether each slab has gates of its own. EVEN: C is a multiple of
    BLOCK_C. An image has fewer than 2^31 output pixels. Grid: (groups * tiles of a group,).
    """
    slab_tiles, tiles_n = tl.cdiv(P, BLOCK_M), tl.cdiv(N, BLOCK_N)
    tiles = slabs * slab_tiles * tiles_n
    tile_m, tile_n = tile_of(tl.program_id(0) % tiles, slabs * slab_tiles, tiles_n, GROUP)
    group, slab = (tl.program_id(0) // tiles).to(tl.int64), tile_m // slab_tiles
    in_row, out_row = group, group
    if IN_PER_SLAB:
        in_row += slab * groups
    if OUT_PER_SLAB:
        out_row += slab * groups
    count = tl.cdiv(C, BLOCK_C)
    if z_in_ptr is not None:
        live_ptr += in_row * count
        count = tl.load(count_ptr + in_row)
    if z_out_ptr is not None:
        # a tile whose output gates are all closed runs no step of the loop
        count *= any_open(load_columns(z_out_ptr + out_row * N, tile_n * BLOCK_N, N, BLOCK_N), 0)

    first = tile_m % slab_tiles * BLOCK_M
    pixel, valid = slab * P + first, first + tl.arange(0, BLOCK_M) < P
    image = pixel // (OH * OW)
    rest = (pixel - image * OH * OW).to(tl.int32) + tl.arange(0, BLOCK_M)  # pixels since the start of that image
    image += rest // (OH * OW)
    # Rows beyond the last pixel are placed far above the image, where the padding test makes them zero.
    top, left = tl.where(valid, rest // OW % OH * SH - PH, -(2**30)), rest % OW * SW - PW
    stride_w = tl.cast(groups, tl.int64) * C
    stride_h = stride_w * W
    x_rows = x_ptr + (image * H * stride_h + top * stride_h + left * stride_w + group * C)[:, None]
    col = tile_n * BLOCK_N + tl.arange(0, BLOCK_N)
    w_rows = w_ptr + ((group * N + tl.where(col < N, col, 0)) * (R * S * C))[None, :]

    acc = tl.zeros((BLOCK_M, BLOCK_N), tl.float32)
    r, s, at = 0, 0, 0  # the tap (r, s), and the position of its block in the list
    for _ in range(0, count * (R * S)):
        block = at
        if z_in_ptr is not None:
            block = tl.load(live_ptr + at)
        c = block * BLOCK_C + tl.arange(0, BLOCK_C)
        # as unsigned numbers, negative coordinates are large, so one comparison tests both edges
        h, w = (top + r * DH).to(tl.uint32, bitcast=True), (left + s * DW).to(tl.uint32, bitcast=True)
        inside = ((h < tl.cast(H, tl.uint32)) & (w < tl.cast(W, tl.uint32)))[:, None]
        x_ptrs = x_rows + (r * (stride_h * DH) + s * (stride_w * DW) + c)[None, :]
        w_ptrs = w_rows + ((r * S + s) * C + c)[:, None]
        if EVEN:
            x, w = tl.load(x_ptrs, mask=inside, other=0.0), tl.load(w_ptrs)  # [BLOCK_M, BLOCK_C], [BLOCK_C, BLOCK_N]
        else:
            x = tl.load(x_ptrs, mask=inside & (c < C)[None, :], other=0.0)
            w = tl.load(w_ptrs, mask=(c < C)[:, None], other=0.0)
        if z_in_ptr is not None:
            z_ptrs = z_in_ptr + in_row * C + c
            z = tl.load(z_ptrs) if EVEN else tl.load(z_ptrs, mask=c < C, other=0.0)  # [BLOCK_C]
            x = (x * z[None, :]).to(x.dtype)
        acc = tl.dot(x, w, acc, input_precision=PRECISION)
        s = tl.where(s + 1 < S, s + 1, 0)
        r = tl.where(s == 0, r + 1, r)
        at = tl.where(r == R, at + 1, at)
        r = tl.where(r == R, 0, r)

    y_rows = y_ptr + ((pixel + tl.arange(0, BLOCK_M)) * groups * N + group * N)[:, None]
    # by quarters of the columns, because pointers, biases and gates of the whole tile would double its registers
    parts = quarters(acc, BLOCK_M, BLOCK_N)
    WIDTH: tl.constexpr = BLOCK_N // 4
    for i in tl.static_range(4):
        y, start = parts[i], tile_n * BLOCK_N + i * WIDTH
        col = start + tl.arange(0, WIDTH)
        if bias_ptr is not None:
            y += load_columns(bias_ptr + group * N, start, N, WIDTH)[None, :]
        if z_out_ptr is not None:
            z = load_columns(z_out_ptr + out_row * N, start, N, WIDTH)[None, :]
            y = tl.where(z == 0.0, 0.0, y * z)  # +0, whether the tile was skipped or not
        tl.store(y_rows + col[None, :], y.to(y_ptr.dtype.element_ty), mask=valid[:, None] & (col < N)[None, :])
