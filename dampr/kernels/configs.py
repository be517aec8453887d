"""Tile sizes as a pure function of (sizes, dtype, compute capability): nothing is tuned at run time, so nothing looks
like a hang.

The tables are the whole list of what ships; tests/testing/test_codegen.py compiles every entry and reads the machine
code.
"""

from __future__ import annotations

from typing import NamedTuple

from .dispatch import Thresholds


def cdiv(count: int, size: int) -> int:
    """How many pieces of ``size`` it takes; that of Triton goes through its compiler's types,
    which a launcher feels.
    """
    return -(count // -size)


class Tile(NamedTuple):
    """An output tile of rows x cols, ``depth`` of the summed axis per step,
    ``group`` tile rows that advance together.
    """

    rows: int
    cols: int
    depth: int
    group: int
    num_warps: int
    num_stages: int


GEMM_TILES = {
    "large": Tile(128, 128, 32, 8, 8, 3),  # eight warps: at four, drawing the gates of the A tile spills
    "small": Tile(64, 64, 32, 8, 4, 3),
    "odd": Tile(32, 32, 16, 8, 4, 2),
    "fp32": Tile(64, 64, 32, 8, 4, 2),
    "fp32_tcgen05": Tile(32, 64, 32, 8, 4, 2),
}
FOLD_FWD_TILE, FOLD_BWD_TILE = (64, 128), (32, 128)  # of the weight
REDUCE_TILE = (16, 64)  # of a (splits, n) workspace
GATE_TILE = (16, 128)  # of a (rows, n) tensor of gates
GATE_VECTOR = (1, 256)
WEIGHT_BLOCK = 1024  # of the flat weight, a gate each
BLOCK_TILE = 1024  # weights in one step over blocks that share a gate
LIVE_BLOCKS = 32  # blocks of input features looked through in one step
PLANE_TILE = (4, 256)  # (rows, elements of a row) where each row of an activation has one gate
COLUMN_SUM_TILE = (16, 64)  # of an activation whose rows are summed
COLUMN_MEAN_TILE = (64, 64)  # of one whose columns get a mean and a spread
GENERATOR_TILE, GENERATOR_WARPS = (64, 64), 16  # of a layer of Dep-L0's generator, in one program
TARGET_PROGRAMS = 256  # work is split over rows until about this many programs run: two for each SM of a large GPU
MAX_SPLITS = 32
PASS_PROGRAMS = 2048  # of a pass that only moves memory; with 256 one took 2.5 times its prediction (H200)
# of the whole tensor, of one sample: sums of the latter are added up one by one
NORM_MAX_SPLITS, NORM_MAX_PARTS = 512, 16
NORM_JOIN_TILE, NORM_FINISH_TILE = (128, 32), (8, 64)  # of the (splits, n) statistics, of the (draws, n) sums


def gemm_kind(M: int, N: int, K: int, dtype: str, capability: int) -> str:
    """Which tiles a problem gets: "odd" when its rows cannot be copied in 16 byte pieces, else by dtype, size and
    machine.

    ``dtype``: "fp32", "bf16" or "fp16"; ``capability``: 90 for sm_90, 0 for AMD, which lacks the shared memory for
    "large". On tcgen05 (sm_100 to sm_110) Triton 3.7 turns a float32 dot of 64 rows or more into TF32 even when asked
    for IEEE; 32 rows keep it on the FMA.
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
    """Draws of the GEMMs with the gates of x (M, K) and y (M, N) inside:
    each of N / 128 (or K / 128) tiles repeats those of its rows.
    """
    return M * (K * -(N // -128) + N * -(K // -128))


def fits_one_pass(M: int, N: int, K: int, table: Thresholds) -> bool:
    """Whether gates of x (M, K) and y (M, N) are cheap enough to be drawn again by every tile of a GEMM that needs
    them.

    Drawing costs some 60 instructions a gate, several times the MMA's own issue slots. Repeating that beats the
    launches and the traffic of a pass of its own only for small problems.
    """
    return one_pass_gates(M, N, K) <= table.one_pass_gates


def fits_small_m(M: int, N: int, K: int, table: Thresholds) -> bool:
    """Whether x (M, K) has so few rows that the GEMM with W (N, K) draws the gates of the weights itself.

    Either way each gate is drawn once as long as all rows of x fit in one tile; drawing inside saves the launch of the
    pass and 4 bytes a weight, W~ written and read. More rows draw again. Rows that cannot be copied in 16 byte pieces
    cost more than that saves.
    """
    return table.small_m >= M and N % 16 == 0 and K % 16 == 0


def small_m_tile(M: int, N: int, K: int, dtype: str, capability: int) -> Tile:
    """The tile (of W's rows, of x's rows, of K) of the GEMM that draws the gates of its weights;
    arguments as in :func:`gemm_kind`.
    """
    kind = gemm_kind(M, N, K, dtype, capability)
    tile = GEMM_TILES["small" if kind == "large" else kind]  # more gates than that in a thread spill
    return tile._replace(cols=16) if M <= 16 or kind == "fp32_tcgen05" else tile


def live_tile(M: int, N: int, K: int, dtype: str, capability: int) -> Tile:
    """The tile of the GEMM over live blocks of input features, ``depth`` of them each;
    arguments as in :func:`gemm_kind`.
    """
    tile = gemm_tile(M, N, K, dtype, capability)
    return tile._replace(num_stages=tile.num_stages + 2)  # the number of a block is fetched as far ahead as its data


def block_tile(R: int, C: int, across: int) -> tuple[int, int, int]:
    """(rows, blocks, columns of a block) in one step over blocks of R x C weights, ``across`` of them side by side;
    powers of two.
    """
    cols = min(128, _power_of_two(C))
    rows = min(16, _power_of_two(R), BLOCK_TILE // cols)
    return rows, min(_power_of_two(across), BLOCK_TILE // (rows * cols)), cols


def _power_of_two(n: int) -> int:
    """The smallest that is at least n."""
    return 1 << (n - 1).bit_length()


def split_rows(
    rows: int, step: int, programs: int, target: int = TARGET_PROGRAMS, most: int = MAX_SPLITS
) -> tuple[int, int]:
    """(splits, rows per split, a multiple of ``step``) for ``programs`` programs that would each go through all rows in
    steps.

    About ``target`` programs and at most ``most`` splits result.

    A function of the shape alone, so that the order of a sum does not depend on the device.
    """
    steps = -(rows // -step)
    splits = max(1, min(most, steps, target // max(1, programs)))
    steps_per_split = -(steps // -splits)
    return max(1, -(steps // -max(1, steps_per_split))), steps_per_split * step


# Of a convolution with channels in multiples of 16, widest first. A step of its loop gates the A tile once for all
# columns, and finds its tap and its block whatever the tile: on sm_90 it issues for 360 cycles to 512 of MMA in the
# first of "half", for 190 to 64 in the last.
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
WIDE_PROGRAMS = 128  # of a tile that has an SM to itself: one for each of a large GPU [estimate]


def conv_tile(slabs: int, rows: int, N: int, C: int, listed: bool, dtype: str, capability: int) -> Tile:
    """The tile of the convolution, with blocks of ``depth`` input channels: C of them and N output channels in a group.

    ``slabs``: how many sets of ``rows`` output pixels have gates of their own, one for each image or one in all;
    ``listed``: input gates make it walk a list of blocks. ``dtype``: as in :func:`gemm_kind`, or "tf32" for float32
    that may be rounded.
    """
    if C % 16 or N % 16 or dtype == "fp32" or capability < 80:
        tile = gemm_tile(rows, N, C if C % 16 else max(C, 128), "fp32" if dtype == "tf32" else dtype, capability)
    else:
        tile = _widest(CONV_TILES["tf32" if dtype == "tf32" else "half"], slabs, rows, N)
    return tile._replace(num_stages=tile.num_stages + 2) if listed else tile  # as in live_tile


def _widest(tiles: tuple[Tile, ...], slabs: int, rows: int, N: int) -> Tile:
    """The first of which edges waste at most a quarter of the rows and of the columns and that keeps a GPU busy;
    else the last.
    """
    for tile in tiles:
        tiles_m, tiles_n = -(rows // -tile.rows), -(N // -tile.cols)
        filled = 3 * tiles_m * tile.rows <= 4 * rows and 3 * tiles_n * tile.cols <= 4 * N
        if filled and (tile.cols <= 128 or slabs * tiles_m * tiles_n >= WIDE_PROGRAMS):
            return tile
    return tiles[-1]
