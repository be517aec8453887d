"""A trace leaves the model, its buffers and the random generators as they were,
and does without values where it can.
"""

import random

import numpy as np
import pytest
import torch
from torch import nn

from dampr.prune.units import trace_units
from dampr.prune.units.proof import retrace
from tests import models


class Keeping(nn.Module):
    """Draws, counts, keeps what it computes, and fails if told to."""

    def __init__(self, fails=False):
        super().__init__()
        self.first, self.norm, self.last = nn.Linear(6, 8), nn.BatchNorm1d(8), nn.Linear(8, 3)
        self.seen, self.every, self.fails = None, [], fails
        self.register_buffer("calls", torch.zeros(()))

    def forward(self, x):
        self.calls += 1
        self.seen = self.norm(self.first(x)) + random.random() + np.random.rand() * torch.rand(8)  # noqa: NPY002
        self.every.append(self.seen)
        if self.fails:
            raise ArithmeticError("told to")
        return self.last(self.seen)


@pytest.mark.parametrize("fake", [True, False, None])
@pytest.mark.parametrize("fails", [True, False])
def test_nothing_is_changed_whatever_is_raised(fake, fails):
    model, x = Keeping(fails), torch.randn(4, 6)
    model.norm.eval()
    state = {name: t.clone() for name, t in model.state_dict().items()}
    modes = [m.training for m in model.modules()]
    generators = torch.get_rng_state(), random.getstate(), np.random.get_state()[1].copy()  # noqa: NPY002
    if fails:
        with pytest.raises(ArithmeticError, match="told to"):
            trace_units(model, x, fake=fake)
    else:
        trace_units(model, x, fake=fake)
    assert [m.training for m in model.modules()] == modes
    assert all(torch.equal(t, state[name]) for name, t in model.state_dict().items())
    assert model.seen is None
    assert model.every == []
    assert torch.equal(torch.get_rng_state(), generators[0])
    assert random.getstate() == generators[1]
    assert (np.random.get_state()[1] == generators[2]).all()  # noqa: NPY002
    assert not any(m._forward_hooks or m._forward_pre_hooks for m in model.modules())
    assert not any(isinstance(t, torch.Tensor) for m in model.modules() for t in vars(m).values())


def test_a_teacher_that_follows_in_training_does_not_move():
    class Following(nn.Module):
        def __init__(self):
            super().__init__()
            self.student, self.teacher = nn.Linear(6, 3), nn.Linear(6, 3)

        def forward(self, x):
            if self.training:
                self.teacher.weight.mul_(0.9).add_(self.student.weight, alpha=0.1)
            return self.student(x), self.teacher(x) * float(x.sum())

    model = Following()
    before = model.teacher.weight.detach().clone()
    trace_units(model, torch.randn(4, 6))
    assert torch.equal(model.teacher.weight, before)


def test_control_flow_that_asks_for_values_gets_them():
    class Asks(nn.Module):
        def __init__(self):
            super().__init__()
            self.a, self.b, self.out = nn.Linear(6, 8), nn.Linear(6, 8), nn.Linear(8, 3)

        def forward(self, x):
            return self.out((self.a(x) if x.sum() > 0 else self.b(x)).relu())

    model, x = Asks(), torch.ones(2, 6)
    units = trace_units(model, x)
    assert units.why_not("a.weight", 0) is None
    assert units.why_not("b.weight", 0).kind == "unreached"
    with pytest.raises(RuntimeError, match="meta"):
        trace_units(model, x, fake=True)
    both = trace_units(model, x, more_inputs=[-x])
    assert both.classes("a.weight", 0) == both.classes("b.weight", 0)
    assert both.why_not("b.weight", 0) is None
    assert retrace(model, both, x, both.clusters, more_inputs=[-x]) == {}


def test_what_leaves_torch_and_comes_back_is_data():
    class Detour(nn.Module):
        def __init__(self):
            super().__init__()
            self.first, self.second, self.third = nn.Linear(6, 8), nn.Linear(8, 10), nn.Linear(10, 3)

        def forward(self, x):
            h = torch.from_numpy(self.first(x).detach().numpy() * 2)
            return self.third(self.second(h).relu())

    units = trace_units(Detour(), torch.randn(4, 6))
    assert units.why_not("second.weight", 0) is None
    assert units.why_not("second.weight", 1).kind == "constants"
    assert units.why_not("first.weight", 0).kind == "unread"


def test_a_model_on_meta_is_traced():
    model = models.ALL["resnet18"]()[0]
    on_meta = models.ALL["resnet18"]()[0].to("meta")
    x = torch.randn(2, 3, 8, 8)
    assert trace_units(on_meta, x.to("meta")).free == trace_units(model, x).free


def test_a_branch_of_training_is_traced_too():
    class Auxiliary(nn.Module):
        def __init__(self):
            super().__init__()
            self.first, self.head, self.aux = nn.Linear(6, 8), nn.Linear(8, 3), nn.Linear(8, 3)

        def forward(self, x):
            x = self.first(x).relu()
            return (self.head(x), self.aux(x)) if self.training else self.head(x)

    units = trace_units(Auxiliary(), torch.randn(4, 6))
    assert units.reached["aux.weight"] == {True}
    assert units.reached["head.weight"] == {True, False}
    assert units.classes("aux.weight", 1) == units.classes("first.weight", 0)
    assert trace_units(Auxiliary(), torch.randn(4, 6), training=[False]).why_not("aux.weight", 1).kind == "unreached"


def test_a_mode_in_which_the_model_does_not_run_is_said():
    model = nn.Sequential(nn.Linear(6, 8), nn.BatchNorm1d(8), nn.Linear(8, 3))
    units = trace_units(model, torch.randn(1, 6))
    assert units.failed.keys() == {True}
    assert "Expected more than 1 value per channel" in units.failed[True]
    assert units.why_not("0.weight", 0) is None


def test_an_input_without_tensors_is_refused():
    with pytest.raises(TypeError, match="example_inputs=3"):
        trace_units(nn.Linear(2, 2), 3)


@pytest.mark.parametrize("output", ["dataclass", "distribution", "object"])
def test_outputs_are_searched_in_any_object(output):
    class Holder:
        def __init__(self, value):
            self.value = value

    class Holding(nn.Module):
        def __init__(self):
            super().__init__()
            self.first, self.second = nn.Linear(6, 8), nn.Linear(8, 4)

        def forward(self, x):
            h = self.second(self.first(x).relu())
            if output == "distribution":
                return torch.distributions.Normal(h, 1.0, validate_args=False)
            return {"dataclass": lambda: {"deep": [(h,)]}, "object": lambda: Holder(Holder(h))}[output]()

    units = trace_units(Holding(), torch.randn(3, 6))
    assert units.why_not("second.weight", 0).kind == "output"
    assert units.why_not("first.weight", 0) is None
