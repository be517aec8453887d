"""Whose matrix products a linear layer takes on the CPU, and that they are right,
oneDNN's on any processor that has it.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import pytest
import torch

import dampr
from dampr import functional
from dampr.nn import GatedLinear
from dampr.testing import verify

pytest.importorskip("dampr._C", reason="dampr was built without its C++ extension", exc_type=ImportError)

from dampr.ops.backend_cpp import products

pytestmark = pytest.mark.skipif(not hasattr(torch.ops.mkldnn, "_linear_pointwise"), reason="this torch has no oneDNN")

M, K, N = 96, 320, 576  # more than 2^24 multiply-adds, and rows enough


@pytest.fixture
def calls(monkeypatch: pytest.MonkeyPatch) -> list[tuple[int, ...]]:
    """oneDNN is the faster one here; what it was asked to multiply from the left."""
    shapes: list[tuple[int, ...]] = []
    inner = products._onednn

    def noting(x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None) -> torch.Tensor:
        shapes.append(tuple(x.shape))
        return inner(x, weight, bias)

    monkeypatch.setattr(products, "FASTER", True)
    monkeypatch.setattr(products, "_onednn", noting)
    return shapes


@contextmanager
def without_onednn() -> Iterator[None]:
    torch._C._set_mkldnn_enabled(False)
    try:
        yield
    finally:
        torch._C._set_mkldnn_enabled(True)


def step(layer: GatedLinear, x: torch.Tensor) -> list[torch.Tensor]:
    torch.manual_seed(3)
    x = x.detach().requires_grad_()
    y = layer(x)
    return [y.detach(), *torch.autograd.grad(y.square().sum(), [x, *layer.parameters()])]


@pytest.mark.parametrize("op", ["gated_linear", "weight_gated_linear"])
def test_every_product_by_onednn_passes_verification(
    monkeypatch: pytest.MonkeyPatch, calls: list[tuple[int, ...]], op: str
) -> None:
    monkeypatch.setattr(products, "WORK", 1)
    monkeypatch.setattr(products, "ROWS", 1)
    rows = [row for row in verify.run(op) if (row.backend, row.dtype) == ("cpp", "float32")]
    assert rows
    assert all(row.ok for row in rows), rows
    assert len(calls) > 100


@pytest.mark.parametrize(
    "how",
    [{}, {"granularity": "input"}, {"granularity": (4, 4)}, {"granularity": "weight"}, {"per_sample": True}],
    ids=str,
)
def test_a_layer_in_training_takes_all_three_products_from_there(
    calls: list[tuple[int, ...]], how: dict[str, object]
) -> None:
    layer, x = GatedLinear(K, N, **how), torch.randn(M, K)  # type: ignore[arg-type]
    found = step(layer, x)
    assert sorted(calls) == [(M, K), (M, N), (N, M)]
    with without_onednn():
        expected = step(layer, x)
    assert len(calls) == 3
    for a, b in zip(found, expected, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-4 * float(b.abs().max()))


@pytest.mark.parametrize("granularity", ["output", "input", "weight", (4, 4)])
def test_evaluation_equals_the_dense_layer_to_the_bit(
    calls: list[tuple[int, ...]], granularity: str | tuple[int, int]
) -> None:
    dense, x = torch.nn.Linear(K, N), torch.randn(M, K)
    layer = GatedLinear.from_dense(dense, granularity=granularity).eval()
    assert torch.equal(layer(x), dense(x))
    assert not calls


@pytest.mark.parametrize("bias", ["a step", "one for all"])
@pytest.mark.parametrize("how", [{"input_gate": K}, {"output_gate": N}, {"weight_gate": N * K}], ids=str)
def test_a_bias_of_any_layout(calls: list[tuple[int, ...]], how: dict[str, Any], bias: str) -> None:
    b = torch.randn(2 * N)[::2] if bias == "a step" else torch.randn(1).expand(N)
    gates = {name: torch.randn(size) for name, size in how.items()}
    x, weight = torch.randn(M, K), torch.randn(N, K)
    y = functional.gated_linear(x, weight, b, **gates, seed=1)
    assert calls
    with without_onednn():
        torch.testing.assert_close(y, functional.gated_linear(x, weight, b, **gates, seed=1), rtol=1e-4, atol=1e-3)


def test_small_and_narrow_problems_other_dtypes_and_absence_stay_with_torch(
    monkeypatch: pytest.MonkeyPatch, calls: list[tuple[int, ...]]
) -> None:
    assert products.by_onednn(M, N, K, torch.float32)
    assert not products.by_onednn(M, N, 8, torch.float32)
    assert not products.by_onednn(8, 4096, 4096, torch.float32)
    assert not any(products.by_onednn(M, N, K, dtype) for dtype in (torch.float64, torch.bfloat16, torch.float16))
    with without_onednn():
        assert not products.by_onednn(M, N, K, torch.float32)
    monkeypatch.setattr(products, "FASTER", False)
    assert not products.by_onednn(M, N, K, torch.float32)
    step(GatedLinear(K, N), torch.randn(M, K))
    assert not calls


def test_explain_says_whose_products_they_are(monkeypatch: pytest.MonkeyPatch, calls: list[tuple[int, ...]]) -> None:
    layer, x = GatedLinear(K, N), torch.randn(M, K)
    assert "oneDNN's products" in dampr.explain(layer, x).route_reason
    assert "torch's product, oneDNN's in the backward" in dampr.explain(layer.eval(), x).route_reason
    monkeypatch.setattr(products, "FASTER", False)
    assert "torch's products" in dampr.explain(layer, x).route_reason
