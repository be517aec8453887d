"""Tiny layers, one call of the extension each way: odd sizes, every subset of gradients,
and nothing kept that need not be.
"""

from __future__ import annotations

import itertools

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

import dampr
from dampr import functional
from dampr.nn import GatedLinear
from dampr.ops import forced_route, routes
from dampr.testing import assert_close, poisoned_empty

pytestmark = pytest.mark.skipif(dampr.backend_info()["cpp"].startswith("missing"), reason="no extension")

NAMES = ("x", "weight", "bias", "input_gate", "output_gate")
PLACES = {"input": NAMES[:4], "output": (*NAMES[:3], "output_gate"), "both": NAMES}


def data_of(m: int, n: int, k: int, place: str, dtype: torch.dtype = torch.float32) -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(m + 100 * n + 10_000 * k)
    shapes = {"x": (m, k), "weight": (n, k), "bias": (n,), "input_gate": (k,), "output_gate": (n,)}
    values = {name: torch.randn(shapes[name], generator=generator) for name in PLACES[place]}
    return {name: t.to(dtype).requires_grad_() for name, t in values.items()}


def gradients(
    data: dict[str, torch.Tensor], per_sample: bool, wanted: tuple[str, ...] | None = None
) -> list[torch.Tensor]:
    y = functional.gated_linear(**data, seed=7, per_sample=per_sample)
    dy = torch.linspace(-1, 2, y.numel()).view(y.shape).to(y.dtype)
    return [y, *torch.autograd.grad(y, [t for name, t in data.items() if wanted is None or name in wanted], dy)]


@pytest.mark.parametrize("per_sample", [False, True])
@pytest.mark.parametrize("place", PLACES)
@pytest.mark.parametrize("m", [0, 1, 2, 3, 4, 7, 16])
@pytest.mark.parametrize(("n", "k"), [(1, 1), (5, 3), (31, 17), (32, 16), (64, 128), (100, 33), (0, 4), (4, 0)])
def test_values_and_gradients_of_every_size(m: int, n: int, k: int, place: str, per_sample: bool) -> None:
    data, wide = data_of(m, n, k, place), data_of(m, n, k, place, torch.float64)
    with forced_route("small"), poisoned_empty():
        found = gradients(data, per_sample)
    with dampr.backend("reference"):
        truth = gradients(wide, per_sample)
    for name, a, b in zip(("y", *data), found, truth, strict=True):
        scale = float(b.detach().abs().max()) if b.numel() else 0.0
        torch.testing.assert_close(a.double(), b, rtol=1e-5, atol=1e-5 * scale, msg=lambda m, n=name: f"{n}: {m}")


@pytest.mark.parametrize("per_sample", [False, True])
@pytest.mark.parametrize("count", range(1, 5))
def test_each_gradient_is_the_same_whichever_others_are_asked_for(per_sample: bool, count: int) -> None:
    data = data_of(6, 20, 9, "both")
    with forced_route("small"):
        everything = dict(zip(data, gradients(data, per_sample)[1:], strict=True))
        for wanted in itertools.combinations(NAMES, count):
            some = {name: t.detach().requires_grad_(name in wanted) for name, t in data.items()}
            for name, grad in zip(
                [name for name in data if name in wanted], gradients(some, per_sample, wanted)[1:], strict=True
            ):
                torch.testing.assert_close(grad, everything[name], msg=lambda m, n=name, w=wanted: f"{n} of {w}: {m}")


def test_gates_that_all_rows_share_keep_no_activation() -> None:
    layer, kept = GatedLinear(64, 64), []
    x = torch.randn(16, 64)
    with torch.autograd.graph.saved_tensors_hooks(lambda t: (kept.append(t), t)[1], lambda t: t):
        layer(x).sum().backward()
    own = {t.data_ptr() for t in (x, *layer.parameters())}
    assert [t.dtype for t in kept if t.data_ptr() not in own] == [torch.int64]
    assert dampr.explain(layer, x).route == "small"


@pytest.mark.parametrize("granularity", ["output", "input"])
def test_a_layer_is_small_or_not_as_the_route_says(granularity: str) -> None:
    for size in (64, 128, 256, 512):
        layer, x = GatedLinear(size, size, granularity=granularity), torch.randn(16, size)
        y = layer(x)
        name = type(y.grad_fn).__name__
        assert (name == "_SmallLinearBackward") == (dampr.explain(layer, x).route == "small"), size
    assert name != "_SmallLinearBackward"
    assert routes.forced_name() is None


def test_what_saved_tensors_come_back_as_does_not_matter() -> None:
    def strided(t: torch.Tensor) -> torch.Tensor:
        return torch.stack((t, t), -1)[..., 0]

    data = data_of(5, 8, 6, "both")
    expected = gradients(data, False)
    with torch.autograd.graph.saved_tensors_hooks(lambda t: t, strided):
        found = gradients(data, False)
    for a, b in zip(found, expected, strict=True):
        assert torch.equal(a, b)


@pytest.mark.parametrize("per_sample", [False, True])
def test_who_counts_only_the_backward_sees_its_operator(per_sample: bool) -> None:
    data = data_of(5, 8, 6, "both")
    y = functional.gated_linear(**data, seed=7, per_sample=per_sample)
    assert type(y.grad_fn).__name__ == "_SmallLinearBackward"
    plain = torch.autograd.grad(y, list(data.values()), torch.ones_like(y), retain_graph=True)
    with FlopCounterMode(display=False) as counter:
        seen = torch.autograd.grad(y, list(data.values()), torch.ones_like(y))
    assert counter.get_total_flops() == 2 * 2 * 5 * 8 * 6
    assert all(torch.equal(a, b) for a, b in zip(plain, seen, strict=True))


@pytest.mark.parametrize("per_sample", [False, True])
@pytest.mark.parametrize(("m", "k", "n"), [(8192, 16, 16), (16, 8192, 16), (16, 16, 8192), (8192, 1, 3), (2, 8192, 1)])
def test_long_sums_are_as_exact_as_torchs(m: int, k: int, n: int, per_sample: bool) -> None:
    data = data_of(m, n, k, "both")
    data["weight"].data /= k**0.5
    assert (
        dampr.ops.select(data["x"].device, torch.float32).route(m, n, k, torch.float32, "output", per_sample)[0]
        == "small"
    )
    found = gradients(data, per_sample)
    with dampr.backend("reference"):
        plain = gradients(data, per_sample)
        truth = gradients({name: t.detach().double().requires_grad_() for name, t in data.items()}, per_sample)
    for name, *three in zip(("y", *data), found, truth, plain, strict=True):
        assert_close(name, *three)
