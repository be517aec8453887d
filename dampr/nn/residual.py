"""GatedResidual: a gate on a whole residual branch."""

from __future__ import annotations

import weakref
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm
from torch.nn.modules.conv import _ConvNd

from dampr import _checks
from dampr.gates import Gate as Family
from dampr.gates import GateLike, make_gate, ranks
from dampr.ops import is_transformed
from dampr.spec import HARD_CONCRETE, RAMP

from .base import GatedLayer, wide_dtype
from .computed import computed, copied
from .pruned.residual import Residual, add_scaled

_SCALABLE = (nn.Linear, _ConvNd, _BatchNorm, nn.LayerNorm, nn.GroupNorm)
FLAT_AT_ZERO = (HARD_CONCRETE, RAMP)  # families whose derivative is 0 where the gate is


class GatedResidual(GatedLayer, nn.Module):
    """A residual branch with a learned gate: y = x + z F(x).

    Args:
        branch: F, any module whose output is added to its first argument; further arguments are handed on.
        gate: a family's name, a :class:`dampr.gates.Gate` subclass, or an instance with one gate to share.
        per_sample: in training, one draw for each index of the first dimension of the input instead of one per call.
        device: the device of the gate; None: that of the parameters of ``branch``.

    A closed branch is not run: in evaluation never (the output is then ``x`` itself), and in training, on the CPU, when
    the draw is 0 and the family's gradient there is 0 too (hard concrete, ramps). Parameters of a branch that was not
    run get no gradient in that step (under DistributedDataParallel, which waits for one, zeros), and its BatchNorms see
    no batch. Where several ranks draw per sample outside of such a wrapper, every branch is run, because the ranks have
    to agree. On a GPU the draw is not waited for, and under ``torch.compile`` and ``torch.func`` no branch is left out.

    The penalty counts the parameters of the branch (those of gates inside excepted).

    Raises: ValueError or TypeError that names the argument.
    """

    def __init__(
        self,
        branch: nn.Module,
        *,
        gate: GateLike = "hard_concrete",
        per_sample: bool = False,
        device: Any = None,
    ) -> None:
        super().__init__()
        if not isinstance(branch, nn.Module):
            raise TypeError(f"branch={branch!r:.80}: expected a torch.nn.Module")
        if device is None:
            device = next((p.device for p in branch.parameters()), None)
        self.branch = branch
        self.granularity = "output"
        self.per_sample = _checks.flag("per_sample", per_sample)
        self.gate = make_gate(gate, 1, device)

    def forward(self, x: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        """``x`` plus the gate times ``branch(x, *args, **kwargs)``."""
        sample_dim = 0 if self.per_sample else None
        if self.sharded:
            from . import sharded  # loads torch.distributed.tensor

            z = self.gate(x.shape[0]) if self.per_sample and self.gate.draws else self.gate()
            branch = self.branch(x, *args, **kwargs)
            return x + sharded.times(branch, z.view(-1, *[1] * (branch.dim() - 1)))
        return gated_sum(x, lambda: self.branch(x, *args, **kwargs), self.gate, self.training, sample_dim, self.branch)

    def _weights(self) -> list[Tensor]:
        """The parameters of the branch, without those of gates in it."""
        gates = {id(p) for module in self.branch.modules() if isinstance(module, Family) for p in module.parameters()}
        return [p for p in self.branch.parameters() if id(p) not in gates]

    def penalty(self, lam: float = 1.0, prior_precision: float = 0.0) -> Tensor:
        weights = self._weights()
        cost: float | Tensor = lam * sum(p.numel() for p in weights)
        for p in weights if prior_precision else ():
            cost = cost + 0.5 * prior_precision * wide_dtype(p).square().sum()
        total: Tensor = (self.gate.open_probability() * cost).sum()
        return total

    def channel_gates(self) -> None:
        """None: the gate belongs to the branch and not to a channel."""

    def closed_channels(self) -> tuple[set[int], set[int]]:
        """Two empty sets: a closed branch switches off no channel of the sum."""
        return set(), set()

    @torch.no_grad()
    def to_dense(self) -> nn.Module:
        """``nn.Identity`` when the branch is closed, else :class:`Residual`: x + F(x), with a copy of the branch.

        A gate that is not 1 goes into the weight and bias of the linear, convolution or norm layer that ends the branch
        (the last of a ``Sequential``, or the branch itself); where there is none, it stays as the constant ``scale``.
        Gated layers inside the branch become plain as well.
        """
        plain = self.without_gate()
        for name, module in reversed(list(plain.named_modules())):
            if isinstance(module, GatedLayer):
                parent, _, child = name.rpartition(".")
                setattr(plain.get_submodule(parent), child, module.to_dense())
        return plain

    @torch.no_grad()
    def without_gate(self) -> nn.Module:
        """As :meth:`to_dense`, but gated layers inside the branch keep their gates."""
        z = self.gate.deterministic()
        if not bool(z != 0):
            return nn.Identity().train(self.training)
        branch = copied(self.branch)
        scale = None if bool(z == 1) or _scale_last(branch, z) else z.clone()
        return Residual(branch, scale).train(self.training)

    def extra_repr(self) -> str:
        return f"per_sample={self.per_sample}"


def gated_sum(
    x: Tensor,
    branch: Callable[[], Tensor],
    gate: Family,
    training: bool,
    sample_dim: int | None = None,
    owner: nn.Module | None = None,
) -> Tensor:
    """x + z branch(); the branch is not run in the cases that :class:`GatedResidual` describes.

    Args:
        x: the input.
        branch: computes the branch.
        gate: the one gate.
        training: whether to draw it.
        sample_dim: in training, the dimension of ``x`` whose indices have a draw each; None: there is one draw.
        owner: the module with the parameters of the branch.
    """
    seen = not torch.compiler.is_compiling() and not is_transformed()  # whether Python may look at a value
    if not training and seen and not bool(gate.is_open()):
        return x
    if sample_dim is not None and gate.draws:
        z = gate(x.shape[sample_dim]).view([-1 if i == sample_dim else 1 for i in range(x.dim())])
    else:
        z = gate()
    may_skip = seen and gate.spec.family in FLAT_AT_ZERO and x.device.type == "cpu"
    reduced = seen and _is_reduced(owner)
    may_skip = may_skip and (reduced or sample_dim is None or not ranks.several())
    if training and may_skip and not bool(z.detach().any()):
        y = (x + z).to(x.dtype)  # z is 0: a tensor of its own, and the graph of the gate stays connected
        idle = (
            [p for p in owner.parameters() if p.requires_grad]
            if reduced and owner is not None and y.requires_grad
            else []
        )
        return _WithIdle.apply(y, *idle) if idle else y
    return add_scaled(x, branch(), z)


_reduced: weakref.WeakSet[nn.Module] = weakref.WeakSet()  # modules that have run within a DistributedDataParallel


def _is_reduced(owner: nn.Module | None) -> bool:
    """Whether a DistributedDataParallel waits for the gradients of ``owner``.

    A checkpointed region is run a second time in the backward, outside of the wrapper, and must then do the same as in
    the first run; so modules that have run within a wrapper are remembered.
    """
    if ranks.wrapper() is None:
        return owner in _reduced
    if owner is not None:
        _reduced.add(owner)
    return True


class _WithIdle(torch.autograd.Function):
    """``y`` itself; the backward gives zeros as gradients to the parameters ``idle``, which had no part in it."""

    @staticmethod
    def forward(ctx: Any, y: Tensor, *idle: Tensor) -> Tensor:
        ctx.save_for_backward(*idle)
        return y.view_as(y)

    @staticmethod
    def backward(ctx: Any, *grads: Any) -> Any:
        return (*grads, *(torch.zeros_like(p) for p in ctx.saved_tensors))


def _scale_last(branch: nn.Module, z: Tensor) -> bool:
    """Multiply the layer that ends ``branch`` by ``z``.

    Returns False, and changes nothing, if the branch does not end in a layer with a weight of its own, or if that
    weight is used twice.
    """
    last = branch
    while isinstance(last, nn.Sequential) and len(last):
        last = last[-1]
    weight = getattr(last, "weight", None)
    if not isinstance(last, _SCALABLE) or not isinstance(weight, nn.Parameter) or computed(last) is not None:
        return False
    if [p is weight for _, p in branch.named_parameters(remove_duplicate=False)].count(True) != 1:
        return False
    for p in (weight, last.bias):
        if p is not None:
            p.data = (p * z).to(p.dtype)
    return True
