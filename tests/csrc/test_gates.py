"""Gates in C++ against dampr.reference and dampr.philox: noise and patterns to the bit, values within the tolerance."""

from __future__ import annotations

import pytest
import torch

from dampr import philox, spec

from .calls import (
    _C,
    CODES,
    DTYPES,
    LARGEST_SEED,
    RULE,
    SHAPES,
    SPECS,
    assert_as_good,
    draw,
    fold_fwd,
    gate_dtype,
    gate_rows_bwd,
    gate_rows_fwd,
    gates_bwd,
    gates_fwd,
    poisoned,
    ptr,
    random_log_alpha,
    random_seed,
    uniform,
    words,
)


def test_words_match_the_published_known_answers() -> None:
    # Random123 kat_vectors, philox 4x32 10: counter 0, key 0.
    # The other vectors have counter words 2 and 3 that our layout keeps at zero.
    expected = [0x6627E8D5, 0xE169C58D, 0xBC57AC4C, 0x9B00DBD8]
    assert words(torch.zeros(1, dtype=torch.int64), 4, 0).tolist() == expected


STARTS = [0, 1, 2, 3, 4, 511, 2**32 - 5, 4 * 2**32 - 6, 2**40 + 7, 2**62 + 1]


@pytest.mark.parametrize("start", STARTS)
@pytest.mark.parametrize("count", [0, 1, 5, 512, 20_011])
def test_noise_is_bit_equal(start: int, count: int) -> None:
    for seed in (random_seed(), torch.tensor([LARGEST_SEED]), torch.tensor([-1])):
        assert torch.equal(words(seed, count, start), philox.words(seed, count, start))
        assert torch.equal(uniform(seed, count, start), philox.uniform(seed, count, start))


@pytest.mark.parametrize("rule", SPECS.values(), ids=SPECS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_gates_match_the_reference(rule: spec.GateSpec, dtype: torch.dtype, shape: tuple[int, int]) -> None:
    rows, n = shape
    log_alpha, seed = random_log_alpha(n, dtype), random_seed()
    same, wide = log_alpha.clone().requires_grad_(), log_alpha.double().requires_grad_()
    z_same, z_wide = draw(rule, same, seed, rows), draw(rule, wide, seed, rows)
    z = gates_fwd(rule, log_alpha, seed, rows)
    assert torch.equal(z == 0, z_same == 0)
    assert torch.equal(z == 1, z_same == 1)
    assert_as_good("z", z, z_same, z_wide.detach())

    dz = torch.randn(rows, n, dtype=dtype)
    grad = gates_bwd(rule, log_alpha, seed, dz)
    if rule.rule == spec.BINARY:
        assert torch.equal(grad, torch.zeros_like(grad))
        return
    (grad_same,) = torch.autograd.grad(z_same, same, dz)
    (grad_wide,) = torch.autograd.grad(z_wide, wide, dz.double())
    assert_as_good("dlog_alpha", grad, grad_same, grad_wide)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_rows_from_a_start_are_those_of_the_whole_to_the_bit(dtype: torch.dtype, shape: tuple[int, int]) -> None:
    (rows, n), seed = shape, random_seed()
    log_alpha, code = random_log_alpha(n, dtype), CODES[dtype]
    whole = gates_fwd(RULE, log_alpha, seed, rows + 3)
    part = poisoned(rows, n, dtype=dtype)
    _C.gates_fwd(RULE, code, ptr(log_alpha), ptr(seed), rows, n, ptr(part), 2, start=3 * n)
    assert torch.equal(part, whole[3:])
    dz, grad = torch.randn(rows, n, dtype=dtype), poisoned(n, dtype=dtype)
    padded = torch.cat([torch.zeros(3, n, dtype=dtype), dz])
    _C.gates_bwd(RULE, code, ptr(log_alpha), ptr(seed), rows, n, ptr(dz), ptr(grad), 2, start=3 * n)
    torch.testing.assert_close(grad, gates_bwd(RULE, log_alpha, seed, padded))


def test_a_million_patterns_are_exact() -> None:
    log_alpha, seed = 4 * torch.randn(1_000_003), random_seed()
    for rule in (SPECS["two_thirds"], SPECS["beta_0.5"]):
        z, truth = gates_fwd(rule, log_alpha, seed, 1), draw(rule, log_alpha, seed, 1)
        assert torch.equal(z == 0, truth == 0)
        assert torch.equal(z == 1, truth == 1)
        assert (z - truth).abs().max() < 2e-6


@pytest.mark.parametrize("name", SPECS)
def test_infinities_decide_and_nan_is_kept(name: str) -> None:
    log_alpha = torch.tensor([float("inf"), -float("inf"), float("nan"), 3e38, -3e38])
    z = gates_fwd(SPECS[name], log_alpha, random_seed(), 3)
    truth = draw(SPECS[name], log_alpha, random_seed(), 3)
    assert torch.equal(z.nan_to_num(7.0), truth.nan_to_num(7.0))


@pytest.mark.parametrize("rule", SPECS.values(), ids=SPECS)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_gate_rows_match_the_reference(rule: spec.GateSpec, dtype: torch.dtype, shape: tuple[int, int]) -> None:
    rows, n = shape
    x, g = torch.randn(shape).to(dtype), torch.randn(shape).to(dtype)
    log_alpha, seed = random_log_alpha(n, gate_dtype(dtype)), random_seed()
    same, wide = log_alpha.clone().requires_grad_(), log_alpha.double().requires_grad_()
    z_same, z_wide = draw(rule, same, seed, rows), draw(rule, wide, seed, rows)
    xs, gs = x.to(gate_dtype(dtype)), g.to(gate_dtype(dtype))

    out = gate_rows_fwd(rule, x, log_alpha, seed)
    assert_as_good("out", out, (xs * z_same).to(dtype), x.double() * z_wide.detach())
    assert torch.equal(out == 0, (xs * z_same).to(dtype) == 0)

    dx, xz, grad = gate_rows_bwd(rule, x, g, log_alpha, seed)
    assert torch.equal(xz, out)
    assert_as_good("dx", dx, (gs * z_same).to(dtype), g.double() * z_wide.detach())
    if rule.rule == spec.BINARY:
        assert torch.equal(grad, torch.zeros_like(grad))
        return
    (grad_same,) = torch.autograd.grad(z_same, same, xs * gs)
    (grad_wide,) = torch.autograd.grad(z_wide, wide, x.double() * g.double())
    assert_as_good("dlog_alpha", grad, grad_same, grad_wide)


def test_gate_rows_bwd_writes_only_what_is_asked_for() -> None:
    x, g, log_alpha, seed = torch.randn(70, 33), torch.randn(70, 33), random_log_alpha(33), random_seed()
    whole = gate_rows_bwd(SPECS["two_thirds"], x, g, log_alpha, seed)
    for wanted in ((True, False, False), (False, True, False), (False, False, True), (False, False, False)):
        part = gate_rows_bwd(SPECS["two_thirds"], x, g, log_alpha, seed, wanted=wanted)
        for made, expected, asked in zip(part, whole, wanted, strict=True):
            assert (made is not None) == asked
            assert made is None or torch.equal(made, expected)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
def test_every_narrow_number_survives_and_rounding_is_to_nearest_even(dtype: torch.dtype) -> None:
    every = torch.arange(-(2**15), 2**15, dtype=torch.int32).to(torch.int16).view(dtype)[None]
    assert torch.equal(fold_fwd(every, None, None, torch.float32).nan_to_num(7.0), every.float().nan_to_num(7.0))
    wide = (torch.randn(1, 100_003).double() * 10 ** torch.empty(1, 100_003).uniform_(-9, 6).double()).float()
    ties = (every[every.isfinite()].float() * (1 + 2.0**-12))[None]  # halfway cases, and both sides of them
    for value in (wide, ties, every.float()):
        assert torch.equal(fold_fwd(value, None, None, dtype).nan_to_num(7.0), value.to(dtype).nan_to_num(7.0))
