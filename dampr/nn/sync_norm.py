"""GatedSyncBatchNorm: a gated batch norm whose statistics are taken over all ranks, on CPUs too."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, distributed, nn
from torch.nn.modules.module import register_module_module_registration_hook

from dampr import functional, names
from dampr.gates import Gate, GateLike
from dampr.ops.gate_args import gate_dtype
from dampr.spec import SAMPLE, GateSpec

from .batch_norm import GatedBatchNorm
from .gated_norm import norms_with, remember


class GatedSyncBatchNorm(GatedBatchNorm):
    """``nn.SyncBatchNorm`` with learned gates on its output channels: y = z * sync_batch_norm(x), with the ReLU that
    follows in one pass.

    In training, mean and variance are those of the rows of all ranks of the group: one message of 2 C + 1 numbers in
    the forward and one of 2 C in the backward, as torch has them. Ranks may have batches of different sizes. It runs on
    CPUs too, where ``nn.SyncBatchNorm`` does not train, and is therefore no subclass of that, which
    DistributedDataParallel would refuse there. ``nn.SyncBatchNorm.convert_sync_batchnorm(model)`` makes it of the gated
    batch norms of a model.

    Args:
        num_features ... dtype: as in ``nn.SyncBatchNorm``.
        gate, per_sample, activation: as for :class:`dampr.nn.GatedBatchNorm2d`.

    Raises: ValueError or TypeError that names the argument.
    """

    alone: bool = False  # whether to use the statistics of this process alone, in trial runs on one rank
    _dense = nn.SyncBatchNorm
    _arguments = (*GatedBatchNorm._arguments, "process_group")

    def __init__(
        self,
        num_features: int,
        eps: float = 1e-5,
        momentum: float | None = 0.1,
        affine: bool = True,
        track_running_stats: bool = True,
        process_group: Any = None,
        device: Any = None,
        dtype: torch.dtype | None = None,
        *,
        bias: bool = True,
        gate: GateLike = "hard_concrete",
        per_sample: bool = False,
        activation: names.Activation | None = None,
    ) -> None:
        how: dict[str, Any] = {"bias": bias, "gate": gate, "per_sample": per_sample, "activation": activation}
        super().__init__(num_features, eps, momentum, affine, track_running_stats, device, dtype, **how)
        self.process_group = process_group

    def _check_input_dim(self, input: Tensor) -> None:
        if input.dim() < 2:
            raise ValueError(f"x.shape={tuple(input.shape)}: expected (B, C) or more dimensions")

    def _gated(
        self, x: Tensor, parameter: Tensor, seed: Tensor | None, spec: GateSpec, activation: names.Activation | None
    ) -> Tensor:
        """In training, normalise by the statistics of all ranks of the process group, which have gradients; else as a
        BatchNorm on one rank.
        """
        group = self._group() if self.training else None
        if group is None:
            return super()._gated(x, parameter, seed, spec, activation)
        mean, var, count = _statistics(x, group)
        self._move_running(mean, var, count)
        if x.requires_grad and torch.is_grad_enabled():
            x = _ThroughStatistics.apply(x, mean, (var + self.eps).rsqrt(), count, group)
        per_sample = self.per_sample and spec.rule == SAMPLE
        return functional.gated_batch_norm(
            x,
            parameter,
            self.weight,
            self.bias,
            mean,
            var,
            eps=self.eps,
            seed=seed,
            per_sample=per_sample,
            activation=activation,
            spec=spec,
            index_offset=self.gate.index_offset(x.shape[0]) if per_sample else 0,
        )

    def _group(self) -> Any:
        """The process group to take statistics with; None if that is one rank."""
        if self.alone or not (distributed.is_available() and distributed.is_initialized()):
            return None
        group = self.process_group or distributed.group.WORLD
        return group if distributed.get_world_size(group) > 1 else None

    @torch.no_grad()
    def _move_running(self, mean: Tensor, var: Tensor, count: Tensor) -> None:
        """Update the running statistics with the batch's mean and biased variance, (C,); ``count``: values per
        channel.
        """
        if not self.track_running_stats:
            return
        assert self.num_batches_tracked is not None
        self.num_batches_tracked.add_(1)
        weight = 1.0 / float(self.num_batches_tracked) if self.momentum is None else self.momentum
        unbiased = var * (count / (count - 1).clamp(min=1))
        for kept, new in ((self.running_mean, mean), (self.running_var, unbiased)):
            if kept is not None:
                kept.lerp_(new.to(kept.dtype), weight)


@torch.no_grad()
def _statistics(x: Tensor, group: Any) -> tuple[Tensor, Tensor, Tensor]:
    """(mean (C,), biased variance (C,), number of values per channel) of x over all ranks.

    Raises: ValueError if there is one value per channel on all ranks together.
    """
    wide, dims = x.to(gate_dtype(x)), [d for d in range(x.dim()) if d != 1]
    count = wide.new_tensor(float(x.numel() // max(1, x.shape[1])))
    if x.numel():
        var, mean = torch.var_mean(wide, dims, correction=0)
    else:
        var = mean = wide.new_zeros(x.shape[1])
    mine = torch.cat([mean, var * count, count.view(1)])
    every = [torch.empty_like(mine) for _ in range(distributed.get_world_size(group))]
    distributed.all_gather(every, mine, group=group)
    means, squares, counts = torch.stack(every).split([x.shape[1], x.shape[1], 1], 1)
    total = counts.sum()
    if float(total) == 1:
        raise ValueError(
            f"x.shape={tuple(x.shape)}: expected more than one value per channel on all ranks together in training"
        )
    together = (means * counts).sum(0) / total
    spread = squares.sum(0) + (counts * (means - together).square()).sum(0)
    return together, spread / total, total


class _ThroughStatistics(torch.autograd.Function):
    """``x`` itself, with the backward of a norm whose statistics depend on the x of all ranks.

    The backward gets the gradient that treats mean and variance as constants, and adds the part that flows through
    them.
    """

    @staticmethod
    def forward(ctx: Any, x: Tensor, mean: Tensor, rstd: Tensor, count: Tensor, group: Any) -> Tensor:
        ctx.save_for_backward(x, mean, rstd, count)
        ctx.group = group
        return x.view_as(x)

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, dx: Tensor) -> Any:
        """The gradient of x with the part that goes through the mean and the variance, whose sums are taken over all
        ranks.
        """
        x, mean, rstd, count = ctx.saved_tensors
        shape, dims = [1, -1] + [1] * (x.dim() - 2), [d for d in range(x.dim()) if d != 1]
        wide, centred = dx.to(mean.dtype), x.to(mean.dtype) - mean.view(shape)
        sums = torch.stack([wide.sum(dims), (wide * centred).sum(dims)])
        distributed.all_reduce(sums, group=ctx.group)
        first, second = sums / count
        dx = wide - first.view(shape) - centred * (rstd.square() * second).view(shape)
        return dx.to(x.dtype), None, None, None, None


def _keep_gates(module: nn.Module, name: str, gate: nn.Module | None) -> None:
    """Registration hook: let ``nn.SyncBatchNorm.convert_sync_batchnorm`` keep the gates of gated batch norms.

    That function makes a plain ``nn.SyncBatchNorm`` and copies children, among them ``gate``. When the gate arrives,
    the new module becomes a :class:`GatedSyncBatchNorm` with the settings of the norm that it replaces.
    """
    if type(module) is not nn.SyncBatchNorm or name != "gate" or not isinstance(gate, Gate):
        return
    for norm in norms_with(gate):
        if (
            isinstance(norm, GatedBatchNorm)
            and norm.weight is module.weight
            and norm.running_mean is module.running_mean
        ):
            module.__class__ = GatedSyncBatchNorm  # type: ignore[assignment]
            for attribute in ("granularity", "per_sample", "weights_per_gate", "activation", "followed"):
                setattr(module, attribute, getattr(norm, attribute))
            remember(module)
            return


register_module_module_registration_hook(_keep_gates)
