"""Records of runs, as lines of JSON: reading and writing them, which runs are missing, in which order to do them, and
which setting the validation data chooses.
"""

from __future__ import annotations

import contextlib
import json
import os
import statistics
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from dampr.records import write_jsonl

from .methods import FAMILIES, METHODS, PEERS, settings, why_not
from .tasks import TASKS, Task

RESULTS = Path(__file__).resolve().parent.parent / "results" / "quality"
SEARCH_SEED = 0
"""The seed that every setting of a peer is run with; other seeds run only the setting that validates best there."""
COMPARISONS = ("steps", "time")
TIMED = ("narrow", "l1", *PEERS)
"""Methods that are run a second time, for as long as the plan's run took."""

Record = dict[str, Any]


class Run(NamedTuple):
    """The key of a run. A record has these fields and what was measured."""

    task: str
    share: float
    method: str
    setting: str
    seed: int
    comparison: str

    def __str__(self) -> str:
        setting = "" if self.setting == "default" else f" ({self.setting})"
        return f"{self.task} at {self.share:.0%}: {self.method}{setting}, seed {self.seed}, equal {self.comparison}"


def key(record: Record) -> Run:
    """The run that a record is of."""
    return Run(**{name: record[name] for name in Run._fields})


class Results(dict[Run, Record]):
    """The records by run."""

    def of(self, task: str, share: float, method: str, comparison: str, setting: str | None = None) -> list[Record]:
        """The records of one method, by seed."""
        wanted = (task, share, method, comparison)
        found = [
            r
            for run, r in self.items()
            if (run.task, run.share, run.method, run.comparison) == wanted and setting in (None, run.setting)
        ]
        return sorted(found, key=lambda r: r["seed"])


def records_in(folder: Path) -> Iterator[Record]:
    """The records of every file of a folder; a line that a crash cut short is skipped."""
    for path in sorted(folder.glob("*.jsonl")):
        for line in path.read_text().splitlines():
            with contextlib.suppress(json.JSONDecodeError):
                yield json.loads(line)


def read(folder: Path = RESULTS) -> Results:
    """The records by run; the last one where a run has several."""
    found = Results()
    for record in records_in(folder):
        if "comparison" in record:
            found[key(record)] = record
    return found


def append(record: Record, folder: Path = RESULTS) -> None:
    """Append a record to its task's file. The line is on the disk when this returns. If a crash left part of a line, a
    new line is started.
    """
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / f"{record['task']}.jsonl"
    cut_short = path.exists() and path.stat().st_size > 0 and not path.read_bytes().endswith(b"\n")
    with path.open("a") as file:
        file.write("\n" * cut_short + json.dumps(record) + "\n")
        file.flush()
        os.fsync(file.fileno())


def forget(runs: Iterable[Run], folder: Path = RESULTS) -> int:
    """Drop the records of these runs, so that they are run again. Returns how many records there were."""
    dropped, found = set(runs), read(folder)
    for task in {run.task for run in dropped}:
        write_jsonl(
            folder / f"{task}.jsonl", [r for run, r in found.items() if run.task == task and run not in dropped]
        )
    return len(dropped & found.keys())


def chosen_setting(results: Results, task: str, share: float, method: str) -> str | None:
    """The setting with the best validation accuracy at :data:`SEARCH_SEED`, or None until all settings have been run.

    Test accuracy is not looked at.
    """
    accuracy = {}
    for setting in settings(method):
        record = results.get(Run(task, share, method, setting, SEARCH_SEED, "steps"))
        if record is None:
            return None if len(settings(method)) > 1 else setting
        accuracy[setting] = record["validation_accuracy"]
    return max(accuracy, key=lambda setting: accuracy[setting])


def wanted(results: Results, seeds: Sequence[int], tasks: Iterable[Task] | None = None) -> list[Run]:
    """All runs of these seeds that are known to be needed so far, in the order in which they should be done.

    For each seed, narrow and plan of every task come first, then the other methods, then comparisons at equal time.
    Runs that depend on a setting not chosen yet, or on the time of a plan not run yet, are left out.
    """
    runs = [run for task in tasks or TASKS.values() for seed in seeds for run in _of_task(results, task, seed)]
    order = list(TASKS)
    return sorted(runs, key=lambda run: (run.seed, _rank(run), order.index(run.task) if run.task in order else 0))


def _of_task(results: Results, task: Task, seed: int) -> Iterator[Run]:
    for method in METHODS:
        for share in (1.0,) if method == "dense" else task.shares:
            if why_not(method, task) is None:
                yield from _of_method(results, task, share, method, seed)


def _of_method(results: Results, task: Task, share: float, method: str, seed: int) -> Iterator[Run]:
    """The runs of a method at a share and seed: every setting with the search seed, only the chosen one with others."""
    best = chosen_setting(results, task.name, share, method)
    for setting in settings(method):
        if seed == SEARCH_SEED or setting == best:
            yield Run(task.name, share, method, setting, seed, "steps")
    if method in TIMED and best is not None:
        run = Run(task.name, share, method, best, seed, "time")
        if run._replace(comparison="steps") in results and plan_of(run) in results:
            yield run


def plan_of(run: Run) -> Run:
    """The plan's run whose CPU time the other method gets in a comparison at equal time."""
    return run._replace(method="plan", setting="default", comparison="steps")


def _rank(run: Run) -> int:
    """The place of a run in the order of :func:`wanted`."""
    if run.method in ("narrow", "plan"):
        return 0 if run.comparison == "steps" else 2
    if run.comparison == "time":
        return 5
    if run.method in PEERS:
        return 3
    return 4 if run.method.removeprefix("plan_") in FAMILIES else 1


def over_seeds(records: Sequence[Record]) -> float:
    """The mean test accuracy."""
    return statistics.mean(r["test_accuracy"] for r in records)
