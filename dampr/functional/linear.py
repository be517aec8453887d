"""The gated linear map."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from dampr import _checks, ops
from dampr.spec import GateSpec

from .gates import DRAWN, drawn_rows, offset_of
from .inputs import cast, gate_of, gates_of


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
    spec: GateSpec = DRAWN,
    index_offset: int = 0,
) -> Tensor:
    """y = z_out * ((x * z_in) weight^T + bias) with gates on the inputs, on the outputs, on both, or on neither; or
    gates on the weights.

    Args:
        x: (..., K), any floating dtype; under autocast it is cast as ``nn.Linear`` would cast it.
        weight: (N, K), the dtype of ``x`` or, under autocast, float32.
        bias: (N,) or None. The output gate multiplies it too, in training as in evaluation.
        input_gate, output_gate: gate parameters (log_alpha), (K,) and (N,), float32 (float64 next to float64 ``x``), or
            None.
        weight_gate: parameters of a gate for each block of the weight (of which only it is gated, not the bias), flat,
            (ceil(N / R) * ceil(K / C),): weight[n, k] belongs to gate (n // R) * ceil(K / C) + k // C. Not together
            with other gates.
        block: (R, C), the size of a block; (1, 1) is a gate for each weight.
        seed: the noise, an int in [0, 2^63) or an int64 tensor of shape (1,); not needed by a deterministic ``spec``.
            With both gates, the output gates use a second stream of the same seed.
        per_sample: one draw per row of ``x`` flattened to (M, K) instead of one per call; vector gates only.
        spec: the gate function, from :func:`dampr.spec.hard_concrete`; drawn by default.
        index_offset: with ``per_sample``, the number of the first row, as of :func:`sample_gates`; not fused unless it
            is 0.

    Returns: (..., N) in the dtype of ``x``. Differentiable in ``x``, ``weight``, ``bias`` and the gate parameters.

    Raises: TypeError or ValueError that names the argument, before any work is done.
    """
    for name, t in (("x", x), ("weight", weight)):
        if not isinstance(t, Tensor) or t.layout != torch.strided or not t.is_floating_point():
            _checks.floating(name, _checks.tensor(name, t))
    if weight.dim() != 2:
        raise ValueError(f"weight.shape={tuple(weight.shape)}: expected two dimensions, (out_features, in_features)")
    n_out, n_in = weight.shape
    if x.dim() < 1 or x.size(-1) != n_in:
        raise ValueError(
            f"x.shape={tuple(x.shape)}: expected (..., {n_in}), because weight has shape {tuple(weight.shape)}"
        )
    x = cast(x, weight, bias)
    if weight_gate is not None:
        if (
            (per_sample is not False and _checks.flag("per_sample", per_sample))
            or input_gate is not None
            or output_gate is not None
        ):
            raise ValueError("weight_gate: expected no input_gate, no output_gate and per_sample=False beside it")
        count = _checks.block_count("block", block, n_out, n_in)
        gate = gate_of("weight_gate", weight_gate, count, f"{block[0]} x {block[1]} block of weight", x, seed, spec)
        return ops.weight_gated_linear(x, weight, bias, gate, (int(block[0]), int(block[1])))
    gates = gates_of(input_gate, n_in, "input feature", output_gate, n_out, "output feature", x, seed, spec, per_sample)
    if not (index_offset and offset_of(index_offset, per_sample) and gates.per_sample):
        return ops.gated_linear(x, weight, bias, gates)
    rows = math.prod(x.shape[:-1])
    if gates.input is not None:
        x = (x * drawn_rows(gates.input, rows, index_offset).view(x.shape)).to(x.dtype)
    y = ops.gated_linear(x, weight, bias, gates._replace(input_log_alpha=None, output_log_alpha=None))
    if gates.output is None:
        return y
    return (y * drawn_rows(gates.output, rows, index_offset).view(y.shape)).to(y.dtype)
