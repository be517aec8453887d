"""Does the runs: build, train, prune, count, test."""

from __future__ import annotations

import functools
import math
import time
import traceback
from collections.abc import Callable
from pathlib import Path

import torch

from dampr import records
from dampr.prune.measure import count_macs, count_params

from . import data, results
from .methods import METHODS, Setup
from .results import Record, Results, Run
from .tasks import TASKS, Task
from .training import accuracy, train
from .widths import macs

_loaded = functools.lru_cache(maxsize=2)(data.load)


def steps_of(run: Run, task: Task, found: Results) -> int:
    """The task's steps. At equal time: as many steps as fit into the plan's CPU seconds at the pace that the method had
    in its own run of equal steps.
    """
    if run.comparison == "steps":
        return task.steps
    own = found[run._replace(comparison="steps")]
    return math.floor(own["steps"] * found[results.plan_of(run)]["cpu_seconds"] / own["cpu_seconds"])


def execute(run: Run, task: Task, images: data.Data, steps: int) -> Record:
    """Do a run and return its record. Training uses one thread, so that the seconds of different runs can be
    compared.
    """
    torch.set_num_threads(1)
    torch.manual_seed(run.seed)
    batches = data.batches(images, task.batch, run.seed, task.augment)
    method = METHODS[run.method](Setup(task, run.share, steps, batches, run.setting))
    model, seconds = train(method, task, batches, steps)
    where = records.environment()
    return {
        **run._asdict(),
        "steps": steps,
        "batch": task.batch,
        "lr": task.lr,
        "lr_warmup": task.lr_warmup,
        "test_accuracy": accuracy(model, images.x_test, images.y_test),
        "validation_accuracy": accuracy(model, images.x_validation, images.y_validation),
        "macs_dense": macs(task, task.widths),
        "macs": count_macs(model, task.example()),
        "params": count_params(model),
        "cpu_seconds": round(seconds, 2),
        **{name: where[name] for name in ("torch", "cpu", "commit", "date", "dampr")},
    }


def missing(seeds: list[int], keep: Callable[[Run], bool], folder: Path = results.RESULTS) -> list[Run]:
    """The runs that are not done and can be done now."""
    found = results.read(folder)
    return [run for run in results.wanted(found, seeds) if run not in found and keep(run)]


def run_missing(
    seeds: list[int], keep: Callable[[Run], bool], hours: float, root: Path, folder: Path = results.RESULTS
) -> None:
    """Do the missing runs one after the other until none is left or the next would not end in time.

    A run that fails is reported and not repeated.
    """
    ends, longest, failed = time.monotonic() + 3600 * hours, 0.0, set[Run]()
    while todo := [run for run in missing(seeds, keep, folder) if run not in failed]:
        started, run = time.monotonic(), todo[0]
        if started + longest > ends:
            print(f"the time is up with {len(todo)} runs missing", flush=True)
            return
        print(f"{run} ...", end=" ", flush=True)
        try:
            task = TASKS[run.task]
            record = execute(run, task, _loaded(task.data, root), steps_of(run, task, results.read(folder)))
        except Exception:
            failed.add(run)
            print(f"FAILED\n{traceback.format_exc()}", flush=True)
            continue
        results.append(record, folder)
        longest = max(longest, time.monotonic() - started)
        print(summary(record), flush=True)


def summary(record: Record) -> str:
    """A record in one line."""
    left = record["macs"] / record["macs_dense"]
    accuracies = f"test {record['test_accuracy']:.2%}, validation {record['validation_accuracy']:.2%}"
    return f"{accuracies}, {left:.2%} of the MACs, {record['steps']} steps in {record['cpu_seconds']:.0f} s"
