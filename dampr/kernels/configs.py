"""Tile sizes of the Triton kernels, a pure function of sizes, dtype and compute capability.

Nothing is tuned at run time, so no first call takes minutes. The tables list every tile that is used;
tests/testing/test_codegen.py compiles each of them and reads the machine code.
"""

from __future__ import annotations

from typing import NamedTuple

from .dispatch import Thresholds


def cdiv(count: int, size: int) -> int:
    """``count`` / ``size``, rounded up. Triton's own function goes through the types of its compiler, which is slower
    on the host.
    """
    return -(count // -size)


class Tile(NamedTuple):
    """The sizes of one tile of a GEMM.

    Attributes:
        rows, cols: of the output.
        depth: how much of the summed dimension one step of the loop reads.
        group: the number of rows of tiles that are computed at about the same time, so that they share operands in L2.
        num_warps, num_stages: options of Triton.
    """

    rows: int
    cols: int
    depth: int
    group: int
    num_warps: int
    num_stages: int


GEMM_TILES = {
    "large": Tile(128, 128, 32, 8, 8, 3),  # eight warps, because with four the gates of the A tile spill registers
    "small": Tile(64, 64, 32, 8, 4, 3),
    "odd": Tile(32, 32, 16, 8, 4, 2),
    "fp32": Tile(64, 64, 32, 8, 4, 2),
    "fp32_tcgen05": Tile(32, 64, 32, 8, 4, 2),
}
# (rows, columns) of the tile that one program, or one step of its loop, works on:
FOLD_FWD_TILE, FOLD_BWD_TILE = (64, 128), (32, 128)  # of the weight
REDUCE_TILE = (16, 64)  # of a (splits, n) workspace
GATE_TILE = (16, 128)  # of a (rows, n) tensor of gates
GATE_VECTOR = (1, 256)  # of a vector of gates
WEIGHT_BLOCK = 1024  # of the flat weight, with a gate on each weight
BLOCK_TILE = 1024  # the number of weights in one step, with gates on blocks of weights
LIVE_BLOCKS = 32  # the number of blocks of input features that one step checks for open gates
PLANE_TILE = (4, 256)  # (rows, elements of a row) if each row of an activation has one gate
COLUMN_SUM_TILE = (16, 64)  # of an activation whose rows are summed
COLUMN_MEAN_TILE = (64, 64)  # of an activation whose columns get a mean and a variance
GENERATOR_TILE, GENERATOR_WARPS = (64, 64), 16  # of a weight of Dep-L0's generator, in one program
TARGET_PROGRAMS = 256  # work is split over rows until about this many programs run: two for each SM of a large GPU
MAX_SPLITS = 32
PASS_PROGRAMS = 2048  # the same for a pass that is bound by memory; with 256 one took 2.5 times its prediction (H200)
# the most splits of a whole tensor, and of one sample, whose partial sums one program adds up in a loop
NORM_MAX_SPLITS, NORM_MAX_PARTS = 512, 16
NORM_JOIN_TILE, NORM_FINISH_TILE = (128, 32), (8, 64)  # of the (splits, n) statistics, of the (draws, n) sums


def gemm_kind(M: int, N: int, K: int, dtype: str, capability: int) -> str:
    """The name of the entry of :data:`GEMM_TILES` for a problem, by dtype, size and machine; "odd" if rows are no
    multiple of 16 elements.

    Args:
        M, N, K: the sizes of x (M, K) and W (N, K).
        dtype: "fp32", "bf16" or "fp16".
        capability: 90 for sm_90; 0 for AMD, whose shared memory is too small for "large".

    On tcgen05 (sm_100 to sm_110) Triton 3.7 computes a float32 dot of 64 rows or more in TF32 even if IEEE is asked
    for; 32 rows keep it on the FMA units.
    """
    if N % 16 or K % 16:
        return "odd"
    if dtype == "fp32":
        return "fp32_tcgen05" if 100 <= capability < 120 else "fp32"
    return "large" if min(M, N, K) >= 128 and capability >= 80 else "small"


def gemm_tile(M: int, N: int, K: int, dtype: str, capability: int) -> Tile:
    """The tile of all three GEMMs of a layer with x (M, K) and W (N, K); arguments as in :func:`gemm_kind`."""
    return GEMM_TILES[gemm_kind(M, N, K, dtype, capability)]


def one_pass_gates(M: int, N: int, K: int) -> int:
    """The number of gates that the GEMMs draw if they draw the gates of x (M, K) and y (M, N) themselves.

    Each of the N / 128 (or K / 128) tiles of a row draws the gates of that row again.
    """
    return M * (K * -(N // -128) + N * -(K // -128))


def fits_one_pass(M: int, N: int, K: int, table: Thresholds) -> bool:
    """Whether the gates of x (M, K) and y (M, N) are few enough for every tile of a GEMM to draw those that it needs.

    A draw costs about 60 instructions, several times the issue slots of the MMA. Repeating draws is faster than a
    separate pass, with its launch and its memory traffic, only for small problems.
    """
    return one_pass_gates(M, N, K) <= table.one_pass_gates


def fits_small_m(M: int, N: int, K: int, table: Thresholds) -> bool:
    """Whether x (M, K) has so few rows that the GEMM with W (N, K) draws the gates of the weights itself.

    As long as one tile holds all rows of x, each gate is drawn once in any case. Drawing inside the GEMM saves the
    launch of a pass, and 4 bytes of memory traffic for each weight (W~ is neither written nor read). With more rows the
    gates are drawn again. If rows are not a multiple of 16 elements, the slower copies cost more than that saves.
    """
    return table.small_m >= M and N % 16 == 0 and K % 16 == 0


def small_m_tile(M: int, N: int, K: int, dtype: str, capability: int) -> Tile:
    """The tile (rows of W, rows of x, depth in K) of the GEMM that draws the gates of its weights; see
    :func:`gemm_kind`.
    """
    kind = gemm_kind(M, N, K, dtype, capability)
    tile = GEMM_TILES["small" if kind == "large" else kind]  # in a larger tile the gates spill registers
    return tile._replace(cols=16) if M <= 16 or kind == "fp32_tcgen05" else tile


def live_tile(M: int, N: int, K: int, dtype: str, capability: int) -> Tile:
    """The tile of the GEMM that skips closed blocks of ``depth`` input features; arguments as in :func:`gemm_kind`."""
    tile = gemm_tile(M, N, K, dtype, capability)
    return tile._replace(num_stages=tile.num_stages + 2)  # the index of a block has to be loaded before its data


def block_tile(R: int, C: int, across: int) -> tuple[int, int, int]:
    """(rows, blocks, columns of a block) of one step over blocks of R x C weights, all powers of two.

    ``across``: the number of blocks side by side.
    """
    cols = min(128, _power_of_two(C))
    rows = min(16, _power_of_two(R), BLOCK_TILE // cols)
    return rows, min(_power_of_two(across), BLOCK_TILE // (rows * cols)), cols


def _power_of_two(n: int) -> int:
    """The smallest power of two that is at least n."""
    return 1 << (n - 1).bit_length()


def split_rows(
    rows: int, step: int, programs: int, target: int = TARGET_PROGRAMS, most: int = MAX_SPLITS
) -> tuple[int, int]:
    """(number of splits, rows of a split) for summing over ``rows`` rows.

    Args:
        rows: the number of rows.
        step: the rows of a split are a multiple of this.
        programs: how many programs there would be without splits.
        target: about this many programs result.
        most: the most splits.

    It depends on the shape alone, so the order of a sum does not depend on the device.
    """
    steps = -(rows // -step)
    splits = max(1, min(most, steps, target // max(1, programs)))
    steps_per_split = -(steps // -splits)
    return max(1, -(steps // -max(1, steps_per_split))), steps_per_split * step


# Tiles of a convolution whose channels are multiples of 16, the widest first. Each step of the loop multiplies the A
# tile by gates and computes addresses, at a cost that hardly depends on the number of columns. On sm_90 that takes 360
# issue cycles beside 512 of MMA with the first tile of "half", and 190 beside 64 with the last, so wide ones win.
CONV_TILES = {
    "half": (
        Tile(128, 256, 32, 8, 8, 3),
        Tile(128, 128, 32, 8, 4, 3),
        Tile(128, 64, 32, 8, 4, 3),
        Tile(64, 128, 32, 8, 4, 3),
        Tile(64, 64, 32, 8, 4, 3),
    ),
    "tf32": (Tile(128, 128, 32, 8, 8, 3), Tile(128, 64, 32, 8, 4, 3), Tile(64, 64, 32, 8, 4, 3)),
}
WIDE_PROGRAMS = 128  # the fewest programs for a tile that fills a whole SM: one for each SM of a large GPU [estimate]


def conv_tile(slabs: int, rows: int, N: int, C: int, listed: bool, dtype: str, capability: int) -> Tile:
    """The tile of a convolution with C input and N output channels in a group; ``depth`` is a block of input channels.

    Args:
        slabs: how many sets of output pixels have gates of their own: one for each image, or one in all.
        rows: the output pixels of one slab.
        N, C: the channels of a group.
        listed: whether the kernel reads its blocks from a list, because input gates may be closed.
        dtype: as in :func:`gemm_kind`, or "tf32" for float32 that may be rounded.
        capability: as in :func:`gemm_kind`.
    """
    if C % 16 or N % 16 or dtype == "fp32" or capability < 80:
        tile = gemm_tile(rows, N, C if C % 16 else max(C, 128), "fp32" if dtype == "tf32" else dtype, capability)
    else:
        tile = _widest(CONV_TILES["tf32" if dtype == "tf32" else "half"], slabs, rows, N)
    return tile._replace(num_stages=tile.num_stages + 2) if listed else tile  # as in live_tile


def _widest(tiles: tuple[Tile, ...], slabs: int, rows: int, N: int) -> Tile:
    """The first tile that wastes at most a quarter of its rows and of its columns at the edges, and that keeps the GPU
    busy; the last one if none does.
    """
    for tile in tiles:
        tiles_m, tiles_n = -(rows // -tile.rows), -(N // -tile.cols)
        filled = 3 * tiles_m * tile.rows <= 4 * rows and 3 * tiles_n * tile.cols <= 4 * N
        if filled and (tile.cols <= 128 or slabs * tiles_m * tiles_n >= WIDE_PROGRAMS):
            return tile
    return tiles[-1]
