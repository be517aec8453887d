"""Cases of `dampr verify` that only compiled kernels failed, with its draws."""

from __future__ import annotations

import contextlib
from typing import Any

import pytest
import torch

pytest.importorskip("triton")

import dampr
from dampr import names
from dampr.testing import verify, verify_norm
from tests.emulator import driver


def verified(wanted: str, capability: int, approximate: int | None) -> verify.Row:
    """The cases whose names hold ``wanted``, with the draws that they have in the list of all."""
    row, generator = verify.Row("norm_gate", "triton", "cpu", "float32"), torch.Generator().manual_seed(3)
    with driver.emulated(capability, approximate=approximate) as emulation:
        for case in verify_norm.norm_cases():
            given = verify_norm.norm_data(case, torch.float32, generator)
            if wanted in str(case):
                verify_norm.verify_case(row, case, torch.float32, given)
    assert not emulation.log.faults
    return row


@pytest.mark.parametrize("seed", [1, 3])
def test_statistics_of_a_large_mean_divide_with_rounding(seed: int) -> None:
    """Every approximate instruction errs by up to what is documented.

    With the approximate division y was up to 5.9 times its bound.
    """
    row = verified("mean 100.0", 90, seed)
    assert row.cases == 14
    assert row.failures == []


@pytest.mark.parametrize("capability", [80, 90, 100, 120])
def test_a_gradient_of_one_open_gate_that_cancels_is_within_its_bound(capability: int) -> None:
    row = verified("(1, 3, 33, 29), evaluation, per batch, ReLU, channels_last", capability, None)
    assert row.cases
    assert row.failures == []


def test_a_single_element_is_within_its_bound() -> None:
    row = verified("(5, 1), training", 80, 3)
    assert row.cases
    assert row.failures == []


@pytest.mark.parametrize("channels_last", [False, True])
@pytest.mark.parametrize("per_sample", [False, True])
def test_running_statistics_are_moved_by_the_kernel_that_joins_the_new_ones(
    channels_last: bool, per_sample: bool
) -> None:
    def trained(backend: names.Backend) -> tuple[list[Any], dict[str, int]]:
        torch.manual_seed(0)
        layer: Any = dampr.nn.GatedBatchNorm2d(20, per_sample=per_sample)
        layer.activation = "relu"
        layer.gate.log_alpha.data.uniform_(-3, 3)
        x = torch.randn(4, 20, 7, 5) + 3
        x = (x.contiguous(memory_format=torch.channels_last) if channels_last else x).requires_grad_()
        with (
            driver.emulated(90) if backend == "triton" else contextlib.nullcontext() as emulation,
            dampr.backend(backend),
        ):
            for _ in range(2):
                layer(x).square().sum().backward()
        found = [x.grad, *(p.grad for p in layer.parameters()), layer.running_mean, layer.running_var]
        assert layer.num_batches_tracked == 2
        return found, {} if emulation is None else dict(emulation.log.launches)

    (found, launches), (expected, _) = trained("triton"), trained("reference")
    for a, b in zip(found, expected, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-4)
    assert launches.get("norm_stats_join_kernel", 0) == 2 * per_sample  # one draw for all is folded into gain and bias
