"""The first and the last programs of launches on tensors of more than 2^31 elements: an index of 32 bits would trap, or
give other values.

The tensors are ``torch.empty`` and zero where nobody wrote; what the chosen programs touch is paged in.
"""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np
import pytest
import torch
from torch import Tensor

pytest.importorskip("triton")

from dampr import philox, reference
from dampr.ops import backend_triton
from dampr.ops.backend_triton import gate_activations, gated_conv2d, gated_linear, host, norm_gate, weight_gated_linear
from dampr.ops.gate_args import GateArgs, GatePair
from dampr.ops.gated_conv import Window
from dampr.ops.norm_gate import Norm
from dampr.spec import hard_concrete
from tests.emulator import driver, execute

SPEC, SEED, HALF = hard_concrete(), torch.tensor([5]), torch.bfloat16
ROWS = 2**20 + 5


def first_and_last(name: str, grid: execute.Grid) -> np.ndarray:
    total = grid[0] * grid[1] * grid[2]
    return np.unique([0, max(0, total - 2), total - 1])


@pytest.fixture(autouse=True)
def _emulated() -> Iterator[None]:
    with driver.emulated(90, chosen=first_and_last) as emulation:
        yield
    assert emulation.log.faults == []


def z_of(log_alpha: Tensor, start: int, count: int, column: int = 0) -> Tensor:
    """Gates number start .. start + count - 1 of a draw, float64; their log-alphas begin at ``column``."""
    u = philox.uniform(SEED, count, start)
    return reference.gate(log_alpha[column : column + count].double(), SPEC, u.double())


def assert_near(out: Tensor, truth: Tensor, tolerance: float) -> None:
    error = (out.double() - truth.double()).abs().max() / truth.double().abs().max().clamp(min=1e-30)
    assert error <= tolerance


def test_gates_of_rows() -> None:
    rows, n = 2**21 + 3, 1025
    log_alpha = torch.randn(n)
    z = backend_triton.sample_gates_fwd(GateArgs(log_alpha, SEED, SPEC, True), rows)
    assert_near(z[-1, -64:], z_of(log_alpha, (rows - 1) * n, n)[-64:], 1e-6)


def test_gated_rows() -> None:
    rows, n = 2**21 + 3, 1040
    log_alpha, t = torch.randn(n), torch.empty(rows, n, dtype=HALF)
    t[-1] = torch.randn(n)
    out = gated_linear._gate_rows(t, GateArgs(log_alpha, SEED, SPEC, True))
    assert_near(out[-1, -64:], (t[-1].double() * z_of(log_alpha, (rows - 1) * n, n))[-64:], 4e-3)


@pytest.mark.parametrize(("M", "K", "N"), [(ROWS, 2064, 16), (ROWS, 16, 2064)])
def test_products_with_gates_of_rows(M: int, K: int, N: int) -> None:
    x, weight, bias = torch.empty(M, K, dtype=HALF), torch.randn(N, K, dtype=HALF) / K**0.5, torch.randn(N, dtype=HALF)
    x[-1] = torch.randn(K)
    in_gate, out_gate = torch.randn(K), torch.randn(N)
    gates = GatePair(in_gate, out_gate, SEED, SEED, SPEC, True)
    with backend_triton.forced_route("one_pass"):
        y, _ = gated_linear._per_sample_fwd(x, weight, bias, gates, False)
    z_in, z_out = z_of(in_gate, (M - 1) * K, K), z_of(out_gate, (M - 1) * N, N)
    truth = ((x[-1].double() * z_in) @ weight.double().t() + bias.double()) * z_out
    assert_near(y[-1, -16:], truth[-16:], 2e-2)


def test_a_product_over_live_blocks() -> None:
    x = torch.empty(ROWS, 2064, dtype=HALF)
    weight = torch.randn(16, 2064, dtype=HALF) / 2064**0.5
    log_alpha = torch.randn(2064)
    x[-1] = torch.randn(2064)
    y = gated_linear.gated_linear_live_fwd(x, weight, None, GatePair(log_alpha, None, SEED, None, SPEC))
    assert_near(y[-1], (x[-1].double() * z_of(log_alpha, 0, 2064)) @ weight.double().t(), 2e-2)


def test_folded_weights() -> None:
    N, K = 65600, 32784
    weight, in_gate, out_gate = torch.empty(N, K, dtype=HALF), torch.randn(K), torch.randn(N)
    weight[-1] = torch.randn(K)
    folded, _ = gated_linear.fold_weight_fwd(weight, None, GatePair(in_gate, out_gate, SEED, SEED, SPEC), HALF)
    truth = weight[-1].double() * z_of(in_gate, 0, K) * z_of(out_gate, 0, N)[-1]
    assert_near(folded[-1, -16:], truth[-16:] + 1e-30, 4e-3)


@pytest.mark.parametrize("block", [(1, 1), (4, 4)])
def test_gated_weights(block: tuple[int, int]) -> None:
    N, K = 65600, 32784
    weight = torch.empty(N, K, dtype=HALF)
    weight[-1] = torch.randn(K)
    count = -(N // -block[0]) * (K // block[1])
    log_alpha = torch.empty(count)
    log_alpha[-64:] = torch.randn(64)
    out = weight_gated_linear.fold_blocks_fwd(weight, GateArgs(log_alpha, SEED, SPEC), block, HALF)
    z = z_of(log_alpha, count - 16 // block[1], 16 // block[1], count - 16 // block[1]).repeat_interleave(block[1])
    assert_near(out[-1, -16:], weight[-1, -16:].double() * z, 4e-3)


def test_sums_of_a_workspace() -> None:
    partial = torch.empty(17, 2**27 + 16)
    partial[:, -64:] = torch.randn(17, 64)
    assert_near(host.reduce(partial, (2**27 + 16,), torch.float32)[-64:], partial[:, -64:].double().sum(0), 1e-6)


@pytest.mark.parametrize("shape", [(2**16 + 1, 32784), (2**13 + 1, 4, 65600)])
def test_norms_and_activations(shape: tuple[int, ...]) -> None:
    n, x = shape[1], torch.empty(shape, dtype=HALF)
    x[-1] = torch.randn(shape[1:])
    gain = torch.randn(n)
    bias = torch.randn(n)
    mean = torch.randn(n)
    var = torch.rand(n) + 0.5
    log_alpha = torch.randn(n)
    z = z_of(log_alpha, (shape[0] - 1) * n, n)

    def spread(v: Tensor) -> Tensor:
        return v.double()[:, None] if len(shape) == 3 else v.double()

    y, *_ = norm_gate.norm_gate_fwd(x, Norm(gain, bias, 1e-5, False), GateArgs(log_alpha, SEED, SPEC, True), mean, var)
    truth = spread(z) * (spread(gain) * (x[-1].double() - spread(mean)) / (spread(var) + 1e-5).sqrt() + spread(bias))
    assert_near(y[-1].reshape(-1)[-16:], truth.reshape(-1)[-16:] + 1e-30, 8e-3)
    y = gate_activations.gate_activations_fwd(x, GateArgs(log_alpha, SEED, SPEC, True), 1)
    assert_near(y[-1].reshape(-1)[-16:], (x[-1].double() * spread(z)).reshape(-1)[-16:] + 1e-30, 4e-3)


def test_a_convolution() -> None:
    B, C, H, N = 2100, 64, 128, 64
    x = torch.empty(B, H, H, C, dtype=HALF).permute(0, 3, 1, 2)
    x[-1] = torch.randn(C, H, H)
    weight, z_in, z_out = torch.randn(N, C, 3, 3, dtype=HALF) / 24, torch.rand(C), torch.rand(N)
    y = gated_conv2d.gated_conv2d_one_pass(x, weight, None, z_in, z_out, Window((1, 1), (1, 1), (1, 1), 1))
    truth = (
        torch.nn.functional.conv2d(x[-1:].double() * z_in[:, None, None], weight.double(), padding=1)[0]
        * z_out[:, None, None]
    )
    assert_near(y[-1, :, -1, -32:], truth[:, -1, -32:], 2e-2)
