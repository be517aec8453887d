"""The public functions: gates, their open probability, the expected L0 penalty, the gated linear map; every draw has an explicit seed."""

from __future__ import annotations

import torch
from torch import Tensor

from dampr import _checks, ops, philox, reference
from dampr.spec import SAMPLE, GateSpec, hard_concrete

__all__ = ["expected_l0", "gated_linear", "open_probability", "sample_gates"]

_DRAWN = hard_concrete()


def sample_gates(log_alpha: Tensor, *, seed: int | Tensor | None = None, rows: int | None = None, spec: GateSpec = _DRAWN) -> Tensor:
    """Gate values of hard concrete gates (Louizos et al. 2018, eq. 10-12).

    Args:
        log_alpha: gate parameters, (n,), float32 or float64.
        seed: the noise: an int in [0, 2^63) or an int64 tensor of shape (1,) on the same device. The same seed gives the same gates on
            every backend, to the bit in which gates are 0 and which are 1. Not needed by a deterministic ``spec``.
        rows: None for one draw, or the number of independent draws.
        spec: the gate function, from :func:`dampr.spec.hard_concrete`; drawn by default.

    Returns: (n,), or (rows, n); dtype and device of ``log_alpha``; values in [0, 1], many of them exactly 0 or 1. Differentiable in
    ``log_alpha``.

    Raises: TypeError or ValueError that names the argument.

    >>> import torch
    >>> sample_gates(torch.tensor([-9.0, 9.0]), seed=1)
    tensor([0., 1.])
    """
    _gate_vector(log_alpha)
    if rows is not None and not isinstance(rows, torch.SymInt):
        _checks.positive_int("rows", rows, least=0)
    noise = _checks.seed_tensor("seed", seed, log_alpha.device) if spec.rule == SAMPLE else None
    return ops.sample_gates(log_alpha, noise, rows, spec)


def open_probability(log_alpha: Tensor, *, spec: GateSpec = _DRAWN) -> Tensor:
    """P(z != 0) of a drawn gate, Louizos et al. 2018 eq. 12; shape and dtype of ``log_alpha`` (float32 or float64); differentiable."""
    _checks.floating("log_alpha", _checks.tensor("log_alpha", log_alpha))
    return reference.open_probability(log_alpha, spec)


def expected_l0(
    log_alpha: Tensor,
    group_size: float | Tensor = 1.0,
    *,
    lam: float = 1.0,
    group_sq_norm: Tensor | None = None,
    prior_precision: float = 0.0,
    spec: GateSpec = _DRAWN,
) -> Tensor:
    """Expected L0 penalty sum_g pi_g (lam |g| + prior_precision / 2 ||w_g||^2) of Louizos et al. 2018 (eq. 9 and appendix A).

    Args:
        log_alpha: gate parameters, (n,), float32 or float64.
        group_size: |g|, how many weights a gate holds: a number, or (n,).
        lam: cost of one weight (the paper's lambda; divide by the number of training examples where the loss is a mean).
        group_sq_norm: ||w_g||^2, (n,); needed for the second term.
        prior_precision: rho, the strength of the L2 term.

    Returns: a scalar tensor, differentiable in ``log_alpha`` and ``group_sq_norm``.
    """
    _gate_vector(log_alpha)
    for name, value in (("group_size", group_size), ("group_sq_norm", group_sq_norm)):
        if isinstance(value, Tensor) and value.shape not in ((), log_alpha.shape):
            raise ValueError(f"{name}.shape={tuple(value.shape)}: expected {tuple(log_alpha.shape)}, one entry per gate")
    return reference.expected_l0(log_alpha, spec, group_size, lam=lam, group_sq_norm=group_sq_norm, prior_precision=prior_precision)


def gated_linear(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    *,
    input_gate: Tensor | None = None,
    output_gate: Tensor | None = None,
    weight_gate: Tensor | None = None,
    block: tuple[int, int] = (1, 1),
    seed: int | Tensor | None = None,
    per_sample: bool = False,
    spec: GateSpec = _DRAWN,
) -> Tensor:
    """y = z_out * ((x * z_in) weight^T + bias) with gates on the inputs, on the outputs, on both, or on neither; or gates on the weights.

    Args:
        x: (..., K), any floating dtype; under autocast it is cast as ``nn.Linear`` would cast it.
        weight: (N, K), the dtype of ``x`` or, under autocast, float32.
        bias: (N,) or None. The output gate multiplies it too, in training as in evaluation.
        input_gate, output_gate: gate parameters (log_alpha), (K,) and (N,), float32 (float64 next to float64 ``x``), or None.
        weight_gate: parameters of a gate for each block of the weight (of which only it is gated, not the bias), flat,
            (ceil(N / R) * ceil(K / C),): weight[n, k] belongs to gate (n // R) * ceil(K / C) + k // C. Not together with other gates.
        block: (R, C), the size of a block; (1, 1) is a gate for each weight.
        seed: the noise, an int in [0, 2^63) or an int64 tensor of shape (1,); not needed by a deterministic ``spec``. With both gates, the
            output gates use a second stream of the same seed.
        per_sample: one draw per row of ``x`` flattened to (M, K) instead of one per call; vector gates only.
        spec: the gate function, from :func:`dampr.spec.hard_concrete`; drawn by default.

    Returns: (..., N) in the dtype of ``x``. Differentiable in ``x``, ``weight``, ``bias`` and the gate parameters.

    Raises: TypeError or ValueError that names the argument, before any work is done.
    """
    _checks.floating("x", _checks.tensor("x", x))
    _checks.floating("weight", _checks.tensor("weight", weight))
    if weight.dim() != 2:
        raise ValueError(f"weight.shape={tuple(weight.shape)}: expected two dimensions, (out_features, in_features)")
    n_out, n_in = weight.shape
    if x.dim() < 1 or x.shape[-1] != n_in:
        raise ValueError(f"x.shape={tuple(x.shape)}: expected (..., {n_in}), because weight has shape {tuple(weight.shape)}")
    if bias is not None and _checks.tensor("bias", bias).shape != (n_out,):
        raise ValueError(f"bias.shape={tuple(bias.shape)}: expected ({n_out},), the rows of weight")
    _checks.same_device("weight", weight, "x", x)
    autocast = not x.is_meta and torch.is_autocast_enabled(x.device.type) and x.dtype != torch.float64
    if autocast:
        x = x.to(torch.get_autocast_dtype(x.device.type))
    for name, t in (("weight", weight), ("bias", bias)):
        if t is not None and t.dtype != x.dtype and not (autocast and t.dtype == torch.float32):
            expected = f"{x.dtype} or torch.float32" if autocast else f"{x.dtype}, the dtype of x (mixed dtypes are for autocast)"
            raise TypeError(f"{name}.dtype={t.dtype}: expected {expected}")
    if bias is not None:
        _checks.same_device("bias", bias, "x", x)
    if weight_gate is not None:
        return _weight_gated(
            x, weight, bias, weight_gate, block, seed, per_sample or input_gate is not None or output_gate is not None, spec
        )
    in_la = None if input_gate is None else _checks.gate_parameter("input_gate", input_gate, n_in, "input feature", x)
    out_la = None if output_gate is None else _checks.gate_parameter("output_gate", output_gate, n_out, "output feature", x)
    in_seed = out_seed = None
    if spec.rule == SAMPLE and (in_la is not None or out_la is not None):
        noise = _checks.seed_tensor("seed", seed, x.device)
        in_seed = None if in_la is None else noise
        if out_la is not None:
            out_seed = noise if in_la is None else noise ^ philox.SECOND_STREAM
    return ops.gated_linear(x, weight, bias, in_la, out_la, in_seed, out_seed, spec, per_sample)


def _weight_gated(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    weight_gate: Tensor,
    block: tuple[int, int],
    seed: int | Tensor | None,
    with_vector_gates: bool,
    spec: GateSpec,
) -> Tensor:
    if with_vector_gates:
        raise ValueError("weight_gate: expected no input_gate, no output_gate and per_sample=False beside it")
    count = _checks.block_count("block", block, weight.shape[0], weight.shape[1])
    log_alpha = _checks.gate_parameter("weight_gate", weight_gate, count, f"{block[0]} x {block[1]} block of weight", x)
    noise = _checks.seed_tensor("seed", seed, x.device) if spec.rule == SAMPLE else None
    return ops.weight_gated_linear(x, weight, bias, log_alpha, noise, spec, (int(block[0]), int(block[1])))


def _gate_vector(log_alpha: Tensor) -> None:
    _checks.tensor("log_alpha", log_alpha)
    if log_alpha.dtype not in _checks.GATE_DTYPES:
        raise TypeError(f"log_alpha.dtype={log_alpha.dtype}: expected torch.float32 or torch.float64")
    if log_alpha.dim() != 1:
        raise ValueError(f"log_alpha.shape={tuple(log_alpha.shape)}: expected one dimension, (num_gates,)")
