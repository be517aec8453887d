"""GatedBatchNorm1d to 3d: gates behind a batch norm, in its gain and bias or, per sample, in one pass with it."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.nn.modules.batchnorm import _BatchNorm

from dampr import _checks, functional, names, ops
from dampr.functional.norm import ACTIVATIONS
from dampr.gates import GateLike
from dampr.ops.gate_args import GateArgs, gate_dtype
from dampr.ops.norm_gate import Norm, Running
from dampr.spec import SAMPLE, GateSpec

from .gated_norm import GatedNorm


class GatedBatchNorm(GatedNorm, _BatchNorm):
    activation: names.Activation | None
    followed: bool = False  # whether the activation is that of an AbsorbedReLU behind
    _arguments: tuple[str, ...] = ("num_features", "eps", "momentum", "affine", "track_running_stats")

    def __init__(
        self,
        num_features: int,
        eps: float = 1e-5,
        momentum: float | None = 0.1,
        affine: bool = True,
        track_running_stats: bool = True,
        device: Any = None,
        dtype: torch.dtype | None = None,
        *,
        bias: bool = True,
        gate: GateLike = "hard_concrete",
        per_sample: bool = False,
        activation: names.Activation | None = None,
    ) -> None:
        _checks.one_of("activation", activation, ACTIVATIONS)
        how: dict[str, Any] = {} if bias else {"bias": False}  # torch's own norms know it from 2.13 on
        super().__init__(num_features, eps, momentum, affine, track_running_stats, device, dtype, **how)
        self._place(gate, num_features, per_sample, device)
        self.activation = activation

    @classmethod
    def from_dense(
        cls,
        layer: Any,
        *,
        gate: GateLike = "hard_concrete",
        per_sample: bool = False,
        activation: names.Activation | None = None,
    ) -> Any:
        """As for every gated norm; ``activation="relu"`` computes the ReLU that follows ``layer``,
        which the caller then leaves out.
        """
        _checks.one_of("activation", activation, ACTIVATIONS)
        gated = super().from_dense(layer, gate=gate, per_sample=per_sample)
        gated.activation = activation
        return gated

    def to_dense(self) -> nn.Module:
        """The plain norm that computes what this one computes in evaluation mode, with copies of its parameters and
        statistics.

        A norm without gain gets one, for the gates to be in. With an activation of its own: ``nn.Sequential`` of the
        plain norm and ``nn.ReLU``.
        """
        dense = super().to_dense()
        return (
            dense if self.activation is None or self.followed else nn.Sequential(dense, nn.ReLU()).train(self.training)
        )

    def _gain_shape(self) -> tuple[int, ...]:
        return (self.num_features,)

    def forward(self, input: Tensor) -> Tensor:
        x = _checks.tensor("input", input)
        self._check_input_dim(x)
        parameter, seed, spec = self.gate.call()
        # To the ReLU behind: a compiler fuses it as well, and a transform has tensors that cannot be marked.
        left = self.followed and (torch.compiler.is_compiling() or ops.is_transformed())
        activation = None if left else self.activation
        y = self._gated(x, parameter, seed, spec, activation)
        if self.followed and not left and not y.is_inference():
            # as it is now: what is changed in place is rectified again
            y._dampr_rectified = y._version  # type: ignore[attr-defined]
        return y

    def _gated(
        self, x: Tensor, parameter: Tensor, seed: Tensor | None, spec: GateSpec, activation: names.Activation | None
    ) -> Tensor:
        """act(z batch_norm(x)), in one pass where that is to be had."""
        offset = self.gate.index_offset(x.shape[0]) if self.per_sample and seed is not None else 0
        y = None
        if self.training and not offset and self._fits(x, parameter):
            norm = Norm(self.weight, self.bias, self.eps, activation is not None)
            gates = GateArgs(parameter, seed, spec, self.per_sample and spec.rule == SAMPLE)
            y = ops.fused_norm(x, norm, gates, Running(*self._kept(), self.momentum))  # type: ignore[arg-type]
        return self._step_by_step(x, parameter, seed, spec, activation, offset) if y is None else y

    def _kept(self) -> tuple[Tensor | None, Tensor | None, Tensor | None]:
        """Running mean and variance and how many updates they have seen, those that this call moves."""
        if self.track_running_stats:
            return self.running_mean, self.running_var, self.num_batches_tracked
        return None, None, self.num_batches_tracked

    def _fits(self, x: Tensor, parameter: Tensor) -> bool:
        """Whether torch's own function would have nothing to refuse or to convert,
        so that a call may go straight to the pass.
        """
        weight, bias = self.weight, self.bias
        shape, wide, momentum = parameter.shape, parameter.dtype, self.momentum
        return (
            x.numel() > x.shape[1] == self.num_features == shape.numel()
            and wide == gate_dtype(x)
            and (weight is None or (weight.dtype == wide and weight.shape == shape))
            and (bias is None or (bias.dtype == wide and bias.shape == shape))
            and momentum is not None
            and 0 <= momentum <= 1
            and self.eps > 0  # 0 where nothing varies: torch's kernel has its own way
        )

    def _step_by_step(
        self,
        x: Tensor,
        parameter: Tensor,
        seed: Tensor | None,
        spec: GateSpec,
        activation: names.Activation | None,
        index_offset: int,
    ) -> Tensor:
        momentum = 0.0 if self.momentum is None else self.momentum
        if self.training and self.num_batches_tracked is not None:
            self.num_batches_tracked.add_(1)
            if self.momentum is None:  # a cumulative average
                momentum = 1.0 / float(self.num_batches_tracked)
        by_batch = self.training or (self.running_mean is None and self.running_var is None)
        kept = not self.training or self.track_running_stats
        statistics = (self.running_mean, self.running_var) if kept else (None, None)
        if not (self.per_sample and spec.rule == SAMPLE):
            y = self._normed(x, ops.BatchNorm(*statistics, by_batch, momentum, self.eps), parameter, seed, spec)
            return y if activation is None else F.relu(y)
        return functional.gated_batch_norm(
            x,
            parameter,
            self.weight,
            self.bias,
            *statistics,
            training=by_batch,
            momentum=momentum,
            eps=self.eps,
            seed=seed,
            per_sample=True,
            activation=activation,
            spec=spec,
            index_offset=index_offset,
        )

    def extra_repr(self) -> str:
        return f"{super().extra_repr()}, {self._describe_gates()}"

    def _describe_gates(self) -> str:
        described = super()._describe_gates()
        if self.activation is None:
            return described
        return f"{described}, activation={self.activation!r}{' of the layer behind' if self.followed else ''}"


class GatedBatchNorm2d(GatedBatchNorm, nn.BatchNorm2d):
    """``nn.BatchNorm2d`` with learned gates on its output channels: y = z * batch_norm(x), the gates folded into gain
    and bias.

    This is where the gates of a convolution's filters belong: a channel closed here is exactly zero for whatever reads
    it, and can be cut out together with the filter in front. Closed before the norm, it would be a constant that
    differs at padded borders.

    Args:
        num_features ... dtype: as in ``nn.BatchNorm2d``.
        gate: a family's name, a :class:`dampr.gates.Gate` subclass, or an instance to share.
        per_sample: in training, one draw per image instead of one per call (the placement of Dep-L0: convolution, norm,
            gate, ReLU). Norm, gates and activation are then one pass, and nothing of the size of the input is kept but
            the input.
        activation: "relu" to compute the ReLU that follows too, or None.

    ``weight`` and ``bias`` come first in ``parameters()``; a dense ``state_dict`` loads and leaves the gates as they
    are. A fresh layer equals the dense one in evaluation mode, to the bit.

    Raises: ValueError or TypeError that names the argument.
    """

    _dense = nn.BatchNorm2d


class GatedBatchNorm1d(GatedBatchNorm, nn.BatchNorm1d):
    """``nn.BatchNorm1d`` with learned gates on its output channels; everything as in :class:`GatedBatchNorm2d`,
    for (B, C) or (B, C, L).
    """

    _dense = nn.BatchNorm1d


class GatedBatchNorm3d(GatedBatchNorm, nn.BatchNorm3d):
    """``nn.BatchNorm3d`` with learned gates on its output channels; everything as in :class:`GatedBatchNorm2d`,
    for (B, C, D, H, W).
    """

    _dense = nn.BatchNorm3d
