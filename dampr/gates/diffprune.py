"""DiffPrune: gates that are a one-sided function of a learned, possibly noisy, number. A reconstruction."""

from __future__ import annotations

import math
from typing import get_args

import torch
from torch import Tensor, nn

from dampr import _checks, functional, names, philox
from dampr.spec import GateSpec, ramp

from .base import VALUE_SPEC, KernelGate, gradient

# shape -> (name in dampr.spec, default sharpness kappa); for B and C kappa is 1 / eps with eps = 0.1
SHAPES = {
    "A": ("tanh", 5.0),
    "B": ("ratio", 10.0),
    "C": ("square_ratio", 10.0),
    "D": ("exponential", 5.0),
    "E": ("clip", 5.0),
}
REVIVALS = (None, *get_args(names.Revival))
LEAK = 0.1
FRESH_PHI = 0.5


class DiffPrune(KernelGate):
    """z = h(x), exactly 0 for x <= 0, with x = phi or x = phi + sigma xi (after Shulman 2020, arXiv 2012.03653).

    Confirmed, by the abstract alone: gates multiply parameters or activations element by element, take exact zero
    values, are computed deterministically or stochastically, as a differentiable transformation of a real random vector
    that approximates a multivariate Bernoulli one; a surrogate of the L0 loss makes them sparse. The equations were not
    available: shapes, constants, surrogates and everything below are a reconstruction that is consistent with that.

    Args:
        num_gates: how many gates.
        shape: h(x) for x > 0. ``"A"``: tanh(kappa x); ``"B"``: x / (x + eps); ``"C"``: x^2 / (x^2 + eps^2); ``"D"``: 1
            - exp(-kappa x); ``"E"``: min(kappa x, 1).
        sharpness: kappa, for B and C 1 / eps; None: 5, for B and C 10.
        init_phi: the start value of every phi.
        stochastic: in training x = phi + sigma xi with xi ~ N(0, 1), one draw per call, and sigma learned; in
            evaluation x = phi. The draw is made beside the kernels, so layers that draw inside them refuse
            ``per_sample=True`` (docs/methods.md says why); a residual branch, rows of an embedding and activations
            grouped by an index do draw per sample.
        init_sigma: the start value of sigma; with ``revive="noise"``, its constant value.
        revive: how a closed gate that is not stochastic can open again, for it has no gradient. ``"noise"``: noise of
            a constant sigma in training; ``"straight_through"``: in training, the backward uses the slope 0.1 kappa for
            x <= 0; None: it cannot.
        device: the device of the parameters. They are float32 and stay so under autocast and ``.half()``.

    Raises: ValueError or TypeError that names the argument.

    >>> DiffPrune(3).open_probability()
    tensor([0.9866, 0.9866, 0.9866], grad_fn=<_SampleGatesBackward>)
    """

    level_parameters = ("phi",)

    def __init__(
        self,
        num_gates: int,
        *,
        shape: names.RampShape = "A",
        sharpness: float | None = None,
        init_phi: float = FRESH_PHI,
        stochastic: bool = False,
        init_sigma: float = 0.1,
        revive: names.Revival | None = None,
        device: torch.device | str | None = None,
    ) -> None:
        super().__init__(num_gates)
        device = _checks.device("device", device)
        _checks.one_of("shape", shape, sorted(SHAPES))
        _checks.one_of("revive", revive, REVIVALS)
        if _checks.flag("stochastic", stochastic) and revive is not None:
            raise ValueError(
                f"revive={revive!r} with stochastic=True: expected None, the noise already opens closed gates"
            )
        _checks.number("init_sigma", init_sigma, 0, above=True)
        _checks.number("init_phi", init_phi)
        name, usual = SHAPES[shape]
        self.shape, self.stochastic, self.revive, self.init_sigma = shape, bool(stochastic), revive, float(init_sigma)
        self._ramp = ramp(name, usual if sharpness is None else sharpness)
        self.draws_once = self.stochastic or revive == "noise"
        self.init_phi = float(init_phi)
        self.phi = nn.Parameter(torch.empty(self.num_gates, dtype=torch.float32, device=device))
        if stochastic:
            self.log_sigma = nn.Parameter(torch.empty(self.num_gates, dtype=torch.float32, device=device))
        self.reset_parameters()

    @torch.no_grad()
    def reset_parameters(self) -> None:
        """Set every phi, and sigma of stochastic gates, to its start value."""
        super().reset_parameters()
        self.phi.fill_(self.init_phi)
        if self.stochastic:
            self.log_sigma.fill_(math.log(self.init_sigma))

    @property
    def spec(self) -> GateSpec:
        return VALUE_SPEC if self._leaks() else self._ramp

    @property
    def parameter(self) -> Tensor:
        """x, float32 (num_gates,), the argument of h in the fused kernels; with noise, drawn anew in each call in
        training.

        In training with ``revive="straight_through"`` it is z itself.
        """
        x = self._drawn(None)
        return self._leaky(x) if self._leaks() else x

    def forward(self, rows: int | None = None) -> Tensor:
        rows = _checks.rows(rows)
        x = self._drawn(rows)
        z = self._leaky(x) if self._leaks() else functional.sample_gates(x.reshape(-1), spec=self._ramp).view(x.shape)
        return z if rows is None else z.expand(rows, self.num_gates)

    def deterministic(self) -> Tensor:
        return functional.sample_gates(self.phi, spec=self._ramp)

    def open_probability(self) -> Tensor:
        """The probability that a gate is open, float32 (num_gates,), with a graph.

        For stochastic gates it is Phi(phi / sigma), the probability that x > 0. For others it is h(phi), which has no
        gradient where a gate is closed.
        """
        if self.stochastic:
            return torch.special.ndtr(self.phi / self.log_sigma.exp())
        return functional.sample_gates(self.phi, spec=self._ramp)

    def is_open(self) -> Tensor:
        return self.phi.detach() > 0

    def levels(self) -> Tensor:
        """The position of each gate, float32 (num_gates,) without a graph: phi / 0.5, so that a fresh gate is at 1 and
        a gate is closed at 0 and below.

        A budget that learns the gates reads and sets levels (:meth:`dampr.gates.Gate.levels`).
        """
        return self.phi.detach() / FRESH_PHI

    @torch.no_grad()
    def set_levels_(self, levels: Tensor) -> None:
        """Set phi to 0.5 times ``levels``, (num_gates,)."""
        self.phi.copy_(levels * FRESH_PHI)

    def pull(self) -> Tensor:
        """-dL/dlevel of each gate, (num_gates,), from the gradient of phi."""
        return -gradient(self.phi) * FRESH_PHI

    def _leaks(self) -> bool:
        """Whether closed gates get a gradient in this mode (``revive="straight_through"`` in training)."""
        return self.training and self.revive == "straight_through"

    def _leaky(self, x: Tensor) -> Tensor:
        """h(x), whose gradient for x <= 0 is 0.1 kappa instead of 0."""
        below = x.clamp(max=0)
        return functional.sample_gates(x, spec=self._ramp) + LEAK * self._ramp.beta * (below - below.detach())

    def _drawn(self, rows: int | None) -> Tensor:
        """x with its noise: (num_gates,), or (rows, num_gates) with a draw for each row.

        Without noise it is phi, (num_gates,).
        """
        if not self.training or not (self.stochastic or self.revive == "noise"):
            return self.phi
        shape = (self.num_gates,) if rows is None else (rows, self.num_gates)
        start = 0 if rows is None else self.index_offset(rows) * self.num_gates
        u = philox.uniform(self.draw_seed(self.phi.device), math.prod(shape), start).view(shape)
        xi = torch.special.ndtri(u.to(self.phi.dtype))
        return self.phi + (self.log_sigma.exp() if self.stochastic else self.init_sigma) * xi

    def extra_repr(self) -> str:
        kind = f"stochastic={self.stochastic}, revive={self.revive!r}"
        return f"{self.num_gates}, shape={self.shape!r}, sharpness={self._ramp.beta:g}, {kind}"
