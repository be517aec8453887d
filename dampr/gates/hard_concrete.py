"""Hard concrete gates, the base of the L0 methods."""

from __future__ import annotations

import math
from typing import get_args

import torch
from torch import Tensor, nn

from dampr import _checks, functional, names
from dampr.spec import GateSpec, hard_concrete

from .base import KernelGate, gradient

PRESETS = get_args(names.Preset)

# The arguments with which published code makes its gates: HardConcrete(n, **PUBLISHED["voita2019"]).
PUBLISHED = {
    "louizos2018": {"preset": "paper", "beta": 2.0 / 3.0},
    "gallego2022": {"preset": "median", "beta": 2.0 / 3.0},
    "voita2019": {"preset": "binary", "beta": 0.33},
}

LOGIT_LIMIT = math.log(100.0)


class ConcreteGate(KernelGate):
    """The code that hard concrete gates share, wherever their ``log_alpha``, (num_gates,), comes from."""

    log_alpha: Tensor
    level_parameters = ("log_alpha",)
    parameter_name = "log_alpha"

    def __init__(self, num_gates: int, *, beta: float, gamma: float, zeta: float, preset: names.Preset) -> None:
        super().__init__(num_gates)
        _checks.one_of("preset", preset, PRESETS)
        self.preset = preset
        self._drawn = hard_concrete("sample", beta, gamma, zeta)
        self._evaluated = hard_concrete(preset, beta, gamma, zeta)

    @property
    def spec(self) -> GateSpec:
        return self._drawn if self.training else self._evaluated

    @property
    def parameter(self) -> Tensor:
        return self.log_alpha

    def deterministic(self) -> Tensor:
        return functional.sample_gates(self.log_alpha, spec=self._evaluated)

    def open_probability(self) -> Tensor:
        return functional.open_probability(self.log_alpha, spec=self._drawn)

    def is_open(self) -> Tensor:
        return self.log_alpha.detach() > self._evaluated.lo

    def levels(self) -> Tensor:
        """(log_alpha - lo) / (hi - lo), (num_gates,), where evaluation closes a gate at lo and a fresh gate starts
        at hi.
        """
        lo, hi = self._ends()
        return (self.log_alpha.detach() - lo) / (hi - lo)

    def _log_alpha_at(self, levels: Tensor) -> Tensor:
        """The log_alpha at these levels, within +-ln 100."""
        lo, hi = self._ends()
        return (lo + levels * (hi - lo)).clamp(-LOGIT_LIMIT, LOGIT_LIMIT)

    def _ends(self) -> tuple[float, float]:
        """(log_alpha at level 0, log_alpha at level 1)."""
        return self._evaluated.lo, max(3.0, self._evaluated.hi + 0.1)

    def extra_repr(self) -> str:
        s = self._drawn
        return f"{self.num_gates}, beta={s.beta:.4g}, gamma={s.gamma:g}, zeta={s.zeta:g}, preset={self.preset!r}"


class HardConcrete(ConcreteGate):
    """Stretched and clipped concrete gates with exact zeros and ones (Louizos, Welling, Kingma, ICLR 2018, eq. 10-12).

    Args:
        num_gates: how many gates.
        beta: temperature, above 0.
        gamma, zeta: the interval the concrete variable is stretched to; gamma < 0, zeta > 1.
        preset: the evaluation rule, by the publication it comes from. ``"paper"``: clip(sigmoid(log_alpha) (zeta -
            gamma) + gamma, 0, 1), no temperature. ``"median"``: the same of sigmoid(log_alpha / beta), the median of
            the distribution (Gallego-Posada et al. 2022). ``"binary"``: 1 where the paper's gate exceeds one half, else
            0 (Voita et al. 2019).
        init_log_alpha: where every log_alpha starts; None: at 3, or just high enough for a fresh evaluation gate to be
            exactly 1.
        droprate: start as published instead: log_alpha ~ N(ln(1 - d) - ln d, 0.01), with 0.5 in place of a d of 0.
        device: the device of the parameters. They are float32 and stay so under autocast and ``.half()``.

    :data:`PUBLISHED` has the constants of code that disagrees. Published code clips the noise u to [1e-6, 1 - 1e-6];
    here it lies in [2^-24, 1 - 2^-24] on every backend. That differs for two draws in a million, and only for gates
    with |log_alpha| above 12.

    Raises: ValueError or TypeError that names the argument.

    >>> gate = HardConcrete(4).eval()
    >>> gate()
    tensor([1., 1., 1., 1.], grad_fn=<_SampleGatesBackward>)
    """

    def __init__(
        self,
        num_gates: int,
        *,
        beta: float = 2.0 / 3.0,
        gamma: float = -0.1,
        zeta: float = 1.1,
        preset: names.Preset = "paper",
        init_log_alpha: float | None = None,
        droprate: float | None = None,
        device: torch.device | str | None = None,
    ) -> None:
        super().__init__(num_gates, beta=beta, gamma=gamma, zeta=zeta, preset=preset)
        if droprate is not None and _checks.number("droprate", droprate, 0, 1) == 1:
            raise ValueError(f"droprate={droprate!r}: expected a number in [0, 1)")
        if init_log_alpha is not None:
            _checks.number("init_log_alpha", init_log_alpha)
        if droprate is not None and init_log_alpha is not None:
            raise ValueError(
                f"droprate={droprate!r} with init_log_alpha={init_log_alpha!r}: expected one, each says where gates "
                "start"
            )
        self.init_log_alpha, self.droprate = init_log_alpha, droprate
        device = _checks.device("device", device)
        self.log_alpha = nn.Parameter(torch.empty(self.num_gates, dtype=torch.float32, device=device))
        self.reset_parameters()

    @torch.no_grad()
    def reset_parameters(self) -> None:
        """Set every log_alpha to its start value: ``init_log_alpha``, or the default for None.

        With ``droprate`` d, draw each log_alpha from N(ln(1 - d) - ln d, 0.01) instead.
        """
        super().reset_parameters()
        if self.droprate is not None:
            d = self.droprate or 0.5  # a drop rate of 0 would start at infinity; published code takes 0.5 in its place
            self.log_alpha.normal_(math.log(1 - d) - math.log(d), 0.01)
        else:
            self.log_alpha.fill_(self._ends()[1] if self.init_log_alpha is None else float(self.init_log_alpha))

    @torch.no_grad()
    def set_levels_(self, levels: Tensor) -> None:
        self.log_alpha.copy_(self._log_alpha_at(levels))

    def pull(self) -> Tensor:
        """-dL/dlevel of each gate, (num_gates,), from the gradient of log_alpha."""
        lo, hi = self._ends()
        return -gradient(self.log_alpha) * (hi - lo)

    @torch.no_grad()
    def clamp_(self, limit: float = LOGIT_LIMIT) -> None:
        """Clamp every log_alpha to +-limit. The published runs do this after every optimizer step, with ln 100."""
        self.log_alpha.clamp_(-limit, limit)
