"""Models of which the example inputs show one way, and other inputs take another: what is cut runs on all of them."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

import dampr
from dampr.prune import inputs
from dampr.prune.cost import Cost
from dampr.prune.measure import count_macs
from dampr.prune.summary import distinct_gates
from tests.halves import cut_in_half


class Experts(nn.Module):
    """Each row to one expert of several; only those run that get rows."""

    def __init__(self, listed: bool) -> None:
        super().__init__()
        self.enter, self.router, self.leave = nn.Linear(8, 16), nn.Linear(16, 6), nn.Linear(16, 3)
        self.experts = nn.ModuleList(
            nn.Sequential(nn.Linear(16, 24), nn.ReLU(), nn.Linear(24, 16)) for _ in range(6 if listed else 0)
        )
        self.up, self.down = (
            (None, None) if listed else (nn.Parameter(torch.randn(6, *size) / 4) for size in ((24, 16), (16, 24)))
        )

    def forward(self, x: Tensor) -> Tensor:
        h = F.relu(self.enter(x))
        weights, chosen = self.router(h).softmax(-1).max(-1)
        y = torch.zeros_like(h)
        for expert in chosen.unique().tolist():
            rows = (chosen == expert).nonzero()[:, 0]
            if self.up is None:
                z = self.experts[expert](h[rows])
            else:
                z = F.relu(h[rows] @ self.up[expert].T) @ self.down[expert].T
            y.index_add_(0, rows, z * weights[rows, None])
        out: Tensor = self.leave(h + y)
        return out


class Branches(nn.Module):
    """Layers one after the other, and an ``if`` between two heads of different sizes."""

    def __init__(self) -> None:
        super().__init__()
        self.enter, self.inner, self.seen, self.unseen = (nn.Linear(*s) for s in ((8, 16), (16, 12), (12, 4), (12, 3)))

    def forward(self, x: Tensor) -> Tensor:
        h = F.relu(self.inner(F.relu(self.enter(x))))
        y: Tensor = (self.seen if x.mean() < 1 else self.unseen)(h)
        return y


class Bare(nn.Module):
    """The same with parameters of the module itself."""

    def __init__(self) -> None:
        super().__init__()
        self.enter, self.inner = nn.Linear(8, 16), nn.Linear(16, 12)
        self.seen, self.unseen = nn.Parameter(torch.randn(4, 12)), nn.Parameter(torch.randn(3, 12))

    def forward(self, x: Tensor) -> Tensor:
        h = F.relu(self.inner(F.relu(self.enter(x))))
        return F.linear(h, self.seen if x.mean() < 1 else self.unseen)


class Steps(nn.Module):
    """The same behind a recurrent layer."""

    def __init__(self) -> None:
        super().__init__()
        self.enter, self.rnn, self.seen, self.unseen = (
            nn.Linear(8, 16),
            nn.GRU(16, 12),
            nn.Linear(12, 4),
            nn.Linear(12, 3),
        )

    def forward(self, x: Tensor) -> Tensor:
        h, _ = self.rnn(F.relu(self.enter(x))[:, None])
        y: Tensor = (self.seen if x.mean() < 1 else self.unseen)(h[:, 0])
        return y


class Images(nn.Module):
    """Two of three norms are for inputs of other kinds."""

    def __init__(self) -> None:
        super().__init__()
        self.enter, self.norms = nn.Conv2d(2, 8, 3), nn.ModuleList(nn.BatchNorm2d(8) for _ in range(3))
        self.inner, self.leave = nn.Conv2d(8, 6, 3), nn.Linear(6, 2)

    def forward(self, x: Tensor) -> Tensor:
        kind = int(x.mean() > 1) + int(x.mean() < -1) * 2
        h = F.relu(self.norms[kind](self.enter(x.reshape(-1, 2, 2, 2).repeat(1, 1, 4, 4))))
        y: Tensor = self.leave(F.relu(self.inner(h)).mean((2, 3)))
        return y


NETWORKS: dict[str, Callable[[], nn.Module]] = {
    "experts": lambda: Experts(True),
    "experts in one tensor": lambda: Experts(False),
    "branches": Branches,
    "bare parameters": Bare,
    "recurrent": Steps,
    "norms": Images,
}


@pytest.mark.parametrize("seed", range(3))
@pytest.mark.parametrize("name", NETWORKS)
def test_what_is_cut_computes_the_same_on_ways_that_the_examples_do_not_show(name: str, seed: int) -> None:
    torch.manual_seed(seed)
    model, x = NETWORKS[name]().eval(), torch.randn(5, 8)
    model = dampr.convert(model, example_inputs=x)
    small = cut_in_half(model, x)
    for other in (torch.randn(200, 8), torch.randn(5, 8) + 3, torch.randn(5, 8) - 3):
        for found, wanted in zip(inputs.evaluate(small, other), inputs.evaluate(model, other), strict=True):
            torch.testing.assert_close(found, wanted, rtol=1e-5, atol=1e-5)


def test_widths_that_cannot_lead_to_the_unseen_layer_are_cut() -> None:
    model = dampr.convert(Branches(), example_inputs=torch.randn(5, 8))
    assert [gate.num_gates for gate in distinct_gates(model).values()] == [16]
    assert "do not reach 'unseen', which may share its width: give inputs that do" in model.dampr_skipped["inner"]


class Tasks(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.first, self.a = nn.Linear(6, 8), nn.Linear(8, 3)
        self.b = nn.Sequential(nn.Linear(8, 5), nn.Linear(5, 3))

    def forward(self, x: Tensor, task: str = "a") -> Tensor:
        y: Tensor = getattr(self, task)(self.first(x).relu())
        return y


def test_what_one_task_does_not_reach_keeps_the_width_that_it_reads() -> None:
    with pytest.raises(dampr.ConversionError, match=r"'first': \"the example inputs do not reach 'b', which may share"):
        dampr.convert(Tasks(), example_inputs=torch.randn(2, 6))


def test_several_examples_show_all_tasks() -> None:
    x = torch.randn(2, 6)
    both = dampr.Several(x, {"x": x, "task": "b"})
    model = dampr.convert(Tasks().eval(), example_inputs=both)
    assert sorted(gate.num_gates for gate in distinct_gates(model).values()) == [5, 8]
    assert count_macs(model, both) == 2 * (2 * 6 * 8) + 2 * 8 * 3 + 2 * (8 * 5 + 5 * 3)
    cost, small = Cost(model, both, "macs"), cut_in_half(model, both)
    assert count_macs(small, both) == 2 * (2 * 6 * 4) + 2 * 4 * 3 + 2 * (4 * 3 + 3 * 3)
    assert float(cost(cost.decision())) == count_macs(small, both)
    for task in "ab":
        torch.testing.assert_close(small(x, task), model(x, task))


def test_several_examples_serve_a_plan() -> None:
    x = torch.randn(16, 6)
    both = dampr.Several(x, (x, "b"))
    plan = dampr.Plan(Tasks(), both, macs=0.6, steps=40)
    optimizer = torch.optim.SGD(plan.model.parameters(), 0.1)
    for step in range(40):
        loss = plan.model(x, "ab"[step % 2]).square().mean() + plan.penalty()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        plan.step(optimizer)
    small = plan.finish()
    assert count_macs(small, both) <= 0.6 * count_macs(Tasks(), both)
    assert [small(x, task).shape for task in "ab"] == [(16, 3), (16, 3)]


@pytest.mark.parametrize("examples", [(), (torch.ones(2), "text")])
def test_several_examples_without_tensors_are_refused(examples: tuple[object, ...]) -> None:
    with pytest.raises(TypeError, match="expected"):
        dampr.Several(*examples)


def test_a_token_that_nothing_reads_keeps_no_width_within_a_block() -> None:
    class Block(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.up, self.down = nn.Linear(16, 16), nn.Linear(16, 16)

        def forward(self, x: Tensor) -> Tensor:
            y: Tensor = x + self.down(F.relu(self.up(x)))
            return y

    class Masked(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.enter, self.token = nn.Linear(8, 16), nn.Parameter(torch.randn(16))
            self.blocks, self.leave = nn.Sequential(Block(), Block()), nn.Linear(16, 3)

        def forward(self, x: Tensor, mask: Tensor | None = None) -> Tensor:
            h = self.enter(x)
            h = h if mask is None else torch.where(mask, self.token, h)
            y: Tensor = self.leave(self.blocks(h))
            return y

    model = dampr.convert(Masked(), example_inputs=torch.randn(5, 8))
    assert [gate.num_gates for gate in distinct_gates(model).values()] == [16, 16]
    small, mask = cut_in_half(model, torch.randn(5, 8)), torch.rand(5, 1) < 0.5
    x = torch.randn(5, 8)
    torch.testing.assert_close(small(x, mask), model.eval()(x, mask))
