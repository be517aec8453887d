"""A run in JSON lines: nothing that was recorded is lost, and nothing that was tampered with is read."""

from __future__ import annotations

import json
import math

import numpy as np
import pytest
import torch
from torch import nn

import dampr
from dampr.prune import history as module

X = torch.randn(8, 12, generator=torch.Generator().manual_seed(0))


def converted():
    return dampr.convert(nn.Sequential(nn.Linear(12, 20), nn.ReLU(), nn.Linear(20, 3)), example_inputs=X)


def test_each_record_is_in_the_file_at_once_with_what_the_budget_reads(tmp_path):
    budget = dampr.Budget(converted(), X, macs=0.5)
    history = dampr.History(tmp_path / "runs" / "a.jsonl", budget)
    assert not history.path.exists(), "a process that records nothing writes nothing"
    budget.penalty()
    history.record(step=0, loss=torch.tensor(2.5), accuracy=np.float32(0.25))
    (row,) = history.rows()
    readings = {name: float(value) for name, value in budget.readings().items()}
    assert row == {"step": 0, "loss": 2.5, "accuracy": 0.25, **readings}
    budget.finalize()
    history.record(step=1)
    run = module.read(history.path)
    assert run.rows[1] == {"step": 1, "gates_open": 0.5, "macs_left": 0.5, "budget_multiplier": 0, "budget_penalty": 0}
    assert (run.metric, run.total, run.target) == ("macs", budget.total, budget.target)
    assert run.names()[:2] == ["gates_open", "macs_left"]


def test_a_model_gives_its_penalty_its_open_gates_and_with_inputs_what_they_leave(tmp_path):
    model = converted()
    model[0].gate.log_alpha.data[:15] = -9
    for name, how in (("a", {}), ("b", {"example_inputs": X})):
        dampr.History(tmp_path / name, model, **how).record(step=3)
    a, b = (module.read(tmp_path / name) for name in "ab")
    expected = {"step": 3, "penalty": pytest.approx(dampr.penalty(model).item()), "gates_open": 0.25}
    assert a.rows == [expected]
    assert b.rows == [expected | {"macs_left": 0.25}]
    assert (a.total, b.total) == (None, 8 * 15 * 20)


def test_a_run_that_resumes_takes_the_place_of_what_came_after_its_checkpoint(tmp_path):
    path = tmp_path / "run.jsonl"
    first = dampr.History(path)
    for step in (10, 20, 30, 40):
        first.record(step=step, loss=step)
    again = dampr.History(path)
    again.record(step=30, loss=3)
    again.record(step=30, accuracy=0.5)
    assert again.rows() == [
        {"step": 10, "loss": 10},
        {"step": 20, "loss": 20},
        {"step": 30, "loss": 3, "accuracy": 0.5},
    ]
    assert len(path.read_text().splitlines()) == 8, "nothing is taken out of the file"


def test_numbers_that_are_not_finite_are_null(tmp_path):
    history = dampr.History(tmp_path / "run.jsonl")
    history.record(step=1, loss=math.nan, other=torch.tensor(math.inf))
    assert history.rows() == [{"step": 1, "loss": None, "other": None}]
    assert json.loads(history.path.read_text().splitlines()[1])["loss"] is None


@pytest.mark.parametrize(
    ("how", "error", "message"),
    [
        ({"step": -1}, ValueError, "step=-1: expected an integer of at least 0"),
        ({"step": 1.5}, ValueError, "step=1.5: expected an integer"),
        ({"step": 1, "loss": "low"}, TypeError, "loss='low': expected a number"),
        ({"step": 1, "ok": True}, TypeError, "ok=True: expected a number"),
        ({"step": 1, "loss": torch.zeros(2)}, TypeError, r"loss=tensor\(\[0., 0.\]\): expected a number"),
    ],
)
def test_what_is_no_number_is_refused_and_nothing_is_written(how, error, message, tmp_path):
    history = dampr.History(tmp_path / "run.jsonl")
    with pytest.raises(error, match=message):
        history.record(**how)
    assert not history.path.exists()


@pytest.mark.parametrize(
    ("arguments", "how", "error", "message"),
    [
        ((0.5,), {}, TypeError, "source=0.5: expected a dampr.Budget, a dampr.Plan, a gated model or None"),
        ((nn.Linear(2, 2),), {}, ValueError, "source=Linear: expected gated layers"),
        ((), {"example_inputs": X}, ValueError, "example_inputs: expected a gated model as source"),
    ],
)
def test_bad_arguments_are_named(arguments, how, error, message, tmp_path):
    with pytest.raises(error, match=message):
        dampr.History(tmp_path / "run.jsonl", *arguments, **how)


HEAD, ROW = '{"dampr_history": 1, "metric": "macs", "total": 10}\n', '{"step": 1, "loss": 2}\n'


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("", "line 1: nothing, expected the first line of a dampr.History"),
        (ROW, 'line 1: .*, expected {"dampr_history": 1'),
        ('{"dampr_history": 2}\n', "line 1: dampr_history=2, expected 1; a newer dampr"),
        ('{"dampr_history": 1, "metric": 3}\n', "line 1: metric=3, expected a name"),
        ('{"dampr_history": 1, "total": "all"}\n', "line 1: total='all', expected a number"),
        (HEAD + ROW + '{"step": 2, "lo', "line 3: .* is cut off; delete the line"),
        (HEAD + ROW + '{"step": 2, "lo\n' + ROW, "line 3: .* is no JSON"),
        (HEAD + "[" * 100_000 + "\n", r"line 2: .* is no JSON"),
        (HEAD + "[1]\n", r"line 2: '\[1\]', expected a JSON object"),
        (HEAD + ROW + '{"loss": 2}\n', "line 3: step=None, expected an integer of at least 0"),
        (HEAD + '{"step": -1}\n', "line 2: step=-1, expected"),
        (HEAD + '{"step": true}\n', "line 2: step=True, expected"),
        (HEAD + '{"step": 1, "loss": NaN}\n', "line 2: loss='NaN', expected a number or null"),
        (HEAD + '{"step": 1, "loss": "2"}\n', "line 2: loss='2', expected a number or null"),
        (HEAD + f'{{"step": 1, "loss": 1{"0" * 400}}}\n', "line 2: loss=1000"),
        ("\x80\n", "line 1: .* is no JSON"),
    ],
)
def test_a_damaged_file_is_refused_with_the_number_of_the_line(text, message, tmp_path):
    path = tmp_path / "run.jsonl"
    path.write_text(text, encoding="latin-1")
    for look in (module.read, dampr.History):
        with pytest.raises(dampr.FileError, match=message):
            look(path)
    assert path.read_text(encoding="latin-1") == text


def test_what_is_recorded_can_be_read_however_large(tmp_path):
    history = dampr.History(tmp_path / "run.jsonl")
    history.record(step=1, loss=1e305, other=10**400, least=-1e308, fine=1e299)
    assert history.rows() == [{"step": 1, "loss": None, "other": None, "least": None, "fine": 1e299}]


@pytest.mark.filterwarnings("error")
def test_a_loss_that_still_has_its_graph_is_recorded(tmp_path):
    history = dampr.History(tmp_path / "run.jsonl")
    history.record(step=1, loss=torch.tensor(0.5, requires_grad=True) * 2)
    assert history.rows() == [{"step": 1, "loss": 1.0}]


def test_the_mark_of_a_run_is_no_name_for_a_number(tmp_path):
    with pytest.raises(ValueError, match="dampr_history: expected another name"):
        dampr.History(tmp_path / "run.jsonl").record(step=1, dampr_history=1)
    assert not (tmp_path / "run.jsonl").exists()
