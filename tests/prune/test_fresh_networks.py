"""Networks are converted before training: fresh norms shift by 0 and fresh branches end in zeros,
and what they add later has to fit.
"""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

import dampr
from dampr.gates import Gate
from dampr.prune import inputs
from dampr.prune.cost import Cost
from dampr.prune.measure import count_macs


class NormAct(nn.BatchNorm2d):
    """As in timm: of a type of its own, so gates in front of it are in the convolution."""

    def forward(self, x: Tensor) -> Tensor:
        return F.relu(super().forward(x))


class Inverted(nn.Module):
    """As in MobileNet and EfficientNet: a depthwise convolution between two norms, and squeeze-and-excite,
    whose scale varies.
    """

    def __init__(self, excite: bool) -> None:
        super().__init__()
        self.stem, self.n0 = nn.Conv2d(3, 8, 3, padding=1), NormAct(8)
        self.expand, self.n1 = nn.Conv2d(8, 16, 1, bias=False), NormAct(16)
        self.depthwise, self.n2 = nn.Conv2d(16, 16, 3, padding=1, groups=16, bias=False), NormAct(16)
        self.down, self.up = nn.Conv2d(16, 4, 1), nn.Conv2d(4, 16, 1)
        self.project, self.n3 = nn.Conv2d(16, 8, 1, bias=False), NormAct(8)
        self.head, self.excite = nn.Linear(8, 3), excite

    def forward(self, x: Tensor) -> Tensor:
        x = F.silu(self.n0(self.stem(x)))
        y = F.silu(self.n2(self.depthwise(F.silu(self.n1(self.expand(x))))))
        if self.excite:
            y = y * self.up(self.down(y.mean((2, 3), keepdim=True)).relu()).sigmoid()
        return self.head((x + self.n3(self.project(y))).mean((2, 3)))


class Dense(nn.Module):
    """As in DenseNet: norms in front of padded convolutions, over what several layers have written."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Conv2d(3, 6, 3, padding=1)
        self.norms = nn.ModuleList(NormAct(6 + 4 * i) for i in range(3))
        self.grow = nn.ModuleList(nn.Conv2d(6 + 4 * i, 4, 3, padding=1) for i in range(3))
        self.head = nn.Linear(18, 3)

    def forward(self, x: Tensor) -> Tensor:
        x = self.stem(x)
        for norm, grow in zip(self.norms, self.grow, strict=True):
            x = torch.cat([x, grow(norm(x).relu())], 1)
        return self.head(x.mean((2, 3)))


class ResponseNorm(nn.Module):
    """As in ConvNeXt V2: it begins as nothing, and compares channels with their mean later."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.gain, self.shift = nn.Parameter(torch.zeros(1, width, 1, 1)), nn.Parameter(torch.zeros(1, width, 1, 1))

    def forward(self, x: Tensor) -> Tensor:
        size = x.square().sum((2, 3), keepdim=True).sqrt()
        return self.gain * (x * size / (size.mean(1, keepdim=True) + 1e-6)) + self.shift + x


class Responding(nn.Module):
    """Nothing else of it could be cut."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.response, self.head = nn.Conv2d(3, 12, 1), ResponseNorm(12), nn.Conv2d(12, 3, 1)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.response(self.first(x).relu()))


class Zero(nn.Module):
    """A branch whose last layer is 0, behind a number of the code that is no width of it."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b, self.c, self.head = nn.Linear(6, 8), nn.Linear(8, 8), nn.Linear(8, 8), nn.Linear(8, 3)
        self.size = 8
        nn.init.zeros_(self.c.weight)
        nn.init.zeros_(self.c.bias)

    def forward(self, x: Tensor) -> Tensor:
        x = x.mean((2, 3)).repeat(1, 2)
        y = self.a(x).relu()
        return self.head(x.repeat(1, 2)[:, :8] + self.c(self.b(y).relu() * y.sum(1, keepdim=True) / self.size))


NETWORKS: dict[str, Callable[[], nn.Module]] = {
    "inverted": lambda: Inverted(False),
    "inverted, excited": lambda: Inverted(True),
    "dense": Dense,
    "response norm": Responding,
    "zero branch": Zero,
}


def train(model: nn.Module) -> None:
    """Other values for everything that a fresh network has at 0 or 1; gates stay."""
    generator = torch.Generator().manual_seed(3)
    gates = {id(p) for module in model.modules() if isinstance(module, Gate) for p in module.parameters()}
    with torch.no_grad():
        for p in model.parameters():
            if id(p) not in gates:
                p.add_(0.2 * torch.randn(p.shape, generator=generator))
        for name, t in model.named_buffers():
            if name.endswith("running_mean"):
                t.add_(0.5 * torch.randn(t.shape, generator=generator))
            elif name.endswith("running_var"):
                t.add_(torch.rand(t.shape, generator=generator))


@pytest.mark.parametrize("network", NETWORKS)
def test_what_a_fresh_network_is_promised_holds_after_training(network: str) -> None:
    torch.manual_seed(0)
    model, x = NETWORKS[network]().eval(), torch.randn(3, 3, 7, 7)
    before = model(x)
    try:
        dampr.convert(model, example_inputs=x)
    except dampr.ConversionError:
        assert network == "response norm"  # what compares channels with their mean keeps them
        return
    assert torch.equal(model(x), before)
    train(model)
    cost = Cost(model, x, "macs")
    for gate in cost.structure.gates:
        gate.set_levels_(torch.where(torch.arange(gate.num_gates) % 2 == 1, -3.0, gate.levels()))
    small = dampr.compact(model.double(), example_inputs=x.double())
    assert count_macs(small, x.double()) == int(cost(cost.decision())) < cost.total
    a, b = inputs.evaluate(model, x.double()), inputs.evaluate(small, x.double())
    assert inputs.gap(a, b) < 1e-10 * inputs.size(a)


def test_the_copy_on_which_it_is_tried_shares_nothing_that_it_changes() -> None:
    torch.manual_seed(0)
    model, x = Inverted(True).eval(), torch.randn(3, 3, 7, 7)
    before = {name: t.clone() for name, t in model.state_dict().items()}
    other = inputs.as_trained(model, x)
    assert all(torch.equal(t, before[name]) for name, t in model.state_dict().items())
    assert other.get_parameter("expand.weight") is model.get_parameter("expand.weight")
    moved = {name for name, t in other.state_dict().items() if not torch.equal(t, before[name])}
    assert {"n1.bias", "n1.weight", "n1.running_mean", "n1.running_var", "up.bias"} <= moved
    assert "expand.weight" not in moved


def test_noise_that_makes_a_model_infinite_is_left_out() -> None:
    class Roots(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.layer, self.least = nn.Linear(6, 4), nn.Parameter(torch.zeros(4))

        def forward(self, x: Tensor) -> Tensor:
            return self.layer(x).relu().clamp(max=0) + self.least.sqrt()

    model, x = Roots(), torch.randn(2, 6)
    other = inputs.as_trained(model, x)
    assert all(torch.equal(a, b) for a, b in zip(model.parameters(), other.parameters(), strict=True))
