"""Predicts how long kernels take on an H200, from the counts of the emulated GPU (tests/data/emulated_counts.json).

A pass takes as long as the slowest of: memory, instructions, shared memory and, for a product, the tensor cores. The
instructions are those of PTX, from which ptxas may make more or fewer. On the device itself only two ceilings were
measured: ``COPY`` and ``PRODUCTS``.
"""

from __future__ import annotations

import functools
import json
from collections.abc import Iterable
from pathlib import Path

from dampr.cli import report

COUNTS = Path(__file__).resolve().parent.parent / "tests" / "data" / "emulated_counts.json"
COPY = 4.3e12  # bytes per second of a copy, read and written together, measured
PRODUCTS = 1.05e-3  # seconds of a forward and backward of the dense layer (M, K, N), at the measured rate of products
SMS, CLOCK, ISSUED = (
    132,
    1.7e9,
    4,
)  # ISSUED: warp instructions per cycle of one SM. A pass over shared memory takes a cycle.
M, K, N = 8192, 4096, 4096
Counts = dict[str, float]
# Kernels that jobs launch beside those that pass over their tensors; their counts are those of one gate or channel.
PER_GATE = ("fold_gate_bwd", "reduce", "norm_stats_join", "norm_gate_finish", "live_blocks", "list_live")

# route -> the passes that it adds to a forward and backward of the dense layer: (kernels, by the names of their counts;
# the number of elements that each passes over).
ROUTES = {
    "fold, gates on inputs and outputs": (("fold: fold_fwd", "fold: fold_bwd"), N * K),
    "fold, gates on weights": (("weights: gate_weights",), N * K),
    "fold, blocks of 4 x 4": (("blocks of 4 x 4: gate_blocks",), N * K),
    "passes, per sample, gates on inputs": (("passes: gate_rows_fwd", "passes: gate_rows_bwd"), M * K),
}


@functools.cache
def counts() -> dict[str, Counts]:
    """The counts of the newest version of Triton that has a record: "job: kernel" -> column -> count per element."""
    recorded: dict[str, dict[str, Counts]] = json.loads(COUNTS.read_text())
    return recorded[max(recorded, key=lambda version: [int(part) for part in version.split(".")[:3]])]


def parts(found: Counts, name: str = "") -> dict[str, float]:
    """The seconds per element that a kernel needs of each resource.

    Args:
        found: its counts.
        name: "job: kernel". For a product, the time of the tensor cores is among the parts, unless it is in fp32.
    """
    seconds = {
        "memory": (found["fetched"] + found["kept"]) / COPY,
        "instructions": found["instructions"] / (SMS * ISSUED * CLOCK),
        "shared memory": found["shared"] / (SMS * CLOCK),
    }
    if _is_product(name) and "fp32" not in name:
        seconds["tensor cores"] = PRODUCTS / (3 * M * K * N) * (2 if "tf32" in name else 1)
    return seconds


def seconds(job: str, kernel: str) -> float | None:
    """The seconds that a kernel should take per element; None for a product, and for a kernel without counts."""
    found = counts().get(f"{job}: {kernel}")
    return None if found is None or _is_product(kernel) or kernel in PER_GATE else max(parts(found).values())


def _is_product(name: str) -> bool:
    """Whether a kernel multiplies matrices, from its name."""
    return "linear" in name or "conv2d" in name


def kernels() -> str:
    """A table in Markdown with a row for each kernel, with the tile that it usually has."""
    return _rows(name for name in counts() if "tile" not in name)


def tiles() -> str:
    """A table in Markdown with a row for each tile of each product, besides the usual ones."""
    return _rows(name for name in counts() if "tile" in name)


def _rows(names: Iterable[str]) -> str:
    """A table in Markdown with the counts of the kernels ``names``, the predicted time per element, and the resource
    that limits it.
    """
    columns = (
        "kernel",
        "instructions",
        "bytes moved",
        "bytes asked for",
        "shared memory",
        "conflicts",
        "parted",
        "predicted",
        "bound by",
    )
    rows = []
    for name in sorted(names):
        found = counts()[name]
        seconds = parts(found, name)
        longest = max(seconds, key=lambda part: seconds[part])
        numbers = (32 * found["instructions"], found["fetched"] + found["kept"], found["read"] + found["written"])
        rest = (found["shared"], found["conflicts"], found["parted"])
        predicted = f"{1e12 * seconds[longest]:.3g} ps"
        rows.append((name, *(f"{number:.3g}" for number in (*numbers, *rest)), predicted, longest))
    return report.markdown(columns, rows) + "\n"


def routes() -> str:
    """A table in Markdown with a row for each route of ``ROUTES``: the time of its passes beside that of the dense
    layer.
    """
    found, rows = counts(), []
    for name, (passes, elements) in ROUTES.items():
        seconds = [elements * max(parts(found[kernel]).values()) for kernel in passes]
        moved = sum(elements * (found[kernel]["fetched"] + found[kernel]["kept"]) for kernel in passes)
        launches = sum(int(found[kernel]["launches"]) for kernel in passes)
        bound = {max(parts(found[kernel]).items(), key=lambda part: part[1])[0] for kernel in passes}
        relative = f"{1 + sum(seconds) / PRODUCTS:.2f}"
        rows.append(
            (
                name,
                relative,
                f"{1e6 * sum(seconds):.0f} us in {launches} passes",
                f"{moved / 2**20:.0f} MB",
                ", ".join(sorted(bound)),
            )
        )
    return (
        report.markdown(("route", "predicted, relative to dense", "passes take", "they move", "bound by"), rows) + "\n"
    )
