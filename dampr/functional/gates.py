"""Gate values, open probability, the expected L0 penalty, and activations times gates."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from dampr import _checks, ops, reference
from dampr.ops.gate_args import GateArgs
from dampr.spec import SAMPLE, GateSpec, hard_concrete

from .inputs import gate_of

DRAWN = hard_concrete()


def sample_gates(
    log_alpha: Tensor,
    *,
    seed: int | Tensor | None = None,
    rows: int | None = None,
    spec: GateSpec = DRAWN,
    index_offset: int = 0,
) -> Tensor:
    """Gate values of hard concrete gates (Louizos et al. 2018, eq. 10-12).

    Args:
        log_alpha: gate parameters, (n,), float32 or float64.
        seed: the noise: an int in [0, 2^63) or an int64 tensor of shape (1,) on the same device. The same seed gives
            the same gates on every backend, to the bit in which gates are 0 and which are 1. Not needed by a
            deterministic ``spec``.
        rows: None for one draw, or the number of independent draws.
        spec: the gate function, from :func:`dampr.spec.hard_concrete`; drawn by default.
        index_offset: with ``rows``, the number of the first one. ``rows=2, index_offset=4`` gives the last two of
            ``rows=6``, to the bit: processes that share a batch draw their own rows of it.

    Returns: (n,), or (rows, n); dtype and device of ``log_alpha``; values in [0, 1], many of them exactly 0 or 1.
    Differentiable in ``log_alpha``.

    Raises: TypeError or ValueError that names the argument.

    >>> import torch
    >>> sample_gates(torch.tensor([-9.0, 9.0]), seed=1)
    tensor([0., 1.])
    """
    _gate_vector(log_alpha)
    _checks.gate_spec("spec", spec)
    rows = _checks.rows(rows)
    index_offset = offset_of(index_offset, rows is not None)
    noise = _checks.seed_tensor("seed", seed, log_alpha.device) if spec.rule == SAMPLE else None
    start = index_offset * log_alpha.shape[0] if spec.rule == SAMPLE else 0
    return ops.sample_gates(GateArgs(log_alpha, noise, spec), rows, start)


def open_probability(log_alpha: Tensor, *, spec: GateSpec = DRAWN) -> Tensor:
    """P(z != 0) of a drawn gate (Louizos et al. 2018, eq. 12), in the shape and dtype of ``log_alpha`` (float32 or
    float64); differentiable.
    """
    _checks.floating("log_alpha", _checks.tensor("log_alpha", log_alpha))
    _checks.gate_spec("spec", spec)
    return reference.open_probability(log_alpha, spec)


def expected_l0(
    log_alpha: Tensor,
    group_size: float | Tensor = 1.0,
    *,
    lam: float | Tensor = 1.0,
    group_sq_norm: Tensor | None = None,
    prior_precision: float | Tensor = 0.0,
    spec: GateSpec = DRAWN,
) -> Tensor:
    """Expected L0 penalty sum_g pi_g (lam |g| + prior_precision / 2 ||w_g||^2) of Louizos et al. 2018 (eq. 9 and
    appendix A).

    Args:
        log_alpha: gate parameters, (n,), float32 or float64.
        group_size: |g|, how many weights a gate holds: a number, or (n,).
        lam: cost of one weight (the paper's lambda; divide by the number of training examples where the loss is a
            mean): a number, or (n,), one for each group.
        group_sq_norm: ||w_g||^2, (n,); needed for the second term.
        prior_precision: rho, the strength of the L2 term: a number, or (n,), one for each group.

    Returns: a scalar tensor, differentiable in ``log_alpha`` and ``group_sq_norm``.

    Raises: ValueError for shapes that do not fit, and for a prior precision without norms.
    """
    _gate_vector(log_alpha)
    if group_sq_norm is None and (isinstance(prior_precision, Tensor) or prior_precision):
        raise ValueError(
            f"group_sq_norm=None: expected ||w_g||^2 of each group with prior_precision={prior_precision!r:.40}"
        )
    each: dict[str, Any] = {
        "group_size": group_size,
        "lam": lam,
        "group_sq_norm": group_sq_norm,
        "prior_precision": prior_precision,
    }
    _checks.gate_spec("spec", spec)
    for name, value in each.items():
        if isinstance(value, Tensor):
            _checks.same_device(name, _checks.tensor(name, value), "log_alpha", log_alpha)
        elif value is not None or name != "group_sq_norm":
            each[name] = _checks.number(name, value)
        if isinstance(value, Tensor) and (value.is_complex() or value.dtype == torch.bool):
            raise TypeError(f"{name}.dtype={value.dtype}: expected real numbers")
        if isinstance(value, Tensor) and value.shape not in ((), log_alpha.shape):
            raise ValueError(
                f"{name}.shape={tuple(value.shape)}: expected {tuple(log_alpha.shape)}, one entry per gate"
            )
    return reference.expected_l0(log_alpha, spec, **each)


def gate_activations(
    x: Tensor,
    gate: Tensor,
    *,
    dim: int = 1,
    seed: int | Tensor | None = None,
    per_sample: bool = False,
    spec: GateSpec = DRAWN,
    index_offset: int = 0,
) -> Tensor:
    """x * z along one dimension: a gate for each channel, feature or position.

    Args:
        x: any shape with at least one dimension, any floating dtype.
        gate: gate parameters, (x.shape[dim],), float32 (float64 next to float64 ``x``).
        dim: which dimension of ``x`` has the gates; negative counts from the end.
        seed: the noise, an int in [0, 2^63) or an int64 tensor of shape (1,); not needed by a deterministic ``spec``.
        per_sample: one draw for each index of the first dimension instead of one per call; not for ``dim`` 0.
        spec: the gate function, from :func:`dampr.spec.hard_concrete`; drawn by default.
        index_offset: with ``per_sample``, the number of the first sample, as of :func:`sample_gates`; not fused unless
            it is 0.

    Returns: like ``x``, contiguous or channels last. Differentiable in ``x`` and ``gate``.

    Raises: TypeError or ValueError that names the argument.

    >>> import torch
    >>> gate_activations(torch.ones(2, 2), torch.tensor([-9.0, 9.0]), seed=1)
    tensor([[0., 1.],
            [0., 1.]])
    """
    dim = gated_dimension(x, dim, per_sample)
    gates = gate_of("gate", gate, x.shape[dim], f"index of dimension {dim} of x", x, seed, spec, per_sample)
    if offset_of(index_offset, per_sample) and gates.per_sample:
        return times_rows(x, drawn_rows(gates, x.shape[0], index_offset), dim)
    return ops.gate_activations(x, gates, dim)


def offset_of(index_offset: int, per_row: bool) -> int:
    """``index_offset``, checked. Raises ValueError if it is negative, or if all rows share one draw."""
    if not index_offset:
        return 0
    if not per_row:
        raise ValueError(f"index_offset={index_offset!r}: expected 0, because all rows have one draw")
    return (
        index_offset
        if isinstance(index_offset, torch.SymInt)
        else _checks.positive_int("index_offset", index_offset, least=0)
    )


def drawn_rows(gates: GateArgs, rows: int, index_offset: int) -> Tensor:
    """The gates of ``rows`` rows from row ``index_offset`` on, (rows, n)."""
    return ops.sample_gates(gates._replace(per_sample=False), rows, index_offset * gates.log_alpha.shape[0])


def times_rows(x: Tensor, z: Tensor, dim: int) -> Tensor:
    """x * z along dimension ``dim`` > 0 for drawn gates z (x.shape[0], x.shape[dim]).

    Raises: as :func:`gate_activations`.
    """
    _checks.gate_parameter("gate", z.new_empty(z.shape[1:]), x.shape[dim], f"index of dimension {dim} of x", x)
    return (x * reference.along(z, x, dim)).to(x.dtype)


def gated_dimension(x: Tensor, dim: int, per_sample: bool) -> int:
    """``dim`` counted from the start. Raises TypeError or ValueError if ``x`` has no such dimension, or if it is that
    of the samples with ``per_sample``.
    """
    _checks.floating("x", _checks.tensor("x", x))
    if isinstance(dim, bool) or not isinstance(dim, int) or not -x.dim() <= dim < x.dim():
        raise ValueError(f"dim={dim!r}: expected an integer in [{-x.dim()}, {x.dim()}) for x of shape {tuple(x.shape)}")
    if _checks.flag("per_sample", per_sample) and dim % x.dim() == 0:
        raise ValueError("per_sample=True with dim=0: expected the gates on another dimension than the samples")
    return dim % x.dim()


def _gate_vector(log_alpha: Tensor) -> None:
    """Raise TypeError or ValueError unless ``log_alpha`` is a vector of float32 or float64."""
    _checks.tensor("log_alpha", log_alpha)
    if log_alpha.dtype not in _checks.GATE_DTYPES:
        raise TypeError(f"log_alpha.dtype={log_alpha.dtype}: expected torch.float32 or torch.float64")
    if log_alpha.dim() != 1:
        raise ValueError(f"log_alpha.shape={tuple(log_alpha.shape)}: expected one dimension, (num_gates,)")
