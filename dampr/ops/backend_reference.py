"""The reference as a backend: values from :mod:`dampr.reference`, gradients written out in plain PyTorch (an op runs below autograd)."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from dampr import reference
from dampr.spec import GateSpec

from .gate_activations import dense_format
from .library import rows_of


def unavailable(device: torch.device, dtype: torch.dtype) -> str | None:
    """None: the reference runs wherever the ops are registered."""
    return None


def route(
    M: int,
    N: int,
    K: int,
    dtype: torch.dtype,
    granularity: str | tuple[int, int],
    per_sample: bool,
    device: torch.device | None = None,
    drawn: bool = True,
) -> tuple[str, str]:
    """Plain PyTorch has one way, whatever is forced."""
    return "reference", "plain PyTorch: every gate is drawn and multiplied as it is written"


def sample_gates_fwd(log_alpha: Tensor, seed: Tensor | None, rows: int | None, spec: GateSpec) -> Tensor:
    return reference.gate_values(log_alpha, spec, seed, rows).clone()


def sample_gates_bwd(dz: Tensor, log_alpha: Tensor, seed: Tensor | None, rows: int | None, spec: GateSpec) -> Tensor:
    grad = dz * reference.gate_derivative(log_alpha, spec, reference.noise(log_alpha, spec, seed, rows))
    return grad if rows is None else grad.sum(0)


def gated_linear_fwd(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    input_log_alpha: Tensor | None,
    output_log_alpha: Tensor | None,
    input_seed: Tensor | None,
    output_seed: Tensor | None,
    spec: GateSpec,
    per_sample: bool,
    keep_pre: bool,
) -> tuple[Tensor, Tensor]:
    args = (input_seed, output_seed, spec, per_sample)
    y = reference.gated_linear(x, weight, bias, input_log_alpha, output_log_alpha, *args)
    pre = reference.gated_linear(x, weight, bias, input_log_alpha, None, *args) if keep_pre else x.new_empty(0)
    return y, pre


def gated_linear_bwd(
    dy: Tensor,
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    input_log_alpha: Tensor | None,
    output_log_alpha: Tensor | None,
    input_seed: Tensor | None,
    output_seed: Tensor | None,
    pre: Tensor,
    spec: GateSpec,
    per_sample: bool,
    needs: Sequence[bool],
) -> tuple[Tensor | None, ...]:
    need_x, need_w, need_b, need_in, need_out = needs
    x2, dy2, w = rows_of(x), rows_of(dy), weight.to(x.dtype)
    draws = x2.shape[0] if per_sample else None

    def gate(log_alpha: Tensor | None, seed: Tensor | None) -> Tensor:
        return x.new_ones(()) if log_alpha is None else reference.gate_values(log_alpha, spec, seed, draws).to(x.dtype)

    def through(upstream: Tensor, log_alpha: Tensor, seed: Tensor | None) -> Tensor:
        """sum over rows of upstream * z', with (rows, n) -> (n,)."""
        upstream = upstream.to(log_alpha.dtype)
        return sample_gates_bwd(upstream if per_sample else upstream.sum(0), log_alpha, seed, draws, spec)

    z_in, z_out = gate(input_log_alpha, input_seed), gate(output_log_alpha, output_seed)
    xz, g = x2 * z_in, dy2 * z_out
    back = g @ w if need_x or need_in else None
    dx = dw = db = din = dout = None
    if need_x and back is not None:
        dx = (back * z_in).view(x.shape)
    if need_w:
        dw = (g.t() @ xz).to(weight.dtype)
    if need_b and bias is not None:
        db = g.sum(0).to(bias.dtype)
    if need_in and input_log_alpha is not None and back is not None:
        din = through(x2 * back, input_log_alpha, input_seed)
    if need_out and output_log_alpha is not None:
        before = torch.nn.functional.linear(xz, w, None if bias is None else bias.to(x.dtype))
        dout = through(dy2 * before, output_log_alpha, output_seed)
    return dx, dw, db, din, dout


def weight_gated_linear_fwd(
    x: Tensor, weight: Tensor, bias: Tensor | None, log_alpha: Tensor, seed: Tensor | None, spec: GateSpec, block: tuple[int, int]
) -> Tensor:
    return reference.weight_gated_linear(x, weight, bias, log_alpha, seed, spec, block)


def weight_gated_linear_bwd(
    dy: Tensor,
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    log_alpha: Tensor,
    seed: Tensor | None,
    spec: GateSpec,
    block: tuple[int, int],
    needs: Sequence[bool],
) -> tuple[Tensor | None, ...]:
    need_x, need_w, need_b, need_gate = needs
    x2, dy2 = rows_of(x), rows_of(dy)
    dx = (dy2 @ fold_blocks_fwd(weight, log_alpha, seed, spec, block, x.dtype)).view(x.shape) if need_x else None
    db = dy2.sum(0).to(bias.dtype) if need_b and bias is not None else None
    if not (need_w or need_gate):
        return dx, None, db, None
    dw, dlog_alpha = fold_blocks_bwd(dy2.t() @ x2, weight, log_alpha, seed, spec, block, (need_w, need_gate))
    return dx, dw, db, dlog_alpha


def fold_weight_fwd(
    weight: Tensor,
    bias: Tensor | None,
    input_log_alpha: Tensor | None,
    output_log_alpha: Tensor | None,
    input_seed: Tensor | None,
    output_seed: Tensor | None,
    spec: GateSpec,
    dtype: torch.dtype,
) -> tuple[Tensor, Tensor | None]:
    z_in, z_out = _gate(weight, input_log_alpha, input_seed, spec), _gate(weight, output_log_alpha, output_seed, spec)
    folded = weight * z_out.unsqueeze(-1) * z_in
    return folded.to(dtype), None if bias is None else (bias * z_out).to(dtype)


def fold_weight_bwd(
    raw: Tensor,
    raw_bias: Tensor | None,
    weight: Tensor,
    bias: Tensor | None,
    input_log_alpha: Tensor | None,
    output_log_alpha: Tensor | None,
    input_seed: Tensor | None,
    output_seed: Tensor | None,
    spec: GateSpec,
    needs: Sequence[bool],
) -> tuple[Tensor | None, ...]:
    need_w, need_b, need_in, need_out = needs
    z_in, z_out = _gate(weight, input_log_alpha, input_seed, spec), _gate(weight, output_log_alpha, output_seed, spec)
    raw = raw.to(z_in.dtype)
    dw = (raw * z_out.unsqueeze(-1) * z_in).to(weight.dtype) if need_w else None
    db = (raw_bias * z_out).to(bias.dtype) if need_b and bias is not None and raw_bias is not None else None
    din = dout = None
    if need_in and input_log_alpha is not None:
        din = sample_gates_bwd((raw * weight * z_out.unsqueeze(-1)).sum(0), input_log_alpha, input_seed, None, spec)
    if need_out and output_log_alpha is not None:
        dz = (raw * weight * z_in).sum(1)
        if bias is not None and raw_bias is not None:
            dz = dz + bias * raw_bias
        dout = sample_gates_bwd(dz, output_log_alpha, output_seed, None, spec)
    return dw, db, din, dout


def _gate(weight: Tensor, log_alpha: Tensor | None, seed: Tensor | None, spec: GateSpec) -> Tensor:
    """Gates as they are, or a one in the dtype that gates have beside ``weight``."""
    dtype = torch.promote_types(weight.dtype, torch.float32)
    return weight.new_ones((), dtype=dtype) if log_alpha is None else reference.gate_values(log_alpha, spec, seed)


def fold_blocks_fwd(
    weight: Tensor, log_alpha: Tensor, seed: Tensor | None, spec: GateSpec, block: tuple[int, int], dtype: torch.dtype
) -> Tensor:
    z = reference.expand_blocks(reference.gate_values(log_alpha, spec, seed), (weight.shape[0], weight.shape[1]), block)
    return (weight * z).to(dtype)


def fold_blocks_bwd(
    raw: Tensor, weight: Tensor, log_alpha: Tensor, seed: Tensor | None, spec: GateSpec, block: tuple[int, int], needs: Sequence[bool]
) -> tuple[Tensor | None, Tensor | None]:
    shape = weight.shape[0], weight.shape[1]
    raw = raw.to(log_alpha.dtype)
    dw = dlog_alpha = None
    if needs[0]:
        dw = (raw * reference.expand_blocks(reference.gate_values(log_alpha, spec, seed), shape, block)).to(weight.dtype)
    if needs[1]:
        owner = reference.expand_blocks(torch.arange(log_alpha.numel(), device=raw.device), shape, block)
        dz = torch.zeros_like(log_alpha).index_add(0, owner.reshape(-1), (raw * weight).reshape(-1))
        dlog_alpha = sample_gates_bwd(dz, log_alpha, seed, None, spec)
    return dw, dlog_alpha


def gate_activations_fwd(x: Tensor, log_alpha: Tensor, seed: Tensor | None, spec: GateSpec, dim: int, per_sample: bool) -> Tensor:
    z = reference.gate_values(log_alpha, spec, seed, x.shape[0] if per_sample else None)
    return (x * reference.along(z, x, dim)).to(x.dtype).contiguous(memory_format=dense_format(x, dim))


def gate_activations_bwd(
    dy: Tensor,
    x: Tensor,
    log_alpha: Tensor,
    seed: Tensor | None,
    spec: GateSpec,
    dim: int,
    per_sample: bool,
    needs: Sequence[bool],
) -> tuple[Tensor | None, Tensor | None]:
    rows = x.shape[0] if per_sample else None
    dx = gate_activations_fwd(dy, log_alpha, seed, spec, dim, per_sample) if needs[0] else None
    if not needs[1]:
        return dx, None
    shared = [i for i in range(x.dim()) if i != dim and not (per_sample and i == 0)]
    dz = dy.to(log_alpha.dtype) * x
    dz = dz.sum(shared) if shared else dz
    return dx, sample_gates_bwd(dz, log_alpha, seed, rows, spec)


def conv_route(
    weight: tuple[int, ...], groups: int, granularity: str | tuple[int, int], per_sample: bool, pointwise: bool, device: torch.device
) -> tuple[str, str]:
    """Plain PyTorch has one way, whatever is forced."""
    return ("passes" if per_sample else "fold"), "plain PyTorch: every gate is drawn and multiplied as it is written"


def gated_conv2d_fwd(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    input_log_alpha: Tensor | None,
    output_log_alpha: Tensor | None,
    input_seed: Tensor | None,
    output_seed: Tensor | None,
    spec: GateSpec,
    stride: tuple[int, int],
    padding: tuple[int, int],
    dilation: tuple[int, int],
    groups: int,
) -> Tensor:
    gates = input_log_alpha, output_log_alpha, input_seed, output_seed
    y = reference.gated_conv(x, weight, bias, *gates, spec, False, stride=stride, padding=padding, dilation=dilation, groups=groups)
    return y.contiguous(memory_format=torch.channels_last)


def _over_channels(t: Tensor, like: Tensor) -> Tensor:
    """(C,) shaped to broadcast to ``like`` (B, C, ...)."""
    return reference.along(t, like, 1)


def _normalised(x: Tensor, mean: Tensor, var: Tensor, eps: float) -> tuple[Tensor, Tensor]:
    """(x - mean) rstd in the dtype of the statistics, and rstd (C,)."""
    rstd = (var + eps).rsqrt()
    return (x.to(mean.dtype) - _over_channels(mean, x)) * _over_channels(rstd, x), rstd


def norm_gate_fwd(
    x: Tensor,
    gain: Tensor | None,
    bias: Tensor | None,
    log_alpha: Tensor,
    seed: Tensor | None,
    mean: Tensor | None,
    var: Tensor | None,
    eps: float,
    spec: GateSpec,
    per_sample: bool,
    relu: bool,
) -> tuple[Tensor, Tensor | None, Tensor | None]:
    batch = mean is None or var is None
    if mean is None or var is None:
        shared = [i for i in range(x.dim()) if i != 1]
        none = torch.zeros_like(log_alpha)
        var, mean = torch.var_mean(x.to(log_alpha.dtype), shared, correction=0) if x.numel() else (none, none.clone())
    pre = _before_gates(_normalised(x, mean, var, eps)[0], gain, bias)
    y = pre * reference.along(reference.gate_values(log_alpha, spec, seed, x.shape[0] if per_sample else None), x, 1)
    y = (y.relu() if relu else y).to(x.dtype).contiguous(memory_format=dense_format(x, 1))
    return (y, mean, var) if batch else (y, None, None)


def _before_gates(normalised: Tensor, gain: Tensor | None, bias: Tensor | None) -> Tensor:
    pre = normalised if gain is None else normalised * _over_channels(gain, normalised)
    return pre if bias is None else pre + _over_channels(bias, normalised)


def norm_gate_bwd(
    dy: Tensor,
    x: Tensor,
    gain: Tensor | None,
    bias: Tensor | None,
    log_alpha: Tensor,
    seed: Tensor | None,
    mean: Tensor,
    var: Tensor,
    eps: float,
    spec: GateSpec,
    per_sample: bool,
    relu: bool,
    training: bool,
    needs: Sequence[bool],
) -> tuple[Tensor | None, ...]:
    rows = x.shape[0] if per_sample else None
    inner = list(range(2, x.dim()))
    normalised, rstd = _normalised(x, mean, var, eps)
    pre = _before_gates(normalised, gain, bias)
    z = reference.along(reference.gate_values(log_alpha, spec, seed, rows), x, 1)
    passed = dy.to(pre.dtype)
    if relu:
        passed = passed.where(pre * z > 0, passed.new_zeros(()))
    dpre = passed * z
    dgain, dbias = (dpre * normalised).sum([0, *inner]), dpre.sum([0, *inner])
    dx = dlog_alpha = None
    if needs[0]:
        dx = dpre
        if training:
            count = max(1, x.numel() // max(1, x.shape[1]))
            dx = dx - _over_channels(dbias / count, x) - normalised * _over_channels(dgain / count, x)
        dx = dx * _over_channels(rstd if gain is None else gain * rstd, x)
        dx = dx.to(x.dtype).contiguous(memory_format=dense_format(x, 1))
    if needs[3]:
        dz = (passed * pre).sum(inner) if inner else passed * pre
        dlog_alpha = sample_gates_bwd(dz if per_sample else dz.sum(0), log_alpha, seed, rows, spec)
    return dx, dgain if needs[1] else None, dbias if needs[2] else None, dlog_alpha
