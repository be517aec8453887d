"""z * norm(x), with the gates folded into the gain and bias of torch's own norm, so that no activation is multiplied.

It is composed of smaller operators; while torch.compile traces, of gates and products that it fuses into the norm. On
the CPU, if nothing has to see operators, it is one autograd function instead, because there each view, each autograd
node and each line of Python takes as long as the fold.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.nn import functional as F

from dampr.spec import GateSpec

from .backends import select
from .fold_weight import fold_weight
from .gate_args import GateArgs, GatePair
from .node import Node, differentiate_layer, needs_dispatcher
from .sample_gates import sample_gates


class BatchNorm(NamedTuple):
    """The arguments of ``F.batch_norm`` without the tensors that it multiplies; calling it runs the norm."""

    running_mean: Tensor | None
    running_var: Tensor | None
    training: bool
    momentum: float
    eps: float

    def __call__(self, x: Tensor, gain: Tensor | None, shift: Tensor | None) -> Tensor:
        return F.batch_norm(x, self.running_mean, self.running_var, gain, shift, self.training, self.momentum, self.eps)

    def fwd(self, x: Tensor, gain: Tensor, shift: Tensor | None) -> tuple[Tensor, Tensor, Tensor]:
        """(y, mean, 1 / standard deviation); the last two are for :meth:`bwd`."""
        return torch.native_batch_norm(x, gain, shift, *self)

    def bwd(
        self, dy: Tensor, x: Tensor, gain: Tensor, shift: Tensor | None, mean: Tensor, rstd: Tensor, needs: list[bool]
    ) -> Sequence[Tensor | None]:
        """The gradients of x, gain and shift, those that ``needs`` asks for."""
        running = self.running_mean, self.running_var
        grads: Sequence[Tensor | None] = torch.ops.aten.native_batch_norm_backward(
            dy, x, gain, *running, mean, rstd, self.training, self.eps, needs
        )
        return grads

    def again(self) -> BatchNorm:
        """The same norm for computing it a second time in a derivative: without an update of the running statistics."""
        return self._replace(running_mean=None, running_var=None) if self.training else self

    def refuses(self, x: Tensor, gain: Tensor, shift: Tensor | None) -> bool:
        """Whether torch would raise for x, or computes something else because x has so few elements."""
        vectors = gain, shift, self.running_mean, self.running_var
        return (
            x.dim() < 2
            or x.numel() <= x.shape[1]
            or self.eps <= 0
            or any(t is not None and t.numel() != x.shape[1] for t in vectors)
        )

    def gain_dtype(self, x: Tensor) -> torch.dtype:
        """The dtype of a gain of ones where the norm has none. Libraries allow a wider gain than x, of their
        statistics' dtype.
        """
        return torch.promote_types(x.dtype, torch.float32) if self.running_mean is None else self.running_mean.dtype


class LayerNorm(NamedTuple):
    """The arguments of ``F.layer_norm`` without the tensors that it multiplies; calling it runs the norm."""

    shape: list[int]
    eps: float

    def __call__(self, x: Tensor, gain: Tensor, shift: Tensor | None) -> Tensor:
        return F.layer_norm(x, self.shape, gain, shift, self.eps)

    def fwd(self, x: Tensor, gain: Tensor, shift: Tensor | None) -> tuple[Tensor, Tensor, Tensor]:
        """(y, mean, 1 / standard deviation); the last two are for :meth:`bwd`."""
        return torch.native_layer_norm(x, self.shape, gain, shift, self.eps)

    def bwd(
        self, dy: Tensor, x: Tensor, gain: Tensor, shift: Tensor | None, mean: Tensor, rstd: Tensor, needs: list[bool]
    ) -> Sequence[Tensor | None]:
        """The gradients of x, gain and shift, those that ``needs`` asks for."""
        grads: Sequence[Tensor | None] = torch.ops.aten.native_layer_norm_backward(
            dy, x, self.shape, mean, rstd, gain, shift, needs
        )
        return grads

    def again(self) -> LayerNorm:
        """This norm itself; a LayerNorm has no running statistics that computing it a second time could change."""
        return self

    def refuses(self, x: Tensor, gain: Tensor, shift: Tensor | None) -> bool:
        """Whether torch would raise for x: it is empty."""
        return x.numel() == 0

    def gain_dtype(self, x: Tensor) -> torch.dtype:
        """The dtype of a gain of ones where the norm has none."""
        return x.dtype


Norm = BatchNorm | LayerNorm


class _FoldedNorm(Node):
    """The autograd function of a norm with folded gates, on the CPU."""

    tensors = 5  # x, weight, bias, log_alpha and the seed of the gate

    @staticmethod
    def plain(
        x: Tensor,
        weight: Tensor,
        bias: Tensor | None,
        log_alpha: Tensor,
        seed: Tensor | None,
        spec: GateSpec,
        norm: Norm,
    ) -> Tensor:
        """z * norm(x) in differentiable torch operators."""
        return _composed(x, weight, bias, GateArgs(log_alpha, seed, spec).on_rows(), norm.again())

    @staticmethod
    def forward(  # type: ignore[override]
        ctx: Any,
        x: Tensor,
        weight: Tensor,
        bias: Tensor | None,
        log_alpha: Tensor,
        gate: GateArgs,
        norm: Norm,
        backend: Any,
    ) -> Tensor:
        """Fold the gates into gain and shift of the norm and normalise; both stay for the backward."""
        gain, shift = backend.fold(weight, bias, gate)
        y, mean, rstd = norm.fwd(x, gain, shift)
        ctx.save_for_backward(x, weight, bias, log_alpha, gate.seed, gain, shift, mean, rstd)
        ctx.constants, ctx.backend = (gate.spec, norm), backend
        return y

    @staticmethod
    def fused(ctx: Any, dy: Tensor) -> Any:
        """The gradients by the kernels: those of gain and shift, divided up among weight, bias and gates."""
        x, weight, bias, log_alpha, seed, gain, shift, mean, rstd = ctx.saved_tensors
        spec, norm = ctx.constants
        need_x, need_w, need_b, need_gate = needs = ctx.needs_input_grad[:4]
        gate = GateArgs(log_alpha, seed, spec)
        if needs_dispatcher((dy,)):
            whole = partial(_composed, norm=norm.again())
            dx, dw, db, _, dgate = differentiate_layer(
                whole, dy, (x, weight, bias), gate.on_rows(), (*needs[:3], False, need_gate)
            )
            return dx, dw, db, dgate, None, None, None
        vectors = need_w or need_gate, bias is not None and (need_b or need_gate)
        dx, dgain, dshift = norm.bwd(dy, x, gain, shift, mean, rstd, [need_x, *vectors])
        if not any(needs[1:]):
            return dx, *[None] * 6
        dgain = torch.empty_like(gain) if dgain is None else dgain
        return dx, *ctx.backend.unfold(dgain, dshift, weight, bias, gate, needs[1:]), None, None, None


_apply = _FoldedNorm.apply_at_once


def folded_norm(x: Tensor, weight: Tensor, bias: Tensor | None, gate: GateArgs, norm: Norm) -> Tensor:
    """z * norm(x), differentiable.

    weight, bias: in the shape that ``norm`` normalises, with one gate for each element. It does not check its
    arguments.
    """
    backend = getattr(select(x.device, weight.dtype), "folded_norm", None)
    tensors = x, weight, bias, gate.log_alpha
    if (
        backend is None
        or needs_dispatcher(tensors)
        or norm.refuses(x, weight, bias)
        or not weight.is_contiguous()
        or torch.is_autocast_enabled(x.device.type)
    ):
        return _composed(x, weight, bias, gate.on_rows(), norm)
    if torch.is_grad_enabled() and any(t is not None and t.requires_grad for t in tensors):
        y: Tensor = _apply(*tensors, gate, norm, backend)
        return y
    return norm(x, *backend.fold(weight, bias, gate))


def affine(weight: Tensor, bias: Tensor | None, gate: GateArgs) -> tuple[Tensor, Tensor | None]:
    """(z weight, z bias) in the dtype of ``weight``, differentiable; any shape, one gate for each element.

    It does not check its arguments.
    """
    return _affine(weight, bias, gate.on_rows())


def _composed(x: Tensor, weight: Tensor, bias: Tensor | None, gates: GatePair, norm: Norm) -> Tensor:
    """z * norm(x) by smaller operators."""
    return norm(x, *_affine(weight, bias, gates))


def _affine(weight: Tensor, bias: Tensor | None, gates: GatePair) -> tuple[Tensor, Tensor | None]:
    """(z weight, z bias) in the dtype of ``weight``, by operators."""
    if torch.compiler.is_compiling():
        assert gates.output is not None
        z = sample_gates(gates.output, None).view(weight.shape)
        return (weight * z).to(weight.dtype), None if bias is None else (bias * z).to(weight.dtype)
    # A gain is a weight with one column, and its rows carry the gates.
    gain, shift = fold_weight(weight.reshape(-1, 1), None if bias is None else bias.reshape(-1), gates, weight.dtype)
    return gain.view(weight.shape), None if shift is None else shift.view(weight.shape)
