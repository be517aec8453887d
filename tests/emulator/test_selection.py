"""A selection of what ``make emulate`` runs: each kernel that multiplies matrices, on each architecture,
in a dtype it is made for.
"""

from __future__ import annotations

from unittest import mock

import pytest
import torch

pytest.importorskip("triton")

from dampr.testing import verify, verify_conv, verify_linear
from tests.emulator import cases, driver

LINEAR = verify_linear.LinearCase
# Route -> op, case, dtype, architectures: sm_120 multiplies as sm_80 does.
SELECTED = {
    "one_pass": ("gated_linear", LINEAR((70, 80, 112), "both", True), "bfloat16", (80, 90, 100)),
    "one_pass, edges, sliced": (
        "gated_linear",
        LINEAR((37, 24, 20), "both", True, layout="sliced", expanded_dy=True),
        verify.TF32,
        (90,),
    ),
    "live": ("gated_linear", LINEAR((70, 80, 112), "both"), "float16", cases.ARCHITECTURES),
    "small_m": ("weight_gated_linear", LINEAR((33, 48, 32), "weight"), "bfloat16", cases.ARCHITECTURES),
}


@pytest.mark.parametrize(
    ("name", "capability"), [(name, arch) for name, selected in SELECTED.items() for arch in selected[3]]
)
def test_a_gated_product_is_right_when_it_is_compiled(name: str, capability: int) -> None:
    (op, case, dtype, _), route = SELECTED[name], name.partition(",")[0]
    given = torch.float32 if dtype == verify.TF32 else getattr(torch, dtype)
    with (
        mock.patch.object(verify_linear, "linear_cases", return_value=[case]),
        mock.patch.object(verify_linear, "_routes", return_value=(route,)),
        driver.emulated(capability) as emulation,
    ):
        row = verify.verify_op(op, "triton", "cpu", given, dtype == verify.TF32)
    assert row.failures == []
    assert emulation.log.faults == []
    assert emulation.log.launches


@pytest.mark.parametrize("capability", cases.ARCHITECTURES)
@pytest.mark.parametrize("dtype", [verify.TF32, "bfloat16"])
def test_a_gated_convolution_is_right_when_it_is_compiled(dtype: str, capability: int) -> None:
    case = verify_conv.ConvCase((2, 64, 6, 5, 48, 3), "both", False, True, {"padding": 1}, "live")
    given = torch.float32 if dtype == verify.TF32 else torch.bfloat16
    with mock.patch.object(verify_conv, "cases", return_value=[case]), driver.emulated(capability) as emulation:
        row = verify.verify_op("gated_conv2d", "triton", "cpu", given, dtype == verify.TF32)
    assert row.failures == []
    assert emulation.log.faults == []
    assert emulation.log.launches["gated_conv2d_fwd_kernel"] == 1


@pytest.mark.parametrize("op", ["noise", "dependency_generator"])
def test_what_multiplies_nothing_is_right_when_it_is_compiled(op: str) -> None:
    with driver.emulated(90) as emulation:
        row = verify.verify_op(op, "triton", "cpu", torch.float32)
    assert row.failures == []
    assert emulation.log.faults == []
