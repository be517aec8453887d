"""``python -m benchmarks.run [STAGE ...]``: times the suite on this machine and writes one JSON line for each point.

Needs torch (and triton where there is a GPU). Each stage of :mod:`benchmarks.suite`, and ``crossover`` of
:mod:`benchmarks.crossover`, writes OUT/linear-STAGE.jsonl; each stage of :mod:`benchmarks.conv` writes
OUT/conv-STAGE.jsonl; each of :data:`WHOLE`, which are modules of benchmarks, writes OUT/STAGE.jsonl. The first line of
a file has the environment and whether the ops passed verification in this run; if they did not, no ratio is printed. On
a GPU, ``crossover`` also writes the thresholds that suit the GPU best, OUT/dispatch-DEVICE.json. Once that file is
copied to dampr/kernels/dispatch/DEVICE.json, its thresholds decide the routes there.
"""

from __future__ import annotations

import argparse
import json
import sys
from pathlib import Path

import torch

from benchmarks import closing, conv, crossover, derivatives, recurrent
from benchmarks.suite import SUITE
from dampr import records
from dampr.bench import linear
from dampr.kernels.dispatch import table_name
from dampr.testing import verify

RESULTS = Path(__file__).parent / "results"
OPS = ("gated_linear", "weight_gated_linear")  # unless these pass verification, no ratio is printed
WHOLE = {  # stages whose results file is named STAGE.jsonl
    "recurrent": recurrent.run,
    "closing": closing.run,
    "derivatives": derivatives.run,
}


def passed(path: Path) -> bool:
    """Whether a file of verification results has a row of each timed op on this device, and all these rows are right.

    Raises ValueError if the file is of another commit or device.
    """
    found, here = json.loads(path.read_text()), records.environment()
    for key in ("commit", "gpu", "torch", "triton"):
        if found["environment"][key] != here[key]:
            raise ValueError(
                f"verified={path}: {key} is {found['environment'][key]!r}: expected {here[key]!r}, that of this run"
            )
    rows = [row for row in found["rows"] if row["op"] in OPS]
    seen = {row["op"] for row in rows if (row["device"] == "cuda") == (here["gpu"] is not None)}
    return seen == set(OPS) and all(row["ok"] for row in rows)


def device_name() -> str:
    """The folder of this machine's results: ``cpu``, or the GPU's name."""
    return table_name(torch.cuda.get_device_name()) if torch.cuda.is_available() else "cpu"


def main(argv: list[str] | None = None) -> int:
    device = "cuda" if torch.cuda.is_available() else "cpu"
    suite = SUITE[device]
    stages = (*suite, "crossover", *WHOLE, *conv.STAGES)
    default = [stage for stage in stages if device == "cuda" or stage != "layers"]
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("stages", nargs="*", help=f"default: {' '.join(default)}; one of: {' '.join(stages)}")
    parser.add_argument("--out", type=Path, default=RESULTS / device_name())
    parser.add_argument("--rounds", type=int, default=20)
    evidence = parser.add_mutually_exclusive_group()
    evidence.add_argument(
        "--verified", type=Path, help="what python -m dampr.testing.verify --json wrote here, else ops are verified"
    )
    evidence.add_argument(
        "--unverified", action="store_true", help="verify nothing and print no ratio: to compile what a later run times"
    )
    parser.add_argument("--no-compile", action="store_true", help="leave the compiled competitor out")
    arguments = parser.parse_args(argv)
    unknown = set(arguments.stages) - set(stages)
    if unknown:
        parser.error(f"stages={sorted(unknown)}: expected some of {sorted(stages)}")
    verified = not arguments.unverified and (
        verify.passes(*OPS) if arguments.verified is None else passed(arguments.verified)
    )
    header = {"environment": records.environment(), "verified": verified}
    for stage in arguments.stages or default:
        if stage == "crossover":
            points = crossover.run(device, rounds=arguments.rounds)
        elif stage in WHOLE:
            points = WHOLE[stage](device, compiled=not arguments.no_compile, rounds=arguments.rounds)
        elif stage in conv.STAGES:
            points = conv.run(stage, device, compiled=not arguments.no_compile, rounds=arguments.rounds)
        else:
            points = linear.run(suite[stage], compiled=not arguments.no_compile, rounds=arguments.rounds)
        print(*linear.aligned(linear.table(points, verified)), sep="\n", flush=True)
        name = f"conv-{stage}" if stage in conv.STAGES else stage if stage in WHOLE else f"linear-{stage}"
        records.write_jsonl(arguments.out / f"{name}.jsonl", [header, *(p.as_dict() for p in points)])
        if stage == "crossover" and device == "cuda" and verified:
            source = (
                f"benchmarks/results/{device_name()}/linear-crossover.jsonl, commit {header['environment']['commit']}"
            )
            records.write_json(
                arguments.out / f"dispatch-{device_name()}.json", crossover.tuned(points, source)._asdict()
            )
    return 0 if verified or arguments.unverified else 1


if __name__ == "__main__":
    sys.exit(main())
