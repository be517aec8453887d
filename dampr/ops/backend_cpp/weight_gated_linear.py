"""Gates of weights and of blocks of weights: multiplied into the weight, then a vendor's GEMM; ``rows.h`` and ``blocks.h`` of csrc."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from dampr import _C  # type: ignore[attr-defined]
from dampr.ops import routes
from dampr.ops.gate_args import GateArgs, Maybe
from dampr.ops.library import rows_of
from dampr.spec import SAMPLE

from . import host, products
from .host import CODES, ptr
from .routes import route

Block = tuple[int, int]


def fold_blocks_fwd(weight: Tensor, gate: GateArgs, block: Block, dtype: torch.dtype, passing: bool = False) -> Tensor:
    """weight * Z, rounded once to ``dtype``: drawn while it is multiplied where each weight has a gate, else drawn first and spread.

    ``passing`` as in :func:`.host.new`.
    """
    weight, log_alpha = weight.contiguous(), gate.log_alpha.contiguous()
    out = host.new(weight.shape, dtype, passing)
    codes, threads = (CODES[weight.dtype], CODES[dtype]), torch.get_num_threads()
    if block == (1, 1):
        _C.gate_weights_fwd(gate.spec, *codes, ptr(weight), weight.numel(), ptr(log_alpha), ptr(gate.seed), ptr(out), threads)
        return out
    _C.fold_blocks_fwd(gate.spec, *codes, ptr(weight), *weight.shape, *block, ptr(log_alpha), ptr(gate.seed), ptr(out), threads)
    return out


def fold_blocks_bwd(raw: Tensor, weight: Tensor, gate: GateArgs, block: Block, needs: Sequence[bool]) -> tuple[Maybe, ...]:
    """Gradients of weight and log_alpha from that of the folded weight, ``raw`` (N, K)."""
    return _ungate(raw, weight, gate, block, needs)[:2]


def _ungate(
    raw: Tensor, weight: Tensor, gate: GateArgs, block: Block, needs: Sequence[bool], *, fold: bool = False, in_place: bool = False
) -> tuple[Maybe, Maybe, Maybe]:
    """:func:`fold_blocks_bwd` and weight * Z, as :func:`.fold_weight.ungate` does it for gates on features."""
    raw, weight, log_alpha = raw.contiguous(), weight.contiguous(), gate.log_alpha.contiguous()
    dw = host.product(raw, weight, in_place) if needs[0] else None
    folded = host.new(weight.shape, weight.dtype, passing=True) if fold and raw.dtype == weight.dtype else None
    grad = torch.empty_like(log_alpha) if needs[1] else None
    codes, threads = (CODES[raw.dtype], CODES[weight.dtype]), torch.get_num_threads()
    if block == (1, 1):
        args = ptr(raw), ptr(weight), weight.numel(), *map(ptr, (log_alpha, gate.seed, dw, grad))
        _C.gate_weights_bwd(gate.spec, *codes, *args, threads, ptr(folded))
        return dw, grad, folded
    args = ptr(raw), ptr(weight), *weight.shape, *block, *map(ptr, (log_alpha, gate.seed, dw, grad, folded))
    _C.fold_blocks_bwd(gate.spec, *codes, *args, threads)
    return dw, grad, folded


def weight_gated_linear_fwd(x: Tensor, weight: Tensor, bias: Maybe, gate: GateArgs, block: Block) -> Tensor:
    if routes.forced_name() is not None:
        route(x.shape[:-1].numel(), weight.shape[0], weight.shape[1], x.dtype, block, False)
    folded = fold_blocks_fwd(weight, gate, block, x.dtype, passing=True)
    return products.linear(x, folded, None if bias is None else bias.to(x.dtype), gate.spec.rule == SAMPLE)


def weight_gated_linear_bwd(
    dy: Tensor, x: Tensor, weight: Tensor, bias: Maybe, gate: GateArgs, block: Block, needs: Sequence[bool]
) -> tuple[Maybe, ...]:
    need_x, need_w, need_b, need_gate = needs
    rows, dy = rows_of(x), rows_of(dy)
    dw = grad = folded = None
    if need_w or need_gate:
        raw = products.to_weight(dy, rows, passing=True)  # (N, K): the weight gradient of the dense layer
        dw, grad, folded = _ungate(raw, weight, gate, block, (need_w, need_gate), fold=need_x, in_place=True)
    if need_x and folded is None:
        folded = fold_blocks_fwd(weight, gate, block, x.dtype, passing=True)
    db = dy.sum(0).to(bias.dtype) if need_b and bias is not None else None
    return None if folded is None else products.to_inputs(dy, folded).view(x.shape), dw, db, grad
