"""The passes of a gated batch norm cut into many pieces, in half precision, and with nothing to do;
test_ops.py has the verification.
"""

from __future__ import annotations

import itertools

import pytest
import torch

import dampr
from dampr import functional, testing
from dampr.kernels import configs
from dampr.testing import verify, verify_norm
from dampr.testing.verify_norm import NormCase
from tests.long import long_if

CASES = [
    NormCase((3, 20, 5, 7), training, per_sample, layout=layout)
    for training, per_sample, layout in itertools.product((False, True), (False, True), ("contiguous", "channels_last"))
]


def _failures(cases: list[NormCase], dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch) -> list[str]:
    monkeypatch.setattr(verify_norm, "norm_cases", lambda: cases)
    row = verify_norm.verify(verify.Row("norm_gate", "triton", "cpu", str(dtype)), dtype)
    assert row.cases >= 7 * len(cases)
    return row.failures


def test_half_precision(monkeypatch: pytest.MonkeyPatch) -> None:
    assert _failures(CASES, torch.float16, monkeypatch) == []


@pytest.mark.parametrize("most", [long_if(most, 1, 100) for most in (1, 3, 100)])
def test_any_number_of_pieces_gives_the_same_sums(most: int, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("NORM_MAX_SPLITS", "NORM_MAX_PARTS"):
        monkeypatch.setattr(configs, name, most)
    monkeypatch.setattr(configs, "COLUMN_SUM_TILE", (4, 16))
    monkeypatch.setattr(configs, "PLANE_TILE", (2, 16))
    monkeypatch.setattr(configs, "NORM_FINISH_TILE", (2, 16))
    monkeypatch.setattr(configs, "NORM_JOIN_TILE", (4, 16))
    assert (
        _failures([*CASES, NormCase((33, 20)), NormCase((33, 20), per_sample=False)], torch.float32, monkeypatch) == []
    )


@pytest.mark.parametrize("shape", [(0, 3), (0, 3, 2, 2), (2, 3, 0), (2, 0, 3)])
@pytest.mark.parametrize("per_sample", [False, True])
@pytest.mark.parametrize("training", [False, True])
def test_nothing_to_normalise(shape: tuple[int, ...], per_sample: bool, training: bool) -> None:
    n = shape[1]
    x, gate, weight, bias = (torch.randn(s).requires_grad_() for s in (shape, n, n, n))
    running = torch.randn(n), torch.rand(n)
    before = [t.clone() for t in running]
    with dampr.backend("triton"), testing.poisoned_empty():
        y = functional.gated_batch_norm(
            x, gate, weight, bias, *running, training=training, seed=1, per_sample=per_sample
        )
        y.sum().backward()
    assert y.shape == shape
    for t in (x, gate, weight, bias):
        assert t.grad is not None
        assert t.grad.eq(0).all()
    assert all(torch.equal(a, b) for a, b in zip(running, before, strict=True))


@pytest.mark.parametrize("layout", ["contiguous", "channels_last"])
def test_no_element_is_left_unwritten(layout: str) -> None:
    x = torch.randn(2, 5, 3, 7)
    x = (x if layout == "contiguous" else x.contiguous(memory_format=torch.channels_last)).requires_grad_()
    gate, weight, bias = (torch.randn(5).requires_grad_() for _ in range(3))
    with dampr.backend("triton"), testing.poisoned_empty():
        y = functional.gated_batch_norm(
            x, gate, weight, bias, training=True, seed=1, per_sample=True, activation="relu"
        )
        y.sum().backward()
    for t in (y, x.grad, gate.grad, weight.grad, bias.grad):
        assert t is not None
        assert not t.isnan().any()


def test_a_large_mean_costs_few_digits_of_the_variance_and_not_a_number_stays_visible() -> None:
    for shape in ((600, 2), (4, 2, 150)):
        x = torch.randn(shape) + 1e4
        mean, var = torch.zeros(2), torch.zeros(2)
        with dampr.backend("triton"):
            functional.gated_batch_norm(x, torch.zeros(2), None, None, mean, var, training=True, momentum=1.0, seed=1)
        true_var, true_mean = torch.var_mean(x.double(), [i for i in range(x.dim()) if i != 1])
        torch.testing.assert_close(mean.double(), true_mean, atol=0, rtol=1e-7)
        torch.testing.assert_close(var.double(), true_var, atol=0, rtol=1e-4)
        x.view(-1)[0] = float("nan")
        with dampr.backend("triton"):
            y = functional.gated_batch_norm(x, torch.full((2,), 9.0), training=True, seed=1, activation="relu")
        assert y.isnan().any()


def test_a_layer_agrees_with_the_reference() -> None:
    x, results = torch.randn(3, 6, 5, 5), []
    for name in ("reference", "triton"):
        layer = dampr.nn.GatedBatchNorm2d(6, per_sample=True, activation="relu")
        torch.manual_seed(3)
        leaf = x.clone().requires_grad_()
        with dampr.backend(name):
            y = layer(leaf)
            y.square().sum().backward()
        results.append(
            [
                y.detach(),
                leaf.grad,
                *(p.grad.clone() for p in layer.parameters()),
                layer.running_mean,
                layer.running_var,
            ]
        )
    for expected, out in zip(*results, strict=True):
        torch.testing.assert_close(out, expected, atol=1e-5, rtol=1e-4)
