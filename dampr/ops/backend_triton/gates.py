"""Launches of the kernels that only draw gates: dampr/kernels/gates.py."""

from __future__ import annotations

import torch

from dampr.kernels import configs
from dampr.kernels import gates as gate_kernels
from dampr.ops import backend_reference
from dampr.ops.gate_args import GateArgs

from . import host


def sample_gates_fwd(gate: GateArgs, rows: int | None, start: int = 0) -> torch.Tensor:
    """Gate values, float32, (n,), or (rows, n) with a draw for each row.

    If the noise starts at another index than 0 (a batch that several processes share), plain PyTorch draws them.
    """
    if start:
        return backend_reference.sample_gates_fwd(gate, rows, start)
    log_alpha = gate.log_alpha.contiguous()
    n, height = log_alpha.numel(), 1 if rows is None else rows
    z = host.empty(log_alpha, (height, n), torch.float32)
    block_m, block_n = configs.GATE_VECTOR if height == 1 else configs.GATE_TILE
    grid = (configs.cdiv(n, block_n) * configs.cdiv(height, block_m),)
    sizes = {"BLOCK_M": block_m, "BLOCK_N": block_n, "GROUPED": n % 4 == 0 or height == 1, "GATE": gate.spec}
    host.launch(gate_kernels.sample_gates_fwd_kernel, grid, log_alpha, gate.seed, z, height, n, **sizes)
    return z.view(n) if rows is None else z


def sample_gates_bwd(dz: torch.Tensor, gate: GateArgs, rows: int | None, start: int = 0) -> torch.Tensor:
    """dlog_alpha, (n,), for the gradient ``dz`` of the gate values, (n,) or (rows, n), float32."""
    if start:
        return backend_reference.sample_gates_bwd(dz, gate, rows, start)
    log_alpha = gate.log_alpha.contiguous()
    n, height = log_alpha.numel(), 1 if rows is None else rows
    block_m, block_n = configs.GATE_VECTOR if height == 1 else configs.COLUMN_SUM_TILE
    splits, per_split = configs.split_rows(height, block_m, configs.cdiv(n, block_n), configs.PASS_PROGRAMS)
    partial = host.empty(dz, (splits, n), torch.float32)
    sizes = {"BLOCK_M": block_m, "BLOCK_N": block_n, "GROUPED": n % 4 == 0 or height == 1, "GATE": gate.spec}
    args = dz.contiguous(), log_alpha, gate.seed, partial, height, n, per_split
    host.launch(gate_kernels.sample_gates_bwd_kernel, (configs.cdiv(n, block_n), splits), *args, **sizes)
    return host.reduce(partial, (n,), torch.float32)
