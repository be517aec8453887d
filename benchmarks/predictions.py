"""What an H200 should take, predicted from what kernels were counted to do when emulated
(tests/data/emulated_counts.json).

A pass takes as long as the slowest of three: memory, instructions, shared memory. Instructions are those of PTX, of
which ptxas makes more or fewer of its own; nothing here was measured on that device but the two ceilings.
"""

from __future__ import annotations

import json
from pathlib import Path

from dampr.cli import report

COUNTS = Path(__file__).resolve().parent.parent / "tests" / "data" / "emulated_counts.json"
COPY = 4.3e12  # bytes a second, read and written, measured
PRODUCTS = 1.05e-3  # seconds of forward and backward of the dense layer below, at the measured rate of products
SMS, CLOCK, ISSUED = 132, 1.7e9, 4  # instructions of warps a cycle and SM; a pass over shared memory takes one cycle
M, K, N = 8192, 4096, 4096
Counts = dict[str, float]

# Passes that a route adds to the dense layer: kernels by the names of their counts,
# which are sums over a forward and a backward; elements.
ROUTES = {
    "fold, gates on inputs and outputs": (("fold: fold_fwd", "fold: fold_bwd"), N * K),
    "fold, gates on weights": (("weights: gate_weights",), N * K),
    "fold, blocks of 4 x 4": (("blocks of 4 x 4: gate_blocks",), N * K),
    "passes, per sample, gates on inputs": (("passes: gate_rows_fwd", "passes: gate_rows_bwd"), M * K),
}


def counts() -> dict[str, Counts]:
    """Of the newest Triton that has a record."""
    recorded: dict[str, dict[str, Counts]] = json.loads(COUNTS.read_text())
    return recorded[max(recorded, key=lambda version: [int(part) for part in version.split(".")[:3]])]


def parts(found: Counts) -> dict[str, float]:
    """Seconds an element by what they are spent on."""
    return {
        "memory": (found["fetched"] + found["kept"]) / COPY,
        "instructions": found["instructions"] / (SMS * ISSUED * CLOCK),
        "shared memory": found["shared"] / (SMS * CLOCK),
    }


def seconds(job: str, kernel: str) -> float | None:
    """How long a kernel should take for an element of what its pass goes over,
    None for a product and for what has no counts.
    """
    found = counts().get(f"{job}: {kernel}")
    return None if found is None or _is_product(kernel) else max(parts(found).values())


def _is_product(name: str) -> bool:
    return "linear" in name or "conv" in name


def kernels() -> str:
    """A row for each kernel: what it was counted to do, and what of it should take longest."""
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
    for name, found in sorted(counts().items()):
        seconds = parts(found)
        longest = max(seconds, key=lambda part: seconds[part])
        product = _is_product(name)
        numbers = (32 * found["instructions"], found["fetched"] + found["kept"], found["read"] + found["written"])
        rest = (found["shared"], found["conflicts"], found["parted"])
        ending = ("", "the tensor cores") if product else (f"{1e12 * seconds[longest]:.2f} ps", longest)
        rows.append((name, *(f"{number:.3g}" for number in (*numbers, *rest)), *ending))
    return report.markdown(columns, rows) + "\n"


def routes() -> str:
    """A row for each route: its passes beside the products of the dense layer."""
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
