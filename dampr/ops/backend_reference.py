"""The reference as a backend: values from :mod:`dampr.reference`, gradients written out in plain PyTorch (an op runs below autograd)."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from dampr import reference
from dampr.spec import GateSpec

from .library import rows_of


def unavailable(device: torch.device, dtype: torch.dtype) -> str | None:
    """None: the reference runs wherever the ops are registered."""
    return None


def route(M: int, N: int, K: int, dtype: torch.dtype, granularity: str | tuple[int, int], per_sample: bool) -> tuple[str, str]:
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
    z = reference.expand_blocks(reference.gate_values(log_alpha, spec, seed), (weight.shape[0], weight.shape[1]), block)
    dx = (dy2 @ (weight * z).to(x.dtype)).view(x.shape) if need_x else None
    db = dy2.sum(0).to(bias.dtype) if need_b and bias is not None else None
    if not (need_w or need_gate):
        return dx, None, db, None
    raw = (dy2.t() @ x2).to(z.dtype)
    dw = (raw * z).to(weight.dtype) if need_w else None
    dlog_alpha = None
    if need_gate:
        of_block = torch.arange(log_alpha.numel(), device=x.device)
        owner = reference.expand_blocks(of_block, (weight.shape[0], weight.shape[1]), block)
        dz = torch.zeros_like(log_alpha).index_add(0, owner.reshape(-1), (raw * weight).reshape(-1))
        dlog_alpha = sample_gates_bwd(dz, log_alpha, seed, None, spec)
    return dx, dw, db, dlog_alpha
