"""The weight times its gates, W~ = W * Z, as an operator. Whatever uses the weight (a product, a norm, an RNN) then
takes W~ and runs unchanged.

``fold_weight`` takes gates for rows and columns, and the bias. ``fold_blocks`` takes a gate for each weight or block of
weights. The gradient of a gate follows from that of the folded weight, dz = sum(W * dW~), so the backward needs only
the inputs and the seed.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from dampr import reference

from .backends import select
from .gate_activations import dense_format
from .gate_args import PAIR, GateArgs, GatePair, unpack
from .library import define, or_empty, wanted
from .node import Node, apply


def _fwd(
    weight: Tensor,
    bias: Tensor | None,
    in_la: Tensor | None,
    out_la: Tensor | None,
    in_seed: Tensor | None,
    out_seed: Tensor | None,
    spec: Sequence[float],
    dtype: torch.dtype,
) -> tuple[Tensor, Tensor | None]:
    """Implementation of ``dampr::fold_weight_fwd``: (z_out W z_in, z_out b) in ``dtype``.

    Args:
        weight: (N, K).
        bias: (N,) or None.
        in_la, out_la: log_alpha of column gates (K,) and row gates (N,); None without these gates.
        in_seed, out_seed: int64 (1,); None if nothing is drawn.
        spec: the fields of a :class:`dampr.spec.GateSpec` as floats.
        dtype: that of the results.
    """
    gates = GatePair.of(in_la, out_la, in_seed, out_seed, spec)
    folded: tuple[Tensor, Tensor | None] = select(weight.device, dtype).fold_weight_fwd(weight, bias, gates, dtype)
    return folded


def _fwd_fake(weight: Tensor, bias: Tensor | None, *rest: Any) -> tuple[Tensor, Tensor]:
    """The empty results of :func:`_fwd`."""
    dtype = rest[-1]
    return weight.new_empty(weight.shape, dtype=dtype), weight.new_empty(
        (0,) if bias is None else bias.shape, dtype=dtype
    )


def _bwd(
    raw: Tensor,
    raw_bias: Tensor | None,
    weight: Tensor,
    bias: Tensor | None,
    in_la: Tensor | None,
    out_la: Tensor | None,
    in_seed: Tensor | None,
    out_seed: Tensor | None,
    spec: Sequence[float],
    needs: Sequence[bool],
) -> tuple[Tensor | None, ...]:
    """Implementation of ``dampr::fold_weight_bwd``: the gradients of weight, bias, in_la and out_la.

    raw, raw_bias: the gradients of the results of :func:`_fwd`, (N, K) and (N,). A gradient is None where ``needs``,
    four bools, is False.
    """
    gates = GatePair.of(in_la, out_la, in_seed, out_seed, spec)
    grads: tuple[Tensor | None, ...] = select(raw.device, raw.dtype).fold_weight_bwd(
        raw, raw_bias, weight, bias, gates, needs
    )
    return grads


def _bwd_fake(raw: Tensor, raw_bias: Tensor | None, *rest: Any) -> tuple[Tensor, ...]:
    """The empty results of :func:`_bwd`."""
    return _like(rest[:4], rest[-1], raw)


def _like(inputs: tuple[Tensor | None, ...], needs: Sequence[bool], empty: Tensor) -> tuple[Tensor, ...]:
    """Empty tensors like ``inputs``; of shape (0,) for those that need no gradient, because an operator cannot return
    None.
    """
    return tuple(
        t.new_empty(t.shape) if need and t is not None else empty.new_empty(0)
        for t, need in zip(inputs, needs, strict=True)
    )


fwd = define(
    f"fold_weight_fwd(Tensor weight, Tensor? bias, {PAIR}, float[] spec, ScalarType dtype) -> (Tensor, Tensor)",
    _fwd,
    _fwd_fake,
    lambda pair, *_: or_empty(pair, pair[0]),
)
bwd = define(
    f"fold_weight_bwd(Tensor raw, Tensor? raw_bias, Tensor weight, Tensor? bias, {PAIR}, float[] spec, bool[] needs)"
    " -> (Tensor, Tensor, Tensor, Tensor)",
    _bwd,
    _bwd_fake,
    lambda grads, raw, *_: or_empty(grads, raw),
)


class _FoldWeight(Node):
    """The autograd function of :func:`fold_weight`."""

    tensors = 6

    @staticmethod
    def plain(*inputs: Any) -> tuple[Tensor, Tensor]:
        folded, folded_bias = reference.fold_weight(*inputs)
        return folded, folded.new_empty(0) if folded_bias is None else folded_bias

    @staticmethod
    def forward(*inputs: Any) -> Any:
        folded, folded_bias = fwd(*inputs)
        return folded, folded.new_empty(0) if inputs[1] is None else folded_bias

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Any) -> None:
        if inputs[1] is None:
            ctx.mark_non_differentiable(output[1])
        ctx.constants = inputs[6:]
        ctx.save_for_backward(*inputs[:6])

    @staticmethod
    def fused(ctx: Any, raw: Tensor, raw_bias: Tensor) -> Any:
        needs, (_, bias, *_) = list(ctx.needs_input_grad[:4]), ctx.saved_tensors
        grads = bwd(raw, None if bias is None else raw_bias, *ctx.saved_tensors, ctx.constants[0], needs)
        return (*wanted(grads, needs), None, None, None, None)


def fold_weight(
    weight: Tensor, bias: Tensor | None, gates: GatePair, dtype: torch.dtype
) -> tuple[Tensor, Tensor | None]:
    """(z_out W z_in, z_out b) in ``dtype``, differentiable.

    weight: (N, K); bias: (N,) or None; gates: on K columns and N rows. It does not check its arguments.
    """
    folded, folded_bias = apply(_FoldWeight, weight, bias, *gates[:5], dtype)
    return folded, None if bias is None else folded_bias


def _blocks_fwd(
    weight: Tensor,
    log_alpha: Tensor,
    seed: Tensor | None,
    spec: Sequence[float],
    block: Sequence[int],
    dtype: torch.dtype,
) -> Tensor:
    """Implementation of ``dampr::fold_blocks_fwd``: W * Z in ``dtype``.

    weight: (N, K). log_alpha: one for each ``block`` = (rows, cols) of weights, row by row.
    """
    gate = GateArgs(log_alpha, seed, unpack(spec))
    folded: Tensor = select(weight.device, dtype).fold_blocks_fwd(weight, gate, tuple(block), dtype)
    return folded


def _blocks_fwd_fake(weight: Tensor, *rest: Any) -> Tensor:
    """The empty result of :func:`_blocks_fwd`."""
    return weight.new_empty(weight.shape, dtype=rest[-1])


def _blocks_bwd(
    raw: Tensor,
    weight: Tensor,
    log_alpha: Tensor,
    seed: Tensor | None,
    spec: Sequence[float],
    block: Sequence[int],
    needs: Sequence[bool],
) -> tuple[Tensor | None, ...]:
    """Implementation of ``dampr::fold_blocks_bwd``: the gradients of weight and log_alpha; None where ``needs`` is
    False.

    raw: the gradient of the result of :func:`_blocks_fwd`, (N, K).
    """
    gate = GateArgs(log_alpha, seed, unpack(spec))
    grads: tuple[Tensor | None, ...] = select(raw.device, raw.dtype).fold_blocks_bwd(
        raw, weight, gate, tuple(block), needs
    )
    return grads


def _blocks_bwd_fake(raw: Tensor, weight: Tensor, log_alpha: Tensor, *rest: Any) -> tuple[Tensor, ...]:
    """The empty results of :func:`_blocks_bwd`."""
    return _like((weight, log_alpha), rest[-1], raw)


_BLOCKS = "Tensor weight, Tensor log_alpha, Tensor? seed, float[] spec, int[2] block"
blocks_fwd = define(f"fold_blocks_fwd({_BLOCKS}, ScalarType dtype) -> Tensor", _blocks_fwd, _blocks_fwd_fake)
blocks_bwd = define(
    f"fold_blocks_bwd(Tensor raw, {_BLOCKS}, bool[] needs) -> (Tensor, Tensor)",
    _blocks_bwd,
    _blocks_bwd_fake,
    lambda grads, raw, *_: or_empty(grads, raw),
)


class _FoldBlocks(Node):
    """The autograd function of :func:`fold_blocks`."""

    tensors = 3
    plain = staticmethod(reference.fold_blocks)

    @staticmethod
    def forward(weight: Tensor, *rest: Any) -> Any:  # type: ignore[override]
        return _laid_out(blocks_fwd(_rows(weight), *rest), weight)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Any) -> None:
        ctx.constants = inputs[3:]
        ctx.save_for_backward(*inputs[:3])

    @staticmethod
    def fused(ctx: Any, raw: Tensor) -> Any:
        (weight, log_alpha, seed), needs = ctx.saved_tensors, list(ctx.needs_input_grad[:2])
        dw, dlog_alpha = wanted(
            blocks_bwd(_rows(raw), _rows(weight), log_alpha, seed, *ctx.constants[:2], needs), needs
        )
        return None if dw is None else _laid_out(dw, weight), dlog_alpha, None, None, None, None


def _rows(weight: Tensor) -> Tensor:
    """A weight (N, ...) as a matrix of N rows, in the order of its indices, whatever its memory format."""
    return weight if weight.dim() == 2 else weight.flatten(1)


def _laid_out(matrix: Tensor, weight: Tensor) -> Tensor:
    """The inverse of :func:`_rows`, in the memory format of ``weight``."""
    return matrix if weight.dim() == 2 else matrix.view(weight.shape).contiguous(memory_format=dense_format(weight, 1))


def fold_blocks(weight: Tensor, gate: GateArgs, block: tuple[int, int], dtype: torch.dtype) -> Tensor:
    """W * Z in ``dtype``, differentiable.

    weight: (N, ...), taken as a matrix of N rows; gate: one for each ``block`` = (rows, cols) of it, row by row. It
    does not check its arguments.
    """
    folded: Tensor = apply(_FoldBlocks, weight, gate.log_alpha, gate.seed, gate.spec, block, dtype)
    return folded
