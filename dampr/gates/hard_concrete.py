"""Hard concrete gates, the common base of the L0 methods."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from dampr import _checks, functional
from dampr.spec import GateSpec, hard_concrete

from .base import Gate

PRESETS = ("paper", "median", "binary")


class HardConcrete(Gate):
    """Stretched and clipped concrete gates with exact zeros and ones (Louizos, Welling, Kingma, ICLR 2018, eq. 10-12).

    Args:
        num_gates: how many gates.
        beta: temperature, above 0.
        gamma, zeta: the interval the concrete variable is stretched to; gamma < 0, zeta > 1.
        preset: the evaluation rule, by the publication it comes from. ``"paper"``: clip(sigmoid(log_alpha) (zeta - gamma) + gamma, 0, 1),
            no temperature. ``"median"``: the same of sigmoid(log_alpha / beta), the median of the distribution (Gallego-Posada et al.
            2022). ``"binary"``: 1 where the paper's gate exceeds one half, else 0 (Voita et al. 2019).
        init_log_alpha: where every log_alpha starts; None: at 3, or just high enough for a fresh evaluation gate to be exactly 1.
        device: where the parameters live. They are float32 and stay so under autocast and ``.half()``.

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
        preset: str = "paper",
        init_log_alpha: float | None = None,
        device: torch.device | str | None = None,
    ) -> None:
        super().__init__(num_gates)
        _checks.one_of("preset", preset, PRESETS)
        self.preset = preset
        self._drawn = hard_concrete("sample", beta, gamma, zeta)
        self._evaluated = hard_concrete(preset, beta, gamma, zeta)
        start = max(3.0, self._evaluated.hi + 0.1) if init_log_alpha is None else float(init_log_alpha)
        self.log_alpha = nn.Parameter(torch.full((num_gates,), start, dtype=torch.float32, device=device))

    @property
    def spec(self) -> GateSpec:
        return self._drawn if self.training else self._evaluated

    @property
    def parameter(self) -> Tensor:
        return self.log_alpha

    def forward(self, rows: int | None = None) -> Tensor:
        return functional.sample_gates(self.log_alpha, seed=self.draw_seed(), rows=rows, spec=self.spec)

    def deterministic(self) -> Tensor:
        return functional.sample_gates(self.log_alpha, spec=self._evaluated)

    def open_probability(self) -> Tensor:
        return functional.open_probability(self.log_alpha, spec=self._drawn)

    def is_open(self) -> Tensor:
        return self.log_alpha.detach() > self._evaluated.lo

    def extra_repr(self) -> str:
        s = self._drawn
        return f"{self.num_gates}, beta={s.beta:.4g}, gamma={s.gamma:g}, zeta={s.zeta:g}, preset={self.preset!r}"
