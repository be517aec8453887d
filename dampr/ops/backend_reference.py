"""The reference backend: forwards from :mod:`dampr.reference`, gradients written out in plain PyTorch.

Operators run below autograd, so gradients cannot be left to it. The functions have the names and arguments of the other
backends; equations are in the modules of the operators.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from dampr import reference

from .gate_activations import dense_format
from .gate_args import GateArgs, GatePair
from .gated_conv import Window
from .library import rows_of
from .norm_gate import Norm
from .routes import ConvProblem

# the largest generator that one operator computes; never here, where it would be made of torch's own products
GENERATOR_PARAMETERS = 0


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
    """("reference", reason) for every layer, whatever route is forced."""
    return "reference", "plain PyTorch: every gate is drawn and multiplied as it is written"


def conv_route(problem: ConvProblem) -> tuple[str, str]:
    """(name, reason) of the route of a convolution, whatever is forced."""
    return (
        "passes" if problem.per_sample else "fold"
    ), "plain PyTorch: every gate is drawn and multiplied as it is written"


def _values(gate: GateArgs, rows: int | None = None) -> Tensor:
    """The values of gates, (n,), or (rows, n) with a draw for each row."""
    return reference.gate_values(gate.log_alpha, gate.spec, gate.seed, rows)


def sample_gates_fwd(gate: GateArgs, rows: int | None, start: int = 0) -> Tensor:
    """Gate values, (n,) or (rows, n); the noise of the first gate has the index ``start``."""
    return reference.gate_values(gate.log_alpha, gate.spec, gate.seed, rows, start).clone()


def sample_gates_bwd(dz: Tensor, gate: GateArgs, rows: int | None, start: int = 0) -> Tensor:
    """dlog_alpha, (n,), for the gradient ``dz`` of the values, (n,) or (rows, n)."""
    log_alpha, seed, spec, _ = gate
    grad = dz * reference.gate_derivative(log_alpha, spec, reference.noise(log_alpha, spec, seed, rows, start))
    return grad if rows is None else grad.sum(0)


def gated_linear_fwd(
    x: Tensor, weight: Tensor, bias: Tensor | None, gates: GatePair, keep_pre: bool
) -> tuple[Tensor, Tensor]:
    """(y, y before the output gates); the latter is empty unless ``keep_pre``."""
    y = reference.gated_linear(x, weight, bias, *gates)
    return y, reference.gated_linear(
        x, weight, bias, *gates._replace(output_log_alpha=None)
    ) if keep_pre else x.new_empty(0)


def gated_linear_bwd(
    dy: Tensor, x: Tensor, weight: Tensor, bias: Tensor | None, gates: GatePair, pre: Tensor, needs: Sequence[bool]
) -> tuple[Tensor | None, ...]:
    """The gradients of x, weight, bias and both log_alphas. ``pre`` is not read, but computed again."""
    need_x, need_w, need_b, need_in, need_out = needs
    x2, dy2, w = rows_of(x), rows_of(dy), weight.to(x.dtype)
    M = x2.shape[0]

    def draw(gate: GateArgs | None) -> Tensor:
        """The values of gates in the dtype of x; 1 without gates."""
        return x.new_ones(()) if gate is None else _values(gate, gate.rows(M)).to(x.dtype)

    def through(upstream: Tensor, gate: GateArgs) -> Tensor:
        """sum over rows of upstream * z', with (rows, n) -> (n,)."""
        upstream = upstream.to(gate.log_alpha.dtype)
        return sample_gates_bwd(upstream if gate.per_sample else upstream.sum(0), gate, gate.rows(M))

    z_in, z_out = draw(gates.input), draw(gates.output)
    xz, g = x2 * z_in, dy2 * z_out
    back = g @ w if need_x or need_in else None
    dx = dw = db = din = dout = None
    if need_x and back is not None:
        dx = (back * z_in).view(x.shape)
    if need_w:
        dw = (g.t() @ xz).to(weight.dtype)
    if need_b and bias is not None:
        db = g.sum(0).to(bias.dtype)
    if need_in and gates.input is not None and back is not None:
        din = through(x2 * back, gates.input)
    if need_out and gates.output is not None:
        before = torch.nn.functional.linear(xz, w, None if bias is None else bias.to(x.dtype))
        dout = through(dy2 * before, gates.output)
    return dx, dw, db, din, dout


def weight_gated_linear_fwd(
    x: Tensor, weight: Tensor, bias: Tensor | None, gate: GateArgs, block: tuple[int, int]
) -> Tensor:
    """y = x (W * Z)^T + b, (..., N)."""
    return reference.weight_gated_linear(x, weight, bias, gate.log_alpha, gate.seed, gate.spec, block)


def weight_gated_linear_bwd(
    dy: Tensor,
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    gate: GateArgs,
    block: tuple[int, int],
    needs: Sequence[bool],
) -> tuple[Tensor | None, ...]:
    """The gradients of x, weight, bias and log_alpha."""
    need_x, need_w, need_b, need_gate = needs
    x2, dy2 = rows_of(x), rows_of(dy)
    dx = (dy2 @ fold_blocks_fwd(weight, gate, block, x.dtype)).view(x.shape) if need_x else None
    db = dy2.sum(0).to(bias.dtype) if need_b and bias is not None else None
    if not (need_w or need_gate):
        return dx, None, db, None
    dw, dlog_alpha = fold_blocks_bwd(dy2.t() @ x2, weight, gate, block, (need_w, need_gate))
    return dx, dw, db, dlog_alpha


def fold_weight_fwd(
    weight: Tensor, bias: Tensor | None, gates: GatePair, dtype: torch.dtype
) -> tuple[Tensor, Tensor | None]:
    """(z_out W z_in, z_out b) in ``dtype``."""
    return reference.fold_weight(weight, bias, *gates[:5], dtype)


def fold_weight_bwd(
    raw: Tensor, raw_bias: Tensor | None, weight: Tensor, bias: Tensor | None, gates: GatePair, needs: Sequence[bool]
) -> tuple[Tensor | None, ...]:
    """The gradients of weight, bias and both log_alphas from those of the folded weight ``raw`` (N, K) and bias
    (N,).
    """
    need_w, need_b, need_in, need_out = needs
    z_in, z_out = _beside(weight, gates.input), _beside(weight, gates.output)
    raw = raw.to(z_in.dtype)
    dw = (raw * z_out.unsqueeze(-1) * z_in).to(weight.dtype) if need_w else None
    db = (raw_bias * z_out).to(bias.dtype) if need_b and bias is not None and raw_bias is not None else None
    din = dout = None
    if need_in and gates.input is not None:
        din = sample_gates_bwd((raw * weight * z_out.unsqueeze(-1)).sum(0), gates.input, None)
    if need_out and gates.output is not None:
        dz = (raw * weight * z_in).sum(1)
        if bias is not None and raw_bias is not None:
            dz = dz + bias * raw_bias
        dout = sample_gates_bwd(dz, gates.output, None)
    return dw, db, din, dout


def _beside(weight: Tensor, gate: GateArgs | None) -> Tensor:
    """The values of gates; without gates a 1 in the dtype that gates beside ``weight`` would have."""
    return (
        weight.new_ones((), dtype=torch.promote_types(weight.dtype, torch.float32)) if gate is None else _values(gate)
    )


def fold_blocks_fwd(weight: Tensor, gate: GateArgs, block: tuple[int, int], dtype: torch.dtype) -> Tensor:
    """W * Z in ``dtype``."""
    return reference.fold_blocks(weight, gate.log_alpha, gate.seed, gate.spec, block, dtype)


def fold_blocks_bwd(
    raw: Tensor, weight: Tensor, gate: GateArgs, block: tuple[int, int], needs: Sequence[bool]
) -> tuple[Tensor | None, Tensor | None]:
    """The gradients of weight and log_alpha from that of the folded weight, ``raw`` (N, K)."""
    shape, log_alpha = (weight.shape[0], weight.shape[1]), gate.log_alpha
    raw = raw.to(log_alpha.dtype)
    dw = dlog_alpha = None
    if needs[0]:
        dw = (raw * reference.expand_blocks(_values(gate), shape, block)).to(weight.dtype)
    if needs[1]:
        owner = reference.expand_blocks(torch.arange(log_alpha.numel(), device=raw.device), shape, block)
        dz = torch.zeros_like(log_alpha).index_add(0, owner.reshape(-1), (raw * weight).reshape(-1))
        dlog_alpha = sample_gates_bwd(dz, gate, None)
    return dw, dlog_alpha


def gate_activations_fwd(x: Tensor, gate: GateArgs, dim: int) -> Tensor:
    """x * z along dimension ``dim``."""
    y = reference.gate_activations(x, gate.log_alpha, gate.seed, gate.spec, dim, gate.per_sample)
    return y.contiguous(memory_format=dense_format(x, dim))


def gate_activations_bwd(
    dy: Tensor, x: Tensor, gate: GateArgs, dim: int, needs: Sequence[bool]
) -> tuple[Tensor | None, Tensor | None]:
    """The gradients of x and log_alpha."""
    dx = gate_activations_fwd(dy, gate, dim) if needs[0] else None
    if not needs[1]:
        return dx, None
    shared = [i for i in range(x.dim()) if i != dim and not (gate.per_sample and i == 0)]
    dz = dy.to(gate.log_alpha.dtype) * x
    dz = dz.sum(shared) if shared else dz
    return dx, sample_gates_bwd(dz, gate, gate.rows(x.shape[0]))


def dependency_generator_fwd(parameters: Sequence[Tensor], limit: float) -> Tensor:
    """a_1, a_2, ... one after the other in one vector."""
    return torch.cat(reference.dependency_generator(parameters, limit))


def dependency_generator_bwd(
    parameters: Sequence[Tensor], values: Tensor, dvalues: Tensor, limit: float
) -> list[Tensor]:
    """The gradients of W_1, b_1, W_2, ..., from those of the values."""
    sizes = [bias.numel() for bias in parameters[1::2]]
    a, upstream = values.split(sizes), list(dvalues.split(sizes))
    grads: list[Tensor] = []
    for layer in reversed(range(len(sizes))):
        weight = parameters[2 * layer]
        g = upstream[layer] * ((limit - a[layer]) * (limit + a[layer]) / limit)
        before = a[layer - 1] if layer else weight.new_ones(weight.shape[1])
        grads += [g, torch.outer(g, before)]
        if layer:
            upstream[layer - 1] = upstream[layer - 1] + weight.t() @ g
    return grads[::-1]


def gated_conv2d_fwd(x: Tensor, weight: Tensor, bias: Tensor | None, gates: GatePair, window: Window) -> Tensor:
    """The gated convolution with one draw for all images, channels last."""
    y = reference.gated_conv(x, weight, bias, *gates[:5], False, **window._asdict())
    return y.contiguous(memory_format=torch.channels_last)


def _over_channels(t: Tensor, like: Tensor) -> Tensor:
    """A vector (C,) in a shape that broadcasts to ``like`` (B, C, ...)."""
    return reference.along(t, like, 1)


def _normalised(x: Tensor, mean: Tensor, var: Tensor, eps: float) -> tuple[Tensor, Tensor]:
    """(x - mean) rstd in the dtype of the statistics, and rstd (C,)."""
    rstd = (var + eps).rsqrt()
    return (x.to(mean.dtype) - _over_channels(mean, x)) * _over_channels(rstd, x), rstd


def _before_gates(normalised: Tensor, norm: Norm) -> Tensor:
    """gain * normalised + bias."""
    pre = normalised if norm.gain is None else normalised * _over_channels(norm.gain, normalised)
    return pre if norm.bias is None else pre + _over_channels(norm.bias, normalised)


def norm_gate_fwd(
    x: Tensor, norm: Norm, gate: GateArgs, mean: Tensor | None, var: Tensor | None
) -> tuple[Tensor, Tensor | None, Tensor | None]:
    """(y, mean, var); the last two are None if they were given."""
    batch, log_alpha = mean is None or var is None, gate.log_alpha
    if mean is None or var is None:
        shared = [i for i in range(x.dim()) if i != 1]
        none = torch.zeros_like(log_alpha)
        var, mean = torch.var_mean(x.to(log_alpha.dtype), shared, correction=0) if x.numel() else (none, none.clone())
    pre = _before_gates(_normalised(x, mean, var, norm.eps)[0], norm)
    y = pre * reference.along(_values(gate, gate.rows(x.shape[0])), x, 1)
    y = (y.relu() if norm.relu else y).to(x.dtype).contiguous(memory_format=dense_format(x, 1))
    return (y, mean, var) if batch else (y, None, None)


def norm_gate_bwd(
    dy: Tensor, x: Tensor, norm: Norm, gate: GateArgs, mean: Tensor, var: Tensor, training: bool, needs: Sequence[bool]
) -> tuple[Tensor | None, ...]:
    """The gradients of x, gain, bias and log_alpha; ``training``: mean and var are those of x."""
    rows = gate.rows(x.shape[0])
    inner = list(range(2, x.dim()))
    normalised, rstd = _normalised(x, mean, var, norm.eps)
    pre = _before_gates(normalised, norm)
    z = reference.along(_values(gate, rows), x, 1)
    passed = dy.to(pre.dtype)
    if norm.relu:
        passed = passed.where(pre * z > 0, passed.new_zeros(()))
    dpre = passed * z
    dgain, dbias = (dpre * normalised).sum([0, *inner]), dpre.sum([0, *inner])
    dx = dlog_alpha = None
    if needs[0]:
        dx = dpre
        if training:
            count = max(1, x.numel() // max(1, x.shape[1]))
            dx = dx - _over_channels(dbias / count, x) - normalised * _over_channels(dgain / count, x)
        dx = dx * _over_channels(rstd if norm.gain is None else norm.gain * rstd, x)
        dx = dx.to(x.dtype).contiguous(memory_format=dense_format(x, 1))
    if needs[3]:
        dz = (passed * pre).sum(inner) if inner else passed * pre
        dlog_alpha = sample_gates_bwd(dz if gate.per_sample else dz.sum(0), gate, rows)
    return dx, dgain if needs[1] else None, dbias if needs[2] else None, dlog_alpha
