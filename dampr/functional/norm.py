"""Norms with gates: the gates are multiplied into gain and bias, or, if they are drawn per sample, in one pass together
with norm and activation.
"""

from __future__ import annotations

from typing import get_args

import torch
from torch import Tensor

from dampr import _checks, names, ops
from dampr.ops.norm_gate import Norm, Running
from dampr.spec import GateSpec, value

from .gates import DRAWN, drawn_rows, offset_of, times_rows
from .inputs import gate_of

ACTIVATIONS = (None, *get_args(names.Activation))


def gated_affine(
    gate: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    *,
    seed: int | Tensor | None = None,
    spec: GateSpec = DRAWN,
) -> tuple[Tensor, Tensor | None]:
    """(z weight, z bias): the gain and bias of a norm with a gate for each channel, to be given to ``batch_norm`` or
    ``layer_norm``.

    Args:
        gate: gate parameters, (C,), float32 or float64.
        weight, bias: gain and bias, (C,), any floating dtype, or None: a gain of 1, no bias.
        seed: the noise, an int in [0, 2^63) or an int64 tensor of shape (1,); not needed by a deterministic ``spec``.
        spec: the gate function, from :func:`dampr.spec.hard_concrete`; drawn by default.

    Returns: gain and bias in the dtype of ``weight`` (float32 without one). Differentiable in every argument.

    Raises: TypeError or ValueError that names the argument.
    """
    _checks.tensor("gate", gate)
    if weight is None:
        weight = torch.ones_like(gate)
    _checks.floating("weight", _checks.tensor("weight", weight))
    if weight.dim() != 1:
        raise ValueError(f"weight.shape={tuple(weight.shape)}: expected (C,), one entry per channel")
    if bias is not None:
        _checks.floating("bias", _checks.tensor("bias", bias))
        if bias.shape != weight.shape:
            raise ValueError(f"bias.shape={tuple(bias.shape)}: expected {tuple(weight.shape)}, the shape of weight")
        _checks.same_device("bias", bias, "weight", weight)
    return ops.affine(weight, bias, gate_of("gate", gate, weight.numel(), "channel", weight, seed, spec))


def gated_batch_norm(
    x: Tensor,
    gate: Tensor,
    weight: Tensor | None = None,
    bias: Tensor | None = None,
    running_mean: Tensor | None = None,
    running_var: Tensor | None = None,
    *,
    training: bool = False,
    momentum: float = 0.1,
    eps: float = 1e-5,
    seed: int | Tensor | None = None,
    per_sample: bool = False,
    activation: names.Activation | None = None,
    spec: GateSpec = DRAWN,
    index_offset: int = 0,
) -> Tensor:
    """act(z batch_norm(x)): a batch norm, a gate for each channel, and an optional ReLU, in one pass.

    For the backward it keeps x and nothing else of that size. Dep-L0 places its gates so: convolution, norm, gate,
    ReLU.

    Args:
        x: (B, C), (B, C, L), (B, C, H, W) or (B, C, D, H, W), any floating dtype; contiguous or channels last.
        gate: gate parameters, (C,), float32 (float64 next to float64 ``x``).
        weight, bias: gain and bias, (C,), any floating dtype, or None: a gain of 1, no bias.
        running_mean, running_var: (C,), or None; used in evaluation, updated in place in training as by
            ``F.batch_norm``.
        training: normalise by the statistics of ``x`` instead of the running ones.
        momentum: the weight of the new statistics in the update, in [0, 1].
        eps: added to the variance, above 0 in training, else 0 or more.
        seed: the noise, an int in [0, 2^63) or an int64 tensor of shape (1,); not needed by a deterministic ``spec``.
        per_sample: one draw for each index of the first dimension instead of one per call.
        activation: "relu", or None for z batch_norm(x) itself.
        spec: the gate function, from :func:`dampr.spec.hard_concrete`; drawn by default.
        index_offset: with ``per_sample``, the number of the first sample, as of :func:`sample_gates`; norm and gates
            are then two passes unless it is 0.

    Returns: like ``x``, contiguous or channels last. Differentiable in ``x``, ``gate``, ``weight`` and ``bias``.

    Raises: TypeError or ValueError that names the argument.

    >>> import torch
    >>> x, log_alpha = torch.tensor([[1.0, 1.0], [3.0, 3.0]]), torch.tensor([-9.0, 9.0])
    >>> gated_batch_norm(x, log_alpha, training=True, eps=1e-12, seed=1)
    tensor([[ 0., -1.],
            [ 0.,  1.]])
    """
    _checks.floating("x", _checks.tensor("x", x))
    if x.dim() < 2:
        raise ValueError(f"x.shape={tuple(x.shape)}: expected (B, C) or more dimensions")
    channels = x.shape[1]
    gates = gate_of("gate", gate, channels, "channel", x, seed, spec, per_sample)
    gain, shift = (_vector(name, t, x, gates.log_alpha) for name, t in (("weight", weight), ("bias", bias)))
    mean, var = (
        _vector(name, t, x, gates.log_alpha)
        for name, t in (("running_mean", running_mean), ("running_var", running_var))
    )
    _checks.one_of("activation", activation, ACTIVATIONS)
    training = _checks.flag("training", training)
    _checks.number("momentum", momentum, 0, 1)
    _checks.number("eps", eps, 0, above=training)
    if not training and (mean is None or var is None):
        raise ValueError(
            "training=False without running_mean and running_var: expected both, the statistics to normalise by"
        )
    count = x.numel() // max(1, channels)
    if training and count == 1:
        raise ValueError(f"x.shape={tuple(x.shape)}: expected more than one value per channel in training")
    if offset_of(index_offset, per_sample) and gates.per_sample:
        ungated = gates._replace(log_alpha=torch.ones_like(gates.log_alpha), seed=None, spec=value(), per_sample=False)
        given = None if training or mean is None or var is None else (mean, var)
        y = ops.norm_gate(
            x, Norm(gain, shift, float(eps), False), ungated, given, Running(running_mean, running_var, None, momentum)
        )
        y = times_rows(y, drawn_rows(gates, x.shape[0], index_offset), 1)
        return y if activation is None else torch.relu(y)
    if torch.compiler.is_compiling() and count > x.shape[0] and _goes_with(x, weight, bias, running_mean, running_var):
        # torch.compile fuses these operators with each other and with those before and after; the gates are few, and
        # drawn by an operator of their own.
        norm = ops.BatchNorm(running_mean, running_var, training, momentum, float(eps))
        y = norm(x, weight, bias)
        z = ops.sample_gates(gates._replace(per_sample=False), x.shape[0] if gates.per_sample else None)
        y = (y * z.view(-1, channels, *[1] * (x.dim() - 2))).to(x.dtype)
        return y if activation is None else torch.relu(y)
    given = None if training or mean is None or var is None else (mean, var)
    running = Running(running_mean, running_var, None, momentum)
    return ops.norm_gate(x, Norm(gain, shift, float(eps), activation == "relu"), gates, given, running)


def _goes_with(x: Tensor, *vectors: Tensor | None) -> bool:
    """Whether torch's batch norm takes these beside x: of the dtype of x, or all float32 beside a half."""
    dtypes = {t.dtype for t in vectors if t is not None}
    return dtypes <= {x.dtype} or (x.dtype.itemsize == 2 and dtypes == {torch.float32})


def _vector(name: str, value: Tensor | None, x: Tensor, log_alpha: Tensor) -> Tensor | None:
    """Check a vector of a norm, one entry per channel (C,), and return it in the dtype of ``log_alpha``, in which the
    norm computes. None stays None.

    Raises: TypeError or ValueError that names the argument.
    """
    if value is None or (
        isinstance(value, Tensor)
        and value.dtype == log_alpha.dtype
        and value.shape == log_alpha.shape
        and value.device == x.device
    ):
        return value
    _checks.floating(name, _checks.tensor(name, value))
    if value.shape != log_alpha.shape:
        raise ValueError(f"{name}.shape={tuple(value.shape)}: expected {tuple(log_alpha.shape)}, one entry per channel")
    _checks.same_device(name, value, "x", x)
    if value.dtype == torch.float64 and log_alpha.dtype != torch.float64:
        raise TypeError(f"{name}.dtype={value.dtype}: expected a narrower one next to x of dtype {x.dtype}")
    return value.to(log_alpha.dtype)
