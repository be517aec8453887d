"""Cases of `dampr verify` that only compiled kernels failed, with its draws."""

from __future__ import annotations

import pytest
import torch

pytest.importorskip("triton")

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
    """Every approximate instruction errs by up to what is documented. With the approximate division y was up to 5.9 times its bound."""
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
