"""Writes the tables of docs/quality.md from results files, one for each task; no number is typed by hand."""

from __future__ import annotations

import math
import statistics
from collections.abc import Sequence
from pathlib import Path

from benchmarks.tables import PLACE, ROOT
from dampr.cli import report

from . import anchors, recipes, results
from .methods import METHODS, PEERS, TITLES, why_not
from .results import Record, Results
from .tasks import TASKS, Task

DOCUMENT = ROOT / "docs" / "quality.md"
COLUMNS = (
    "MACs",
    "method",
    "test accuracy",
    "each seed",
    "over narrow (95 %)",
    "dampr.Plan over it (95 %)",
    "MACs left",
    "parameters",
    "steps",
    "CPU s",
)
WORDS = {
    "steps": "At equal steps",
    "time": "At equal time: as many steps as fit in the time of dampr.Plan at equal steps",
}
# The 97.5 % quantiles of Student's t for 1, 2, ... degrees of freedom; for more the normal distribution's is used.
STUDENT = (
    12.706,
    4.303,
    3.182,
    2.776,
    2.571,
    2.447,
    2.365,
    2.306,
    2.262,
    2.228,
    2.201,
    2.179,
    2.160,
    2.145,
    2.131,
    2.120,
    2.110,
    2.101,
)


def paired_interval(ours: Sequence[float], theirs: Sequence[float]) -> tuple[float, float]:
    """(mean, half of the 95 % interval) of the differences of pairs, by Student's t; for a single pair the half is
    infinite.

    Raises ValueError for sequences of different lengths.
    """
    differences = [a - b for a, b in zip(ours, theirs, strict=True)]
    if len(differences) == 1:
        return differences[0], math.inf
    freedom = len(differences) - 1
    quantile = STUDENT[freedom - 1] if freedom <= len(STUDENT) else statistics.NormalDist().inv_cdf(0.975)
    return statistics.mean(differences), quantile * statistics.stdev(differences) / math.sqrt(len(differences))


def render(name: str, found: Results | None = None) -> str:
    """The tables of ``quality/TASK``, one for each comparison that has runs, and where their numbers come from.

    ``quality/anchors`` has published points, ``quality/recipes`` the settings that were tried on validation images.
    """
    if name == "quality/anchors":
        return _anchors()
    if name == "quality/recipes":
        return _recipes()
    found = results.read() if found is None else found
    task = TASKS[name.removeprefix("quality/")]
    parts = []
    for comparison, words in WORDS.items():
        rows = table_rows(found, task, comparison)
        if rows:
            parts.append(f"{words}:\n\n{report.markdown(COLUMNS, rows)}\n")
    mine = [r for r in found.values() if r["task"] == task.name]
    return "\n".join([*parts, _source(task, mine)]) if parts else "No runs yet.\n"


def _anchors() -> str:
    """The table of published points."""
    columns = ("run", "at most: error", "params", "test error", "each seed", "params left", "units left", "by")
    rows = []
    for anchor in anchors.ANCHORS:
        mine = [record for (name, _), record in sorted(anchors.done().items()) if name == anchor.name]
        if mine:
            errors = [record["error"] for record in mine]
            widths = "-".join(map(str, mine[0]["widths"]))
            wanted = (f"{anchor.error:.1%}", f"{anchor.params:.1%}")
            shown = (
                f"{statistics.mean(errors):.2%}",
                ", ".join(f"{e:.2%}" for e in errors),
                f"{mine[0]['params_share']:.2%}",
            )
            rows.append((anchor.name, *wanted, *shown, widths, anchor.source))
    return f"{report.markdown(columns, rows)}\n" if rows else "No runs yet.\n"


def _recipes() -> str:
    """The table of settings that were tried."""
    columns = ("task", "MACs", "steps", "setting", "validation accuracy", "each seed")
    groups: dict[tuple[str, ...], list[float]] = {}
    for r in recipes.read():
        key = (r["task"], f"{r['share']:.0%}", str(r["steps"]), r["variant"])
        groups.setdefault(key, []).append(r["validation_accuracy"])
    rows = [
        (*key, f"{statistics.mean(found):.2%}", ", ".join(f"{a:.2%}" for a in found))
        for key, found in sorted(groups.items())
    ]
    return f"{report.markdown(columns, rows)}\n" if rows else "No runs yet.\n"


def _source(task: Task, mine: list[Record]) -> str:
    """The line below a task's tables: where the numbers come from, and why some methods are left out."""

    def several(name: str) -> str:
        return ", ".join(sorted({r[name] for r in mine}))

    where = (
        f"{several('cpu')}, one thread, torch {several('torch')}, {max(r['date'] for r in mine)[:10]}, commits "
        f"{several('commit')}"
    )
    left_out = [f"{TITLES[method]}: {reason}" for method in METHODS if (reason := why_not(method, task))]
    ending = f" Left out: {'; '.join(left_out)}." * bool(left_out)
    return f"[{task.name}.jsonl](../benchmarks/results/quality/{task.name}.jsonl): {where}.{ending}\n"


def table_rows(found: Results, task: Task, comparison: str) -> list[tuple[str, ...]]:
    """A row for each share and method with runs. A Torch-Pruning pruner is shown with the setting that validates best,
    once all settings have been run.
    """
    rows = []
    for share in (1.0, *task.shares):
        for method in METHODS:
            mine = best_records(found, task, share, method, comparison)
            if mine and not (comparison == "time" and method == "plan"):
                rows.append(_row(found, task, share, method, mine, comparison))
    return rows


def best_records(found: Results, task: Task, share: float, method: str, comparison: str) -> list[Record]:
    """The records, by seed, of the setting that validation chooses; none before that choice."""
    setting = results.chosen_setting(found, task.name, share, method)
    return [] if setting is None else found.of(task.name, share, method, comparison, setting)


def _row(found: Results, task: Task, share: float, method: str, mine: list[Record], comparison: str) -> tuple[str, ...]:
    """The cells of the row of a method at a share, from its records ``mine``."""
    narrow = [] if method == "narrow" else found.of(task.name, share, "narrow", comparison)
    plan = [] if method == "plan" else found.of(task.name, share, "plan", "steps")
    setting = f" ({mine[0]['setting']})" if method in PEERS else ""
    return (
        f"{share:.0%}",
        TITLES[method] + setting,
        f"{results.over_seeds(mine):.2%}",
        ", ".join(f"{r['test_accuracy']:.2%}" for r in mine),
        _difference(mine, narrow),
        _difference(plan, mine),
        " to ".join(
            sorted({f"{r['macs'] / r['macs_dense']:.2%}" for r in (min(mine, key=_left), max(mine, key=_left))})
        ),
        f"{statistics.mean(r['params'] for r in mine) / 1e3:.1f}k",
        f"{statistics.mean(r['steps'] for r in mine):.0f}",
        f"{statistics.mean(r['cpu_seconds'] for r in mine):.0f}",
    )


def _left(record: Record) -> float:
    """The share of the dense network's MACs that is left."""
    left: float = record["macs"] / record["macs_dense"]
    return left


def _difference(ours: list[Record], theirs: list[Record]) -> str:
    """The mean paired difference in percentage points over the seeds that both have, with its interval."""
    a, b = ({r["seed"]: 100 * r["test_accuracy"] for r in records} for records in (ours, theirs))
    seeds = sorted(a.keys() & b.keys())
    if not seeds:
        return ""
    mean, half = paired_interval([a[s] for s in seeds], [b[s] for s in seeds])
    return f"{mean:+.2f}" if math.isinf(half) else f"{mean:+.2f} ± {half:.2f}"


def write(document: Path = DOCUMENT, found: Results | None = None) -> None:
    """Write the tables into the document; a document that does not exist is started with a place for each task."""
    text = document.read_text() if document.exists() else skeleton()
    document.write_text(
        PLACE.sub(lambda m: m[1] + render(m[2], found) + m[3] if m[2].startswith("quality/") else m[0], text)
    )


INTRODUCTION = """# Quality at equal cost

What test accuracy each way to prune leaves, at the same multiply-accumulates.
`python -m benchmarks.quality run` does the runs.
`python -m benchmarks.quality table` writes this page from their records.

- A tenth of the training images, the same in every run, validates.
  The learning rate of a task, its warm-up for transformers (both by the dense network), and the setting of a
  Torch-Pruning pruner (the best of three at seed 0) are chosen on it; nothing is chosen on test images.
- All methods of a task share one loop: Adam (AdamW for the transformer), a cosine to zero over the whole run,
  the same batches for a seed.
- Methods that cut train the dense network for 40 % of the steps, are cut, and go on with a new optimizer.
- dampr.Plan has one recipe, its defaults, on every task.
- "Over narrow" and "dampr.Plan over it": the mean difference of pairs of the same seed, in percentage points,
  and its 95 % interval by Student's t; without an interval where there is one pair.
- CPU seconds are those of the training process on one thread, without evaluation.

![Test accuracy against the share of the multiply-accumulates](plots/quality.png)
"""


ENDING = """## Published points on MNIST

One plan with the defaults, 12 epochs, images shifted by up to two pixels: `python -m benchmarks.quality.anchors`.

<!-- table: quality/anchors -->
<!-- end -->

## What was tried

Settings of the plan by accuracy on validation images, in shorter runs:
`python -m benchmarks.quality.recipes TASK SHARE --steps N`.
The defaults were chosen by these; one seed says little, so no setting was chosen for a lead of less than a point.

<!-- table: quality/recipes -->
<!-- end -->
"""


def skeleton() -> str:
    """The text of docs/quality.md, with an empty place for the tables of each task."""
    places = "\n".join(
        f"## {task.title}\n\n<!-- table: quality/{name} -->\n<!-- end -->\n" for name, task in TASKS.items()
    )
    return f"{INTRODUCTION}\n{places}\n{ENDING}"
