"""The rules of `dampr verify` itself: what is held to which bound, and in which arithmetic."""

from __future__ import annotations

import pytest
import torch

from dampr.testing import as_tf32, compare, rows, verify

SWITCHES = (torch.backends.cuda.matmul, torch.backends.cudnn.conv, torch.backends.cudnn.rnn)


def precisions():
    return [switch.fp32_precision for switch in SWITCHES]


@pytest.mark.parametrize("tf32", [False, True])
def test_products_are_ieee_unless_a_row_is_for_tf32_whatever_the_switches_say(tf32, monkeypatch):
    """torch's default is TF32 for convolutions and IEEE for matrices."""
    seen, before = [], precisions()

    def look(row, dtype):
        seen.append((row.dtype, precisions()))
        return row

    monkeypatch.setitem(verify._OPS, "noise", look)
    assert verify.verify_op("noise", "cpp", "cpu", torch.float32, tf32).tf32 == tf32
    assert seen == [("tf32", ["tf32"] * 3) if tf32 else ("float32", ["ieee"] * 3)]
    assert precisions() == before


def test_the_switches_are_put_back_after_a_failure():
    before = precisions()
    with pytest.raises(ValueError, match="on purpose"), verify.float32_products("tf32"):
        raise ValueError("on purpose")
    assert precisions() == before


def product(how):
    """(out, truth, baseline) of a matrix product whose factors ``how`` has rounded."""
    a, b = torch.randn(64, 256), torch.randn(256, 32)
    return how(a).double() @ how(b).double(), a.double() @ b.double(), as_tf32(a) @ as_tf32(b)


def test_tf32_has_bounds_of_its_own():
    out, truth, baseline = product(as_tf32)
    assert compare("y", out, truth, baseline, torch.float32, tf32=True).ok
    assert not compare("y", out, truth, truth.float(), torch.float32).ok


def test_tf32_is_not_held_to_half_precision():
    out, truth, baseline = product(lambda t: t.bfloat16())
    assert not compare("y", out, truth, baseline, torch.float32, tf32=True).ok


def test_tf32_is_a_rule_for_float32():
    with pytest.raises(ValueError, match=r"tf32=True with dtype=torch\.float16: expected float32"):
        compare("y", *[torch.ones(1)] * 3, torch.float16, tf32=True)


def test_tf32_keeps_ten_bits_of_the_mantissa():
    t = torch.tensor([1 + 2.0**-10, 1 + 2.0**-11, -3.0, 0.0, float("inf")])
    assert as_tf32(t).tolist() == [1 + 2.0**-10, 1.0, -3.0, 0.0, float("inf")]


def cancelling(error):
    """A sum of two numbers of size 1 that cancel, exact by luck in the baseline."""
    truth = torch.tensor([1e-9], dtype=torch.float64)
    return torch.tensor([1e-9 + error], dtype=torch.float64), truth, truth


def test_a_sum_that_cancels_is_held_to_the_size_of_what_was_added():
    alike = [torch.tensor([2.0], dtype=torch.float64)]
    assert not compare("y", *cancelling(1e-7), torch.float32).ok
    assert compare("y", *cancelling(1e-7), torch.float32, alike=alike).ok
    assert not compare("y", *cancelling(1e-5), torch.float32, alike=alike).ok


def test_other_signs_leave_gates_and_large_problems_alone():
    data = {"x": torch.ones(8, 8), "input_gate": torch.ones(8)}
    for signed, dy in rows.other_signs(data, torch.ones(8, 8)):
        assert torch.equal(signed["input_gate"], data["input_gate"])
        assert set(signed["x"].unique().tolist()) == set(dy.unique().tolist()) == {-1.0, 1.0}
    assert not list(rows.other_signs({"x": torch.ones(300, 300)}, torch.ones(300, 300)))


def test_a_bound_is_never_zero():
    """Of one element the bound is a share of it, and it may be 0; nothing below the smallest normal number counts."""
    zero = torch.zeros(1, dtype=torch.float64)
    assert compare("dx", zero + 1e-44, zero, zero, torch.float32).ok
    assert not compare("dx", zero + 1e-30, zero, zero, torch.float32).ok
