"""y = norm(x) with gain z * weight and bias z * bias, around torch's own norm: the gates are folded into vectors,
no activation is touched.

Made of smaller ops; while torch.compile traces, of gates by themselves and products that it fuses into the norm. On the
CPU, where nobody needs operators, it is one node of autograd instead, because beside a cold cache each view, node and
line of Python costs as much as the fold.
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
    """``F.batch_norm`` but for the tensors that it multiplies."""

    running_mean: Tensor | None
    running_var: Tensor | None
    training: bool
    momentum: float
    eps: float

    def __call__(self, x: Tensor, gain: Tensor | None, shift: Tensor | None) -> Tensor:
        return F.batch_norm(x, self.running_mean, self.running_var, gain, shift, self.training, self.momentum, self.eps)

    def fwd(self, x: Tensor, gain: Tensor, shift: Tensor | None) -> tuple[Tensor, Tensor, Tensor]:
        """y, and mean and 1 / standard deviation for :meth:`bwd`."""
        return torch.native_batch_norm(x, gain, shift, *self)

    def bwd(
        self, dy: Tensor, x: Tensor, gain: Tensor, shift: Tensor | None, mean: Tensor, rstd: Tensor, needs: list[bool]
    ) -> Sequence[Tensor | None]:
        running = self.running_mean, self.running_var
        grads: Sequence[Tensor | None] = torch.ops.aten.native_batch_norm_backward(
            dy, x, gain, *running, mean, rstd, self.training, self.eps, needs
        )
        return grads

    def again(self) -> BatchNorm:
        """The same once more, for derivatives, without an update of the running statistics."""
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
        """The dtype of a gain that stands for none: vendors take one that is wider than x, like their statistics."""
        return torch.promote_types(x.dtype, torch.float32) if self.running_mean is None else self.running_mean.dtype


class LayerNorm(NamedTuple):
    """``F.layer_norm`` but for the tensors that it multiplies."""

    shape: list[int]
    eps: float

    def __call__(self, x: Tensor, gain: Tensor, shift: Tensor | None) -> Tensor:
        return F.layer_norm(x, self.shape, gain, shift, self.eps)

    def fwd(self, x: Tensor, gain: Tensor, shift: Tensor | None) -> tuple[Tensor, Tensor, Tensor]:
        return torch.native_layer_norm(x, self.shape, gain, shift, self.eps)

    def bwd(
        self, dy: Tensor, x: Tensor, gain: Tensor, shift: Tensor | None, mean: Tensor, rstd: Tensor, needs: list[bool]
    ) -> Sequence[Tensor | None]:
        grads: Sequence[Tensor | None] = torch.ops.aten.native_layer_norm_backward(
            dy, x, self.shape, mean, rstd, gain, shift, needs
        )
        return grads

    def again(self) -> LayerNorm:
        return self

    def refuses(self, x: Tensor, gain: Tensor, shift: Tensor | None) -> bool:
        return x.numel() == 0

    def gain_dtype(self, x: Tensor) -> torch.dtype:
        return x.dtype


Norm = BatchNorm | LayerNorm


class _FoldedNorm(Node):
    tensors = 5  # with the seed, which takes the place of the gate among the inputs

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
        gain, shift = backend.fold(weight, bias, gate)
        y, mean, rstd = norm.fwd(x, gain, shift)
        ctx.save_for_backward(x, weight, bias, log_alpha, gate.seed, gain, shift, mean, rstd)
        ctx.constants, ctx.backend = (gate.spec, norm), backend
        return y

    @staticmethod
    def fused(ctx: Any, dy: Tensor) -> Any:
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
    """Differentiable; weight, bias: the shape that ``norm`` normalises, a gate for each element;
    arguments are taken as checked.
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
    """(z weight, z bias) in the dtype of ``weight``, differentiable; any shape, a gate for each element;
    arguments are taken as checked.
    """
    return _affine(weight, bias, gate.on_rows())


def _composed(x: Tensor, weight: Tensor, bias: Tensor | None, gates: GatePair, norm: Norm) -> Tensor:
    return norm(x, *_affine(weight, bias, gates))


def _affine(weight: Tensor, bias: Tensor | None, gates: GatePair) -> tuple[Tensor, Tensor | None]:
    if torch.compiler.is_compiling():
        assert gates.output is not None
        z = sample_gates(gates.output, None).view(weight.shape)
        return (weight * z).to(weight.dtype), None if bias is None else (bias * z).to(weight.dtype)
    # A gain is a weight with one column, and its rows carry the gates.
    gain, shift = fold_weight(weight.reshape(-1, 1), None if bias is None else bias.reshape(-1), gates, weight.dtype)
    return gain.view(weight.shape), None if shift is None else shift.view(weight.shape)
