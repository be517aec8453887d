"""``python -m tests.emulator``, or ``make emulate``: compare compiled kernels with the float64 reference on every
architecture.

A unit (a set of cases of one op in one dtype) that has a result already is skipped, unless ``--again`` is given, so
that a run goes on where the last one stopped. Results are in benchmarks/results/emulated/sm_<arch>.json; ``python -m
benchmarks.tables`` makes docs/emulated.md of them.
"""

from __future__ import annotations

import argparse
import itertools
import json
import os
import sys
import time
import traceback
from pathlib import Path
from typing import Any

os.environ.setdefault("OMP_NUM_THREADS", "1")

import torch

from dampr import records
from tests.emulator import cases, driver

RESULTS = Path(__file__).resolve().parent.parent.parent / "benchmarks" / "results" / "emulated"


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "--arch", type=int, nargs="+", choices=cases.ARCHITECTURES, default=cases.ARCHITECTURES, help="90 for sm_90"
    )
    parser.add_argument("--unit", default="", help="only those with this in their names: set/op/dtype")
    parser.add_argument("--seconds", type=float, default=float("inf"), help="begin nothing after that")
    parser.add_argument("--again", action="store_true", help="run what has a result too")
    parser.add_argument(
        "--approximate",
        type=int,
        help="a seed: approximate instructions err by up to what is documented; writes nothing",
    )
    parser.add_argument("--out", type=Path, default=RESULTS, metavar="FOLDER")
    args = parser.parse_args()
    torch.set_num_threads(1)
    started, failed, left = time.monotonic(), 0, 0
    for unit, arch in itertools.product(cases.units(), args.arch):
        path = args.out / f"sm_{arch}.json"
        if args.unit not in str(unit) or (str(unit) in _units(path) and not args.again):
            continue
        if time.monotonic() - started > args.seconds:
            left += 1
            continue
        result = run(unit, arch, args.approximate)
        failed += report(unit, arch, result)
        if args.approximate is None:  # read again: another process may have written since
            environment = records.environment()
            result["commit"] = environment["commit"]
            records.write_json(path, {"environment": environment, "units": {**_units(path), str(unit): result}})
    if left:
        print(f"{left} units are left; run the same again")
    return 1 if failed else 0


def _units(path: Path) -> dict[str, Any]:
    """The results so far, by unit; empty without a file."""
    found: dict[str, Any] = json.loads(path.read_text())["units"] if path.exists() else {}
    return found


def run(unit: cases.Unit, arch: int, approximate: int | None) -> dict[str, Any]:
    """The result of a unit as plain data: a row for each route with its faults and shared memory, the error that ended
    the unit if there was one, and the seconds it took.
    """
    begun, stopped = time.monotonic(), None
    rows: list[dict[str, Any]] = []
    with driver.emulated(arch, approximate=approximate):
        try:
            rows = [_plain(route, row) for route, row in cases.run(unit).routes.items()]
        except Exception as error:  # a trap, a refusal, a failed compilation
            last = traceback.extract_tb(error.__traceback__)[-1]
            stopped = f"{type(error).__name__}: {error} ({Path(last.filename).name}:{last.lineno})"
    return {"rows": rows, "stopped": stopped, "seconds": round(time.monotonic() - begun, 1)}


def _plain(route: str, row: cases.Route) -> dict[str, Any]:
    """A route's row of results as plain data, with numbers rounded to three digits."""
    worst = row.worst
    numbers = (
        {}
        if worst is None
        else {name: float(f"{getattr(worst, name):.3g}") for name in ("error", "bound", "rms", "rms_bound")}
    )
    what = {
        "worst_case": row.worst_case,
        "failures": row.failures[:20],
        "faults": row.faults[:20],
        "shared": row.shared,
    }
    return {"route": route, "cases": row.cases, **numbers, **what}


def report(unit: cases.Unit, arch: int, result: dict[str, Any]) -> bool:
    """Print a unit's result. Returns whether it failed."""
    failures = [failure for row in result["rows"] for failure in (*row["failures"], *row["faults"])]
    failures += [result["stopped"]] if result["stopped"] else []
    compared = sum(row["cases"] for row in result["rows"])
    print(
        f"{'FAILED' if failures else 'ok':7} sm_{arch} {unit!s:40} {compared:5} comparisons {result['seconds']:7.1f} s",
        flush=True,
    )
    for failure in failures[:10]:
        print(f"        {failure}", flush=True)
    return bool(failures)


if __name__ == "__main__":
    sys.exit(main())
