"""GatedBatchNorm1d to 3d and GatedLayerNorm: gates after a norm, in its gain and bias or, per sample,
in one pass with it.
"""

from __future__ import annotations

import math
import weakref
from typing import Any, cast

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.nn.modules.batchnorm import _BatchNorm

from dampr import _checks, functional, ops
from dampr.functional.inputs import gate_of
from dampr.functional.norm import ACTIVATIONS
from dampr.gates import Gate, make_gate, place_gate
from dampr.ops.gate_args import GateArgs, gate_dtype
from dampr.ops.norm_gate import Norm, Running
from dampr.spec import SAMPLE, GateSpec

from .base import GatedLayer, fresh_values, wide_dtype
from .computed import check_dense, refresh, settled
from .open_statistics import of_open

_made: weakref.WeakSet[Any] = weakref.WeakSet()  # every gated norm there is


def remember(norm: Any) -> None:
    """Have :func:`norms_with` know a gated norm."""
    _made.add(norm)


def norms_with(gate: Gate) -> list[Any]:
    """The gated norms that have this very gate."""
    return [norm for norm in _made if getattr(norm, "gate", None) is gate]


class GatedNorm(GatedLayer):
    """A norm with a gate for each channel, mixed in before the ``torch.nn`` layer in ``_dense``: y = z * norm(x).

    ``weights_per_gate`` is what closing a gate saves, for the penalty: its own gain and bias and, where
    :func:`dampr.convert` moved the gate of a layer in front into the norm, the parameters of that layer's channel.
    """

    weight: Any
    bias: Any
    training: bool
    weights_per_gate: float
    _dense: type[nn.Module]
    _arguments: tuple[str, ...]

    def _place(self, gate: str | type[Gate] | Gate, count: int, per_sample: bool, device: Any) -> None:
        self.granularity = "output"
        self.per_sample = _checks.flag("per_sample", per_sample)
        self.gate = place_gate(gate, count, device, self.per_sample)
        remember(self)
        self._count_weights()

    def __setstate__(self, state: dict[str, Any]) -> None:
        super().__setstate__(state)  # type: ignore[misc]
        remember(self)

    def _count_weights(self) -> None:
        self.weights_per_gate = float((self.weight is not None) + (self.bias is not None))

    def _normed(
        self, x: Tensor, norm: ops.BatchNorm | ops.LayerNorm, parameter: Tensor, seed: Tensor | None, spec: GateSpec
    ) -> Tensor:
        """norm(x) with these gates, one draw for all samples, in gain and bias."""
        weight = self.weight
        if weight is None:
            weight = torch.ones(self._gain_shape(), dtype=norm.gain_dtype(x), device=x.device)
        gate = gate_of("gate", parameter, weight.numel(), "channel", weight, seed, spec)
        return ops.whole_norm(x, weight, self.bias, gate, norm)

    def _gain_shape(self) -> tuple[int, ...]:
        raise NotImplementedError

    def _draws_per_sample(self) -> bool:
        return self.per_sample and self.gate.spec.rule == SAMPLE

    @classmethod
    def gates_for(cls, layer: Any, granularity: str = "output") -> int:
        """How many gates a dense ``layer`` would have, one for each channel."""
        count: int = layer.num_features if hasattr(layer, "num_features") else math.prod(layer.normalized_shape)
        return count

    @classmethod
    def from_dense(
        cls, layer: Any, *, gate: str | type[Gate] | Gate = "hard_concrete", per_sample: bool = False
    ) -> Any:
        """A gated norm with the very parameters and statistics of ``layer``, not copies. Raises TypeError unless its
        type is exactly the dense one.

        Where fresh gates are not 1, gain and bias are divided by them, so that the layer computes the same; a norm
        without gain and bias has nothing to divide, and ValueError is raised.
        """
        check_dense(layer, cls._dense)
        build: Any = cls
        device = next((t.device for t in [*layer.parameters(), *layer.buffers()]), None)
        if not isinstance(gate, Gate):
            count = math.prod(getattr(layer, "normalized_shape", None) or (layer.num_features,))
            gate = make_gate(gate, count, device)
        gated = build(
            **{name: getattr(layer, name) for name in cls._arguments}, device="meta", gate=gate, per_sample=per_sample
        )
        gated._parameters.update(layer._parameters)
        gated._buffers.update(layer._buffers)
        gated._count_weights()  # a LayerNorm may have a gain and no bias
        gated.train(layer.training)
        gated._undo_fresh_gates()
        return gated

    @torch.no_grad()
    def _undo_fresh_gates(self) -> None:
        if self.gate.starts_at_one():
            return
        z = fresh_values(self.gate)
        if self.weight is None or not bool((z != 0).all()):
            raise ValueError(
                f"gate={type(self.gate).__name__}: fresh gates are not 1, and this norm has no gain to make up for it"
            )
        self.weight.data = (self.weight / z.view(self.weight.shape)).to(self.weight.dtype)
        if self.bias is not None:
            self.bias.data = (self.bias / z.view(self.bias.shape)).to(self.bias.dtype)

    @torch.no_grad()
    @settled
    def to_dense(self) -> nn.Module:
        """The plain norm that computes what this one computes in evaluation mode,
        with copies of its parameters and statistics.

        A norm without gain gets one, for the gates to be in.
        """
        arguments = {name: getattr(self, name) for name in self._arguments}
        arguments |= {name: True for name in ("affine", "elementwise_affine") if name in arguments}
        like = next(
            (t for t in (self.weight, *self._own_buffers().values()) if t is not None and t.is_floating_point()), None
        )
        dense: Any = self._dense(**arguments, device="meta", dtype=None if like is None else like.dtype)
        z = self.gate.deterministic().view(self._gain_shape())
        wants_grad = self.weight is None or self.weight.requires_grad
        gain = z.clone() if self.weight is None else self.weight * z
        gain = gain if like is None else gain.to(like.dtype)
        dense.weight = nn.Parameter(gain, requires_grad=wants_grad)
        if dense.bias is not None:
            shift = torch.zeros_like(gain) if self.bias is None else (self.bias * z).to(self.bias.dtype)
            dense.bias = nn.Parameter(shift, requires_grad=wants_grad)
        if self.bias is None and self.weight is not None:
            dense.bias = None
        dense._buffers.update({name: None if t is None else t.clone() for name, t in self._own_buffers().items()})
        plain: nn.Module = dense.train(self.training)
        return plain

    def _own_buffers(self) -> dict[str, Tensor | None]:
        buffers: dict[str, Tensor | None] = self._buffers  # type: ignore[attr-defined]
        return buffers

    def closed_channels(self) -> tuple[set[int], set[int]]:
        return set((~self.gate.is_open()).nonzero().flatten().tolist()), set()

    def penalty(self, lam: float = 1.0, prior_precision: float = 0.0) -> Tensor:
        cost: float | Tensor = lam * self.weights_per_gate
        if prior_precision:
            refresh(cast(nn.Module, self))
        for t in (self.weight, self.bias) if prior_precision else ():
            if t is not None:
                cost = cost + 0.5 * prior_precision * wide_dtype(t).square().view(-1)
        total: Tensor = (self.gate.open_probability() * cost).sum()
        return total

    def _describe_gates(self) -> str:
        return f"per_sample={self.per_sample}"


class TakenReLU(nn.ReLU):
    """``nn.ReLU`` behind a batch norm that has taken it in: hands on what the norm has rectified,
    and rectifies everything else.

    :func:`dampr.convert` puts it in the place of an ``nn.ReLU``, :func:`dampr.compact` takes it out again.
    """

    def forward(self, input: Tensor) -> Tensor:
        version = None if torch.compiler.is_compiling() else getattr(input, "_dampr_rectified", None)
        return input if type(version) is int and version == input._version else super().forward(input)


class GatedBatchNorm(GatedNorm, _BatchNorm):
    activation: str | None
    followed: bool = False  # whether the activation is that of a TakenReLU behind
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
        gate: str | type[Gate] | Gate = "hard_concrete",
        per_sample: bool = False,
        activation: str | None = None,
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
        gate: str | type[Gate] | Gate = "hard_concrete",
        per_sample: bool = False,
        activation: str | None = None,
    ) -> Any:
        """As for every gated norm; ``activation="relu"`` takes in the ReLU that follows ``layer``,
        which the caller then leaves out.
        """
        _checks.one_of("activation", activation, ACTIVATIONS)
        gated = super().from_dense(layer, gate=gate, per_sample=per_sample)
        gated.activation = activation
        return gated

    def to_dense(self) -> nn.Module:
        """The plain norm that computes what this one computes in evaluation mode,
        with copies of its parameters and statistics.

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
            y._dampr_rectified = y._version  # type: ignore[attr-defined]  # as it is now: what is changed in place is rectified again
        return y

    def _gated(
        self, x: Tensor, parameter: Tensor, seed: Tensor | None, spec: GateSpec, activation: str | None
    ) -> Tensor:
        """act(z batch_norm(x)), in one pass where that is to be had."""
        offset = self.gate.index_offset(x.shape[0]) if self.per_sample and seed is not None else 0
        y = None
        if self.training and not offset and self._fits(x, parameter):
            norm = Norm(self.weight, self.bias, self.eps, activation is not None)
            gates = GateArgs(parameter, seed, spec, self.per_sample and spec.rule == SAMPLE)
            y = ops.whole_norm_gate(x, norm, gates, Running(*self._kept(), self.momentum))  # type: ignore[arg-type]
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
        activation: str | None,
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
    """``nn.BatchNorm2d`` with learned gates on its output channels: y = z * batch_norm(x),
    the gates folded into gain and bias.

    This is where the gates of a convolution's filters belong: a channel closed here is exactly zero for whatever reads
    it, and can be cut out together with the filter in front. Closed before the norm,
    it would be a constant that differs at padded borders.

    Args:
        num_features ... dtype: as in ``nn.BatchNorm2d``.
        gate: a family's name, a :class:`dampr.gates.Gate` subclass, or an instance to share.
        per_sample: in training, one draw per image instead of one per call (the placement of Dep-L0: convolution, norm,
            gate, ReLU). Norm, gates and activation are then one pass,
            and nothing of the size of the input is kept but the input.
        activation: "relu" to take in the ReLU that follows, or None.

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


class GatedLayerNorm(GatedNorm, nn.LayerNorm):
    """``nn.LayerNorm`` with a learned gate on each of the elements it normalises: y = z * layer_norm(x).

    Args:
        normalized_shape ... dtype: as in ``nn.LayerNorm``.
        gate: a family's name, a :class:`dampr.gates.Gate` subclass, or an instance to share; a gate for each element of
            ``normalized_shape``.
        per_sample: in training, one draw for each index of the first dimension of the input instead of one per call.
        statistics: "all": mean and variance see every element that comes in. "open": only those whose gate of this call
            is not exactly 0, so that the layer computes what a plain ``nn.LayerNorm`` of these alone computes, and
            closed elements can be cut. Not with ``per_sample``.

    Closed gates make zeros of what comes after; with statistics of the open ones nothing depends on what comes in
    there, as long as it is finite. Gates get their gradient through gain and bias; which elements count is a step of
    the gates, whose gradient is 0. "open" takes three more passes over the input, waits for no device, and keeps for
    the backward what it hands to ``F.layer_norm`` where the plain layer keeps its input.
    Equal to the plain layer to the bit while every gate is 1.

    Raises: ValueError or TypeError that names the argument.
    """

    _dense = nn.LayerNorm
    _arguments = ("normalized_shape", "eps", "elementwise_affine")

    def __init__(
        self,
        normalized_shape: int | list[int] | torch.Size,
        eps: float = 1e-5,
        elementwise_affine: bool = True,
        bias: bool = True,
        device: Any = None,
        dtype: torch.dtype | None = None,
        *,
        gate: str | type[Gate] | Gate = "hard_concrete",
        per_sample: bool = False,
        statistics: str = "all",
    ) -> None:
        _check_statistics(statistics, per_sample)
        super().__init__(normalized_shape, eps, elementwise_affine, bias, device, dtype)
        self._place(gate, math.prod(self.normalized_shape), per_sample, device)
        self.statistics = statistics

    @classmethod
    def from_dense(
        cls,
        layer: Any,
        *,
        gate: str | type[Gate] | Gate = "hard_concrete",
        per_sample: bool = False,
        statistics: str = "all",
    ) -> Any:
        """As for every gated norm."""
        _check_statistics(statistics, per_sample)
        gated = super().from_dense(layer, gate=gate, per_sample=per_sample)
        gated.statistics = statistics
        return gated

    def to_dense(self) -> nn.Module:
        """The plain norm that computes what this one computes in evaluation mode, with copies of its parameters.

        A norm without gain gets one, for gates that are not 1 to be in. Raises ValueError where ``statistics="open"``
        leaves elements out, which a plain norm of the same size would count: see :meth:`compacted`.
        """
        closed = self.closed_channels()[0] if self.statistics == "open" else set()
        if closed:
            raise ValueError(
                f"statistics='open' with {len(closed)} of {self.gate.num_gates} gates closed: expected all open, "
                "because a plain norm of "
                "the same size counts every element; compacted() gives that of the open ones"
            )
        return self._whole()

    def _whole(self) -> nn.Module:
        """The plain norm of the same size with the gates in gain and bias;
        elements that do not count are there to be cut.
        """
        plain: Any = super().to_dense()
        z = self.gate.deterministic()
        left = z[z != 0] if self.statistics == "open" else z
        if self.bias is None:
            plain.bias = None
        if self.weight is None and len(left) and bool((left == 1).all()):
            plain.weight, plain.elementwise_affine = None, False
        return plain

    @torch.no_grad()
    def compacted(self) -> tuple[nn.LayerNorm, Tensor]:
        """The plain norm of the open elements alone, of one dimension, and which these are, int64.

        ``plain(x.flatten(-n)[..., kept])`` for the n dimensions of ``normalized_shape``; what is left out is 0. One
        element at least is left, with a gain and bias of 0 where its gate was closed too. Raises ValueError with
        ``statistics="all"``, which counts the others.
        """
        if self.statistics != "open":
            raise ValueError(
                f"statistics={self.statistics!r}: expected 'open', because the closed elements count in the statistics"
            )
        kept = self.gate.is_open().nonzero().flatten()
        kept = kept if len(kept) else kept.new_zeros(1)
        plain: Any = self._whole()
        for name, p in list(plain.named_parameters()):
            setattr(plain, name, nn.Parameter(p.view(-1)[kept], requires_grad=p.requires_grad))
        plain.normalized_shape = (len(kept),)
        return plain, kept

    def _gain_shape(self) -> tuple[int, ...]:
        return tuple(self.normalized_shape)

    def forward(self, input: Tensor) -> Tensor:
        x, shape = _checks.tensor("input", input), list(self.normalized_shape)
        if self.sharded:
            return self._on_shards(x, shape)
        if self.statistics == "open":
            z = self.gate().view(shape)
            spread, factor = of_open(x, z.detach() != 0, tuple(range(-len(shape), 0)))
            gain = (z.to(torch.promote_types(z.dtype, x.dtype)) if self.weight is None else self.weight * z) / factor
            shift = None if self.bias is None else (self.bias * z).to(self.bias.dtype)
            return F.layer_norm(
                spread, shape, gain.to(x.dtype if self.weight is None else self.weight.dtype), shift, self.eps
            )
        if not self._draws_per_sample():
            return self._normed(x, ops.LayerNorm(shape, self.eps), *self.gate.call())
        y = F.layer_norm(x, shape, self.weight, self.bias, self.eps)
        parameter, seed, spec = self.gate.call()
        flat = y.flatten(y.dim() - len(shape))
        how: dict[str, Any] = {"per_sample": True, "spec": spec, "index_offset": self.gate.index_offset(flat.shape[0])}
        return functional.gate_activations(flat, parameter, dim=-1, seed=seed, **how).view(y.shape)

    def _on_shards(self, x: Tensor, shape: list[int]) -> Tensor:
        from . import sharded  # loads torch.distributed.tensor

        if self.statistics == "open":
            raise ValueError(
                "statistics='open' of a GatedLayerNorm under tensor parallelism: expected 'all', or the norm left out "
                "of the plan"
            )
        if self._draws_per_sample():
            z = self.gate(x.shape[0]).view(x.shape[0], *[1] * (x.dim() - 1 - len(shape)), *shape)
        else:
            z = self.gate().view(shape)
        return sharded.times(F.layer_norm(x, shape, self.weight, self.bias, self.eps), z)

    def extra_repr(self) -> str:
        return f"{super().extra_repr()}, {self._describe_gates()}"

    def _describe_gates(self) -> str:
        described = super()._describe_gates()
        return described if self.statistics == "all" else f"{described}, statistics={self.statistics!r}"


def _check_statistics(statistics: str, per_sample: bool) -> None:
    _checks.one_of("statistics", statistics, ("all", "open"))
    if _checks.flag("per_sample", per_sample) and statistics == "open":
        raise ValueError(
            "per_sample=True with statistics='open': expected False, because all samples share the elements that count"
        )
