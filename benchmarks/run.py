"""``python -m benchmarks.run [STAGE ...]``: time the suite on this machine, one JSON line a point.

Needs torch (and triton where there is a GPU). Each stage of :mod:`benchmarks.suite` becomes OUT/linear-STAGE.jsonl, whose first line is
the environment and whether the ops passed verification in this run; no ratio is printed when they did not.
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

import torch

from benchmarks.suite import SUITE
from dampr.bench import linear, records, verify

RESULTS = Path(__file__).parent / "results"


def device_name() -> str:
    """The folder of this machine's results: ``cpu``, or the GPU's name."""
    return torch.cuda.get_device_name().lower().replace("nvidia ", "").replace(" ", "-") if torch.cuda.is_available() else "cpu"


def main(argv: list[str] | None = None) -> int:
    suite = SUITE["cuda" if torch.cuda.is_available() else "cpu"]
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("stages", nargs="*", help=f"default: {' '.join(suite)}")
    parser.add_argument("--out", type=Path, default=RESULTS / device_name())
    parser.add_argument("--rounds", type=int, default=20)
    parser.add_argument("--no-compile", action="store_true", help="leave the compiled competitor out")
    arguments = parser.parse_args(argv)
    unknown = set(arguments.stages) - set(suite)
    if unknown:
        parser.error(f"stages={sorted(unknown)}: expected some of {sorted(suite)}")
    verified = verify.passes("gated_linear", "weight_gated_linear")
    header = {"environment": records.environment(), "verified": verified}
    for stage in arguments.stages or suite:
        points = linear.run(suite[stage], compiled=not arguments.no_compile, rounds=arguments.rounds)
        for row in linear.table(points, verified):
            print("  ".join(cell.ljust(width) for cell, width in zip(row, (18, 36, 21, 12, 7, 8), strict=True)).rstrip(), flush=True)
        records.write_jsonl(arguments.out / f"linear-{stage}.jsonl", [header, *(p.as_dict() for p in points)])
    return 0 if verified else 1


if __name__ == "__main__":
    sys.exit(main())
