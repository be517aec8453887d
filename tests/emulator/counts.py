"""``python -m tests.emulator.counts [--write]``: what each kernel does to the machine, counted while it runs compiled
for sm_90.

Per element of what it passes over (multiply-adds of a product): instructions of warps, PTX; bytes that memory has to
move; bytes of the sectors that warps ask for, which a cache may serve; passes over shared memory and those that
conflicts of banks cost; branches that part a warp. ``--write`` records them in tests/data/emulated_counts.json, which
tests hold them to; docs/performance.md predicts from them.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple
from unittest import mock

import torch
import triton

from dampr import ops
from dampr.kernels import configs
from dampr.testing import verify_conv, verify_linear, verify_norm
from tests.emulator import driver
from tests.emulator.meter import Meter

COUNTS = Path(__file__).resolve().parent.parent / "data" / "emulated_counts.json"
CAPABILITY = 90
HALF = torch.bfloat16
COLUMNS = ("instructions", "fetched", "kept", "read", "written", "useful", "shared", "conflicts", "parted")


class Job(NamedTuple):
    """A call of an op that launches kernels, and by kernel how many elements it has."""

    call: Callable[[], Any]
    elements: dict[str, int]


def _linear(
    shape: tuple[int, int, int], gates: Any, per_sample: bool, route: str | None, *kernels: str, over: str = "weight"
) -> Job:
    case = verify_linear.LinearCase(shape, gates, per_sample)

    def call() -> None:
        with ops.forced_route(route):
            verify_linear.linear_once(
                "triton", HALF, "cpu", case, *verify_linear.linear_data(case, HALF, torch.Generator().manual_seed(7))
            )

    m, k, n = shape
    return Job(call, dict.fromkeys(kernels, {"weight": n * k, "x": m * k, "products": m * n * k}[over]))


def _norm(shape: tuple[int, ...], layout: str, *kernels: str) -> Job:
    case = verify_norm.NormCase(shape, layout=layout)

    def call() -> None:
        data, running, dy, seed = verify_norm.norm_data(case, HALF, torch.Generator().manual_seed(7))
        verify_norm.norm_once("triton", HALF, "cpu", case, data, running, dy, seed)

    return Job(call, dict.fromkeys(kernels, torch.Size(shape).numel()))


def _conv() -> Job:
    case = verify_conv.ConvCase((1, 64, 16, 16, 64, 3), "both", False, True, {"padding": 1}, "live")

    def call() -> None:
        verify_conv.once("triton", HALF, "cpu", case, *verify_conv.make(case, HALF, torch.Generator().manual_seed(7)))

    return Job(call, {"gated_conv2d_fwd_kernel": 16 * 16 * 64 * 64 * 9})


_GEMMS = ("gated_linear_fwd_kernel", "gated_linear_bwd_dx_kernel", "gated_linear_bwd_dw_kernel")
_LIVE, _DRAWN = "gated_linear_live_fwd_kernel", "weight_gated_linear_fwd_kernel"
JOBS: dict[str, Job] = {
    "fold": _linear((64, 512, 512), "both", False, "fold", "fold_fwd_kernel", "fold_bwd_kernel"),
    "passes": _linear(
        (512, 512, 64), "input", True, "passes", "gate_rows_fwd_kernel", "gate_rows_bwd_kernel", over="x"
    ),
    "weights": _linear((64, 256, 256), "weight", False, "fold", "gate_weights_kernel"),
    "blocks of 4 x 4": _linear((64, 256, 256), (4, 4), False, "fold", "gate_blocks_kernel"),
    "one_pass, small": _linear((128, 128, 128), "both", True, "one_pass", *_GEMMS, over="products"),
    "one_pass, odd": _linear((99, 99, 99), "both", True, "one_pass", *_GEMMS, over="products"),
    "live, small": _linear((128, 128, 128), "both", False, "live", _LIVE, over="products"),
    "small_m": _linear((16, 128, 128), "weight", False, "small_m", _DRAWN, over="products"),
    "norm, channels last": _norm(
        (2, 128, 16, 16), "channels_last", "norm_stats_columns_kernel", "norm_gate_columns_kernel"
    ),
    "norm, contiguous": _norm((4, 32, 32, 32), "contiguous", "norm_stats_rows_kernel", "norm_gate_rows_kernel"),
    "convolution, live": _conv(),
}


def measure(name: str) -> dict[str, dict[str, float]]:
    """Counts per element of the kernels of a job, over all their launches; ``launches`` itself is a number.

    The tensors are small, so work is split into as few programs as are needed for each to see many tiles, as it does of
    large ones.
    """
    job, meter, split = JOBS[name], Meter(), configs.split_rows
    with (
        mock.patch.object(
            configs, "split_rows", lambda rows, step, programs, *most: split(rows, step, programs, 4, *most[1:])
        ),
        driver.emulated(CAPABILITY, shuffled=False, meter=meter),
    ):
        job.call()
    found = {}
    for kernel, elements in job.elements.items():
        counts = meter.counts[kernel]
        each = {what: float(f"{counts[what] / elements:.4g}") for what in COLUMNS}
        found[f"{name}: {kernel.strip('_').removesuffix('_kernel')}"] = {"launches": counts["launches"], **each}
    return found


def recorded() -> dict[str, dict[str, float]]:
    """The counts of the running Triton version; empty without a record."""
    counts: dict[str, dict[str, float]] = (
        json.loads(COUNTS.read_text()).get(triton.__version__, {}) if COUNTS.exists() else {}
    )
    return counts


def main() -> None:
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
