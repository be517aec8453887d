"""Does the emulator see what it is there to see?

Faults are put into compiled kernels of dampr; each has to be noticed.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator
from unittest import mock

import numpy as np
import pytest
import torch

triton = pytest.importorskip("triton")

import triton.language as tl  # noqa: E402

from dampr.kernels import gated_linear, gates  # noqa: E402
from dampr.ops.backend_triton import host  # noqa: E402
from dampr.spec import hard_concrete  # noqa: E402
from dampr.testing import verify, verify_linear  # noqa: E402
from tests.emulator import driver, memory  # noqa: E402

CASE = verify_linear.LinearCase((70, 80, 112), "both", True)
BARRIER = r"bar\.sync\s+0;"
Edit = Callable[[str], str]


@pytest.fixture
def fresh_kernel() -> Iterator[None]:
    """The compiled forms of the edited kernel are forgotten before and after."""
    caches = gated_linear.gated_linear_fwd_kernel.device_caches
    caches.clear()
    yield
    caches.clear()


def outcome(edit: Edit, capability: int) -> str:
    """Forward and backward of a GEMM with gates, the PTX of its forward edited: what was noticed."""

    def forward_only(text: str) -> str:
        return edit(text) if "gated_linear_fwd_kernel" in text else text

    row = verify.Row("gated_linear", "triton", "cpu", "bfloat16")
    with (
        mock.patch.object(verify_linear, "linear_cases", return_value=[CASE]),
        mock.patch.object(verify_linear, "_routes", return_value=("one_pass",)),
        driver.emulated(capability, edit=forward_only) as emulation,
    ):
        try:
            verify_linear.verify(row, torch.bfloat16)
        except memory.Trap as trap:
            return f"trap: {trap}"
    if emulation.log.faults:
        return f"race: {emulation.log.faults[0]}"
    return "wrong numbers" if row.failures else "nothing"


def without(pattern: str, which: int) -> Edit:
    """Leave out one of the places that match."""

    def edit(text: str) -> str:
        place = list(re.finditer(pattern, text))[which]
        return text[: place.start()] + text[place.end() :]

    return edit


def one_more_left_open(text: str) -> str:
    changed = re.sub(r"wait_group(\s+)3;", r"wait_group\g<1>5;", text)
    assert changed != text
    return changed


@pytest.mark.parametrize("capability", [80, 90])
def test_a_right_kernel_passes(capability: int, fresh_kernel: None) -> None:
    assert outcome(lambda text: text, capability) == "nothing"


@pytest.mark.parametrize(
    ("capability", "edit"),
    [
        pytest.param(80, without(BARRIER, 2), id="third barrier of sm_80"),  # the first one is redundant
        pytest.param(80, without(BARRIER, -2), id="last barrier but one of sm_80"),
        pytest.param(90, without(BARRIER, 1), id="second barrier of sm_90"),
        pytest.param(80, without(r"cp\.async\.wait_group\s+\d+;", 0), id="first wait for a copy"),
        pytest.param(80, one_more_left_open, id="one more copy left open"),
    ],
)
def test_what_is_missing_between_warps_is_a_race(capability: int, edit: Edit, fresh_kernel: None) -> None:
    assert outcome(edit, capability).startswith("race: gated_linear_fwd_kernel: RACE")


@triton.jit
def _copy_rows(x_ptr, y_ptr, n, WIDE: tl.constexpr, BLOCK: tl.constexpr):  # type: ignore[no-untyped-def]
    row = tl.program_id(0)
    if WIDE:
        row = row.to(tl.int64)
    cols = tl.arange(0, BLOCK)
    tl.store(y_ptr + row * BLOCK + cols, tl.load(x_ptr + row * n + cols, mask=cols < n))


@pytest.mark.parametrize("wide", [True, False])
def test_a_row_index_of_32_bits_is_too_short_beyond_two_to_the_thirty_first_elements(wide: bool) -> None:
    count, n = 2**21 + 3, 1025
    x, y = torch.empty(count, n, dtype=torch.bfloat16), torch.empty(count, 1024, dtype=torch.bfloat16)
    x[-1] = torch.randn(n)
    with driver.emulated(90, chosen=lambda name, grid: np.array([grid[0] - 1])):
        if wide:
            _copy_rows[(count,)](x, y, n, WIDE=wide, BLOCK=1024)
            assert torch.equal(y[-1], x[-1, :1024])
        else:
            with pytest.raises(memory.Trap, match="outside of every storage"):
                _copy_rows[(count,)](x, y, n, WIDE=wide, BLOCK=1024)


def test_a_row_too_many_is_a_store_outside_of_the_tensor() -> None:
    sizes = {"BLOCK_M": 16, "BLOCK_N": 128, "GROUPED": True, "GATE": hard_concrete()}
    args = torch.randn(64), torch.tensor([1]), torch.empty(3, 64), 4, 64
    with (
        driver.emulated(90),
        pytest.raises(memory.Trap, match="sample_gates_fwd_kernel: store of 16 bytes outside of every storage"),
    ):
        host.launch(gates.sample_gates_fwd_kernel, (1,), *args, **sizes)
