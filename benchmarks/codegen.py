"""``python -m benchmarks.codegen [--write] [--arch 90] [--only fwd]``: prints what every Triton kernel uses (registers,
shared memory, spills, instructions of the hot loop), as read from its machine code.
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path

import triton

from dampr.testing import codegen

BUDGETS = Path(__file__).parent.parent / "tests" / "data" / "codegen_budgets.json"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument(
        "--write", action="store_true", help=f"record the hot-loop counts in {BUDGETS.name} under this Triton version"
    )
    parser.add_argument("--only", default="", help="kernels whose name contains this")
    parser.add_argument(
        "--arch", type=int, nargs="+", default=list(codegen.ARCHITECTURES), help="compute capabilities, 90 for sm_90"
    )
    args = parser.parse_args()

    counts = {}
    print(f"triton {triton.__version__}")
    print(
        f"{'kernel':<32}{'regs':>6}{'shared':>8}{'spills':>8}{'hot loop':>10}{'wgmma':>7}{'A in regs':>11}{'copies':>8}"
    )
    for arch in args.arch:
        for case in (case for case in codegen.cases(arch) if args.only in case.name):
            report, key = codegen.inspect(case, arch), f"sm_{arch}/{case.name}"
            counts[key] = report.hot_loop
            cells = f"{report.registers:>6}{report.shared:>8}{report.spills:>8}{report.hot_loop:>10}{report.wgmma:>7}"
            print(f"{key:<32}{cells}{'yes' if report.register_a else '-':>11}{report.copies_in_loop:>8}", flush=True)
    if args.write:
        recorded = json.loads(BUDGETS.read_text()) if BUDGETS.exists() else {}
        recorded[triton.__version__] = {**recorded.get(triton.__version__, {}), **counts}
        BUDGETS.write_text(json.dumps(recorded, indent=1, sort_keys=True) + "\n")


if __name__ == "__main__":
    main()
