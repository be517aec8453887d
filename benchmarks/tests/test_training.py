"""The benchmark of training time: its records, its table and its chart; and the page that shows them."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

from benchmarks import training
from benchmarks.quality import data
from benchmarks.quality.tasks import TASKS
from benchmarks.tables import PLACE


def record(method="dense", seed=0, seconds=100.0, **more):
    run = {"task": "vgg", "method": method, "seed": seed, "steps": 100}
    times = {"cpu_seconds": seconds, "to_ramp": 0.3 * seconds, "ramp": 0.2 * seconds, "after_ramp": 0.5 * seconds}
    where = {"torch": "2", "cpu": "some", "commit": "abc", "date": "2026-01-01"}
    return run | times | where | {"share": 0.25, "test_accuracy": 0.5, "macs_left": 0.25, "shrunk": []} | more


def found(*records):
    return {training.Run(*(r[name] for name in training.Run._fields)): r for r in records}


def test_a_run_is_recorded_with_its_parts_and_is_not_done_again(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys
) -> None:
    images = data.Data(*[t for _ in range(3) for t in (torch.randn(500, 1, 28, 28), torch.randint(10, (500,)))])
    monkeypatch.setattr(training, "_loaded", lambda name, root: images)
    runs = [training.Run("lenet5", method, 0, 60) for method in training.METHODS]
    training.run_missing(runs, 1.0, tmp_path, tmp_path)
    records = training.read(tmp_path)
    assert list(records) == runs
    for run, found in records.items():
        assert found["to_ramp"] + found["ramp"] + found["after_ramp"] == pytest.approx(found["cpu_seconds"], abs=0.05)
        assert found["macs_left"] == pytest.approx(1.0) if run.method == "dense" else 0.1 < found["macs_left"] <= 0.15
    capsys.readouterr()
    training.run_missing(runs, 1.0, tmp_path, tmp_path)
    assert capsys.readouterr().out == ""
    with (tmp_path / "lenet5.jsonl").open("a") as file:
        file.write('{"task": "lenet5", "met')
    assert list(training.read(tmp_path)) == runs
    training.append(record(), tmp_path)
    assert len(training.read(tmp_path)) == len(runs) + 1


def test_ratios_are_of_pairs_of_the_same_seed() -> None:
    dense = [record(seed=seed, seconds=100.0 + 10 * seed) for seed in (0, 1, 2)]
    ours = [record("plan", seed, 50.0 + 5 * seed) for seed in (0, 1)]
    assert training.ratio(ours, dense, "cpu_seconds") == "0.50 ± 0.00"
    assert training.ratio(ours[:1], dense, "cpu_seconds") == "0.50"
    assert training.ratio(ours, [], "cpu_seconds") == ""
    text = training.table(found(*dense, *ours, record("narrow", 0, 25.0)))
    assert "| vgg | dampr.Plan, shrink=False | 25.0% | 100 | 52.5 | 0.50 ± 0.00 |" in text
    assert training.table({}) == "No runs yet.\n"


def test_the_longest_runs_are_shown() -> None:
    records = found(record(), record(steps=50, seconds=1.0))
    assert [r["steps"] for r in training._of(records, "vgg", "dense")] == [100]


def test_the_chart_is_drawn(tmp_path: Path) -> None:
    training.draw(found(record(), record("plan", seconds=60.0)), tmp_path / "time.png")
    assert (tmp_path / "time.png").stat().st_size > 0


def test_marks_are_those_of_the_parts_of_a_plan() -> None:
    method = SimpleNamespace(step=lambda done, optimizer: optimizer)
    marks = training.timed(method, 100)
    assert [len(marks) for step in range(1, 101) if method.step(step, None) is None] == [0] * 29 + [1] * 20 + [2] * 51


def test_every_task_has_a_share() -> None:
    assert training.SHARES.keys() == TASKS.keys()
    assert all(training.SHARES[name] in task.shares for name, task in TASKS.items())


def test_the_page_shows_what_the_results_files_hold() -> None:
    text = training.DOCUMENT.read_text()
    assert [name for _, name, _ in PLACE.findall(text)] == ["training/time"]
    assert PLACE.sub(lambda m: m[1] + training.table() + m[3], text) == text, "run python -m benchmarks.training table"
