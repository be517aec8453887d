"""Runs as lines of JSON: which are done, which are missing, in which order, and what the validation split chooses."""

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
    """What tells a run from the others; its record has these and what was measured."""

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
    return Run(**{name: record[name] for name in Run._fields})


class Results(dict[Run, Record]):
    """Every record by its run."""

    def of(self, task: str, share: float, method: str, comparison: str, setting: str | None = None) -> list[Record]:
        """Those of one method, by seed."""
        wanted = (task, share, method, comparison)
        found = [
            r
            for run, r in self.items()
            if (run.task, run.share, run.method, run.comparison) == wanted and setting in (None, run.setting)
        ]
        return sorted(found, key=lambda r: r["seed"])


def records_in(folder: Path) -> Iterator[Record]:
    """Every whole line of every file; one that a crash cut short is left out."""
    for path in sorted(folder.glob("*.jsonl")):
        for line in path.read_text().splitlines():
            with contextlib.suppress(json.JSONDecodeError):
                yield json.loads(line)


def read(folder: Path = RESULTS) -> Results:
    """The records of runs; of several of one run the last."""
    found = Results()
    for record in records_in(folder):
        if "comparison" in record:
            found[key(record)] = record
    return found


def append(record: Record, folder: Path = RESULTS) -> None:
    """One line more, on the disk when this returns. Starts a new line where a crash left part of one."""
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / f"{record['task']}.jsonl"
    cut_short = path.exists() and path.stat().st_size > 0 and not path.read_bytes().endswith(b"\n")
    with path.open("a") as file:
        file.write("\n" * cut_short + json.dumps(record) + "\n")
        file.flush()
        os.fsync(file.fileno())


def forget(runs: Iterable[Run], folder: Path = RESULTS) -> int:
    """Drop the records of these runs, so that they are run again; returns how many there were."""
    dropped, found = set(runs), read(folder)
    for task in {run.task for run in dropped}:
        write_jsonl(
            folder / f"{task}.jsonl", [r for run, r in found.items() if run.task == task and run not in dropped]
        )
    return len(dropped & found.keys())


def chosen_setting(results: Results, task: str, share: float, method: str) -> str | None:
    """The setting of best validation accuracy at :data:`SEARCH_SEED`; None until all have been run.

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
    """All runs of these seeds that can be told already, in the order in which they are worth doing.

    Broad first: of each seed narrow and plan of every task, then the other methods, then the comparisons at equal time.
    Runs that wait for the choice of a setting, or for the time of the plan, are not among them yet.
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
    best = chosen_setting(results, task.name, share, method)
    for setting in settings(method):
        if seed == SEARCH_SEED or setting == best:
            yield Run(task.name, share, method, setting, seed, "steps")
    if method in TIMED and best is not None:
        run = Run(task.name, share, method, best, seed, "time")
        if run._replace(comparison="steps") in results and plan_of(run) in results:
            yield run


def plan_of(run: Run) -> Run:
    """The run whose time a comparison at equal time is given."""
    return run._replace(method="plan", setting="default", comparison="steps")


def _rank(run: Run) -> int:
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
