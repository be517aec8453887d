"""W~ = W * Z, the weight with its gates in it, as an op: whatever reads a weight (a convolution, a norm, an RNN) then runs as it is.

``fold_weight`` takes gates of rows and columns and the bias along, ``fold_blocks`` a gate for each weight or block of weights. The gradient
of a gate comes from that of the folded weight, dz = sum(W * dW~): nothing but the inputs and the seed is kept.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from dampr.spec import GateSpec

from .backends import select
from .library import apply, define, once_differentiable, or_empty, unpack, wanted

Maybe = Tensor | None
_GATES = "Tensor? input_log_alpha, Tensor? output_log_alpha, Tensor? input_seed, Tensor? output_seed, float[] spec"


def _fwd(
    weight: Tensor,
    bias: Maybe,
    in_la: Maybe,
    out_la: Maybe,
    in_seed: Maybe,
    out_seed: Maybe,
    spec: Sequence[float],
    dtype: torch.dtype,
) -> tuple[Tensor, Maybe]:
    backend = select(weight.device, dtype)
    folded: tuple[Tensor, Maybe] = backend.fold_weight_fwd(weight, bias, in_la, out_la, in_seed, out_seed, unpack(spec), dtype)
    return folded


def _fwd_fake(
    weight: Tensor,
    bias: Maybe,
    in_la: Maybe,
    out_la: Maybe,
    in_seed: Maybe,
    out_seed: Maybe,
    spec: Sequence[float],
    dtype: torch.dtype,
) -> tuple[Tensor, Tensor]:
    return weight.new_empty(weight.shape, dtype=dtype), weight.new_empty((0,) if bias is None else bias.shape, dtype=dtype)


def _bwd(
    raw: Tensor,
    raw_bias: Maybe,
    weight: Tensor,
    bias: Maybe,
    in_la: Maybe,
    out_la: Maybe,
    in_seed: Maybe,
    out_seed: Maybe,
    spec: Sequence[float],
    needs: Sequence[bool],
) -> tuple[Maybe, ...]:
    backend = select(raw.device, raw.dtype)
    args = raw, raw_bias, weight, bias, in_la, out_la, in_seed, out_seed
    grads: tuple[Maybe, ...] = backend.fold_weight_bwd(*args, unpack(spec), needs)
    return grads


def _bwd_fake(raw: Tensor, raw_bias: Maybe, weight: Tensor, bias: Maybe, in_la: Maybe, out_la: Maybe, *rest: Any) -> tuple[Tensor, ...]:
    return _like((weight, bias, in_la, out_la), rest[-1], raw)


def _like(inputs: tuple[Maybe, ...], needs: Sequence[bool], empty: Tensor) -> tuple[Tensor, ...]:
    return tuple(t.new_empty(t.shape) if need and t is not None else empty.new_empty(0) for t, need in zip(inputs, needs, strict=True))


fwd = define(
    f"fold_weight_fwd(Tensor weight, Tensor? bias, {_GATES}, ScalarType dtype) -> (Tensor, Tensor)",
    _fwd,
    _fwd_fake,
    lambda pair, *_: or_empty(pair, pair[0]),
)
bwd = define(
    f"fold_weight_bwd(Tensor raw, Tensor? raw_bias, Tensor weight, Tensor? bias, {_GATES}, bool[] needs)"
    " -> (Tensor, Tensor, Tensor, Tensor)",
    _bwd,
    _bwd_fake,
    lambda grads, raw, *_: or_empty(grads, raw),
)


class _FoldWeight(torch.autograd.Function):
    @staticmethod
    def forward(
        weight: Tensor,
        bias: Maybe,
        in_la: Maybe,
        out_la: Maybe,
        in_seed: Maybe,
        out_seed: Maybe,
        spec: GateSpec,
        dtype: torch.dtype,
    ) -> Any:
        folded, folded_bias = fwd(weight, bias, in_la, out_la, in_seed, out_seed, spec, dtype)
        return folded, folded.new_empty(0) if bias is None else folded_bias

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Any) -> None:
        *tensors, ctx.spec, _ = inputs
        if tensors[1] is None:
            ctx.mark_non_differentiable(output[1])
        ctx.save_for_backward(*tensors)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, raw: Tensor, raw_bias: Tensor) -> Any:  # type: ignore[override]
        needs, (_, bias, *_) = list(ctx.needs_input_grad[:4]), ctx.saved_tensors
        grads = bwd(raw, None if bias is None else raw_bias, *ctx.saved_tensors, ctx.spec, needs)
        return (*wanted(grads, needs), None, None, None, None)


def fold_weight(
    weight: Tensor,
    bias: Maybe,
    input_log_alpha: Maybe,
    output_log_alpha: Maybe,
    input_seed: Maybe,
    output_seed: Maybe,
    spec: GateSpec,
    dtype: torch.dtype,
) -> tuple[Tensor, Maybe]:
    """(z_out W z_in, z_out b) in ``dtype``, differentiable; weight: (N, K), bias: (N,), log-alphas: (K,) and (N,); taken as checked."""
    folded, folded_bias = apply(_FoldWeight, weight, bias, input_log_alpha, output_log_alpha, input_seed, output_seed, spec, dtype)
    return folded, None if bias is None else folded_bias


def _blocks_fwd(weight: Tensor, log_alpha: Tensor, seed: Maybe, spec: Sequence[float], block: Sequence[int], dtype: torch.dtype) -> Tensor:
    folded: Tensor = select(weight.device, dtype).fold_blocks_fwd(weight, log_alpha, seed, unpack(spec), tuple(block), dtype)
    return folded


def _blocks_fwd_fake(
    weight: Tensor, log_alpha: Tensor, seed: Maybe, spec: Sequence[float], block: Sequence[int], dtype: torch.dtype
) -> Tensor:
    return weight.new_empty(weight.shape, dtype=dtype)


def _blocks_bwd(
    raw: Tensor, weight: Tensor, log_alpha: Tensor, seed: Maybe, spec: Sequence[float], block: Sequence[int], needs: Sequence[bool]
) -> tuple[Maybe, ...]:
    backend = select(raw.device, raw.dtype)
    grads: tuple[Maybe, ...] = backend.fold_blocks_bwd(raw, weight, log_alpha, seed, unpack(spec), tuple(block), needs)
    return grads


def _blocks_bwd_fake(raw: Tensor, weight: Tensor, log_alpha: Tensor, *rest: Any) -> tuple[Tensor, ...]:
    return _like((weight, log_alpha), rest[-1], raw)


_BLOCKS = "Tensor weight, Tensor log_alpha, Tensor? seed, float[] spec, int[2] block"
blocks_fwd = define(f"fold_blocks_fwd({_BLOCKS}, ScalarType dtype) -> Tensor", _blocks_fwd, _blocks_fwd_fake)
blocks_bwd = define(
    f"fold_blocks_bwd(Tensor raw, {_BLOCKS}, bool[] needs) -> (Tensor, Tensor)",
    _blocks_bwd,
    _blocks_bwd_fake,
    lambda grads, raw, *_: or_empty(grads, raw),
)


class _FoldBlocks(torch.autograd.Function):
    @staticmethod
    def forward(weight: Tensor, log_alpha: Tensor, seed: Maybe, spec: GateSpec, block: tuple[int, int], dtype: torch.dtype) -> Any:
        return blocks_fwd(weight, log_alpha, seed, spec, block, dtype)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Any) -> None:
        weight, log_alpha, seed, ctx.spec, ctx.block, _ = inputs
        ctx.save_for_backward(weight, log_alpha, seed)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, raw: Tensor) -> Any:  # type: ignore[override]
        needs = list(ctx.needs_input_grad[:2])
        grads = blocks_bwd(raw, *ctx.saved_tensors, ctx.spec, ctx.block, needs)
        return (*wanted(grads, needs), None, None, None, None)


def fold_blocks(weight: Tensor, log_alpha: Tensor, seed: Maybe, spec: GateSpec, block: tuple[int, int], dtype: torch.dtype) -> Tensor:
    """W * Z in ``dtype``, differentiable; weight: (N, K), log_alpha: a gate for each block, row by row; taken as checked."""
    folded: Tensor = apply(_FoldBlocks, weight, log_alpha, seed, spec, block, dtype)
    return folded
