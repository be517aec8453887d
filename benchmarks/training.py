"""Measures how long whole training runs take: dense, narrow from scratch, a plan that keeps closed units to the end of
its ramp, a plan that removes them during the ramp ("shrinking"), and one whose widths are multiples of eight.

``python -m benchmarks.training run | table``. Tasks, recipe and batches are those of :mod:`benchmarks.quality`; times
are CPU seconds on one thread. Each run is one JSON line in ``benchmarks/results/training/TASK.jsonl``; a run that is
there already is not repeated.
"""

from __future__ import annotations

import argparse
import functools
import math
import statistics
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

import torch

from benchmarks.quality import data, results
from benchmarks.quality.methods import METHODS as QUALITY
from benchmarks.quality.methods import Planned, Setup
from benchmarks.quality.tables import paired_interval
from benchmarks.quality.tasks import TASKS, Task
from benchmarks.quality.training import Method, accuracy, train
from benchmarks.quality.widths import macs
from benchmarks.tables import PLACE, ROOT
from dampr import records
from dampr.cli import report
from dampr.prune.measure import count_macs

RESULTS = ROOT / "benchmarks" / "results" / "training"
DOCUMENT, CHART = ROOT / "docs" / "training_time.md", ROOT / "docs" / "plots" / "training-time.png"
SHARES = {"lenet5": 0.15, "vgg": 0.25, "resnet20": 0.25, "gru": 0.25}
SHARES |= dict.fromkeys(("transformer_warm", "transformer_warm_long", "transformer", "transformer_long"), 0.5)
METHODS: dict[str, Callable[[Setup], Method]] = {
    "dense": QUALITY["dense"],
    "narrow": QUALITY["narrow"],
    "plan": lambda setup: Planned(setup, shrink=False),
    "plan, shrinking": lambda setup: Planned(setup, shrink="auto"),
    "plan, rounded": lambda setup: Planned(setup, shrink="auto", round_to=8),
}
TITLES = {
    "dense": "dense",
    "narrow": "narrow from scratch",
    "plan": "dampr.Plan, shrink=False",
    "plan, shrinking": "dampr.Plan",
    "plan, rounded": "dampr.Plan, round_to=8",
}
RAMP, COMPACTED = 0.3, 0.5  # the shares of the steps at which a plan from scratch begins and ends its ramp
_loaded = functools.lru_cache(maxsize=1)(data.load)
Record = dict[str, Any]


class Run(NamedTuple):
    """The key of a run, by which its record is found."""

    task: str
    method: str
    seed: int
    steps: int


def wanted(seeds: list[int], scale: float, tasks: list[str]) -> Iterator[Run]:
    """Every run, seed by seed."""
    for seed in seeds:
        for task in tasks:
            for method in METHODS:
                yield Run(task, method, seed, round(scale * TASKS[task].steps))


def read(folder: Path = RESULTS) -> dict[Run, Record]:
    """The records by run; the last one where a run has several."""
    return {Run(*(record[name] for name in Run._fields)): record for record in results.records_in(folder)}


def append(record: Record, folder: Path = RESULTS) -> None:
    """Append a record to its file. The line is on the disk when this returns."""
    results.append(record, folder)


def timed(method: Method, steps: int) -> list[float]:
    """Make ``method`` note the CPU clock at the beginning and at the end of the ramp, in the list returned here."""
    marks: list[float] = []
    inner, at = method.step, {round(RAMP * steps), round(COMPACTED * steps)}

    def step(done: int, optimizer: torch.optim.Optimizer) -> torch.optim.Optimizer:
        left = inner(done, optimizer)
        if done in at:
            marks.append(time.process_time())
        return left

    method.step = step  # type: ignore[method-assign]
    return marks


def execute(run: Run, task: Task, images: data.Data) -> Record:
    """Do a run and return its record."""
    torch.set_num_threads(1)
    torch.manual_seed(run.seed)
    share = SHARES[run.task]
    batches = data.batches(images, task.batch, run.seed, task.augment)
    method = METHODS[run.method](Setup(task, share, run.steps, batches, "default"))
    marks = timed(method, run.steps)
    began = time.process_time()
    model, seconds = train(method, task, batches, run.steps)
    plan = getattr(method, "plan", None)
    where = records.environment()
    return {
        **run._asdict(),
        "share": share,
        "test_accuracy": accuracy(model, images.x_test, images.y_test),
        "macs_left": count_macs(model, task.example()) / macs(task, task.widths),
        "cpu_seconds": round(seconds, 2),
        "to_ramp": round(marks[0] - began, 2),
        "ramp": round(marks[1] - marks[0], 2),
        "after_ramp": round(seconds - (marks[1] - began), 2),
        "shrunk": [] if plan is None else plan.report.shrunk,
        **{name: where[name] for name in ("torch", "cpu", "commit", "date")},
    }


def run_missing(runs: list[Run], hours: float, root: Path, folder: Path = RESULTS) -> None:
    """Do the missing runs one after the other until all are done or the time is up."""
    ends, longest = time.monotonic() + 3600 * hours, 0.0
    for run in runs:
        if run in read(folder):
            continue
        started = time.monotonic()
        if started + longest > ends:
            print("the time is up", flush=True)
            return
        task = TASKS[run.task]
        record = execute(run, task, _loaded(task.data, root))
        append(record, folder)
        longest = max(longest, time.monotonic() - started)
        print(f"{run}: {record['cpu_seconds']} s, {record['test_accuracy']:.2%}", flush=True)


def table(found: dict[Run, Record] | None = None) -> str:
    """The table with the means over seeds of each task and method, and each plan's time relative to dense and
    narrow.
    """
    found = read() if found is None else found
    columns = (
        "task",
        "run",
        "MACs left",
        "steps",
        "CPU s",
        "of dense",
        "ramp",
        "after the ramp, of narrow",
        "test accuracy",
        "each seed",
    )
    rows = []
    for task in TASKS:
        by_method = {method: _of(found, task, method) for method in METHODS}
        for method, mine in by_method.items():
            if mine:
                rows.append((task, TITLES[method], *_row(mine, by_method["dense"], by_method["narrow"])))
    if not rows:
        return "No runs yet.\n"
    where = sorted({f"{r['cpu']}, torch {r['torch']}, commit {r['commit']}" for r in found.values()})
    return f"{report.markdown(columns, rows)}\n\n{'; '.join(where)}; one thread.\n"


def _of(found: dict[Run, Record], task: str, method: str) -> list[Record]:
    """The records of the longest runs of a task and method, by seed."""
    mine = [r for run, r in found.items() if (run.task, run.method) == (task, method)]
    longest = max((r["steps"] for r in mine), default=0)
    return sorted((r for r in mine if r["steps"] == longest), key=lambda r: r["seed"])


def _row(mine: list[Record], dense: list[Record], narrow: list[Record]) -> tuple[str, ...]:
    """The last cells of a row of the table: cost, steps, times and accuracies of one way to train.

    Args:
        mine: the records of this way, one for each seed.
        dense: the records of the dense network, for the ratio of times.
        narrow: the records of the narrow network, for the ratio of times after the ramp.
    """
    accuracies = [r["test_accuracy"] for r in mine]
    return (
        f"{statistics.mean(r['macs_left'] for r in mine):.1%}",
        str(mine[0]["steps"]),
        f"{statistics.mean(r['cpu_seconds'] for r in mine):.1f}",
        ratio(mine, dense, "cpu_seconds"),
        f"{statistics.mean(r['ramp'] for r in mine):.1f} s",
        ratio(mine, narrow, "after_ramp"),
        f"{statistics.mean(accuracies):.2%}",
        ", ".join(f"{a:.2%}" for a in accuracies),
    )


def ratio(ours: list[Record], theirs: list[Record], name: str) -> str:
    """The mean ratio of the values of ``name`` over pairs of the same seed, with its 95 % interval if there are several
    pairs.
    """
    a, b = ({r["seed"]: r[name] for r in records} for records in (ours, theirs))
    found = [a[seed] / b[seed] for seed in sorted(a.keys() & b.keys()) if b[seed] > 0]
    if not found:
        return ""
    mean, half = paired_interval(found, [0.0] * len(found))
    return f"{mean:.2f}" if math.isinf(half) else f"{mean:.2f} ± {half:.2f}"


def draw(found: dict[Run, Record] | None = None, path: Path = CHART) -> None:
    """A chart of time against accuracy: a panel for each task, a mark for each seed, time relative to the dense run."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot as plt

    found = read() if found is None else found
    begun = [task for task in TASKS if _of(found, task, "dense")]
    figure, axes = plt.subplots(
        1, max(1, len(begun)), figsize=(3.2 * max(1, len(begun)), 3.2), layout="constrained", squeeze=False
    )
    styles = ("#999999", "o"), ("#000000", "s"), ("#E69F00", "^"), ("#0072B2", "D"), ("#009E73", "v")
    marks = dict(zip(METHODS, styles, strict=True))
    for ax, task in zip(axes.flat, begun, strict=False):
        dense = statistics.mean(r["cpu_seconds"] for r in _of(found, task, "dense"))
        for method, (color, marker) in marks.items():
            mine = _of(found, task, method)
            x, y = [r["cpu_seconds"] / dense for r in mine], [100 * r["test_accuracy"] for r in mine]
            ax.plot(x, y, marker, color=color, label=TITLES[method])
        ax.set_title(f"{task} at {SHARES[task]:.0%} of the MACs", fontsize=9)
        ax.set_xlabel("CPU time, of dense")
        ax.set_xlim(left=0)
    axes.flat[0].set_ylabel("test accuracy, %")
    axes.flat[0].legend(fontsize=7)
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=110)
    plt.close(figure)


def write(document: Path = DOCUMENT) -> None:
    """Write the table into the page."""
    document.write_text(
        PLACE.sub(lambda m: m[1] + table() + m[3] if m[2] == "training/time" else m[0], document.read_text())
    )


def main() -> None:
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.training", description="CPU time of whole training runs."
    )
    parser.add_argument("do", choices=("run", "table"))
    parser.add_argument(
        "--task", choices=TASKS, action="append", help="may be given several times; all of them by default"
    )
    parser.add_argument("--seeds", type=lambda text: [int(seed) for seed in text.split(",")], default=[0, 1, 2])
    parser.add_argument("--scale", type=float, default=1.0, help="share of the steps of the quality benchmark")
    parser.add_argument("--hours", type=float, default=math.inf, help="start no run that would end later")
    parser.add_argument("--root", type=Path, default=data.DEFAULT_ROOT, help="folder of the data")
    args = parser.parse_args()
    if args.do == "run":
        run_missing(list(wanted(args.seeds, args.scale, args.task or list(TASKS))), args.hours, args.root)
    else:
        write()
        draw()


if __name__ == "__main__":
    main()
