"""Makes the tables of docs/emulated.md from the files that ``make emulate`` and ``benchmarks.steps`` wrote to
benchmarks/results/emulated.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from dampr import records
from dampr.cli import report

RESULTS = Path(__file__).resolve().parent / "results" / "emulated"
COLUMNS = ("op", "route", "dtype", "architecture", "cases", "error", "bound", "races", "shared memory", "")


def table() -> str:
    """A row for each op, route, dtype and architecture, with the numbers of the case that came closest to its bound;
    below the table, where the numbers come from.
    """
    paths = sorted(RESULTS.glob("sm_*.json"), key=lambda path: int(path.stem.removeprefix("sm_")))
    files = {path: json.loads(path.read_text()) for path in paths}
    rows = [row for path, found in files.items() for row in _rows(path.stem, found["units"])]
    where = files[paths[0]]["environment"]
    names = ", ".join(f"[{path.name}](../benchmarks/results/emulated/{path.name})" for path in paths)
    commits = ", ".join(sorted({unit["commit"] for found in files.values() for unit in found["units"].values()}))
    run = (
        f"{records.device_of(where)}, torch {where['torch']}, triton {where['triton']}, {where['date'][:10]}, commits "
        f"{commits}"
    )
    order = sorted(rows, key=lambda row: (row[0], row[1], row[2], int(row[3][3:])))
    return f"{report.markdown(COLUMNS, order)}\n\n{names}: emulated on {run}.\n"


def _rows(architecture: str, units: dict[str, Any]) -> list[tuple[str, ...]]:
    """The rows of one architecture; units of the same op and dtype are merged."""
    merged: dict[tuple[str, str, str], list[dict[str, Any]]] = {}
    for name, unit in units.items():
        _, op, dtype = name.split("/")
        if unit["stopped"]:
            merged.setdefault((op, "", dtype), []).append(
                {"cases": 0, "failures": [unit["stopped"]], "faults": [], "shared": 0}
            )
        for row in unit["rows"]:
            merged.setdefault((op, row["route"], dtype), []).append(row)
    return [(op, route, dtype, architecture, *_cells(rows)) for (op, route, dtype), rows in merged.items()]


def _cells(rows: list[dict[str, Any]]) -> tuple[str, ...]:
    """The last cells of a row: cases, error, bound, races, shared memory, and whether all is right."""
    worst = max(rows, key=_share)
    numbers = (f"{worst['error']:.1e}", f"{worst['bound']:.1e}") if "error" in worst else ("", "")
    races, shared = sum(len(row["faults"]) for row in rows), max(row["shared"] for row in rows)
    bad = sum(len(row["failures"]) for row in rows)
    state = "ok" if not bad and not races else f"FAILED ({bad})" if bad else "FAILED"
    return (
        str(sum(row["cases"] for row in rows)),
        *numbers,
        str(races),
        f"{shared / 1024:.1f} KB" if shared else "none",
        state,
    )


def _share(row: dict[str, Any]) -> float:
    """The larger of the two errors (maximal, root mean square), each divided by its bound."""
    pairs = [(row.get(name, 0.0), row.get(bound, 0.0)) for name, bound in (("error", "bound"), ("rms", "rms_bound"))]
    return max(error / bound if bound else 0.0 for error, bound in pairs)


def steps() -> str:
    """A row for each model with what its training step launches."""
    found = json.loads((RESULTS / "steps.json").read_text())
    rows = [_step(name, model) for name, model in found["models"].items()]
    where = found["environment"]
    run = f"torch {where['torch']}, triton {where['triton']}, {where['date'][:10]}, commit {where['commit']}"
    gated = ("gated: operators", "and Triton kernels", "more than dense", "for a layer", "waits", "by value")
    columns = ("model", "gated layers", "dense: operators", *gated)
    return f"{report.markdown(columns, rows)}\n\n[steps.json](../benchmarks/results/emulated/steps.json): {run}.\n"


def _step(name: str, model: dict[str, Any]) -> tuple[str, ...]:
    """The cells of the row of a model, from its counts of operators, kernels and waits, dense and gated."""
    dense, operators = (sum(model[kind]["operators"].values()) for kind in ("dense", "gated"))
    kernels, layers = sum(model["gated"]["kernels"].values()), model["layers"]
    more = operators + kernels - dense
    waits = (model[kind]["waits"].get("aten::_local_scalar_dense", 0) for kind in ("gated", "dense"))
    by_value = (sum(model[kind]["by_value"].values()) for kind in ("gated", "dense"))
    own = [f"{gated - dense}" for gated, dense in (tuple(waits), tuple(by_value))]
    return name, str(layers), str(dense), str(operators), str(kernels), str(more), f"{more / layers:.1f}", *own
