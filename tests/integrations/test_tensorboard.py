"""What TensorBoard reads of the gates."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

import dampr
from dampr.integrations.tensorboard import log_gates

pytestmark = pytest.mark.filterwarnings("ignore::DeprecationWarning:tensorboard")
X = torch.randn(8, 12, generator=torch.Generator().manual_seed(0))


class Sum(nn.Module):
    """Two layers whose outputs are added up share their gates."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b, self.last = nn.Linear(12, 10), nn.Linear(12, 10), nn.Linear(10, 3)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.last(torch.relu(self.a(x) + self.b(x)))


def read(folder: Path) -> Any:
    event_accumulator = pytest.importorskip("tensorboard.backend.event_processing.event_accumulator")
    events = event_accumulator.EventAccumulator(str(folder), size_guidance={"histograms": 0})  # 0: all
    events.Reload()
    return events


@pytest.mark.parametrize("gate", ["hard_concrete", "dam", "dep_l0"])
def test_the_event_file_holds_a_histogram_and_a_share_for_each_gate_vector(gate: str, tmp_path: Path) -> None:
    tensorboard = pytest.importorskip("torch.utils.tensorboard")
    model = dampr.convert(Sum(), gate=gate, example_inputs=X)
    budget = dampr.Budget(model, X, macs=0.5)
    with tensorboard.SummaryWriter(tmp_path) as writer:
        log_gates(writer, model, 3, budget)
        budget.finalize()
        log_gates(writer, model, 4, budget)
    events = read(tmp_path)
    own = {"hard_concrete": {"log_alpha/a"}}.get(gate, set())
    assert set(events.Tags()["histograms"]) == {"gates/a", "open_probability/a"} | own, (
        "layer b has the gates of layer a"
    )
    scalars = {
        "gates_open/a",
        "budget/gates_open",
        "budget/macs_left",
        "budget/budget_multiplier",
        "budget/budget_penalty",
    }
    assert set(events.Tags()["scalars"]) == scalars
    before, after = events.Histograms("gates/a")
    assert (before.step, after.step) == (3, 4)
    assert before.histogram_value.num == after.histogram_value.num == 10
    assert after.histogram_value.sum == pytest.approx(float(model.a.gate.deterministic().sum()), rel=1e-5)
    assert [s.value for s in events.Scalars("gates_open/a")] == [1, 0.5]
    assert events.Scalars("budget/macs_left")[1].value == pytest.approx(budget.left()) == 0.5


class Writer:
    """Something else that takes the same calls."""

    def __init__(self) -> None:
        self.tags: list[str] = []

    def add_histogram(self, tag: str, values: torch.Tensor, step: int) -> None:
        self.tags.append(tag)

    add_scalar = add_histogram


def test_any_writer_will_do_and_a_layer_alone_is_the_model() -> None:
    writer = Writer()
    log_gates(writer, dampr.nn.GatedLinear(4, 3), 0)
    assert writer.tags == ["gates/model", "open_probability/model", "log_alpha/model", "gates_open/model"]


@pytest.mark.parametrize(
    ("arguments", "error", "message"),
    [
        ((None, dampr.nn.GatedLinear(4, 3), 0), TypeError, "writer=None: expected one with add_histogram"),
        ((Writer(), nn.Linear(4, 3), 0), ValueError, "model=Linear: expected gated layers"),
        ((Writer(), dampr.nn.GatedLinear(4, 3), -1), ValueError, "step=-1: expected an integer of at least 0"),
        ((Writer(), dampr.nn.GatedLinear(4, 3), 0, 0.5), TypeError, "budget=0.5: expected a dampr.Budget"),
    ],
)
def test_bad_arguments_are_named(arguments: Any, error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        log_gates(*arguments)
