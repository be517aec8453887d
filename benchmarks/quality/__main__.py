"""``python -m benchmarks.quality fetch | run | list | table | tune | forget``; ``--help`` says more."""

from __future__ import annotations

import argparse
import dataclasses
import math
from collections import Counter
from collections.abc import Callable
from pathlib import Path

from . import data, results, run
from .methods import METHODS, why_not
from .results import Run
from .tasks import TASKS


def main() -> None:
    args = _parser().parse_args()
    args.do(args)


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.quality", description="Test accuracy of pruned networks at equal cost."
    )
    commands = parser.add_subparsers(required=True)

    def command(
        name: str, do: Callable[[argparse.Namespace], None], words: str, filters: bool = False
    ) -> argparse.ArgumentParser:
        found = commands.add_parser(name, help=words, description=words)
        found.set_defaults(do=do)
        if filters:
            _add_filters(found)
        return found

    _add_root(command("fetch", _fetch, "get the data"))
    runs = command("run", _run, "do the runs that are missing", filters=True)
    runs.add_argument("--hours", type=float, default=math.inf, help="start no run that would end later")
    _add_root(runs)
    command("list", _list, "say what is done and what is missing", filters=True)
    command("table", _table, "write docs/quality.md and its chart")
    tune = command(
        "tune",
        _tune,
        "validation accuracy of the dense network at learning rates, in a third of the steps; nothing is written",
    )
    tune.add_argument("--task", choices=TASKS, required=True)
    tune.add_argument("--warmup", type=int, help="steps in which the rate rises; by default those of the task")
    tune.add_argument("--lr", type=float, nargs="+", required=True)
    _add_root(tune)
    command(
        "forget",
        _forget,
        "drop the records of the filtered runs, which need a filter, so that they are run again",
        filters=True,
    )
    return parser


def _add_root(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--root", type=Path, default=data.DEFAULT_ROOT, help="folder of the data")


def _add_filters(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--task", choices=TASKS, action="append", help="may be given several times; all of them by default"
    )
    parser.add_argument("--share", type=float, action="append", help="the same")
    parser.add_argument("--method", choices=METHODS, action="append", help="the same")
    parser.add_argument("--comparison", choices=results.COMPARISONS, action="append", help="the same")
    parser.add_argument(
        "--seeds", type=lambda text: [int(seed) for seed in text.split(",")], default=[0, 1, 2], help="by default 0,1,2"
    )


def _filter(args: argparse.Namespace) -> Callable[[Run], bool]:
    """Whether a run passes the filters of the command line, as a function of the run."""

    def keep(found: Run) -> bool:
        pairs = (
            (args.task, found.task),
            (args.share, found.share),
            (args.method, found.method),
            (args.comparison, found.comparison),
        )
        return all(allowed is None or value in allowed for allowed, value in pairs) and found.seed in args.seeds

    return keep


def _fetch(args: argparse.Namespace) -> None:
    data.fetch(args.root)


def _run(args: argparse.Namespace) -> None:
    data.fetch(args.root)
    run.run_missing(args.seeds, _filter(args), args.hours, args.root)


def _list(args: argparse.Namespace) -> None:
    found, keep = results.read(), _filter(args)
    todo = run.missing(args.seeds, keep)
    for task in TASKS:
        for method in METHODS:
            done = sum(keep(known) and (known.task, known.method) == (task, method) for known in found)
            left = sum((known.task, known.method) == (task, method) for known in todo)
            reason = why_not(method, TASKS[task])
            if done or left or reason:
                print(f"{task:12} {method:20} {f'{done} done, {left} missing':24} {reason or ''}")
    print(f"missing now, without those that wait for others: {dict(Counter(known.task for known in todo))}")
    print(f"next: {todo[0] if todo else 'none'}")


def _table(args: argparse.Namespace) -> None:
    from . import chart, tables

    tables.write()
    chart.write()


def _tune(args: argparse.Namespace) -> None:
    """Print the validation accuracy of the dense network at each learning rate, after a third of the steps."""
    images = data.load(TASKS[args.task].data, args.root)
    for lr in args.lr:
        task = dataclasses.replace(TASKS[args.task], lr=lr)
        if args.warmup is not None:
            task = dataclasses.replace(task, lr_warmup=args.warmup)
        record = run.execute(Run(task.name, 1.0, "dense", "default", 0, "steps"), task, images, task.steps // 3)
        print(
            f"{task.name}, lr {lr:g}: validation {record['validation_accuracy']:.2%}, {record['cpu_seconds']:.0f} s",
            flush=True,
        )


def _forget(args: argparse.Namespace) -> None:
    """Drop the records of the runs that pass the filters. Exits if no filter is given."""
    if not (args.task or args.share or args.method or args.comparison):
        raise SystemExit("forget: give --task, --share, --method or --comparison")
    print(f"{results.forget(filter(_filter(args), results.read()))} records dropped")


if __name__ == "__main__":
    main()
