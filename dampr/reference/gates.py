"""Gate values of every family, open probability and the expected L0 penalty in plain PyTorch.

Equations and notation: :mod:`dampr.spec`.
"""

from __future__ import annotations

import math

import torch

from dampr import philox
from dampr.spec import (
    BINARY,
    CLIP,
    EDGE,
    EXACT_ZERO,
    EXP_LIMIT,
    EXP_LN2_HI,
    EXP_LN2_LO,
    EXP_LOG2E,
    EXP_POLY,
    EXP_ROUND,
    EXPONENTIAL,
    HARD,
    HARD_CONCRETE,
    HARD_CONSTANT,
    LINEAR,
    LOGISTIC,
    MASK,
    MASK_LIMIT,
    MEDIAN,
    PAPER,
    RAMP,
    RAMP_LIMIT,
    RATIO,
    SAMPLE,
    SMOOTH,
    SQUARE_RATIO,
    TANH,
    GateSpec,
    is_two_thirds,
)


def exp_portable(x: torch.Tensor) -> torch.Tensor:
    """exp(x) in float32 by single IEEE operations, with the same bits as in C++ and Triton; no derivative.

    ``x`` is clamped to [-80, 80].
    """
    x = x.detach().to(torch.float32).clamp(-EXP_LIMIT, EXP_LIMIT)
    n = (x * EXP_LOG2E + EXP_ROUND) - EXP_ROUND
    f = (x - n * EXP_LN2_HI) - n * EXP_LN2_LO
    p = torch.full_like(x, EXP_POLY[0])
    for c in EXP_POLY[1:]:
        p = p * f
        p = p + c
    return p * ((n.to(torch.int32) + 127) << 23).view(torch.float32)


def _decide(log_alpha: torch.Tensor, spec: GateSpec, u: torch.Tensor | None) -> tuple[torch.Tensor, torch.Tensor]:
    """(which gates are exactly 0, which exactly 1), decided in float32 for every dtype, so that all backends agree."""
    if spec.rule == SAMPLE:
        assert u is not None, "a drawn gate needs its noise"
        a, u32 = exp_portable(-log_alpha), u.to(torch.float32)
        return u32 * (a + spec.c0) <= a, u32 * (a + spec.c1) >= a
    la32 = log_alpha.detach().to(torch.float32)
    return la32 <= spec.lo, la32 >= spec.hi


def _concrete(log_alpha: torch.Tensor, spec: GateSpec, u: torch.Tensor | None) -> torch.Tensor:
    """s, the concrete variable before stretching."""
    if spec.rule == SAMPLE:
        assert u is not None
        u = u.to(log_alpha.dtype)
        t = torch.exp(-log_alpha) * ((1 - u) / u)
        return 1 / (1 + (t * t.sqrt() if is_two_thirds(spec.beta) else t ** (1 / spec.beta)))
    return torch.sigmoid(log_alpha / spec.beta if spec.rule == MEDIAN else log_alpha)


def gate(log_alpha: torch.Tensor, spec: GateSpec, u: torch.Tensor | None = None) -> torch.Tensor:
    """Gate values for given noise, differentiable in ``log_alpha``.

    ``log_alpha``: the gate parameters of any family, (..., n), float32 or float64; ``u``: noise in (0, 1),
    broadcastable with them, needed for a drawn gate.
    """
    if spec.family != HARD_CONCRETE:
        return (
            _ramp(log_alpha, spec)
            if spec.family == RAMP
            else _masked(log_alpha, spec)
            if spec.family == MASK
            else log_alpha.clone()
        )
    zero, one = log_alpha.new_zeros(()), log_alpha.new_ones(())
    closed, full = _decide(log_alpha, spec, u)
    if spec.rule == BINARY:
        return torch.where(closed, zero, one)
    # where() passes gradients through both branches; 0 in place of a clipped log_alpha keeps infinities out of them
    s = _concrete(torch.where(closed | full, zero, log_alpha), spec, u)
    z = s * (spec.zeta - spec.gamma) + spec.gamma
    inside = z + (z.clamp(EDGE, 1 - EDGE) - z).detach()
    return torch.where(closed, zero, torch.where(full, one, inside))


def gate_derivative(log_alpha: torch.Tensor, spec: GateSpec, u: torch.Tensor | None = None) -> torch.Tensor:
    """dz / dlog_alpha for given noise, in closed form; arguments as for :func:`gate`.

    For hard concrete gates it is (zeta - gamma) / beta s (1 - s) strictly inside (0, 1), else 0.
    """
    if spec.family != HARD_CONCRETE:
        family = {RAMP: _ramp_derivative, MASK: _masked_derivative}.get(spec.family)
        return torch.ones_like(log_alpha) if family is None else family(log_alpha, spec)
    closed, full = _decide(log_alpha, spec, u)
    clipped = closed | full | (spec.rule == BINARY)
    zero = log_alpha.new_zeros(())
    s = _concrete(torch.where(clipped, zero, log_alpha), spec, u)
    slope = (spec.zeta - spec.gamma) / (1.0 if spec.rule == PAPER else spec.beta)
    return torch.where(clipped, zero, slope * s * (1 - s))


def _decide_ramp(x: torch.Tensor, spec: GateSpec) -> tuple[torch.Tensor, torch.Tensor]:
    """(which gates are exactly 0, which exactly 1), decided in float32."""
    x32 = x.detach().to(torch.float32)
    closed = x32 <= spec.lo
    return closed, x32 >= spec.hi if spec.rule == CLIP else torch.zeros_like(closed)


def _ramp(x: torch.Tensor, spec: GateSpec) -> torch.Tensor:
    """Gates of the ramp family, see :mod:`dampr.spec`."""
    zero, one = x.new_zeros(()), x.new_ones(())
    closed, full = _decide_ramp(x, spec)
    y = spec.beta * torch.where(closed | full, zero, x)
    if spec.rule in (CLIP, LINEAR):
        z = y
    else:
        y = y.clamp(max=RAMP_LIMIT)
        if spec.rule == TANH:
            z = torch.tanh(y)
        elif spec.rule == EXPONENTIAL:
            z = -torch.expm1(-y)
        else:
            power = y if spec.rule == RATIO else y * y
            z = power / (1 + power)
    return torch.where(closed, zero, torch.where(full, one, _off_zero(z)))


def _ramp_derivative(x: torch.Tensor, spec: GateSpec) -> torch.Tensor:
    """dz/dx of the ramp family."""
    zero = x.new_zeros(())
    closed, full = _decide_ramp(x, spec)
    y = (spec.beta * torch.where(closed | full, zero, x)).clamp(max=RAMP_LIMIT)
    if spec.rule == TANH:
        slope = 1 / torch.cosh(y).square()
    elif spec.rule == EXPONENTIAL:
        slope = torch.exp(-y)
    elif spec.rule == RATIO:
        slope = 1 / (1 + y).square()
    elif spec.rule == SQUARE_RATIO:
        slope = 2 * y / (1 + y * y).square()
    else:
        slope = torch.ones_like(y)
    return torch.where(closed | full, zero, spec.beta * slope)


def _off_zero(z: torch.Tensor) -> torch.Tensor:
    """z, at least EDGE, with the derivative of ``z``."""
    return torch.where(z < EDGE, z + (EDGE - z).detach(), z)


def sign_swish(x: torch.Tensor, slope: float | torch.Tensor) -> torch.Tensor:
    """SS_b(x) = 2 sigmoid(b x) (1 + b x (1 - sigmoid(b x))) - 1, Darabi et al. 2018 (arXiv 1812.11800);
    differentiable.
    """
    y = slope * x
    return 2 * torch.sigmoid(y) * (1 + y * torch.sigmoid(-y)) - 1


def mask(alpha: torch.Tensor, rule: int, slope: float | torch.Tensor, threshold: float | torch.Tensor) -> torch.Tensor:
    """The mask M of :mod:`dampr.spec` in variant ``rule``, like ``alpha``; differentiable in every tensor argument."""
    distance = alpha.abs() - threshold
    y = (slope * distance).clamp(-MASK_LIMIT, MASK_LIMIT)
    if rule == LOGISTIC:
        return torch.sigmoid(y)
    if rule == SMOOTH:
        return (1 + sign_swish(y, 1.0)) / 2
    limit = threshold.detach().to(torch.float32) if isinstance(threshold, torch.Tensor) else threshold
    closed = alpha.detach().to(torch.float32).abs() <= limit
    if rule == EXACT_ZERO:
        return torch.where(closed, alpha.new_zeros(()), _off_zero(torch.tanh(y)))
    hard = (~closed).to(alpha.dtype)
    if rule == HARD_CONSTANT:
        return hard
    surrogate = sign_swish(y, 1.0) / 2
    return hard + (surrogate - surrogate.detach())


def _masked(alpha: torch.Tensor, spec: GateSpec) -> torch.Tensor:
    """Gates of the mask family: alpha M."""
    return alpha * mask(alpha, spec.rule, spec.beta, spec.lo)


def _masked_derivative(alpha: torch.Tensor, spec: GateSpec) -> torch.Tensor:
    """dz/dalpha of the mask family: M + |alpha| dM/d|alpha|."""
    m = mask(alpha, spec.rule, spec.beta, spec.lo)
    size = alpha.abs()
    y = (spec.beta * (size - spec.lo)).clamp(-MASK_LIMIT, MASK_LIMIT)
    if spec.rule in (HARD, SMOOTH):
        steep = (2 - y * torch.tanh(y / 2)) / (1 + torch.cosh(y)) / 2
    elif spec.rule == EXACT_ZERO:
        steep = torch.where(m > 0, 1 / torch.cosh(y).square(), alpha.new_zeros(()))
    elif spec.rule == LOGISTIC:
        steep = m * torch.sigmoid(-y)
    else:
        return m
    return m + size.clamp(max=RAMP_LIMIT) * spec.beta * steep


def noise(
    log_alpha: torch.Tensor, spec: GateSpec, seed: torch.Tensor | None, rows: int | None, start: int = 0
) -> torch.Tensor | None:
    """The uniforms of ``seed`` from index ``start`` on, (n,) or (rows, n); None for a deterministic gate."""
    if spec.rule != SAMPLE:
        return None
    assert seed is not None, "a drawn gate needs a seed"
    n = log_alpha.numel()
    return philox.uniform(seed, n, start) if rows is None else philox.uniform(seed, rows * n, start).view(rows, n)


def gate_values(
    log_alpha: torch.Tensor, spec: GateSpec, seed: torch.Tensor | None = None, rows: int | None = None, start: int = 0
) -> torch.Tensor:
    """Gates with the noise of ``seed`` from index ``start`` on: (n,), or (rows, n) with a draw for each row.

    ``log_alpha``: (n,); differentiable in it.
    """
    z = gate(log_alpha, spec, noise(log_alpha, spec, seed, rows, start))
    return z if rows is None else z.expand(rows, log_alpha.numel())


def along(z: torch.Tensor, x: torch.Tensor, dim: int) -> torch.Tensor:
    """Gates in a shape that multiplies dimension ``dim`` of ``x``.

    z: (n,), or (rows, n) with a row for each index of the first dimension of ``x``.
    """
    shape = [1] * x.dim()
    shape[dim] = z.shape[-1]
    if z.dim() == 2 and dim != 0:
        shape[0] = z.shape[0]
    return z.view(shape)


def open_probability(log_alpha: torch.Tensor, spec: GateSpec) -> torch.Tensor:
    """P(z != 0) = sigmoid(log_alpha - beta log(-gamma / zeta)), Louizos et al. 2018 eq. 12, in the shape and dtype of
    ``log_alpha``; differentiable.

    Raises: ValueError for a family without a distribution; its module in :mod:`dampr.gates` has a surrogate.
    """
    if spec.family != HARD_CONCRETE:
        raise ValueError(
            f"spec.family={spec.family}: expected {HARD_CONCRETE} (hard concrete), the family that has a probability "
            "to be open"
        )
    return torch.sigmoid(log_alpha - spec.beta * math.log(-spec.gamma / spec.zeta))


def expected_l0(
    log_alpha: torch.Tensor,
    spec: GateSpec,
    group_size: float | torch.Tensor = 1.0,
    *,
    lam: float | torch.Tensor = 1.0,
    group_sq_norm: torch.Tensor | None = None,
    prior_precision: float | torch.Tensor = 0.0,
) -> torch.Tensor:
    """sum_g pi_g (rho / 2 ||w_g||^2 + lambda |g|), the expected penalty of Louizos et al. 2018 (eq. 9 and appendix A);
    a scalar tensor.
    """
    cost = group_size * lam
    if group_sq_norm is not None and (isinstance(prior_precision, torch.Tensor) or prior_precision):
        cost = cost + 0.5 * prior_precision * group_sq_norm
    return (open_probability(log_alpha, spec) * cost).sum()
