"""y = z_out * (conv(x * z_in, W) + b), one pass over x in NHWC, where channels whose gates are closed are neither read
nor multiplied.

    y[b, oh, ow, n] = z_out[n] (bias[n] + sum_{r, s, c} z_in[c] W[n, r, s, c] x[b, h, w, c]) with h = oh SH - PH + r DH,
    w = ow SW - PW + s DW

x: (B, H, W, groups C), W: (groups N, R, S, C), y: (B, OH, OW, groups N), all dense; zeros outside of x. An implicit
GEMM: a row of an output tile is a pixel, a step of its loop one tap (r, s) of one block of BLOCK_C channels. The gates
are read, not drawn: they are B C numbers where x has H W times as many, and a draw in the loop would be repeated by
every tap and every tile.

A *slab* is the output pixels that share their gates: all of them where a gate is drawn per batch, those of an image
where per sample. No tile lies across two slabs, so its gates are one vector, multiplied in registers, and each slab
skips what is dead in it alone: it walks its own list of live blocks, whose length and entries are loaded from memory,
as in gated_linear_live.py. The taps of a block follow each other, since they read almost the same pixels. A dead block
adds products with 0, so for finite x and W the result is that of the full list.
"""

import triton
import triton.language as tl

from .gated_linear import quarters, tile_of
from .gated_linear_live import any_open
from .gates import load_columns


@triton.jit
def list_live_kernel(z_ptr, live_ptr, count_ptr, C, BLOCKS: tl.constexpr, BLOCK_C: tl.constexpr):
    """Of each row of z (rows, C): live (rows, blocks), its blocks with an open gate, ascending, and count (rows,).

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
    """y of ``slabs`` slabs of P pixels; z_in: (slabs or 1, groups, C), live and count: of its rows of C; z_out: (slabs
    or 1, groups, N).

    A row of gates of its own for each slab if IN_PER_SLAB, OUT_PER_SLAB. Grid: (groups * tiles of a group,). EVEN: C is
    a multiple of BLOCK_C. An image has fewer than 2^31 output pixels.
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
        # a dead tile is done before the loop
        count *= any_open(load_columns(z_out_ptr + out_row * N, tile_n * BLOCK_N, N, BLOCK_N), 0)

    first = tile_m % slab_tiles * BLOCK_M
    pixel, valid = slab * P + first, first + tl.arange(0, BLOCK_M) < P
    image = pixel // (OH * OW)
    rest = (pixel - image * OH * OW).to(tl.int32) + tl.arange(0, BLOCK_M)  # pixels since the start of that image
    image += rest // (OH * OW)
    # A row beyond the edge lies far above its image and reads the zeros there.
    top, left = tl.where(valid, rest // OW % OH * SH - PH, -(2**30)), rest % OW * SW - PW
    stride_w = tl.cast(groups, tl.int64) * C
    stride_h = stride_w * W
    x_rows = x_ptr + (image * H * stride_h + top * stride_h + left * stride_w + group * C)[:, None]
    col = tile_n * BLOCK_N + tl.arange(0, BLOCK_N)
    w_rows = w_ptr + ((group * N + tl.where(col < N, col, 0)) * (R * S * C))[None, :]

    acc = tl.zeros((BLOCK_M, BLOCK_N), tl.float32)
    r, s, at = 0, 0, 0  # the tap, and the place of its block in the list
    for _ in range(0, count * (R * S)):
        block = at
        if z_in_ptr is not None:
            block = tl.load(live_ptr + at)
        c = block * BLOCK_C + tl.arange(0, BLOCK_C)
        # below 0 is far beyond the edge
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
    # pointers, biases and gates of a whole tile at once would double its registers
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
