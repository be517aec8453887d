"""Multiply gates of rows and columns into a weight, and compute their gradients from that of the product: calls of
``folds.h`` in csrc.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from dampr import _C  # type: ignore[attr-defined]
from dampr.ops.gate_args import GatePair

from . import host
from .host import CODES, WIDE


def fold_weight_fwd(
    weight: Tensor, bias: Tensor | None, gates: GatePair, dtype: torch.dtype, in_scratch: bool = False
) -> tuple[Tensor, Tensor | None]:
    """(z_out W z_in, z_out b) in ``dtype``; ``in_scratch``: the weight is in :data:`.host.scratch`."""
    if gates.input_log_alpha is None and gates.output_log_alpha is None:
        return weight.to(dtype), None if bias is None else bias.to(dtype)
    weight = weight.contiguous()
    out = host.new(weight.shape, dtype, in_scratch)
    return out, fold_into(out, weight, bias, gates, *weight.shape)


def fold_into(
    out: Tensor, weight: Tensor, bias: Tensor | None, gates: GatePair, n_out: int, n_in: int
) -> Tensor | None:
    """Fill ``out`` with the folded weight; returns the folded bias.

    In memory ``weight`` and ``out`` are laid out alike, as a matrix (n_out, n_in). The bias is multiplied by the row
    gates.
    """
    in_la, out_la, in_seed, out_seed, spec, _ = gates
    in_la = None if in_la is None else in_la.contiguous()
    out_la = None if out_la is None else out_la.contiguous()
    gated = own = None
    if bias is not None and out_la is None:
        gated = bias.to(out.dtype)
    elif bias is not None:
        own = bias.to(WIDE[weight.dtype]).contiguous()
        gated = torch.empty_like(own, dtype=out.dtype)
    _C.fold_gates_fwd(
        spec,
        CODES[weight.dtype],
        CODES[out.dtype],
        weight.data_ptr(),
        0 if own is None else own.data_ptr(),
        n_out,
        n_in,
        0 if out_la is None else out_la.data_ptr(),
        0 if in_la is None else in_la.data_ptr(),
        0 if out_seed is None else out_seed.data_ptr(),
        0 if in_seed is None else in_seed.data_ptr(),
        out.data_ptr(),
        0 if own is None or gated is None else gated.data_ptr(),
        torch.get_num_threads(),
    )
    return gated


def fold_weight_bwd(
    raw: Tensor, raw_bias: Tensor | None, weight: Tensor, bias: Tensor | None, gates: GatePair, needs: Sequence[bool]
) -> tuple[Tensor | None, ...]:
    """The gradients of weight, bias and both log_alphas from those of the folded weight ``raw`` (N, K) and bias
    (N,).
    """
    if gates.input_log_alpha is None and gates.output_log_alpha is None:
        db = raw_bias.to(bias.dtype) if needs[1] and bias is not None and raw_bias is not None else None
        return raw.to(weight.dtype), db, None, None
    raw, weight = raw.contiguous(), weight.contiguous()
    dw = torch.empty_like(weight) if needs[0] else None
    n_out, n_in = weight.shape
    return dw, *unfold(raw, raw_bias, weight, bias, gates, n_out, n_in, needs, dw)


def unfold(
    raw: Tensor,
    raw_bias: Tensor | None,
    weight: Tensor,
    bias: Tensor | None,
    gates: GatePair,
    n_out: int,
    n_in: int,
    needs: Sequence[bool],
    dw: Tensor | None,
    folded: Tensor | None = None,
) -> tuple[Tensor | None, Tensor | None, Tensor | None]:
    """The gradients of bias, in_la and out_la; that of the weight is written to ``dw``, and the folded weight to
    ``folded``.

    In memory ``raw``, ``weight``, ``dw`` and ``folded`` are laid out alike, as a matrix (n_out, n_in). ``dw`` may be
    ``raw``. None for ``dw`` or ``folded`` leaves these out.
    """
    in_la, out_la, in_seed, out_seed, spec, _ = gates
    in_la = None if in_la is None else in_la.contiguous()
    out_la = None if out_la is None else out_la.contiguous()
    db = own = raw_own = None
    if bias is not None and raw_bias is not None and out_la is None:
        db = raw_bias if needs[1] else None
    elif bias is not None and raw_bias is not None:
        wide = WIDE[weight.dtype]
        own, raw_own = bias.to(wide).contiguous(), raw_bias.to(wide).contiguous()
        db = torch.empty_like(own) if needs[1] else None
    din = torch.empty_like(in_la) if needs[2] and in_la is not None else None
    dout = torch.empty_like(out_la) if needs[3] and out_la is not None else None
    _C.fold_gates_bwd(
        spec,
        CODES[raw.dtype],
        CODES[weight.dtype],
        raw.data_ptr(),
        0 if raw_own is None else raw_own.data_ptr(),
        weight.data_ptr(),
        0 if own is None else own.data_ptr(),
        n_out,
        n_in,
        0 if out_la is None else out_la.data_ptr(),
        0 if in_la is None else in_la.data_ptr(),
        0 if out_seed is None else out_seed.data_ptr(),
        0 if in_seed is None else in_seed.data_ptr(),
        0 if dw is None else dw.data_ptr(),
        0 if own is None or db is None else db.data_ptr(),
        0 if dout is None else dout.data_ptr(),
        0 if din is None else din.data_ptr(),
        0 if folded is None else folded.data_ptr(),
        torch.get_num_threads(),
    )
    return None if db is None or bias is None else db.to(bias.dtype), din, dout
