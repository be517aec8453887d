"""``python -m benchmarks.tables``: writes the tables of README.md and docs from results files, so that no number is
typed by hand.

A table stands between ``<!-- table: NAME -->`` and ``<!-- end -->``. NAME is a file under benchmarks/results without
its ending, or one of :data:`EXAMPLES`, whose tables are made from files in examples/results, emulated runs and counts.
"""

from __future__ import annotations

import json
import re
import statistics
from math import nan
from pathlib import Path
from typing import Any

from benchmarks import emulated, predictions, scale
from dampr import records
from dampr.bench import linear
from dampr.cli import demo, report

ROOT = Path(__file__).resolve().parent.parent
DOCUMENTS = (
    ROOT / "README.md",
    *(
        ROOT / "docs" / f"{name}.md"
        for name in ("results", "performance", "methods", "choosing", "emulated", "scale", "distributed")
    ),
)
PLACE = re.compile(r"(<!-- table: (\S+) -->\n).*?(<!-- end -->)", re.DOTALL)


def render(name: str, document: Path) -> str:
    """The table of one results file and, below it, where its numbers come from. ``document`` is the file that the table
    goes into.
    """
    if name in EXAMPLES:
        return EXAMPLES[name]()
    path = next(
        p for ending in ("json", "jsonl") if (p := ROOT / "benchmarks" / "results" / f"{name}.{ending}").exists()
    )
    lines = (
        [json.loads(line) for line in path.read_text().splitlines()]
        if path.suffix == ".jsonl"
        else [json.loads(path.read_text())]
    )
    where = lines[0]["environment"]
    up = "../" * (len(document.relative_to(ROOT).parts) - 1)
    run = f"{records.device_of(where)}, torch {where['torch']}, {where['date'][:10]}, commit {where['commit']}"
    source = f"[{path.name}]({up}{path.relative_to(ROOT)}): {run}."
    table = _table(lines)
    gap = "" if table.endswith("\n") else " "
    return f"{table}{gap}{source}\n"


def _table(lines: list[dict[str, Any]]) -> str:
    """The table of a results file, of whichever kind its first line shows it to be."""
    head, *points = lines
    if "models" in head:
        found = demo.Report.from_dict(head)
        table = report.markdown(report.DEMO_COLUMNS, report.demo_rows(found))
        return f"{table}\n\nmax \\|masked - compacted\\|: {found.max_abs_difference:.1e}."
    if "report" in head:
        return _plan_parts(head)
    if "runs" in head:
        return _plan_families(head)
    if "rows" in head:
        return (
            report.markdown(
                ("op", "backend", "dtype", "cases", "error", "bound", ""), [_verified(row) for row in head["rows"]]
            )
            + "\n\n"
        )
    if "kernels" in head:
        return _kernels(head["kernels"])
    if "points" in head:
        points = head["points"]
    if "ceilings" in head:
        unit = {"copy_bytes_per_second": ("GB/s", 1e9)}
        rows = [
            (name, f"{value / unit.get(name, ('', 1e12))[1]:.3g} {unit.get(name, ('TFLOP/s', 0))[0]}")
            for name, value in head["ceilings"].items()
        ]
        return report.markdown(("ceiling", "measured"), rows) + "\n\n"
    found = [linear.Point(**{**p, "shape": tuple(p["shape"])}) for p in points]
    if len({(p.shape, p.case) for p in found}) >= 20:
        return _side_by_side(found, head["verified"]) + _against_compiled(found, head["verified"])
    columns, *rows = linear.table(found, head["verified"])
    return report.markdown(columns, rows) + "\n\n" + _against_compiled(found, head["verified"])


def _plan_parts(found: dict[str, Any]) -> str:
    """The table of a plan's run: what is left, and the accuracy, at the end of each part."""
    rows, plan = found["rows"], found["report"]
    cells = []
    for name, first, last in (
        ("dense", 1, plan["dense"]),
        ("ramp: gates are measured, then close", plan["dense"] + 1, plan["compacted"]),
        ("fine-tuning", plan["compacted"] + 1, plan["steps"]),
    ):
        end = max((row for row in rows if row["step"] <= last), key=lambda row: row["step"])
        cells.append(
            (name, f"{first} to {last}", f"{end['macs_left']:.2%}", f"{end['macs_goal']:.2%}", f"{end['accuracy']:.1%}")
        )
    table = report.markdown(("part", "steps", "MACs left at its end", "goal", "validation accuracy"), cells)
    widths = ", ".join(f"{left} of {count}" for count, left in plan["budget"]["widths"].values())
    changed = sum(plan["budget"]["closed"].values()) + sum(plan["budget"]["opened"].values())
    what = (
        f"{found['task']}, {found['images']:,} images to train on, {found['validated_on']:,} to validate; units left: "
        f"{widths}"
    )
    return (
        f"{table}\n\n{what}; gates that `finalize` had to change: {changed}; masked and compacted differ by "
        f"{plan['difference']:.1e}."
    )


def _plan_families(found: dict[str, Any]) -> str:
    """The table of plans by importance and by learned gates of each family."""
    runs: dict[str, list[dict[str, Any]]] = {}
    for run in found["runs"]:
        runs.setdefault(run["way"], []).append(run)
    rows = []
    for way, mine in runs.items():
        accuracy = [run["accuracy"] for run in mine]
        widths = sorted({"-".join(map(str, run["widths"])) for run in mine})
        each = ", ".join(f"{a:.1%}" for a in accuracy)
        name = way if way in ("dense", "importance") else f"learned, {way}"
        rows.append(
            (
                name,
                f"{statistics.mean(accuracy):.1%}",
                each,
                "; ".join(widths),
                f"{max(run['left'] for run in mine):.2%}",
            )
        )
    table = report.markdown(("score and family", "mean accuracy", "each seed", "units left", "MACs left"), rows)
    return f"{table}\n\nLeNet-300-100, digits, {found['epochs']} epochs, macs={found['macs']:g}."


def _kernels(rows: list[dict[str, Any]]) -> str:
    """The table of kernels that were predicted, with the vendor's matrix products of the same step."""
    cells = []
    for job in dict.fromkeys(row["job"] for row in rows):
        mine = [row for row in rows if row["job"] == job]
        for row in mine:
            if row["kernel"].startswith(PROFILED):
                predicted = row["predicted"]
                beside = (
                    ("", "") if predicted is None else (f"{1e6 * predicted:.0f}", f"{row['median'] / predicted:.2f}")
                )
                spread = f"{(row['high'] - row['low']) / row['median']:.0%}"
                cells.append((job, row["kernel"], str(row["launches"]), f"{1e6 * row['median']:.0f}", spread, *beside))
        products = sum(row["median"] for row in mine if row["kernel"].startswith(VENDORS))
        if products:
            cells.append((job, "the vendor's products", "", f"{1e6 * products:.0f}", "", "", ""))
    columns = ("job", "kernel", "launches", "us", "spread", "predicted us", "measured / predicted")
    shapes = {row["job"]: row["shape"] for row in rows}
    sizes = "; ".join(f"{job} {tuple(shape)}" for job, shape in shapes.items())
    return report.markdown(columns, cells) + f"\n\nSizes: {sizes}.\n\n"


PROFILED = ("fold_", "gate_", "gated_", "norm_", "weight_gated", "live_", "list_live", "sample_gates")
VENDORS = ("nvjet", "cutlass", "sm90_xmma")


def _side_by_side(points: list[linear.Point], verified: bool) -> str:
    """A table with a row for each of many cases: the dense layer in milliseconds, the others relative to it."""
    cases: dict[tuple[Any, str], dict[str, linear.Point]] = {}
    for p in points:
        cases.setdefault((p.shape, p.case), {})[p.provider] = p
    others = ("dampr", "eager unfused", COMPILED)
    rows = []
    for (shape, case), by in cases.items():
        dense = by["dense"].median
        times = [
            f"{by[name].median / dense:.2f}" if verified and name in by and not by[name].error else ""
            for name in others
        ]
        middle, low, high = (by["dampr"].ratios or {}).get(COMPILED, (nan, nan, nan))
        rows.append(
            (
                str(shape),
                case,
                f"{dense * 1e3:.2f}",
                *times,
                f"{middle:.3f} ({low:.3f} to {high:.3f})" if verified else "",
            )
        )
    return report.markdown(("shape", "case", "dense ms", *others, "dampr / compiled (95 %)"), rows) + "\n\n"


COMPILED = "compiled unfused"


def _against_compiled(points: list[linear.Point], verified: bool) -> str:
    """A sentence on how many cases dampr is faster, level or slower in than the compiled competitor, by the intervals
    of the ratios; each slower case is named.
    """
    counts = []
    for provider in linear.RATED:
        found = [
            (p, p.ratios[COMPILED]) for p in points if p.provider == provider and p.ratios and COMPILED in p.ratios
        ]
        if not found or not verified:
            continue
        behind = [
            f"{p.case} at {p.shape}: {middle:.3f} ({low:.3f} to {high:.3f})"
            for p, (middle, low, high) in found
            if low > 1
        ]
        faster = sum(high < 1 for _, (_, _, high) in found)
        ending = f": {'; '.join(behind)}" if behind else ""
        level = len(found) - faster - len(behind)
        counts.append(
            f"{provider} is faster in {faster}, level in {level}, slower in {len(behind)} of {len(found)} cases{ending}"
        )
    return f"Against {COMPILED} (median ratio of the rounds, 95 % interval): {'; '.join(counts)}.\n\n" if counts else ""


def _verified(row: dict[str, Any]) -> tuple[str, ...]:
    """The cells of a row of verification results."""
    worst = row["worst"]
    found = ("", "") if worst is None else (f"{worst['error']:.1e}", f"{worst['bound']:.1e}")
    return row["op"], row["backend"], row["dtype"], str(row["cases"]), *found, "ok" if row["ok"] else "FAILED"


def _example(name: str) -> dict[str, Any]:
    """The results of an example script."""
    found: dict[str, Any] = json.loads((ROOT / "examples" / "results" / f"{name}.json").read_text())
    return found


def _singles() -> str:
    """The table of the examples that reproduce a published method."""
    rows = []
    for name in ("l0_lenet300", "l0_lenet5", "depl0_vgg", "diffprune_lenet5", "diffmask_filters"):
        r = _example(name)
        share = f"{r['macs'] / r['macs_dense']:.0%} ({r['macs'] / 1e3:.0f}k)"
        threads = r["environment"]["threads"]
        run = (
            f"{r['epochs']} epochs of {r['data']}, seed {r['seed']}, {r['seconds']:.0f} s on {threads} "
            f"thread{'s' * (threads > 1)}"
        )
        rows.append((_link(name), r["method"], f"accuracy {r['accuracy']:.2%}", r["open"], share, run, r["published"]))
    rank, images = _example("dam_rank"), _example("dam_autoencoder")
    linear_runs = [r for r in rank["runs"] if r["kernel"] == "linear"]
    truths, seeds = sorted({r["true"] for r in linear_runs}), len({r["seed"] for r in linear_runs})
    quality = f"true dimension in {rank['linear_exact']} of {len(linear_runs)}"
    run = f"{seeds} seeds, {sum(r['seconds'] for r in linear_runs):.0f} s"
    rows.append((_link("dam_rank"), rank["method"], quality, ", ".join(map(str, truths)), "", run, rank["published"]))
    whole, *others = images["runs"]
    middle = others[len(others) // 2]
    quality = f"test error {middle['error']:.3f} (all codes: {whole['error']:.3f})"
    run = f"{images['epochs']} epochs of {images['data']}, seed {images['seed']}, {middle['seconds']:.0f} s"
    rows.append(
        (_link("dam_autoencoder"), images["method"], quality, f"{middle['open']}/50", "", run, images["published"])
    )
    columns = ("script", "family", "quality", "open gates", "MACs left", "run", "published")
    return report.markdown(columns, rows) + "\n"


def _link(name: str) -> str:
    return f"[{name}.py](../examples/{name}.py)"


def _dam_rank() -> str:
    """The table of the ranks that discriminative masking found."""
    runs: dict[tuple[str, int], list[dict[str, Any]]] = {}
    for r in _example("dam_rank")["runs"]:
        runs.setdefault((r["kernel"], r["true"]), []).append(r)
    rows = [
        (
            kernel,
            str(true),
            ", ".join(str(r["found"]) for r in found),
            ", ".join(f"{r['beta']:.3f}" for r in found),
            str(len(found)),
        )
        for (kernel, true), found in runs.items()
    ]
    return report.markdown(("data", "true dimension", "open codes", "beta", "seeds"), rows) + "\n"


def _dam_autoencoder() -> str:
    """The table of autoencoders with discriminative masking."""
    rows = [(f"{r['lam']:g}", f"{r['open']} / 50", f"{r['error']:.4f}") for r in _example("dam_autoencoder")["runs"]]
    return report.markdown(("lambda", "open codes", "test error"), rows) + "\n"


def _compare() -> str:
    """The table of the comparison of families."""
    runs: dict[str, list[dict[str, Any]]] = {}
    for r in _example("compare_families")["runs"]:
        runs.setdefault(r["family"], []).append(r)
    rows = []
    for family, found in runs.items():
        accuracy, share = [r["accuracy"] for r in found], [r["macs"] / r["macs_dense"] for r in found]
        each = ", ".join(f"{a:.2%}" for a in accuracy)
        rows.append(
            (
                family,
                f"{statistics.mean(accuracy):.2%}",
                each,
                ", ".join(f"{s:.0%}" for s in share),
                "; ".join(r["open"] for r in found),
            )
        )
    return report.markdown(("family", "mean accuracy", "each seed", "MACs left", "open gates"), rows) + "\n"


def _many() -> str:
    """The table of the examples on several ranks."""
    rows = []
    for name in ("train_ddp", "train_fsdp", "train_tp"):
        found = _example(name)
        for r in found["runs"].values():
            size = f"{r['macs'] / r['macs_dense']:.1%}", f"{r['params'] / 1e3:.1f}k"
            rows.append((_link(name), found["data"], str(r["ranks"]), f"{r['accuracy']:.2%}", r["open"], *size))
    return report.markdown(("script", "data", "ranks", "accuracy", "widths", "MACs left", "params"), rows) + "\n"


STRUCTURES = ("lstm_language_model", "gru_digits", "transformer_digits", "dam_recommender", "dam_graph")


def _structures() -> str:
    """The table of the examples of other structures than images."""
    rows = []
    for name in STRUCTURES:
        r = _example(name)
        for m in r["models"]:
            quality = f"{m['quality']:.2%}" if r["metric"] == "accuracy" else f"{m['quality']:.4g}"
            size = f"{m['params'] / 1e3:.1f}k", f"{m['macs'] / 1e6:.2f}M", f"{m['ms']:.2f}"
            rows.append((_link(name), r["data"], m["model"], f"{quality} {r['metric']}", *size))
    return report.markdown(("script", "data", "model", "quality", "params", "MACs", "ms"), rows) + "\n"


EXAMPLES = {
    "examples": _singles,
    "examples-dam-rank": _dam_rank,
    "examples-dam-autoencoder": _dam_autoencoder,
    "examples-compare": _compare,
    "examples-structures": _structures,
    "emulated": emulated.table,
    "emulated-steps": emulated.steps,
    "examples-many": _many,
    "scale-counts": scale.counts,
    "scale-host": scale.host,
    "scale-many": scale.many,
    "scale-limits": scale.limits,
    "scale-tokens": scale.tokens,
    "predicted-kernels": predictions.kernels,
    "predicted-tiles": predictions.tiles,
    "predicted-routes": predictions.routes,
}


def main() -> None:
    for document in DOCUMENTS:
        text = document.read_text()
        document.write_text(PLACE.sub(lambda m, document=document: m[1] + render(m[2], document) + m[3], text))


if __name__ == "__main__":
    main()
