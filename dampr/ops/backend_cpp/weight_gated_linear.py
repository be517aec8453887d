"""Linear layers with gates on weights and on blocks of weights: the gates are multiplied into the weight
(``rows.h`` and ``blocks.h`` of csrc), then torch's GEMM runs.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from dampr import _C  # type: ignore[attr-defined]
from dampr.ops import routes
from dampr.ops.gate_args import GateArgs
from dampr.ops.plan import Plan
from dampr.spec import SAMPLE, GateSpec

from . import host, products
from .host import CODES
from .routes import decide

Block = tuple[int, int]


def fold_blocks_fwd(
    weight: Tensor, gate: GateArgs, block: Block, dtype: torch.dtype, in_scratch: bool = False
) -> Tensor:
    """W * Z in ``dtype``, rounded once.

    A gate on each weight is drawn in the pass that multiplies; gates on blocks are drawn first. ``in_scratch``: the
    result is in :data:`.host.scratch`.
    """
    weight, log_alpha = weight.contiguous(), gate.log_alpha.contiguous()
    out = host.scratch.views[weight.shape, None, dtype] if in_scratch else torch.empty(weight.shape, dtype=dtype)
    args = gate.spec, CODES[weight.dtype], CODES[dtype], weight.data_ptr()
    seed = 0 if gate.seed is None else gate.seed.data_ptr()
    gates = log_alpha.data_ptr(), seed, out.data_ptr(), torch.get_num_threads()
    if block == (1, 1):
        _C.gate_weights_fwd(*args, weight.numel(), *gates)
    else:
        _C.fold_blocks_fwd(*args, *weight.shape, *block, *gates)
    return out


def fold_blocks_bwd(
    raw: Tensor, weight: Tensor, gate: GateArgs, block: Block, needs: Sequence[bool]
) -> tuple[Tensor | None, ...]:
    """The gradients of weight and log_alpha from that of the folded weight, ``raw`` (N, K)."""
    return _ungate(raw, weight, gate, block, needs)[:2]


def _ungate(
    raw: Tensor,
    weight: Tensor,
    gate: GateArgs,
    block: Block,
    needs: Sequence[bool],
    *,
    fold: bool = False,
    in_place: bool = False,
) -> tuple[Tensor | None, Tensor | None, Tensor | None]:
    """(dweight, dlog_alpha, W * Z), from ``raw`` (N, K), the gradient of the folded weight, in one pass.

    ``fold``: whether W * Z is wanted; it is None if dtypes differ. ``in_place``: dweight may be written over ``raw``.
    """
    raw, weight, log_alpha = raw.contiguous(), weight.contiguous(), gate.log_alpha.contiguous()
    dw = folded = grad = None
    if needs[0]:
        dw = raw if in_place and raw.dtype == weight.dtype else torch.empty_like(weight)
    if fold and raw.dtype == weight.dtype:
        folded = host.scratch.views[weight.shape, None, weight.dtype]
    if needs[1]:
        grad = torch.empty_like(log_alpha)
    args = gate.spec, CODES[raw.dtype], CODES[weight.dtype], raw.data_ptr(), weight.data_ptr()
    seed, to_dw = 0 if gate.seed is None else gate.seed.data_ptr(), 0 if dw is None else dw.data_ptr()
    gates = log_alpha.data_ptr(), seed, to_dw, 0 if grad is None else grad.data_ptr()
    to_folded, threads = 0 if folded is None else folded.data_ptr(), torch.get_num_threads()
    if block == (1, 1):
        _C.gate_weights_bwd(*args, weight.numel(), *gates, threads, to_folded)
    else:
        _C.fold_blocks_bwd(*args, *weight.shape, *block, *gates, to_folded, threads)
    return dw, grad, folded


def plan_weights(x: Tensor, weight: Tensor, spec: GateSpec, block: Block) -> Plan:
    """The plan of a call: its route and what the route needs. Raises ValueError if a forced route cannot serve the
    call.
    """
    N, K = weight.shape
    M, drawn = x.numel() // K if K else x.shape[:-1].numel(), spec.rule == SAMPLE
    route = decide(routes.stack[-1][0] if routes.stack else None, M, N, K, x.dtype, block, False, drawn)
    return Plan(route, fwd, bwd, spec, M, onednn=products.by_onednn(M, N, K, x.dtype), drawn=drawn, block=block)


def weight_gated_linear_fwd(x: Tensor, weight: Tensor, bias: Tensor | None, gate: GateArgs, block: Block) -> Tensor:
    """y = x (W * Z)^T + bias, with one gate for each weight or block of weights."""
    return fwd(plan_weights(x, weight, gate.spec, block), x, weight, bias, *gate[:2])[0]


def weight_gated_linear_bwd(
    dy: Tensor, x: Tensor, weight: Tensor, bias: Tensor | None, gate: GateArgs, block: Block, needs: Sequence[bool]
) -> tuple[Tensor | None, ...]:
    """The gradients of x, weight, bias and log_alpha, those that ``needs`` asks for."""
    return bwd(plan_weights(x, weight, gate.spec, block), dy, (x, weight, bias, *gate[:2]), needs)


def fwd(
    plan: Plan, x: Tensor, weight: Tensor, bias: Tensor | None, log_alpha: Tensor, seed: Tensor | None
) -> tuple[Tensor, None]:
    """(y, None) by the plan."""
    folded = fold_blocks_fwd(weight, GateArgs(log_alpha, seed, plan.spec), plan.block, x.dtype, in_scratch=True)
    return products.linear(x, folded, None if bias is None else bias.to(x.dtype), plan.onednn and plan.drawn), None


def bwd(plan: Plan, dy: Tensor, tensors: Sequence[Tensor | None], needs: Sequence[bool]) -> tuple[Tensor | None, ...]:
    """The gradients of x, weight, bias and log_alpha by the plan. ``tensors``: (x, weight, bias, log_alpha, seed)."""
    x, weight, bias, log_alpha, seed, *_ = tensors
    assert x is not None
    assert weight is not None
    assert log_alpha is not None
    need_x, need_w, need_b, need_gate = needs[:4]
    gate, (n_out, n_in) = GateArgs(log_alpha, seed, plan.spec), weight.shape
    rows, dy = (x, dy) if x.dim() == 2 else (x.reshape(plan.rows, n_in), dy.reshape(plan.rows, n_out))
    dw = grad = folded = None
    if need_w or need_gate:
        raw = products.to_weight(
            dy, rows, plan.onednn, in_scratch=True
        )  # (N, K): the weight gradient of the dense layer
        dw, grad, folded = _ungate(raw, weight, gate, plan.block, (need_w, need_gate), fold=need_x, in_place=True)
    if need_x and folded is None:
        folded = fold_blocks_fwd(weight, gate, plan.block, x.dtype, in_scratch=True)
    db = dy.sum(0).to(bias.dtype) if need_b and bias is not None else None
    return None if folded is None else products.to_inputs(dy, folded, plan.onednn).view(x.shape), dw, db, grad
