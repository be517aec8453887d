"""Noise, gate values and their gradients: bits where bits are promised, 1e-6 elsewhere."""

from __future__ import annotations

import pytest
import torch
import triton
import triton.language as tl

from dampr import philox
from dampr.kernels import gates as kernels
from dampr.ops import GateArgs
from dampr.ops import backend_triton as backend
from dampr.reference import gate_values
from dampr.spec import RULES, hard_concrete


@triton.jit
def noise_kernel(seed_ptr, start_ptr, word_ptr, u_ptr, BLOCK: tl.constexpr, GROUPED: tl.constexpr):
    word = kernels.draw_words(tl.load(seed_ptr), tl.load(start_ptr), BLOCK, GROUPED)
    tl.store(word_ptr + tl.arange(0, BLOCK), word.to(tl.int64))
    tl.store(u_ptr + tl.arange(0, BLOCK), kernels.uniform(word))


@pytest.mark.parametrize("grouped", [True, False])
@pytest.mark.parametrize("start", [0, 4, 2**31 - 8, 2**34 - 64, 2**34 + 4, 2**40, 2**62])
def test_noise_is_philox_to_the_bit(start: int, grouped: bool) -> None:
    start += 0 if grouped else 3
    for seed in (0, 1, 2**32, 2**63 - 1, *torch.randint(0, 2**63 - 1, (4,)).tolist()):
        s, block = torch.tensor([seed]), 128
        word, u = torch.zeros(block, dtype=torch.int64), torch.zeros(block)
        noise_kernel[(1,)](s, torch.tensor([start]), word, u, BLOCK=block, GROUPED=grouped)
        assert torch.equal(word & 0xFFFFFFFF, philox.words(s, block, start))
        assert torch.equal(u, philox.uniform(s, block, start))


def log_alphas(n: int) -> torch.Tensor:
    """Most gates undecided, some far beyond every threshold."""
    generator = torch.Generator().manual_seed(n)
    values = torch.randn(n, generator=generator) * 3
    values[:: max(1, n // 7)] *= 40
    return values


@pytest.mark.parametrize("beta", [2 / 3, 0.5])
@pytest.mark.parametrize("rule", sorted(RULES))
@pytest.mark.parametrize(
    ("n", "rows"), [(1, None), (1023, None), (2048, None), (96, 40), (37, 33), (5, 1), (7, 0), (0, 3)]
)
def test_zeros_and_ones_are_those_of_the_reference_and_values_agree(
    n: int, rows: int | None, rule: str, beta: float
) -> None:
    spec, seed = hard_concrete(rule, beta=beta), torch.randint(0, 2**63 - 1, (1,))
    log_alpha = log_alphas(n).requires_grad_()
    expected = gate_values(log_alpha, spec, seed, rows)
    gate = GateArgs(log_alpha.detach(), seed if rule == "sample" else None, spec)
    z = backend.sample_gates_fwd(gate, rows)
    assert z.shape == expected.shape
    assert z.dtype == torch.float32
    assert torch.equal(z == 0, expected == 0)
    assert torch.equal(z == 1, expected == 1)
    torch.testing.assert_close(z, expected.detach(), atol=1e-6, rtol=1e-6)

    dz = torch.randn(expected.shape)
    if expected.requires_grad:
        (slope,) = torch.autograd.grad(expected, log_alpha, dz)
    else:  # the binary rule is a constant
        slope = torch.zeros(n)
    got = backend.sample_gates_bwd(dz, gate, rows)
    torch.testing.assert_close(got, slope, atol=1e-5, rtol=1e-5)


def test_gradient_of_gates_takes_an_expanded_dz() -> None:
    gate = GateArgs(log_alphas(20), torch.tensor([7]), hard_concrete())
    dz = torch.ones(1).expand(6, 20)
    expected = backend.sample_gates_bwd(dz.contiguous(), gate, 6)
    assert torch.equal(backend.sample_gates_bwd(dz, gate, 6), expected)


def test_not_a_number_stays_visible() -> None:
    z = backend.sample_gates_fwd(GateArgs(torch.tensor([float("nan"), 0.0]), torch.tensor([7]), hard_concrete()), None)
    assert z.isnan().tolist() == [True, False]


def test_many_rows_are_summed_in_splits() -> None:
    spec, seed, rows = hard_concrete(), torch.tensor([11]), 700
    log_alpha = log_alphas(6).requires_grad_()
    dz = torch.randn(rows, 6)
    (expected,) = torch.autograd.grad(gate_values(log_alpha, spec, seed, rows), log_alpha, dz)
    got = backend.sample_gates_bwd(dz, GateArgs(log_alpha.detach(), seed, spec), rows)
    torch.testing.assert_close(got, expected, atol=1e-4, rtol=1e-4)


def test_unavailable_says_why_not(monkeypatch: pytest.MonkeyPatch) -> None:
    cpu, cuda = torch.device("cpu"), torch.device("cuda", 0)
    assert backend.unavailable(cpu, torch.float32) is None
    assert "float64" in (backend.unavailable(cuda, torch.float64) or "")
    monkeypatch.setattr(backend.gate_kernels, "reduce_kernel", triton.JITFunction.__new__(triton.JITFunction))
    assert backend.unavailable(cuda, torch.bfloat16) is None
    assert "TRITON_INTERPRET" in (backend.unavailable(cpu, torch.float32) or "")
