"""What a gate function is: a family, an evaluation rule and its constants.

A :class:`GateSpec` is what every backend is given besides tensors. It is a named tuple of plain numbers, so it hashes, it travels through
operator schemas, and Triton kernels take it whole as one ``tl.constexpr``. This module imports nothing but the standard library.

Hard concrete (Louizos et al. 2018, eq. 10-12), written the way all backends compute it. With ``a = exp(-log_alpha)`` and ``u ~ U(0, 1)``::

    t     = a (1 - u) / u                      = exp(-(logit u + log_alpha))
    s     = 1 / (1 + t ** (1 / beta))          = sigmoid((logit u + log_alpha) / beta)
    z     = clip(s (zeta - gamma) + gamma, 0, 1)

    z = 0  <=>  u (a + c0) <= a,   c0 = (zeta / -gamma) ** beta
    z = 1  <=>  u (a + c1) >= a,   c1 = ((zeta - 1) / (1 - gamma)) ** beta

The two threshold tests *define* which gates are closed and which are fully open; in between z is kept inside [2^-24, 1 - 2^-24]. ``a`` is
computed in float32 by the same sequence of single IEEE operations everywhere (:data:`EXP_LOG2E` and following), so zero patterns are equal
to the bit on every backend even where ``exp``, division or the square root of the hardware are approximate.
"""

from __future__ import annotations

import math
from typing import NamedTuple

HARD_CONCRETE = 0
FAMILIES = {"hard_concrete": HARD_CONCRETE}

# Which value a gate takes. SAMPLE draws; the others are the published evaluation rules (methods: PRESETS of gates.HardConcrete).
SAMPLE, PAPER, MEDIAN, BINARY = 0, 1, 2, 3
RULES = {"sample": SAMPLE, "paper": PAPER, "median": MEDIAN, "binary": BINARY}

# Between its two thresholds a gate stays at least this far from 0 and from 1; noise is clamped to the same interval.
EDGE = 2.0**-24

# Portable exp(x), |x| <= EXP_LIMIT: n = round(x log2 e), f = x - n ln 2 in two steps, a degree-6 polynomial, times 2^n. Every product and
# every sum is rounded to float32 on its own (no fused multiply-add). EXP_LN2_HI has 12 significant bits, so n * EXP_LN2_HI is exact.
EXP_LIMIT = 80.0
EXP_LOG2E = 1.4426950408889634
EXP_ROUND = 12582912.0  # 1.5 * 2^23: adding and subtracting it rounds to the nearest integer
EXP_LN2_HI = 0.693359375
EXP_LN2_LO = -2.12194440054690583e-4
EXP_POLY = (1.0 / 720.0, 1.0 / 120.0, 1.0 / 24.0, 1.0 / 6.0, 0.5, 1.0, 1.0)  # Horner, highest power first


class GateSpec(NamedTuple):
    """Family, rule and constants of a gate function; see the module docstring for the equations.

    ``family`` and ``rule`` are integers from :data:`FAMILIES` and :data:`RULES`; the rest are real numbers without a unit. ``c0``, ``c1``
    are the threshold constants of a draw; ``lo``, ``hi`` those of a deterministic gate: it is 0 iff log_alpha <= lo, 1 iff log_alpha >= hi.
    Build one with :func:`hard_concrete`.
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

    Rules for evaluation: ``"paper"`` clips the stretched sigmoid(log_alpha); ``"median"`` that of sigmoid(log_alpha / beta), the median of
    the distribution (Gallego-Posada et al. 2022); ``"binary"`` is 1 where the paper's gate exceeds one half, else 0 (Voita et al. 2019).

    Raises ValueError for an unknown rule, beta <= 0, gamma >= 0 or zeta <= 1 (outside of these no gate is ever exactly 0 or 1).
    """
    if rule not in RULES:
        raise ValueError(f"rule={rule!r}: expected one of {sorted(RULES)}")
    for name, value, ok, want in (
        ("beta", beta, beta > 0, "a finite number above 0"),
        ("gamma", gamma, gamma < 0, "a finite number below 0"),
        ("zeta", zeta, zeta > 1, "a finite number above 1"),
    ):
        if not (ok and math.isfinite(value)):
            raise ValueError(f"{name}={value!r}: expected {want}")
    logit_lo, logit_hi = math.log(-gamma / zeta), math.log((1 - gamma) / (zeta - 1))  # of the s at which s_bar is 0, and 1
    if rule == "binary":
        middle = math.log((0.5 - gamma) / (zeta - 0.5))
        lo = hi = middle
    else:
        scale = beta if rule == "median" else 1.0
        lo, hi = scale * logit_lo, scale * logit_hi
    c0, c1 = math.exp(-beta * logit_lo), math.exp(-beta * logit_hi)
    return GateSpec(HARD_CONCRETE, RULES[rule], float(beta), float(gamma), float(zeta), c0, c1, lo, hi)


def is_two_thirds(beta: float) -> bool:
    """Whether beta is 2/3, the published value, for which t ** (1 / beta) is t * sqrt(t) and no logarithm is needed."""
    return abs(beta - 2.0 / 3.0) < 1e-12
