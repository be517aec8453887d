"""What a gate function is: a family, an evaluation rule and its constants.

A :class:`GateSpec` is what every backend is given besides tensors. It is a named tuple of plain numbers, so it hashes,
it travels through operator schemas, and Triton kernels take it whole as one ``tl.constexpr``. This module imports
nothing but the standard library.

Only ``rule == SAMPLE`` needs noise; under every other rule a gate is a function of its parameter alone. Whether a gate
is 0 is always decided in float32, by the comparisons written here, whatever the dtype of the value, so zero patterns
are equal on every backend.

Hard concrete (Louizos et al. 2018, eq. 10-12), written the way all backends compute it. With ``a = exp(-log_alpha)``
and ``u ~ U(0, 1)``::

    t     = a (1 - u) / u                      = exp(-(logit u + log_alpha))
    s     = 1 / (1 + t ** (1 / beta))          = sigmoid((logit u + log_alpha) / beta)
    z     = clip(s (zeta - gamma) + gamma, 0, 1)

    z = 0  <=>  u (a + c0) <= a,   c0 = (zeta / -gamma) ** beta
    z = 1  <=>  u (a + c1) >= a,   c1 = ((zeta - 1) / (1 - gamma)) ** beta

The two threshold tests *define* which gates are closed and which are fully open; in between z is kept inside [2^-24, 1
- 2^-24]. ``a`` is computed in float32 by the same sequence of single IEEE operations everywhere (:data:`EXP_LOG2E` and
following), so zero patterns are equal to the bit on every backend even where ``exp``, division or the square root of
the hardware are approximate.

Ramp (DAM, DiffPrune; ``beta`` is the sharpness k): one-sided, exactly zero on the left. With ``y = k x``::

    z = 0  <=>  x <= 0;   else  TANH tanh(y)   RATIO y / (1 + y)   SQUARE_RATIO y^2 / (1 + y^2)
                                EXPONENTIAL 1 - exp(-y)   CLIP min(y, 1), 1 <=> x >= hi = 1 / k   LINEAR y

Mask (differentiable mask; ``beta`` is the slope b, ``lo`` the threshold t): ``z = alpha M``. With ``y = b (|alpha| -
t)``, the SignSwish ``SS(y) = 2 sigmoid(y) (1 + y (1 - sigmoid(y))) - 1`` and its derivative SS' by |alpha|::

    HARD           M = [|alpha| > t], but dz/dalpha = M + |alpha| SS' / 2         z = 0  <=>  |alpha| <= t
    HARD_CONSTANT  M = [|alpha| > t], dz/dalpha = M                               z = 0  <=>  |alpha| <= t
    SMOOTH         M = (1 + SS(y)) / 2                              z = 0 at alpha = 0 (and where M crosses 0, below t)
    EXACT_ZERO     M = max(tanh(y), 0)                                            z = 0  <=>  |alpha| <= t
    LOGISTIC       M = sigmoid(y)                                                 z = 0  <=>  alpha = 0

Value: ``z = p``, the parameter is the gate.
"""

from __future__ import annotations

import math
import sys
from collections.abc import Callable
from typing import NamedTuple

HARD_CONCRETE, VALUE, RAMP, MASK = 0, 1, 2, 3
FAMILIES = {"hard_concrete": HARD_CONCRETE, "value": VALUE, "ramp": RAMP, "mask": MASK}

# Which value a gate takes; no number means two things. Of hard concrete gates SAMPLE draws,
# the others are the published evaluation rules.
SAMPLE, PAPER, MEDIAN, BINARY = 0, 1, 2, 3
RULES = {"sample": SAMPLE, "paper": PAPER, "median": MEDIAN, "binary": BINARY}
IDENTITY = 4  # the one rule of VALUE
TANH, RATIO, SQUARE_RATIO, EXPONENTIAL, CLIP, LINEAR = 5, 6, 7, 8, 9, 10
SHAPES = {
    "tanh": TANH,
    "ratio": RATIO,
    "square_ratio": SQUARE_RATIO,
    "exponential": EXPONENTIAL,
    "clip": CLIP,
    "linear": LINEAR,
}
HARD, HARD_CONSTANT, SMOOTH, EXACT_ZERO, LOGISTIC = 11, 12, 13, 14, 15
VARIANTS = {
    "hard": HARD,
    "hard_constant": HARD_CONSTANT,
    "smooth": SMOOTH,
    "exact_zero": EXACT_ZERO,
    "logistic": LOGISTIC,
}

# A gate that is not decided to be 0 stays at least this far from it (of a mask that has exact zeros, M does), and a
# hard concrete one as far from 1; noise is clamped to the same interval.
EDGE = 2.0**-24

# Portable exp(x), |x| <= EXP_LIMIT: n = round(x log2 e), f = x - n ln 2 in two steps, a degree-6 polynomial, times 2^n.
# Every product and every sum is rounded to float32 on its own (no fused multiply-add). EXP_LN2_HI has 12 significant
# bits, so n * EXP_LN2_HI is exact.
EXP_LIMIT = 80.0
EXP_LOG2E = 1.4426950408889634
EXP_ROUND = 12582912.0  # 1.5 * 2^23: adding and subtracting it rounds to the nearest integer
EXP_LN2_HI = 0.693359375
EXP_LN2_LO = -2.12194440054690583e-4
EXP_POLY = (1.0 / 720.0, 1.0 / 120.0, 1.0 / 24.0, 1.0 / 6.0, 0.5, 1.0, 1.0)  # Horner, highest power first

# tanh(y) in float32 = y + y^3 p(y^2) up to TANH_SMALL, which keeps small values precise, else (1 - t) / (1 + t) with t
# = exp(-2 y). A least-squares fit reweighted to a minimax one, relative error 5e-9 before rounding; Horner,
# highest power first.
TANH_SMALL = 0.625
TANH_POLY = (-5.717043105e-03, 2.065058541e-02, -5.374349745e-02, 1.333149128e-01, -3.333328392e-01)
# y of a ramp, and |alpha| in dz/dalpha, are clamped to this: every bounded ramp has long been 1, and y^2 is finite.
RAMP_LIMIT = 2.0**60
MASK_LIMIT = 80.0  # |y| of a mask is clamped to this


class GateSpec(NamedTuple):
    """Family, rule and constants of a gate function; see the module docstring for the equations.

    ``family`` is an integer from :data:`FAMILIES`, ``rule`` one of those that the family has; the rest are real numbers
    without a unit. ``c0``, ``c1`` are the threshold constants of a draw; ``lo``, ``hi`` those of a deterministic gate:
    of a hard concrete one or a ramp, it is 0 iff the parameter is <= lo and (if it ever is, hi > lo or the rule is
    BINARY) 1 iff it is >= hi. A ramp keeps its sharpness in ``beta``; a mask its slope in ``beta`` and its threshold in
    ``lo``. What a family does not use is 0, but ``beta`` is always above 0. Build one with :func:`hard_concrete`,
    :func:`ramp`, :func:`mask` or :func:`value`.
    """

    family: int
    rule: int
    beta: float
    gamma: float
    zeta: float
    c0: float
    c1: float
    lo: float
    hi: float


def hard_concrete(rule: str = "sample", beta: float = 2.0 / 3.0, gamma: float = -0.1, zeta: float = 1.1) -> GateSpec:
    """The hard concrete gate (Louizos et al. 2018), drawn (``rule="sample"``) or deterministic (the other rules).

    Rules for evaluation: ``"paper"`` clips the stretched sigmoid(log_alpha); ``"median"`` that of sigmoid(log_alpha /
    beta), the median of the distribution (Gallego-Posada et al. 2022); ``"binary"`` is 1 where the paper's gate exceeds
    one half, else 0 (Voita et al. 2019).

    Raises ValueError for an unknown rule, beta <= 0, gamma >= 0 or zeta <= 1 (outside of these no gate is ever exactly
    0 or 1).
    """
    if not isinstance(rule, str) or rule not in RULES:
        raise ValueError(f"rule={rule!r}: expected one of {sorted(RULES)}")
    _require("beta", beta, lambda x: x > 0, "a finite number above 0")
    _require("gamma", gamma, lambda x: x < 0, "a finite number below 0")
    _require("zeta", zeta, lambda x: x > 1, "a finite number above 1")
    # The logits of the s at which the stretched variable is 0, and 1.
    logit_lo, logit_hi = math.log(-gamma / zeta), math.log((1 - gamma) / (zeta - 1))
    if rule == "binary":
        # Where the paper's gate is one half: log((0.5 - gamma) / (zeta - 0.5)),
        # which is exactly 0 for an interval around one half.
        middle = math.log1p((1 - gamma - zeta) / (zeta - 0.5))
        lo = hi = middle
    else:
        scale = beta if rule == "median" else 1.0
        lo, hi = scale * logit_lo, scale * logit_hi
    c0, c1 = math.exp(-beta * logit_lo), math.exp(-beta * logit_hi)
    return GateSpec(HARD_CONCRETE, RULES[rule], float(beta), float(gamma), float(zeta), c0, c1, lo, hi)


def value() -> GateSpec:
    """The parameter is the gate: z = p, dz/dp = 1, closed iff p is 0.

    For gates that are computed outside of the kernels.
    """
    return GateSpec(VALUE, IDENTITY, 1.0, 0.0, 0.0, 0.0, 0.0, 0.0, 0.0)


def ramp(shape: str = "tanh", sharpness: float = 1.0) -> GateSpec:
    """A gate that is exactly 0 for x <= 0 and rises as ``shape`` of ``sharpness * x`` above; equations: the module
    docstring.

    ``"tanh"`` with sharpness 1 is the gate of DAM (Bu et al. 2021), with 5 the first of the reconstructed DiffPrune
    (Shulman 2020); ``"clip"`` and ``"linear"`` are the variants in DAM's code. ``"ratio"`` and ``"square_ratio"`` are x
    / (x + eps) and
    x^2 / (x^2 + eps^2) with sharpness 1 / eps.

    Raises ValueError for an unknown shape or a sharpness that is not above 0.
    """
    if not isinstance(shape, str) or shape not in SHAPES:
        raise ValueError(f"shape={shape!r}: expected one of {sorted(SHAPES)}")
    _require("sharpness", sharpness, lambda x: x > 0, "a finite number above 0")
    full = 1.0 / sharpness if shape == "clip" else 0.0
    return GateSpec(RAMP, SHAPES[shape], float(sharpness), 0.0, 0.0, 0.0, 0.0, 0.0, full)


def mask(variant: str = "hard", slope: float = 5.0, threshold: float = 0.1) -> GateSpec:
    """A scale times its mask, z = alpha M(|alpha| - threshold), a reconstruction: see gates.DifferentiableMask.

    Equations: the module docstring.

    Raises ValueError for an unknown variant, a slope that is not above 0 or a threshold below 0.
    """
    if not isinstance(variant, str) or variant not in VARIANTS:
        raise ValueError(f"variant={variant!r}: expected one of {sorted(VARIANTS)}")
    _require("slope", slope, lambda x: x > 0, "a finite number above 0")
    _require("threshold", threshold, lambda x: x >= 0, "a finite number of at least 0")
    return GateSpec(MASK, VARIANTS[variant], float(slope), 0.0, 0.0, 0.0, 0.0, float(threshold), 0.0)


def _require(name: str, value: float, ok: Callable[[float], bool], want: str) -> None:
    """Raise ValueError that names the argument unless ``value`` is a finite real number for which ``ok`` holds."""
    real = isinstance(value, (int, float)) and not isinstance(value, bool)
    if not real or not abs(value) <= sys.float_info.max or not ok(value):
        raise ValueError(f"{name}={value!r:.80}: expected {want}")


def is_two_thirds(beta: float) -> bool:
    """Whether beta is 2/3, the published value, for which t ** (1 / beta) is t * sqrt(t) and no logarithm is needed."""
    return abs(beta - 2.0 / 3.0) < 1e-12
