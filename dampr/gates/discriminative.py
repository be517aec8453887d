"""DAM, discriminative masking: one learned offset per layer decides how many of its ordered gates are open."""

from __future__ import annotations

import math
from collections.abc import Iterable
from typing import get_args

import torch
from torch import Tensor, nn

from dampr import _checks, names
from dampr.spec import GateSpec, ramp

from .base import KernelGate, gradient

ORDERS = get_args(names.Order)
SHAPES = {"tanh": "tanh", "linear": "linear", "piecewise_linear": "clip"}


class DiscriminativeMask(KernelGate):
    """Ordered gates that one ``beta`` opens from the last to the first (Bu, Daw, Maruf, Karpatne, NeurIPS 2021, arXiv
    2110.00684).

    z_j = ReLU(tanh(alpha^2 (mu_j + beta))) with mu_j = (j / n) k. Gate j is closed iff beta <= -mu_j: open gates are
    always a suffix, and because beta is shared a closed gate opens again when the gates at the edge want it. The same
    in training and in evaluation.

    Args:
        num_gates: how many gates, n.
        k: the range of the offsets mu.
        alpha: the steepness, a constant (the authors' code squares it, the paper's appendix does not; they keep it at
            1).
        order: ``"zero"``: j = 0 ... n - 1, as in the code; ``"one"``: j = 1 ... n, as the paper can be read.
        shape: ``"tanh"``, or the variants in the code, ``"linear"``: alpha^2 (mu_j + beta), and ``"piecewise_linear"``:
            at most 1.
        init_beta: where beta starts; None: 1, and 0.1 for the linear shapes, as published.
        min_open: the last ``min_open`` gates never close, however low beta gets; its gradient stays as it is. The
            published code has no such guard, and closes a layer altogether at beta <= -k (n - 1) / n.
        weight_decay_on_beta: whether :func:`dampr.param_groups` lets the optimizer decay beta with the weights. The
            published code does (1e-3), and this sets the sparsity: where the data leaves beta alone it settles at -lam
            / (layers * decay).
        frozen: beta does not learn until ``gate.frozen = False``; the published cold start lasts 20 of 200 epochs.
        device: the device of beta. It is float32 and stays so under autocast and ``.half()``.

    ``beta`` is the only parameter, (1,). The published penalty is :func:`dam_penalty`.

    Raises: ValueError or TypeError that names the argument.

    >>> gate = DiscriminativeMask(4, init_beta=-2.0)
    >>> gate.open_slice()
    (2, 4)
    """

    level_parameters = ("beta",)

    def __init__(
        self,
        num_gates: int,
        *,
        k: float = 5.0,
        alpha: float = 1.0,
        order: names.Order = "zero",
        shape: names.WindowShape = "tanh",
        init_beta: float | None = None,
        min_open: int = 0,
        weight_decay_on_beta: bool = False,
        frozen: bool = False,
        device: torch.device | str | None = None,
    ) -> None:
        super().__init__(num_gates)
        device = _checks.device("device", device)
        for name, constant in (("k", k), ("alpha", alpha)):
            _checks.number(name, constant, 0, above=True)
        if init_beta is not None:
            _checks.number("init_beta", init_beta)
        _checks.one_of("order", order, ORDERS)
        _checks.one_of("shape", shape, sorted(SHAPES))
        min_open = _checks.positive_int("min_open", min_open, least=0)
        if min_open > self.num_gates:
            raise ValueError(f"min_open={min_open}: expected at most num_gates={num_gates}")
        self.k, self.alpha, self.order, self.shape = float(k), float(alpha), order, shape
        self.min_open = min_open
        self.weight_decay_on_beta = _checks.flag("weight_decay_on_beta", weight_decay_on_beta)
        self._ramp = ramp(SHAPES[shape])
        self.init_beta = (1.0 if shape == "tanh" else 0.1) if init_beta is None else float(init_beta)
        self.beta = nn.Parameter(torch.empty(1, dtype=torch.float32, device=device))
        self.reset_parameters()
        self.frozen = _checks.flag("frozen", frozen)

    @torch.no_grad()
    def reset_parameters(self) -> None:
        """Set beta to its start value; ``frozen`` does not change."""
        super().reset_parameters()
        self.beta.fill_(self.init_beta)

    @property
    def frozen(self) -> bool:
        """Whether beta does not learn."""
        return not self.beta.requires_grad

    @frozen.setter
    def frozen(self, frozen: bool) -> None:
        self.beta.requires_grad_(not frozen)

    @property
    def spec(self) -> GateSpec:
        return self._ramp

    @property
    def parameter(self) -> Tensor:
        """alpha^2 (mu_j + beta) of each gate, (num_gates,), the argument of the ramp; all gradients add up in beta."""
        beta: Tensor = self.beta
        if self.min_open:
            beta = beta + (self._lowest() - beta).clamp(min=0).detach()
        return self.alpha**2 * (self._mu() + beta)

    def _mu(self) -> Tensor:
        """The offsets mu_j, (num_gates,)."""
        first = ORDERS.index(self.order)
        # In this order the published counts of open gates hold in float32 too.
        return (
            torch.arange(first, first + self.num_gates, dtype=self.beta.dtype, device=self.beta.device)
            / self.num_gates
            * self.k
        )

    def _lowest(self) -> float:
        """The beta in the middle of those that leave exactly ``min_open`` gates open."""
        return (0.5 - self.num_gates + self.min_open - ORDERS.index(self.order)) * self.k / self.num_gates

    def deterministic(self) -> Tensor:
        return self.forward()

    def open_probability(self) -> Tensor:
        """1 + beta / k for every gate, kept in [0, 1]: together n + n beta / k, the number of open gates to within one.

        Linear in beta like the published penalty, with the gradient of the uncapped line above beta = 0, where beta
        starts, and none below -k.
        """
        share = 1 + self.beta.clamp(min=-self.k) / self.k
        return (share - (share - 1).clamp(min=0).detach()).expand(self.num_gates)

    def is_open(self) -> Tensor:
        return self.parameter.detach() > 0

    def open_slice(self) -> tuple[int, int]:
        """(start, stop) of the open gates, which are neighbours, as host integers: on a GPU this waits for beta."""
        return self.num_gates - int(self.is_open().sum()), self.num_gates

    def levels(self) -> Tensor:
        """mu_j + beta, (num_gates,). They increase with j and can only move together."""
        return (self._mu() + self.beta).detach()

    @torch.no_grad()
    def set_levels_(self, levels: Tensor) -> None:
        """Move beta so that as many gates are open as ``levels`` has above 0; within that, by the mean of the wanted
        moves.
        """
        mu, opened = self._mu(), int((levels > 0).sum())
        beta = self.beta + (levels - mu - self.beta).mean()
        step = self.k / self.num_gates
        first_open = mu[self.num_gates - opened] if opened else mu[-1] + step
        self.beta.copy_(beta.clamp(min=0.01 * step - first_open))
        if opened < self.num_gates:
            self.beta.clamp_(max=0.99 * step - first_open)

    def pull(self) -> Tensor:
        """-dL/dlevel of each gate, (num_gates,): the gradient of beta, divided equally."""
        return (-gradient(self.beta) / self.num_gates).expand(self.num_gates)

    def extra_repr(self) -> str:
        return (
            f"{self.num_gates}, k={self.k:g}, alpha={self.alpha:g}, order={self.order!r}, shape={self.shape!r}, "
            f"min_open={self.min_open}"
        )


def dam_penalty(gates: Iterable[DiscriminativeMask], lam: float, floor: float = -5.0) -> Tensor:
    """lam * mean_l max(beta_l, floor) over the masked layers, a scalar (Bu et al. 2021, the authors' code).

    It is negative if the betas are. In the published runs, lam is 0.1 or 0.2 for a network of 163 masks; for a single
    layer the penalty is lam * beta without a floor, with lam from 0.01 to 0.1.

    Args:
        gates: the masks of the layers.
        lam: the weight of the penalty.
        floor: the least value of a beta that counts; -inf for no floor.

    Raises: ValueError or TypeError that names the argument.
    """
    found = _checks.items("gates", gates)
    if not found or not all(isinstance(gate, DiscriminativeMask) for gate in found):
        raise ValueError(f"gates={found!r:.80}: expected at least one DiscriminativeMask, and nothing else")
    betas: list[Tensor] = [gate.beta for gate in found]
    _checks.number("lam", lam)
    if floor != -math.inf:  # -inf means no floor
        _checks.number("floor", floor)
    return lam * torch.cat(betas).clamp(min=floor).mean()
