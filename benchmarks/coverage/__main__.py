"""``python -m benchmarks.coverage fetch | run [--name NAME] [--library LIBRARY] [--again] | table``."""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

from dampr import records

from . import measure, networks, operators

ROOT = Path(__file__).resolve().parents[2]
RESULTS = ROOT / "benchmarks" / "results" / "coverage.jsonl"
PAGE = ROOT / "docs" / "coverage.md"
PACKAGES = ROOT / "build" / "coverage"
FETCHED = ("timm", "torchvision", "segmentation_models_pytorch")
LIMIT = 300  # seconds for a network


def fetch() -> None:
    """Install the model libraries into a folder of their own, without their dependencies, which would bring another
    torch.
    """
    PACKAGES.mkdir(parents=True, exist_ok=True)
    subprocess.run(
        [sys.executable, "-m", "pip", "install", "--no-deps", "--target", str(PACKAGES), *FETCHED], check=True
    )


def results() -> dict[tuple[str, str], dict[str, Any]]:
    """The rows of the results file; the last one where a network has several."""
    lines = [json.loads(line) for line in RESULTS.read_text().splitlines()] if RESULTS.exists() else []
    return {(line["library"], line["name"]): line for line in lines}


def run(wanted: list[tuple[str, str]], again: bool, residual: bool) -> None:
    """Measure the networks without a result, each in a process that may take :data:`LIMIT` seconds. With ``residual``,
    the result of ``convert(residual=True)`` is added to a network's row.
    """
    for library, name in wanted:
        had = results().get((library, name), {})
        if (not residual or "residual" in had) and had and not again:
            continue
        print(f"{library} {name} ...", end=" ", flush=True)
        try:
            command = [sys.executable, "-m", "benchmarks.coverage", "one", "--library", library, "--name", name]
            command += ["--residual"] if residual else []
            done = subprocess.run(command, capture_output=True, text=True, timeout=LIMIT, cwd=ROOT)
            row = (
                json.loads(done.stdout.splitlines()[-1])
                if done.returncode == 0
                else {"error": done.stderr.strip().splitlines()[-1][:300]}
            )
        except subprocess.TimeoutExpired:
            row = {"error": f"no end within {LIMIT} s"}
        print(row, flush=True)
        own = {"environment": records.environment()}
        if residual:
            row = had | {"residual": row | own}
        else:
            row = row | own | ({"residual": had["residual"]} if "residual" in had else {})
        kept = {key: value for key, value in results().items() if key != (library, name)}
        kept[library, name] = {"library": library, "name": name} | row
        order = {key: number for number, key in enumerate(networks.names())}
        lines = [json.dumps(kept[key]) for key in sorted(kept, key=lambda key: order.get(key, len(order)))]
        RESULTS.write_text("\n".join(lines) + "\n")


def one(library: str, name: str, residual: bool) -> None:
    """Measure one network in this process and print its row."""
    sys.path.insert(0, str(PACKAGES))
    os.environ["HF_HUB_OFFLINE"] = "1"
    if library != "by hand":  # transformers imports torchvision if it is installed
        operators.register()
    print(json.dumps((measure.with_residual if residual else measure.row)(library, name)))


def page() -> str:
    """The text of docs/coverage.md."""
    rows = list(results().values())
    good = [row for row in rows if "error" not in row]
    enough = [row for row in good if row["prunable"] >= measure.SHARE]
    exact = [row for row in good if row["left"] == row["foretold"]]
    wrong = [row for row in good if not isinstance(row["float64"], float) or row["float64"] > 1e-9]
    beside = [row for row in rows if isinstance(row.get("torch_pruning"), float)]
    level = [
        row
        for row in beside
        if row.get("left") is not None and row["left"] / row["macs"] <= row["torch_pruning"] + 0.01
    ]
    streams = [row["residual"] for row in rows if "left" in row.get("residual", {})]
    same = [row for row in streams if isinstance(row["float64"], float) and row["float64"] <= 1e-9]
    least = [
        min((r["left"] / r["macs"] for r in (row, row.get("residual", {})) if "left" in r), default=1.0)
        for row in beside
    ]
    below = sum(share <= row["torch_pruning"] + 0.01 for share, row in zip(least, beside, strict=True))
    dates = sorted({row["environment"]["date"][:10] for row in rows})
    where = f"{records.device_of(rows[0]['environment'])}, torch {rows[0]['environment']['torch']}, " + " to ".join(
        dict.fromkeys((dates[0], dates[-1]))
    )
    head = f"""# Coverage: which networks can be pruned

Written by `python -m benchmarks.coverage table` from [coverage.jsonl](../benchmarks/results/coverage.jsonl) ({where}).

Each network is converted fresh, with the defaults.
Then its norms, biases and gains get other values, as training would give them.
Half of every width is closed, and the masked model is compared with the compacted one on new inputs.

- {len(rows)} networks, of which {len(rows) - len(good)} have no result.
- {len(enough)} have at least {measure.SHARE:.0%} of their multiply-accumulates (MACs) within reach.
- {len(good) - len(wrong)} of {len(good)} compute the same masked and compacted, to 1e-9 in float64.
- {len(exact)} of {len(good)} cost exactly what was foretold.
- Torch-Pruning 1.6.1 gives a model that runs for {len(beside)}.
  With half of every width cut by both, dampr leaves as few MACs or fewer on {len(level)} of these,
  with `residual=True` on {below}.
- With `residual=True` {len(streams)} have a width that norms count and that may go;
  {len(same)} of them compute the same masked and compacted, to 1e-9 in float64
  (norms of `transformers` compute in float32),
  {sum(row["left"] == row["foretold"] for row in streams)} cost exactly what was foretold.

**Within reach**: the share of the MACs that goes when every width keeps one unit.
**Half**: the MACs that are left with half of every width, and whether that was foretold.
**Residual**: the MACs that are left with half of every width by `convert(residual=True)`, where it finds one.
**Gates on**: layers (fused kernels), or parameters (whatever reads a unit).
**Same**: the largest difference of masked and compacted model over the largest output.
**After convert**: the same of the model before and after `convert`.
**Convert**: seconds of one core, and how many forward passes take as long.

"""
    columns = (
        "network|gates on|within reach|half|foretold|residual|same, float32|float64|after convert|convert|Torch-Pruning"
    )
    head += f"| {' | '.join(columns.split('|'))} |\n|---|---|---:|---:|---|---:|---:|---:|---|---:|---|\n"
    return head + "".join(_line(row) for row in rows) + _faults(rows)


def _line(row: dict[str, Any]) -> str:
    """A network's row of the table."""
    name = f"{row['library']} {row['name']}"
    beside = row.get("torch_pruning", "")
    beside = f"{beside:.1%}" if isinstance(beside, float) else "no result"
    stream = row.get("residual", {})
    residual = f"{stream['left'] / stream['macs']:.1%}" if "left" in stream else ""
    if "error" in row:
        return f"| {name} | no result | | | | {residual} | | | | | {beside} |\n"
    exact = "exact" if row["left"] == row["foretold"] else f"{row['foretold'] / row['macs']:.1%}"
    forwards = row["convert_s"] / max(row["forward_s"], 1e-4)
    cells = [name, row["gates_on"], f"{row['prunable']:.0%}", f"{row['left'] / row['macs']:.1%}", exact, residual]
    cells += [
        row["float32"],
        row["float64"],
        row["same_after_convert"],
        f"{row['convert_s']:.1f} s ({forwards:.0f})",
        beside,
    ]
    return "| " + " | ".join(map(str, cells)) + " |\n"


def _faults(rows: list[dict[str, Any]]) -> str:
    """The lists of networks without a result, with the errors."""
    lines = [f"- {row['library']} {row['name']}: `{row['error']}`\n" for row in rows if "error" in row]
    beside = [
        f"- {r['library']} {r['name']}: `{r['torch_pruning']}`\n"
        for r in rows
        if isinstance(r.get("torch_pruning"), str)
    ]
    found = "\n## No result\n\n" + "".join(lines) if lines else ""
    return found + ("\n## No result of Torch-Pruning\n\n" + "".join(beside) if beside else "")


def main() -> None:
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.coverage", description=sys.modules["benchmarks.coverage"].__doc__
    )
    parser.add_argument("command", choices=["fetch", "run", "one", "table"])
    parser.add_argument("--library", choices=["timm", "torchvision", "smp", "transformers", "by hand"])
    parser.add_argument("--name")
    parser.add_argument("--again", action="store_true", help="measure what has a result too")
    parser.add_argument("--residual", action="store_true", help="with the residual width too")
    given = parser.parse_args()
    wanted = [
        (lib, name) for lib, name in networks.names() if given.library in (None, lib) and given.name in (None, name)
    ]
    if not wanted:
        parser.error(f"--name {given.name}: expected one of {sorted({name for _, name in networks.names()})}")
    if given.command == "fetch":
        fetch()
    elif given.command == "run":
        run(wanted, given.again, given.residual)
    elif given.command == "one":
        one(*wanted[0], given.residual)
    else:
        PAGE.write_text(page())


if __name__ == "__main__":
    main()
