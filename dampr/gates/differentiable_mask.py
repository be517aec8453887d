"""The Differentiable Mask family: a learned scale times a mask that cuts off small scales. It is a reconstruction."""

from __future__ import annotations

import math
from collections.abc import Iterable
from typing import get_args

import torch
from torch import Tensor, nn

from dampr import _checks, functional, names, reference
from dampr.spec import EXACT_ZERO, VARIANTS, GateSpec, mask

from .base import VALUE_SPEC, KernelGate, gradient

SLOPES = get_args(names.SlopeMode)
THRESHOLDS = get_args(names.ThresholdMode)
REGULARISERS = get_args(names.Regulariser)


class DifferentiableMask(KernelGate):
    """z = alpha M(|alpha| - t): a scale per gate, and a mask (after Ramakrishnan, Sari, Partovi Nia 2020, arXiv
    1909.04567).

    Confirmed, by the abstract, the introduction and the abstract and claims of the same authors' patent US 12,039,448:
    after the non-linearity each filter's output is multiplied by a scaling factor and by a mask function of it; the
    factor is learned under a regulariser of its own, next to two more with weights of their own; filters are pruned iff
    |factor| <= threshold. The formula of the mask was not available: the variants below are a reconstruction around the
    SignSwish that the same group published (arXiv 1812.11800).

    Args:
        num_gates: how many gates.
        variant: the mask in training; b is the slope, SS the SignSwish. ``"hard"``: [|alpha| > t], differentiated as
            (1 + SS_b(|alpha| - t)) / 2, so that gates just below the threshold feel the task. ``"hard_constant"``: the
            same, differentiated as a constant: a closed gate never opens again, and strong regularisation closes all.
            ``"smooth"``: (1 + SS_b(|alpha| - t)) / 2 itself. ``"exact_zero"``: max(tanh(b (|alpha| - t)), 0), constant
            where closed. ``"logistic"``: sigmoid(b (|alpha| - t)). In evaluation ``"smooth"`` and ``"logistic"``, which
            never close a gate, are replaced by ``"hard"``.
        threshold: t, at least 0; where it starts if it is trained.
        threshold_mode: ``"fixed"``; ``"trainable"``: the exponential of a parameter ``log_threshold``, (1,), in
            training and in evaluation. It moves by the slope of the mask, hence not with ``"hard_constant"``, and what
            the task alone asks for is an open gate: a threshold that should rise needs a term of your own, such as
            ``-lam * gate.log_threshold.exp()``.
        slope: b, above 0.
        slope_mode: ``"fixed"``; ``"scheduled"``: :meth:`set_slope` changes it (:func:`geometric_slope` says to what);
            ``"trainable"``: the exponential of a parameter ``log_slope``, (1,). Only a fixed slope and a fixed
            threshold are built into the kernels; masks of the others are computed beside them.
        init_alpha: where every alpha starts; at 1 fresh evaluation gates are exactly 1 (but those of ``"exact_zero"``).
        device: the device of the parameters. They are float32 and stay so under autocast and ``.half()``.

    The published loss is task + lam1 sum R(alpha) + lam2 ||W||^2 + lam3 ||b||^2 with regularisers not known:
    :func:`scale_penalty`, :func:`square_penalty`.

    Raises: ValueError or TypeError that names the argument.

    >>> gate = DifferentiableMask(2).eval()
    >>> gate()
    tensor([1., 1.], grad_fn=<_SampleGatesBackward>)
    """

    slope: Tensor

    level_parameters = ("alpha",)

    def __init__(
        self,
        num_gates: int,
        *,
        variant: names.MaskVariant = "hard",
        threshold: float = 0.1,
        slope: float = 5.0,
        slope_mode: names.SlopeMode = "fixed",
        threshold_mode: names.ThresholdMode = "fixed",
        init_alpha: float = 1.0,
        device: torch.device | str | None = None,
    ) -> None:
        super().__init__(num_gates)
        device = _checks.device("device", device)
        _checks.one_of("variant", variant, sorted(VARIANTS))
        _checks.number("threshold", threshold, 0)
        _checks.number("slope", slope, 0, above=True)
        _checks.number("init_alpha", init_alpha)
        _checks.one_of("slope_mode", slope_mode, SLOPES)
        _checks.one_of("threshold_mode", threshold_mode, THRESHOLDS)
        if threshold_mode == "trainable" and (variant == "hard_constant" or threshold == 0):
            raise ValueError(
                f"threshold_mode='trainable' with variant={variant!r}, threshold={threshold!r}: expected a mask that "
                "has a slope"
                " and a threshold above 0"
            )
        self._fixed = mask(variant, slope, threshold)
        self.variant, self.slope_mode, self.threshold_mode = variant, slope_mode, threshold_mode
        self._evaluated = self._fixed if variant in ("hard_constant", "exact_zero") else mask("hard", slope, threshold)
        self.init_alpha = float(init_alpha)
        self.alpha = nn.Parameter(torch.empty(self.num_gates, dtype=torch.float32, device=device))
        if slope_mode == "scheduled":
            self.register_buffer("slope", torch.empty(1, dtype=torch.float32, device=device))
        elif slope_mode == "trainable":
            self.log_slope = nn.Parameter(torch.empty(1, dtype=torch.float32, device=device))
        if threshold_mode == "trainable":
            self.log_threshold = nn.Parameter(torch.empty(1, dtype=torch.float32, device=device))
        self.reset_parameters()

    @torch.no_grad()
    def reset_parameters(self) -> None:
        """Set alpha, slope and threshold to their start values."""
        super().reset_parameters()
        self.alpha.fill_(self.init_alpha)
        if self.slope_mode == "scheduled":
            self.slope.fill_(self._fixed.beta)
        elif self.slope_mode == "trainable":
            self.log_slope.fill_(math.log(self._fixed.beta))
        if self.threshold_mode == "trainable":
            self.log_threshold.fill_(math.log(self._fixed.lo))

    @property
    def threshold(self) -> float | Tensor:
        """t: a number, or a tensor (1,) if it is trained."""
        return self._fixed.lo if self.threshold_mode == "fixed" else self.log_threshold.exp()

    def set_slope(self, slope: float) -> None:
        """Set the slope of the mask, above 0. Raises ValueError unless ``slope_mode`` is ``"scheduled"``."""
        if self.slope_mode != "scheduled":
            raise ValueError(f"slope_mode={self.slope_mode!r}: expected 'scheduled' for set_slope")
        self.slope.fill_(mask(self.variant, slope).beta)

    @property
    def spec(self) -> GateSpec:
        held = self._fixed if self.training else self._evaluated
        return VALUE_SPEC if self._beside(held) else held

    @property
    def parameter(self) -> Tensor:
        """alpha, (num_gates,), for the kernels; z itself where the mask is computed in plain PyTorch."""
        held = self._fixed if self.training else self._evaluated
        return self._masked(held) if self._beside(held) else self.alpha

    def deterministic(self) -> Tensor:
        held = self._evaluated
        return self._masked(held) if self._beside(held) else functional.sample_gates(self.alpha, spec=held)

    def open_probability(self) -> Tensor:
        """|alpha|, a surrogate of the count that the published loss is assumed to have. It is not a probability: it can
        exceed 1.
        """
        return self.alpha.abs()

    def is_open(self) -> Tensor:
        with torch.no_grad():
            return ~(self.alpha.abs().to(torch.float32) <= self.threshold)

    def levels(self) -> Tensor:
        """(|alpha| - t) / (1 - t), or |alpha| - t for a threshold of 1 or above."""
        low, span = self._ends()
        return (self.alpha.detach().abs() - low) / span

    @torch.no_grad()
    def set_levels_(self, levels: Tensor) -> None:
        """Set |alpha| to the levels; each alpha keeps its sign."""
        low, span = self._ends()
        self.alpha.copy_(torch.copysign((low + levels * span).clamp(min=0), self.alpha))

    def pull(self) -> Tensor:
        """-dL/dlevel of each gate, (num_gates,), from the gradient of alpha."""
        return (
            -gradient(self.alpha) * torch.copysign(torch.ones_like(self.alpha), self.alpha.detach()) * self._ends()[1]
        )

    def _ends(self) -> tuple[float, float]:
        """(|alpha| at level 0, the difference of |alpha| between level 1 and level 0)."""
        low = float(self.threshold)
        return low, 1 - low if low < 1 else 1.0

    def _beside(self, held: GateSpec) -> bool:
        """Whether the mask is computed in plain PyTorch, so that the kernels get z and not alpha.

        In evaluation a hard mask does not depend on the slope, so a changing slope is no reason then.
        """
        return self.threshold_mode != "fixed" or (
            self.slope_mode != "fixed" and (self.training or held.rule == EXACT_ZERO)
        )

    def _masked(self, held: GateSpec) -> Tensor:
        """z = alpha M in plain PyTorch, for the slope and the threshold of now."""
        slope: float | Tensor = held.beta
        if self.slope_mode != "fixed":
            # a copy, because set_slope may change it in place before the backward
            slope = self.slope.clone() if self.slope_mode == "scheduled" else self.log_slope.exp()
        return self.alpha * reference.mask(self.alpha, held.rule, slope, self.threshold)

    def extra_repr(self) -> str:
        threshold, slope = f"{self._fixed.lo:g} ({self.threshold_mode})", f"{self._fixed.beta:g} ({self.slope_mode})"
        return f"{self.num_gates}, variant={self.variant!r}, threshold={threshold}, slope={slope}"


def geometric_slope(step: int, steps: int, start: float = 1.0, end: float = 50.0) -> float:
    """The slope of an annealed mask after ``step`` of ``steps`` steps: start (end / start)^(step / steps), then
    ``end``.
    """
    for name, bound in (("start", start), ("end", end)):
        _checks.number(name, bound, 0, above=True)
    steps = _checks.positive_int("steps", steps)
    _checks.number("step", step, 0)
    return start * (end / start) ** min(step / steps, 1.0)


def foothill(x: Tensor, a: float = 1.0, b: float = 1.0) -> Tensor:
    """a x tanh(b x / 2), element by element; between L1 (large b) and L2. The form of arXiv 1901.06414, written from
    memory and not confirmed.
    """
    _checks.floating("x", _checks.tensor("x", x))
    _checks.number("a", a)
    _checks.number("b", b)
    return a * x * torch.tanh(b * x / 2)


def scale_penalty(
    gates: Iterable[DifferentiableMask],
    lam: float,
    regulariser: names.Regulariser = "l1",
    *,
    a: float = 1.0,
    b: float = 1.0,
) -> Tensor:
    """lam sum R(alpha) over all gates, a scalar; R is |alpha|, or :func:`foothill` with its ``a`` and ``b``."""
    _checks.one_of("regulariser", regulariser, REGULARISERS)
    found = _checks.items("gates", gates)
    if not found or not all(isinstance(gate, DifferentiableMask) for gate in found):
        raise ValueError(f"gates={found!r:.80}: expected at least one DifferentiableMask, and nothing else")
    _checks.number("lam", lam)
    alpha = torch.cat([gate.alpha for gate in found])
    return lam * (alpha.abs() if regulariser == "l1" else foothill(alpha, a, b)).sum()


def square_penalty(tensors: Iterable[Tensor], lam: float) -> Tensor:
    """lam sum ||t||^2, a scalar: once for the weights and once for the biases, each with its own lam."""
    found = [_checks.tensor("tensors", t) for t in _checks.items("tensors", tensors)]
    if not found:
        raise ValueError("tensors: expected at least one tensor")
    _checks.number("lam", lam)
    squares = [t.to(torch.promote_types(t.dtype, torch.float32)).square().sum() for t in found]
    return lam * torch.stack(squares).sum()
