"""Which numbers beside parameters a forward asks for, and what trial cuts remember."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from dampr.prune.unit_trials import Subject, Trial
from dampr.prune.units import trace_units
from dampr.prune.units.sizes import Size, followers


class Numbers(nn.Module):
    """Keeps its width under names that its forward asks for in different ways, or not at all."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.last = nn.Linear(4, 8), nn.Linear(8, 2)
        self.viewed = self.compared = self.shown = self.found = self.unread = self.listed = 8
        self.shape = (1, 8)

    def forward(self, x: Tensor) -> Tensor:
        y = torch.relu(self.first(x)).view(-1, self.viewed)
        if self.compared == 0 or f"{self.shown}" == "0":
            y = -y
        y = F.pad(y, (0, getattr(self, "found", 8) - y.shape[-1]))
        assert self.listed is not None  # which needs no number
        return self.last(y.reshape(-1, self.shape[1]))


def sizes_of(subject: Subject) -> list[Size]:
    return followers(subject.model, subject.units, subject.units.classes("first.weight", 0))


@pytest.fixture
def subject() -> Subject:
    torch.manual_seed(0)
    model, x = Numbers().eval(), torch.randn(3, 4)
    return Subject(model, trace_units(model, x), x, {})


def test_numbers_that_no_forward_asks_for_are_no_choice(subject: Subject) -> None:
    every = sizes_of(subject)
    assert {size.attribute for size in every} >= {"viewed", "unread", "listed", "shape.1"}
    left = [size.attribute for size in subject.used(every)]
    assert sorted(left) == ["compared", "found", "shape.1", "shown", "viewed"]
    assert subject.model.viewed == subject.model.unread == 8
    assert subject.used(reversed(every)) == [size for size in reversed(every) if size.attribute in left]


def test_a_model_that_asks_for_values_keeps_all_numbers(subject: Subject) -> None:
    subject.doubt_shapes()
    assert subject.used(sizes_of(subject)) == sizes_of(subject)


def test_a_cut_runs_once_for_each_choice_of_numbers(subject: Subject, monkeypatch: pytest.MonkeyPatch) -> None:
    shapes = subject.shapes
    assert shapes is not None
    runs: list[nn.Module] = []
    fits = shapes.fits
    monkeypatch.setattr(shapes, "fits", lambda small: runs.append(small) or fits(small))
    trial = Trial(subject, subject.units.classes("first.weight", 0)[::2])
    every = sizes_of(subject)
    assert trial.fits(every)
    assert not trial.fits([])
    assert trial.fits(every)
    assert len(runs) == 2
