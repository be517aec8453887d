"""A batch norm and the gates after it in one call for the forward and one for the backward: ``norms.h`` of csrc.

After a convolution has filled the caches, Python takes longer here than the arithmetic. So layouts are cached by shape,
and every argument of a call is written out.
"""

from __future__ import annotations

import functools
from collections.abc import Sequence

import torch
from torch import Tensor

from dampr import _C  # type: ignore[attr-defined]
from dampr.ops.gate_activations import planes
from dampr.ops.gate_args import GateArgs
from dampr.ops.norm_gate import Norm, Running

from .host import CODES

_NONE = Running(None, None, None, 0.0)


@functools.lru_cache(maxsize=1024)
def _layout(
    shape: torch.Size, stride: tuple[int, ...], per_sample: bool
) -> tuple[int, int, int, int, torch.memory_format, bool]:
    """(outer, middle, n, inner, memory format, whether the tensor has that format already); see
    :class:`dampr.ops.gate_activations.Planes`.
    """
    x = torch.empty_strided(shape, stride, device="meta")
    _, sizes, layout = planes(x, 1, per_sample)
    return *sizes[:4], layout, x.is_contiguous(memory_format=layout)


def norm_gate_fwd(
    x: Tensor, norm: Norm, gate: GateArgs, mean: Tensor | None, var: Tensor | None, running: Running | None = None
) -> tuple[Tensor, Tensor | None, Tensor | None]:
    """(y, mean, var); the last two are None if they were given.

    ``running``: statistics to update in the same call; contiguous, in the dtype of the vectors.
    """
    gain, bias, eps, relu = norm
    log_alpha, seed, spec, per_sample = gate
    outer, middle, n, inner, layout, dense = _layout(x.shape, x.stride(), per_sample)
    x = x if dense else x.contiguous(memory_format=layout)
    gain, bias = None if gain is None else gain.contiguous(), None if bias is None else bias.contiguous()
    log_alpha, out, training = log_alpha.contiguous(), torch.empty_like(x), mean is None or var is None
    if mean is None or var is None:
        mean, var = torch.empty_like(log_alpha), torch.empty_like(log_alpha)
    else:
        mean, var = mean.contiguous(), var.contiguous()
    running_mean, running_var, updates, momentum = running or _NONE
    _C.norm_gate_fwd(
        spec,
        CODES[x.dtype],
        x.data_ptr(),
        outer,
        middle,
        n,
        inner,
        log_alpha.data_ptr(),
        0 if seed is None else seed.data_ptr(),
        per_sample,
        0 if gain is None else gain.data_ptr(),
        0 if bias is None else bias.data_ptr(),
        training,
        mean.data_ptr(),
        var.data_ptr(),
        0 if running_mean is None else running_mean.data_ptr(),
        0 if running_var is None else running_var.data_ptr(),
        0 if updates is None else updates.data_ptr(),
        momentum,
        eps,
        relu,
        out.data_ptr(),
        torch.get_num_threads(),
    )
    return (out, mean, var) if training else (out, None, None)


def norm_gate_bwd(
    dy: Tensor, x: Tensor, norm: Norm, gate: GateArgs, mean: Tensor, var: Tensor, training: bool, needs: Sequence[bool]
) -> tuple[Tensor | None, ...]:
    """The gradients of x, gain, bias and log_alpha; ``training``: mean and var are those of x."""
    gain, bias, eps, relu = norm
    log_alpha, seed, spec, per_sample = gate
    outer, middle, n, inner, layout, dense = _layout(x.shape, x.stride(), per_sample)
    x = x if dense else x.contiguous(memory_format=layout)
    dy = dy.contiguous(memory_format=layout)
    gain, bias = None if gain is None else gain.contiguous(), None if bias is None else bias.contiguous()
    log_alpha, mean, var = log_alpha.contiguous(), mean.contiguous(), var.contiguous()
    dx = torch.empty_like(x) if needs[0] else None
    dgain = torch.empty_like(log_alpha) if needs[1] else None
    dbias = torch.empty_like(log_alpha) if needs[2] else None
    dlog_alpha = torch.empty_like(log_alpha) if needs[3] else None
    _C.norm_gate_bwd(
        spec,
        CODES[x.dtype],
        dy.data_ptr(),
        x.data_ptr(),
        outer,
        middle,
        n,
        inner,
        log_alpha.data_ptr(),
        0 if seed is None else seed.data_ptr(),
        per_sample,
        0 if gain is None else gain.data_ptr(),
        0 if bias is None else bias.data_ptr(),
        training,
        mean.data_ptr(),
        var.data_ptr(),
        eps,
        relu,
        0 if dx is None else dx.data_ptr(),
        0 if dgain is None else dgain.data_ptr(),
        0 if dbias is None else dbias.data_ptr(),
        0 if dlog_alpha is None else dlog_alpha.data_ptr(),
        torch.get_num_threads(),
    )
    return dx, dgain, dbias, dlog_alpha
