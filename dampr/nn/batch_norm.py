"""GatedBatchNorm1d, 2d and 3d: batch norms with a gate on each output channel.

Gates that are the same for all samples are multiplied into gain and bias, and torch's batch norm runs. Gates per sample
are multiplied in one pass together with the norm (and a ReLU).
"""

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
    """The code that the gated batch norms of all dimensions share; see :class:`GatedBatchNorm2d`.

    Attributes:
        activation: "relu" if the layer computes the ReLU that follows it too, else None.
        followed: whether an :class:`AbsorbedReLU`, which has replaced the model's ReLU, follows the layer.
    """

    activation: names.Activation | None
    followed: bool = False  # whether the activation is that of an AbsorbedReLU which follows the norm
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
        how: dict[str, Any] = {} if bias else {"bias": False}  # torch's norms have this argument from 2.13 on
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
        """As :meth:`GatedNorm.from_dense`.

        ``activation="relu"``: compute the ReLU that follows ``layer`` too; the caller then leaves that out.
        """
        _checks.one_of("activation", activation, ACTIVATIONS)
        gated = super().from_dense(layer, gate=gate, per_sample=per_sample)
        gated.activation = activation
        return gated

    def to_dense(self) -> nn.Module:
        """The plain norm that computes what this layer computes in evaluation mode, with copies of parameters and
        statistics.

        A norm without a gain gets one, which holds the gates. If the layer computes a ReLU of its own, the result is an
        ``nn.Sequential`` of the plain norm and ``nn.ReLU``.
        """
        dense = super().to_dense()
        return (
            dense if self.activation is None or self.followed else nn.Sequential(dense, nn.ReLU()).train(self.training)
        )

    def _gain_shape(self) -> tuple[int, ...]:
        return (self.num_features,)

    def forward(self, input: Tensor) -> Tensor:
        """The gated norm of ``input``, followed by ``activation``; the result has the shape of ``input``.

        If an :class:`AbsorbedReLU` follows the norm (``followed``), the attribute ``_dampr_rectified`` of the result
        tells it that the ReLU is computed already. Under torch.compile and torch.func transforms the norm leaves the
        ReLU to the :class:`AbsorbedReLU`.
        """
        x = _checks.tensor("input", input)
        self._check_input_dim(x)
        parameter, seed, spec = self.gate.call()
        # Leave the ReLU to the AbsorbedReLU that follows: torch.compile fuses it there, and the tensors of torch.func
        # transforms cannot be marked as rectified.
        leaves_relu = self.followed and (torch.compiler.is_compiling() or ops.is_transformed())
        activation = None if leaves_relu else self.activation
        y = self._gated(x, parameter, seed, spec, activation)
        if self.followed and not leaves_relu and not y.is_inference():
            # mark y as rectified in its present version; if it is changed in place, AbsorbedReLU rectifies it again
            y._dampr_rectified = y._version  # type: ignore[attr-defined]
        return y

    def _gated(
        self, x: Tensor, parameter: Tensor, seed: Tensor | None, spec: GateSpec, activation: names.Activation | None
    ) -> Tensor:
        """act(z batch_norm(x)), in one fused pass if the input allows it."""
        offset = self.gate.index_offset(x.shape[0]) if self.per_sample and seed is not None else 0
        y = None
        if self.training and not offset and self._fits(x, parameter):
            norm = Norm(self.weight, self.bias, self.eps, activation is not None)
            gates = GateArgs(parameter, seed, spec, self.per_sample and spec.rule == SAMPLE)
            y = ops.fused_norm(x, norm, gates, Running(*self._kept(), self.momentum))  # type: ignore[arg-type]
        return self._step_by_step(x, parameter, seed, spec, activation, offset) if y is None else y

    def _kept(self) -> tuple[Tensor | None, Tensor | None, Tensor | None]:
        """(running mean, running variance, number of updates) that this call updates; None for those that are not
        tracked.
        """
        if self.track_running_stats:
            return self.running_mean, self.running_var, self.num_batches_tracked
        return None, None, self.num_batches_tracked

    def _fits(self, x: Tensor, parameter: Tensor) -> bool:
        """Whether torch's batch norm would neither raise for these arguments nor convert them, so that the fused pass
        may run.
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
            and self.eps > 0  # with eps = 0 a constant channel divides 0 by 0, which torch's kernel handles its own way
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
        """act(z batch_norm(x)) in torch's norm and our operators, with the running statistics updated as
        ``nn.BatchNorm`` does.

        Arguments as :meth:`_gated`; ``index_offset`` is the number of the first sample for draws per sample.
        """
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
