"""Host and device together: models train on compiled kernels as they do on the reference, and end as small ones."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import nn
from torch._inductor import config as inductor

pytest.importorskip("triton")

import dampr
from dampr import names
from tests.emulator import driver

STEPS = 3
Made = tuple[nn.Module, torch.Tensor]


def mlp() -> Made:
    return nn.Sequential(nn.Linear(20, 33), nn.ReLU(), nn.Linear(33, 16), nn.ReLU(), nn.Linear(16, 5)), torch.randn(
        12, 20
    )


def cnn() -> Made:
    layers = (
        nn.Conv2d(3, 12, 3, bias=False),
        nn.BatchNorm2d(12),
        nn.ReLU(),
        nn.Conv2d(12, 8, 1),
        nn.BatchNorm2d(8),
        nn.ReLU(),
    )
    return nn.Sequential(*layers, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(8, 5)), torch.randn(6, 3, 8, 8)


def transformer() -> Made:
    layer = nn.TransformerEncoderLayer(16, 2, 24, dropout=0.0, batch_first=True)
    return nn.Sequential(
        nn.Linear(7, 16), nn.TransformerEncoder(layer, 2, enable_nested_tensor=False), nn.Linear(16, 5)
    ), torch.randn(4, 6, 7)


def train(
    backend: names.Backend, make: Callable[[], Made], compiled: bool = False, **how: Any
) -> tuple[nn.Module, torch.Tensor, list[torch.Tensor]]:
    """A converted model after a few steps on a backend, its input, and what every step lost and moved."""
    torch.manual_seed(0)
    net, x = make()
    with dampr.backend("reference"):  # convert proves that nothing changed, which is not what is tested here
        model = dampr.convert(net, example_inputs=x, **how).train()
    optimizer, kept = torch.optim.SGD(model.parameters(), lr=0.1), []
    call = torch.compile(model, fullgraph=True) if compiled else model
    with dampr.backend(backend):
        for _ in range(STEPS):
            y = call(x)
            loss = y.square().mean() + 1e-2 * dampr.penalty(model)
            optimizer.zero_grad()
            loss.backward()
            kept += [loss.detach(), *(p.grad.clone() for p in model.parameters() if p.grad is not None)]
            optimizer.step()
    return model, x, kept


def alike(one: list[torch.Tensor], other: list[torch.Tensor], rtol: float = 2e-4) -> None:
    """Equal within the rounding of a few steps."""
    assert len(one) == len(other)
    for a, b in zip(one, other, strict=True):
        torch.testing.assert_close(a, b, rtol=rtol, atol=rtol * max(1e-3, float(b.abs().max())))


@pytest.mark.parametrize("family", ["hard_concrete", "dep_l0", "dam", "diffprune", "diffmask"])
def test_an_mlp_of_each_family_trains_as_on_the_reference(family: str) -> None:
    with driver.emulated(90) as emulation:
        _, _, on_triton = train("triton", mlp, gate=family)
    _, _, on_reference = train("reference", mlp, gate=family)
    alike(on_triton, on_reference)
    assert emulation.log.launches
    assert emulation.log.faults == []


@pytest.mark.parametrize(("make", "per_sample"), [(cnn, False), (cnn, True), (transformer, False)])
def test_a_network_trains_as_on_the_reference_and_compacts(make: Any, per_sample: bool) -> None:
    with driver.emulated(100) as emulation:
        model, x, on_triton = train("triton", make, per_sample=per_sample)
        _, _, on_reference = train("reference", make, per_sample=per_sample)
        alike(on_triton, on_reference)
        with dampr.backend("triton"):
            masked = model.eval()(x)
            small = dampr.compact(model, example_inputs=x)
    assert emulation.log.launches
    assert emulation.log.faults == []
    torch.testing.assert_close(small(x), masked, rtol=1e-4, atol=1e-5)


@pytest.mark.filterwarnings("ignore:.*should not be instantiated:DeprecationWarning")
@pytest.mark.parametrize(
    ("make", "how"),
    [
        (mlp, {}),
        (mlp, {"per_sample": True}),
        pytest.param(cnn, {"per_sample": True}, marks=pytest.mark.long),
        pytest.param(mlp, {"gate": "dep_l0"}, marks=pytest.mark.long),
    ],
)
def test_a_compiled_model_launches_the_kernels_and_trains_as_on_the_reference(make: Any, how: dict[str, Any]) -> None:
    # inductor's own generator would give other seeds
    with driver.emulated(90) as emulation, inductor.patch(fallback_random=True):
        _, _, on_triton = train("triton", make, compiled=True, **how)
    _, _, on_reference = train("reference", make, **how)
    alike(on_triton, on_reference)
    assert emulation.log.launches
    assert emulation.log.faults == []


def test_a_bank_draws_all_gates_in_one_launch_each_way() -> None:
    def step(backend: names.Backend) -> list[torch.Tensor]:
        torch.manual_seed(0)
        net, x = cnn()
        with dampr.backend("reference"):
            model = dampr.convert(net, example_inputs=x).train()
        bank = dampr.GateBank(model)
        with dampr.backend(backend), bank.draw():
            (model(x).square().mean() + 1e-3 * bank.penalty()).backward()
        return [p.grad for p in model.parameters() if p.grad is not None]

    with driver.emulated(90) as emulation:
        on_triton = step("triton")
    assert emulation.log.faults == []
    assert {name: n for name, n in emulation.log.launches.items() if "sample" in name} == {
        "sample_gates_fwd_kernel": 1,
        "sample_gates_bwd_kernel": 1,
    }
    alike(on_triton, step("reference"))


def test_a_budget_ends_where_it_should() -> None:
    torch.manual_seed(0)
    net, x = mlp()
    with driver.emulated(80) as emulation, dampr.backend("triton"):
        model = dampr.convert(net, example_inputs=x).train()
        budget = dampr.Budget(model, example_inputs=x, macs=0.5)
        optimizer = torch.optim.Adam(model.parameters(), lr=0.01)
        for _ in range(STEPS):
            (model(x).square().mean() + budget.penalty()).backward()
            optimizer.step()
            optimizer.zero_grad()
            budget.step()
        report = budget.finalize()
        small = dampr.compact(model, example_inputs=x)
    assert emulation.log.faults == []
    assert report.reached <= 0.5 * report.total
    assert sum(p.numel() for p in small.parameters()) < sum(p.numel() for p in mlp()[0].parameters())


def test_activation_checkpointing_draws_the_same_gates_again() -> None:
    from torch.utils.checkpoint import checkpoint

    torch.manual_seed(0)
    layer, x = dampr.nn.GatedLinear(20, 24, per_sample=True), torch.randn(7, 20)
    found = []
    with driver.emulated(90), dampr.backend("triton"):
        for again in (False, True):
            torch.manual_seed(1)
            layer.zero_grad()
            y = checkpoint(layer, x, use_reentrant=False) if again else layer(x)
            y.square().sum().backward()
            found.append([y.detach(), *(p.grad.clone() for p in layer.parameters() if p.grad is not None)])
    for a, b in zip(*found, strict=True):
        assert torch.equal(a, b)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_autocast_trains_in_half_precision(dtype: torch.dtype) -> None:
    def losses(backend: names.Backend) -> list[torch.Tensor]:
        torch.manual_seed(0)
        net, x = mlp()
        with dampr.backend("reference"):
            model = dampr.convert(net, example_inputs=x).train()
        with dampr.backend(backend), torch.autocast("cpu", dtype):
            y = model(x)
            y.float().square().mean().backward()
        assert y.dtype == dtype
        return [y.detach().float(), *(p.grad for p in model.parameters() if p.grad is not None)]

    with driver.emulated(120) as emulation:
        on_triton = losses("triton")
    assert emulation.log.faults == []
    alike(on_triton, losses("reference"), 3e-2)


@pytest.mark.parametrize("layers", [2, 6])
def test_launches_of_gates_do_not_grow_with_the_number_of_layers(layers: int) -> None:
    model = nn.Sequential(*[dampr.nn.GatedLinear(16, 16) for _ in range(layers)])
    bank, x = dampr.GateBank(model), torch.randn(4, 16)
    with driver.emulated(90, recording=True) as emulation, dampr.backend("triton"):
        for _ in range(2):
            emulation.take_log()
            with bank.draw():
                loss = model(x).square().mean() + bank.penalty(1e-3)
            loss.backward()
    launches = emulation.log.launches
    assert launches["sample_gates_fwd_kernel"] == launches["sample_gates_bwd_kernel"] == 1
