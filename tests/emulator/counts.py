"""``python -m tests.emulator.counts [--write]``: counts what each kernel does while it runs on the emulated GPU.

Kernels are compiled for sm_90, or for the architecture that a tile is for. The counts are per element of the tensor
that a kernel passes over; for a product, per multiply-add:

- instructions of warps, in PTX;
- bytes that memory has to move;
- bytes of the sectors that warps ask for, which a cache may serve;
- passes over shared memory, and those of them that bank conflicts cost;
- branches in which the threads of a warp part.

``--write`` records the counts in tests/data/emulated_counts.json. Tests compare new counts with these, and
docs/performance.md predicts times from them.
"""

from __future__ import annotations

import argparse
import itertools
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple
from unittest import mock

import torch
import triton

from dampr import functional, ops
from dampr.kernels import configs
from dampr.spec import hard_concrete
from dampr.testing import verify, verify_conv, verify_gates, verify_linear, verify_norm
from tests.emulator import driver
from tests.emulator.meter import Meter

COUNTS = Path(__file__).resolve().parent.parent / "data" / "emulated_counts.json"
CAPABILITY = 90
HALF = torch.bfloat16
COLUMNS = ("instructions", "fetched", "kept", "read", "written", "useful", "shared", "conflicts", "parted")


class Job(NamedTuple):
    """A call of an op that launches kernels.

    Attributes:
        call: makes the call.
        elements: name of a kernel -> how many elements it passes over, by which its counts are divided.
        tile: for a convolution, ("half" or "tf32", the only tile that may be chosen for it); None if every tile may be
            chosen.
        capability: the architecture, 90 for sm_90.
    """

    call: Callable[[], Any]
    elements: dict[str, int]
    tile: tuple[str, configs.Tile] | None = None
    capability: int = CAPABILITY


def _linear(
    shape: tuple[int, int, int],
    gates: Any,
    per_sample: bool,
    route: str | None,
    *kernels: str,
    over: str = "weight",
    dtype: torch.dtype = HALF,
    capability: int = CAPABILITY,
    **others: int,
) -> Job:
    """A forward and backward of a gated linear layer in a batch of the given shape, (M, K, N).

    Args:
        gates, per_sample: as in :class:`dampr.testing.verify_linear.LinearCase`.
        route: the route to force; None for the usual one.
        kernels: the kernels that pass over ``over``: "weight" (N K elements), "x" (M K) or "products" (M N K).
        others: further kernels and how many elements they pass over.
    """
    case = verify_linear.LinearCase(shape, gates, per_sample)

    def call() -> None:
        with ops.forced_route(route):
            verify_linear.linear_once(
                "triton", dtype, "cpu", case, *verify_linear.linear_data(case, dtype, torch.Generator().manual_seed(7))
            )

    m, k, n = shape
    elements = dict.fromkeys(kernels, {"weight": n * k, "x": m * k, "products": m * n * k}[over]) | others
    return Job(call, elements, capability=capability)


def _norm(shape: tuple[int, ...], layout: str, *kernels: str) -> Job:
    """A forward and backward of a gated BatchNorm.

    ``kernels`` pass over all elements of ``shape``; the kernels that join statistics pass over the channels.
    """
    case = verify_norm.NormCase(shape, layout=layout)

    def call() -> None:
        data, running, dy, seed = verify_norm.norm_data(case, HALF, torch.Generator().manual_seed(7))
        verify_norm.norm_once("triton", HALF, "cpu", case, data, running, dy, seed)

    each = dict.fromkeys(("norm_stats_join_kernel", "norm_gate_finish_kernel"), shape[1])
    return Job(call, dict.fromkeys(kernels, torch.Size(shape).numel()) | each)


def _conv(
    shape: verify_conv.Shape,
    dtype: torch.dtype = HALF,
    tile: tuple[str, configs.Tile] | None = None,
    gates: str = "both",
    capability: int = CAPABILITY,
    **others: int,
) -> Job:
    """A forward and backward of a gated convolution of shape (B, C, H, W, N, K), with a K x K window.

    Args:
        tile: as in :class:`Job`.
        gates: which channels have gates, as in :class:`dampr.testing.verify_conv.ConvCase`.
        others: further kernels and how many elements they pass over.
    """
    case = verify_conv.ConvCase(shape, gates, False, True, {"padding": 1}, "live")

    def call() -> None:
        with verify.float32_products("tf32" if tile else "ieee"):
            verify_conv.once(
                "triton", dtype, "cpu", case, *verify_conv.make(case, dtype, torch.Generator().manual_seed(7))
            )

    b, c, h, w, n, k = shape
    return Job(call, {"gated_conv2d_fwd_kernel": b * h * w * c * n * k * k, **others}, tile, capability)


def _gates(rows: int | None, n: int, **others: int) -> Job:
    """A draw of ``n`` gates and its gradient: once, or for each of ``rows`` samples.

    ``others``: further kernels and how many elements they pass over.
    """

    def call() -> None:
        log_alpha, dz = torch.linspace(-3, 3, n), torch.ones((n,) if rows is None else (rows, n))
        verify_gates.gates_once("triton", torch.float32, "cpu", log_alpha, SEED, dz, rows, hard_concrete())

    drawn = (1 if rows is None else rows) * n
    return Job(call, dict.fromkeys(("sample_gates_fwd_kernel", "sample_gates_bwd_kernel"), drawn) | others)


def _activations(shape: tuple[int, ...], layout: torch.memory_format, kernel: str) -> Job:
    """The product of an activation of this shape with gates along dimension 1, forward and backward; ``kernel`` passes
    over all of it.
    """

    def call() -> None:
        x = torch.ones(shape, dtype=HALF).contiguous(memory_format=layout).requires_grad_()
        log_alpha = torch.linspace(-3, 3, shape[1]).requires_grad_()
        with ops.backend("triton"):
            y = functional.gate_activations(x, log_alpha, dim=1, seed=SEED)
            y.backward(torch.ones_like(y))

    return Job(call, {kernel: torch.Size(shape).numel()})


def _generator(*widths: int) -> Job:
    """The generator of Dep-L0 gates with layers of these widths, forward and backward; its kernels pass over all
    weights.
    """
    shapes = [shape for before, after in itertools.pairwise(widths) for shape in ((after, before), (after,))]

    def call() -> None:
        data = [torch.ones(shape) / shape[-1] for shape in shapes]
        verify_gates.generator_once("triton", torch.float32, "cpu", data, torch.ones(sum(widths[1:])))

    weights = sum(torch.Size(shape).numel() for shape in shapes)
    return Job(call, {f"dependency_generator_{way}_kernel": weights for way in ("fwd", "bwd")})


SEED = torch.full((1,), 7)
_GEMMS = ("gated_linear_fwd_kernel", "gated_linear_bwd_dx_kernel", "gated_linear_bwd_dw_kernel")
_LIVE, _DRAWN = "gated_linear_live_fwd_kernel", "weight_gated_linear_fwd_kernel"
# Name of a kind of tile in kernels/configs.py -> (shape, dtype, capability) of a problem for which that tile is chosen.
_TILED = {
    "small": ((64, 64, 64), HALF, 90),
    "fp32": ((64, 64, 64), torch.float32, 90),
    "fp32_tcgen05": ((64, 64, 64), torch.float32, 100),
}
_ODD = (99, 99, 99)
JOBS: dict[str, Job] = {
    "fold": _linear(
        (64, 512, 512), "both", False, "fold", "fold_fwd_kernel", "fold_bwd_kernel", fold_gate_bwd_kernel=1024
    ),
    "passes": _linear(
        (512, 512, 64),
        "input",
        True,
        "passes",
        "gate_rows_fwd_kernel",
        "gate_rows_bwd_kernel",
        over="x",
    ),
    "weights": _linear((64, 256, 256), "weight", False, "fold", "gate_weights_kernel"),
    "blocks of 4 x 4": _linear((64, 256, 256), (4, 4), False, "fold", "gate_blocks_kernel"),
    "one_pass, small": _linear((128, 128, 128), "both", True, "one_pass", *_GEMMS, over="products"),
    "one_pass, odd": _linear(_ODD, "both", True, "one_pass", *_GEMMS, over="products"),
    "live, small": _linear((128, 128, 128), "both", False, "live", _LIVE, over="products", live_blocks_kernel=128),
    "live, tile odd": _linear(_ODD, "both", False, "live", _LIVE, over="products"),
    "small_m": _linear((16, 128, 128), "weight", False, "small_m", _DRAWN, over="products"),
    "small_m, 64 rows": _linear((64, 128, 128), "weight", False, "small_m", _DRAWN, over="products"),
    "small_m, tile odd": _linear((16, 99, 99), "weight", False, "small_m", _DRAWN, over="products"),
    **{
        f"{route}, tile {kind}": _linear(
            shape, gates, each, route, *kernels, over="products", dtype=dtype, capability=capability
        )
        for kind, (shape, dtype, capability) in _TILED.items()
        for route, gates, each, kernels in (
            ("one_pass", "both", True, _GEMMS),
            ("live", "both", False, (_LIVE,)),
            ("small_m", "weight", False, (_DRAWN,)),
        )
        if (route, kind) != ("small_m", "small")  # the same as the job "small_m, 64 rows"
    },
    "norm, channels last": _norm(
        (2, 128, 16, 16), "channels_last", "norm_stats_columns_kernel", "norm_gate_columns_kernel"
    ),
    "norm, contiguous": _norm((4, 32, 32, 32), "contiguous", "norm_stats_rows_kernel", "norm_gate_rows_kernel"),
    "convolution, live": _conv((1, 64, 16, 16, 64, 3), list_live_kernel=64),
    "convolution, tile odd": _conv((1, 20, 8, 8, 33, 3)),
    "convolution, tile fp32": _conv((1, 64, 8, 8, 64, 3), torch.float32),
    "convolution, tile fp32_tcgen05": _conv((1, 64, 8, 8, 64, 3), torch.float32, capability=100),
    **{
        f"convolution, tile {tile.rows} x {tile.cols}, {precision}": _conv(
            (1, 32, 16, 16, max(64, tile.cols), 3), torch.float32 if precision == "tf32" else HALF, (precision, tile)
        )
        for precision, tiles in configs.CONV_TILES.items()
        for tile in tiles
    },
    "gates, one draw": _gates(None, 16384),
    "gates, per sample": _gates(128, 128, reduce_kernel=128),
    "activations, channels last": _activations((4, 64, 16, 16), torch.channels_last, "gate_columns_kernel"),
    "activations, contiguous": _activations((4, 64, 16, 16), torch.contiguous_format, "gate_rows_of_planes_kernel"),
    "generator": _generator(64, 64, 128, 256),
}


def measure(name: str) -> dict[str, dict[str, float]]:
    """The counts of a job: "job: kernel" -> column -> count per element over all launches of the kernel.

    The column ``launches`` is the number of launches itself. The tensors are small. To make each program see many
    tiles, as with large tensors, work is split among few programs.
    """
    job, meter, split = JOBS[name], Meter(), configs.split_rows
    offered = {} if job.tile is None else {job.tile[0]: (job.tile[1],)}
    with (
        mock.patch.object(
            configs, "split_rows", lambda rows, step, programs, *most: split(rows, step, programs, 4, *most[1:])
        ),
        mock.patch.dict(configs.CONV_TILES, offered),
        driver.emulated(job.capability, shuffled=False, meter=meter),
    ):
        job.call()
    found = {}
    for kernel, elements in job.elements.items():
        counts = meter.counts[kernel]
        each = {what: float(f"{counts[what] / elements:.4g}") for what in COLUMNS}
        found[f"{name}: {kernel.strip('_').removesuffix('_kernel')}"] = {"launches": counts["launches"], **each}
    return found


def recorded() -> dict[str, dict[str, float]]:
    """The recorded counts for the running version of Triton; empty if there are none."""
    counts: dict[str, dict[str, float]] = (
        json.loads(COUNTS.read_text()).get(triton.__version__, {}) if COUNTS.exists() else {}
    )
    return counts


def main() -> None:
    """The command: measure the given jobs, print their counts, and record them with ``--write``."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--write", action="store_true")
    parser.add_argument("job", nargs="*", default=list(JOBS))
    args = parser.parse_args()
    torch.set_num_threads(1)
    found = recorded()
    for name in args.job:
        for kernel, counts in measure(name).items():
            found[kernel] = counts
            print(f"{kernel:50} " + "  ".join(f"{what} {number:g}" for what, number in counts.items()), flush=True)
    if args.write:
        everything = json.loads(COUNTS.read_text()) if COUNTS.exists() else {}
        COUNTS.write_text(json.dumps({**everything, triton.__version__: found}, indent=1, sort_keys=True) + "\n")


if __name__ == "__main__":
    main()
