"""The benchmark of quality on data made up here: nothing is downloaded, nothing takes minutes."""

from __future__ import annotations

import dataclasses
import json
import math
import warnings

import pytest
import torch
from torch import nn

from benchmarks.quality import chart, data, results, run, tables
from benchmarks.quality.methods import PEER_SETTINGS, Setup, why_not
from benchmarks.quality.results import Results, Run
from benchmarks.quality.tasks import TASKS, Task
from benchmarks.quality.training import accuracy, learning_rate
from benchmarks.quality.widths import cut_by_l1, macs, narrow_widths
from benchmarks.tables import PLACE
from dampr.prune.measure import count_macs
from tests.long import long_if

SMALL = ("lenet5", "vgg", "gru", "transformer")


def mlp(widths) -> nn.Module:
    first, second = widths
    return nn.Sequential(
        nn.Flatten(), nn.Linear(16, first), nn.ReLU(), nn.Linear(first, second), nn.ReLU(), nn.Linear(second, 10)
    )


TASK = Task("vgg", "made up", "none", (1, 4, 4), mlp, (60, 40), (0.5,), steps=30, lr=1e-2, batch=16)


@pytest.fixture
def images() -> data.Data:
    generator = torch.Generator().manual_seed(0)
    x, y = torch.randn(400, 1, 4, 4, generator=generator), torch.randint(0, 10, (400,), generator=generator)
    x += y.view(-1, 1, 1, 1)
    return data.split(x[:300], y[:300], x[300:], y[300:])


@pytest.fixture
def only(monkeypatch, images) -> None:
    """One small task on made up images."""
    monkeypatch.setattr(results, "TASKS", {"vgg": TASK})
    monkeypatch.setattr(run, "TASKS", {"vgg": TASK})
    monkeypatch.setattr(run, "_loaded", lambda name, root: images)


def record(method="narrow", seed=0, comparison="steps", setting="default", test=0.5, validation=0.5, share=0.5, **more):
    measured = {
        "steps": 100,
        "test_accuracy": test,
        "validation_accuracy": validation,
        "macs": 49,
        "macs_dense": 100,
        "params": 1000,
    }
    where = {
        "cpu_seconds": 10.0,
        "torch": "2",
        "cpu": "some",
        "commit": "abc",
        "date": "2030-01-01T00:00:00",
        "dampr": "1",
    }
    run = {"task": "vgg", "share": share, "method": method, "setting": setting, "seed": seed, "comparison": comparison}
    return {**run, **measured, **where, **more}


def found(*records) -> Results:
    return Results({results.key(r): r for r in records})


@pytest.mark.parametrize("name", [long_if(name, "transformer") for name in SMALL])
def test_a_narrow_network_costs_its_share_within_one_percent(name) -> None:
    task = TASKS[name]
    share = task.shares[-1]
    widths = narrow_widths(task, share)
    left = count_macs(task.build(widths), task.example()) / count_macs(task.build(task.widths), task.example())
    assert 0.99 * share <= left <= share, widths


def test_a_share_that_no_widths_give_is_refused() -> None:
    with pytest.raises(ValueError, match="no widths"):
        narrow_widths(dataclasses.replace(TASK, build=lambda widths: mlp((60, 40))), 0.5)


@pytest.mark.parametrize("name", [*SMALL, "resnet20"])
def test_a_cut_to_all_units_changes_nothing_and_one_to_half_has_half(name) -> None:
    torch.manual_seed(0)
    task = TASKS[name]
    half = tuple(width // 2 for width in task.widths)
    model, x = task.build(task.widths).eval(), task.example(3)
    torch.testing.assert_close(cut_by_l1(model, task, task.widths).eval()(x), model(x))
    small = cut_by_l1(model, task, half).eval()
    assert [p.shape for p in small.parameters()] == [p.shape for p in task.build(half).parameters()]
    assert small(x).isfinite().all()


@pytest.mark.parametrize("name", ["lenet5", "gru"])
def test_a_network_with_closed_units_and_its_cut_compute_the_same(name) -> None:
    torch.manual_seed(0)
    task = TASKS[name]
    model = task.build(task.widths).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            width = next((w for w in task.widths if parameter.shape[0] in (w, 3 * w)), None)
            if width is not None:  # every second unit computes zero and, in a GRU, keeps its state of zero
                parameter.view(-1, width, *parameter.shape[1:])[:, ::2] = 0
    small = cut_by_l1(model, task, tuple(width // 2 for width in task.widths)).eval()
    torch.testing.assert_close(small(task.example(3)), model(task.example(3)))


def test_training_leaves_one_record_a_run_and_done_runs_are_skipped(only, tmp_path, monkeypatch) -> None:
    def keep(run) -> bool:
        return run.method in ("dense", "narrow", "l1")

    run.run_missing([0], keep, math.inf, tmp_path, tmp_path)
    lines = (tmp_path / "vgg.jsonl").read_text().splitlines()
    assert [json.loads(line)["method"] for line in lines] == ["narrow", "dense", "l1"]
    first = json.loads(lines[0])
    assert first["macs"] <= 0.5 * first["macs_dense"]
    assert first["steps"] == TASK.steps
    monkeypatch.setattr(run, "execute", lambda *_: pytest.fail("a done run is run again"))
    run.run_missing([0], keep, math.inf, tmp_path, tmp_path)
    assert [r.seed for r in run.missing([0, 1], keep, tmp_path)] == [1, 1, 1]


def test_a_failed_run_is_not_recorded_and_others_go_on(only, tmp_path, monkeypatch) -> None:
    execute = run.execute

    def failing(wanted, *rest):
        if wanted.method == "narrow":
            raise RuntimeError("broken")
        return execute(wanted, *rest)

    monkeypatch.setattr(run, "execute", failing)
    run.run_missing([0], lambda r: r.method in ("narrow", "dense"), math.inf, tmp_path, tmp_path)
    assert [r.method for r in results.read(tmp_path)] == ["dense"]


def test_no_run_starts_after_the_time_is_up(only, tmp_path) -> None:
    run.run_missing([0], lambda r: True, -1.0, tmp_path, tmp_path)
    assert not results.read(tmp_path)


def test_the_same_seed_gives_the_same_record(only, images) -> None:
    narrow = Run("vgg", 0.5, "narrow", "default", 3, "steps")
    a, b = (run.execute(narrow, TASK, images, 20) for _ in range(2))
    assert a["test_accuracy"] == b["test_accuracy"]


def test_a_line_cut_short_by_a_crash_is_run_again(tmp_path) -> None:
    results.append(record(seed=0), tmp_path)
    with (tmp_path / "vgg.jsonl").open("a") as file:
        file.write('{"task": "vg')
    results.append(record(seed=1), tmp_path)
    assert [r.seed for r in results.read(tmp_path)] == [0, 1]


def test_forgotten_runs_are_missing_again(tmp_path) -> None:
    for seed in (0, 1):
        results.append(record(seed=seed), tmp_path)
    assert results.forget([results.key(record(seed=1))], tmp_path) == 1
    assert [r.seed for r in results.read(tmp_path)] == [0]


def test_the_setting_is_chosen_by_validation_whatever_the_test_accuracy() -> None:
    validation, test = (0.5, 0.7, 0.6), (0.9, 0.1, 0.8)
    lines = [
        record("tp_taylor", setting=s, validation=v, test=t)
        for s, v, t in zip(PEER_SETTINGS, validation, test, strict=True)
    ]
    assert results.chosen_setting(found(*lines), "vgg", 0.5, "tp_taylor") == PEER_SETTINGS[1]
    assert results.chosen_setting(found(*lines[:2]), "vgg", 0.5, "tp_taylor") is None


def test_other_seeds_run_only_the_chosen_setting() -> None:
    lines = [record("tp_taylor", setting=s, validation=v) for s, v in zip(PEER_SETTINGS, (0.5, 0.7, 0.6), strict=True)]
    task = dataclasses.replace(TASKS["vgg"], shares=(0.5,))
    runs = [r for r in results.wanted(found(*lines), [0, 1], [task]) if r.method == "tp_taylor"]
    assert [(r.seed, r.setting) for r in runs] == [*((0, s) for s in PEER_SETTINGS), (1, PEER_SETTINGS[1])]


def test_equal_time_waits_for_the_plan_and_gets_its_seconds() -> None:
    timed = Run("vgg", 0.5, "narrow", "default", 0, "time")
    task = dataclasses.replace(TASKS["vgg"], shares=(0.5,))
    narrow, plan = record(cpu_seconds=20.0), record("plan", cpu_seconds=50.0)
    assert timed not in results.wanted(found(narrow), [0], [task])
    assert timed in results.wanted(found(narrow, plan), [0], [task])
    assert run.steps_of(timed, task, found(narrow, plan)) == 250


def test_narrow_comes_first_and_other_seeds_last() -> None:
    runs = results.wanted(Results(), [0, 1])
    assert {r.method for r in runs[: sum(len(t.shares) for t in TASKS.values())]} <= {"narrow", "plan"}
    assert [r.seed for r in runs] == sorted(r.seed for r in runs)


def test_the_interval_of_paired_differences_is_students() -> None:
    mean, half = tables.paired_interval([3.0, 5.0, 7.0], [1.0, 2.0, 3.0])  # 2, 3, 4: deviation 1
    assert mean == pytest.approx(3)
    assert half == pytest.approx(4.303 / math.sqrt(3))
    assert tables.paired_interval([2.0], [1.0]) == (1.0, math.inf)
    with pytest.raises(ValueError, match="zip"):
        tables.paired_interval([1.0], [1.0, 2.0])


def test_the_document_is_generated_from_the_lines(tmp_path) -> None:
    lines = [record(seed=seed, test=0.5 + seed / 100) for seed in range(3)]
    lines += [record("plan", seed=seed, test=0.52 + seed / 100) for seed in range(3)]
    lines += [record(comparison="time", seed=0, test=0.51)]
    tables.write(tmp_path / "quality.md", found(*lines))
    text = (tmp_path / "quality.md").read_text()
    assert "| 50% | narrow from scratch | 51.00% | 50.00%, 51.00%, 52.00% |  | +2.00 ± 0.00 | 49.00% |" in text
    assert "| 50% | dampr.Plan | 53.00% | 52.00%, 53.00%, 54.00% | +2.00 ± 0.00 |" in text
    assert "At equal time" in text
    assert text.count("<!-- table: quality/") == len(TASKS) + 2
    tables.write(tmp_path / "quality.md", found(*lines))
    assert (tmp_path / "quality.md").read_text() == text


def test_the_chart_draws_what_is_there(tmp_path) -> None:
    chart.write(tmp_path / "quality.png", found(record(), record("plan", seed=1), record("dense", share=1.0)))
    assert (tmp_path / "quality.png").stat().st_size > 0


def test_a_tenth_validates_and_is_the_same_every_time(images) -> None:
    assert (len(images.x), len(images.x_validation), len(images.x_test)) == (270, 30, 100)
    x = torch.arange(50.0)[:, None]
    a, b = (data.split(x, torch.arange(50), x, torch.arange(50)) for _ in range(2))
    assert torch.equal(a.y_validation, b.y_validation)
    assert set(a.y.tolist()).isdisjoint(a.y_validation.tolist())


def test_the_order_of_batches_is_no_other_generators(images) -> None:
    stream = data.batches(images, 16, 5)
    first = [next(stream)[1] for _ in range(20)]
    torch.manual_seed(7)
    again = data.batches(images, 16, 5)
    for y in first:
        torch.rand(3)
        assert torch.equal(next(again)[1], y)


def test_crop_and_flip_shifts_and_mirrors_images() -> None:
    x = torch.arange(2 * 3 * 16 * 16.0).view(2, 3, 16, 16) + 1
    y = data.crop_and_flip(x, torch.Generator().manual_seed(0))
    assert y.shape == x.shape
    padded = nn.functional.pad(x, (2, 2, 2, 2))
    windows = [padded[0, :, r : r + 16, c : c + 16] for r in range(5) for c in range(5)]
    assert any(torch.equal(y[0], w) or torch.equal(y[0], w.flip(2)) for w in windows)


def test_the_learning_rate_ends_at_zero() -> None:
    assert learning_rate(TASK, 0, 10) == TASK.lr
    assert learning_rate(TASK, 5, 10) == pytest.approx(TASK.lr / 2)
    assert learning_rate(TASK, 10, 10) == pytest.approx(0)


def test_accuracy_counts_what_is_right() -> None:
    assert accuracy(nn.Identity(), torch.eye(4), torch.tensor([0, 1, 2, 0])) == 0.75


@pytest.mark.parametrize("kind", ["tp_random", "tp_taylor", "tp_groupnorm"])
def test_torch_pruning_ends_within_one_percent_and_above_its_floor(kind, images) -> None:
    from benchmarks.quality import peers

    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        torch.manual_seed(0)
        method = peers.TorchPruning(Setup(TASK, 0.5, 50, data.batches(images, 16, 0), "global"), kind)
        small = method.cut(0.5)
    dense = macs(TASK, TASK.widths)
    assert 0.49 * dense <= count_macs(small, TASK.example()) <= 0.5 * dense
    assert all(layer.weight.shape[0] >= 10 for layer in small.modules() if isinstance(layer, nn.Linear))


@pytest.mark.parametrize("method", ["prune_once", "plan", "plan_hard_concrete"])
def test_damprs_own_methods_end_at_the_share(method, images) -> None:
    if why_not(method, TASK):
        pytest.skip(why_not(method, TASK))
    found = run.execute(Run("vgg", 0.5, method, "default", 0, "steps"), TASK, images, 80)
    assert 0.97 * 0.5 <= found["macs"] / found["macs_dense"] <= 0.5


def test_methods_that_cannot_run_say_why() -> None:
    assert "does not prune" in why_not("tp_taylor", TASKS["gru"])
    assert "BatchNorm" in why_not("tp_slim", TASKS["lenet5"])
    assert why_not("plan_dam", TASKS["gru"]) is None
    assert why_not("narrow", TASKS["gru"]) is None


def test_the_page_shows_what_the_results_files_hold():
    text = tables.DOCUMENT.read_text()
    places = PLACE.findall(text)
    assert {name for _, name, _ in places} == {
        *(f"quality/{task}" for task in TASKS),
        "quality/anchors",
        "quality/recipes",
    }
    assert PLACE.sub(lambda m: m[1] + tables.render(m[2]) + m[3], text) == text, (
        "run python -m benchmarks.quality table"
    )
