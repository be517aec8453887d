"""Calls of dampr._C on tensors, each with the memory that it needs, and what results are held to."""

from __future__ import annotations

import pytest
import torch

from dampr import reference, spec

_C = pytest.importorskip("dampr._C", reason="dampr was built without its C++ extension", exc_type=ImportError)


CODES = {torch.float32: 0, torch.float64: 1, torch.bfloat16: 2, torch.float16: 3}


DTYPES = list(CODES)


SHAPES = [(0, 5), (5, 0), (1, 1), (1, 129), (3, 7), (7, 3), (5, 512), (127, 257), (3, 2053), (701, 13), (67, 2500)]


SPECS = {
    "two_thirds": spec.hard_concrete(),
    "beta_0.5": spec.hard_concrete(beta=0.5, gamma=-0.3, zeta=1.2),
    "paper": spec.hard_concrete("paper"),
    "median": spec.hard_concrete("median"),
    "binary": spec.hard_concrete("binary"),
}


RULE = SPECS["two_thirds"]


VALUE = spec.value()  # gates that are their parameters


LARGEST_SEED = 2**63 - 1


def ptr(tensor: torch.Tensor | None) -> int:
    return 0 if tensor is None else tensor.data_ptr()


def poisoned(*shape: int, dtype: torch.dtype = torch.float32) -> torch.Tensor:
    """Memory in which an element that is never written shows."""
    return torch.full(shape, float("nan"), dtype=dtype)


def random_seed() -> torch.Tensor:
    return torch.randint(0, LARGEST_SEED, (1,), dtype=torch.int64)


def gate_dtype(dtype: torch.dtype) -> torch.dtype:
    return torch.float64 if dtype == torch.float64 else torch.float32


def random_log_alpha(n: int, dtype: torch.dtype = torch.float32) -> torch.Tensor:
    """Log-alphas around the thresholds, some far beyond them."""
    log_alpha = 2.5 * torch.randn(n)
    log_alpha[::11] *= 60
    return log_alpha.to(dtype)


def assert_as_good(
    name: str, actual: torch.Tensor, same_dtype: torch.Tensor, truth: torch.Tensor, terms: float = 0.0
) -> None:
    """At most twice the error of PyTorch in the same dtype, against float64, plus a rounding error of the largest
    value.

    ``terms``: the sizes of what is added up for one number, summed. Where terms cancel, a truth in float64 is no better
    than their rounding.
    """
    assert actual.shape == truth.shape
    if not truth.numel():
        return
    assert not actual.isnan().any(), f"{name}: an element was not written"
    rounding = 1e-13 if actual.dtype == torch.float64 else 1e-6
    allowed = 2 * (same_dtype.double() - truth).abs().max() + rounding * truth.abs().max() + 1e-15 * terms
    error = (actual.double() - truth).abs().max()
    assert error <= allowed, f"{name}: error {error:.3e}, allowed {allowed:.3e}"


def draw(rule: spec.GateSpec, log_alpha: torch.Tensor, seed: torch.Tensor, rows: int) -> torch.Tensor:
    return reference.gate_values(log_alpha, rule, seed, rows)


def gates_fwd(rule, log_alpha, seed, rows, threads=2):
    z = poisoned(rows, log_alpha.numel(), dtype=log_alpha.dtype)
    _C.gates_fwd(rule, CODES[log_alpha.dtype], ptr(log_alpha), ptr(seed), rows, log_alpha.numel(), ptr(z), threads)
    return z


def gates_bwd(rule, log_alpha, seed, dz, threads=2):
    grad = poisoned(log_alpha.numel(), dtype=log_alpha.dtype)
    _C.gates_bwd(rule, CODES[log_alpha.dtype], ptr(log_alpha), ptr(seed), *dz.shape, ptr(dz), ptr(grad), threads)
    return grad


def gate_rows_fwd(rule, x, log_alpha, seed, threads=2):
    out = poisoned(*x.shape, dtype=x.dtype)
    _C.gate_rows_fwd(rule, CODES[x.dtype], ptr(x), *x.shape, ptr(log_alpha), ptr(seed), ptr(out), threads)
    return out


def gate_rows_bwd(rule, x, g, log_alpha, seed, threads=2, wanted=(True, True, True)):
    made = (
        poisoned(*x.shape, dtype=x.dtype),
        poisoned(*x.shape, dtype=x.dtype),
        poisoned(log_alpha.numel(), dtype=log_alpha.dtype),
    )
    dx, xz, grad = (t if w else None for t, w in zip(made, wanted, strict=True))
    _C.gate_rows_bwd(
        rule, CODES[x.dtype], ptr(x), ptr(g), *x.shape, ptr(log_alpha), ptr(seed), ptr(dx), ptr(xz), ptr(grad), threads
    )
    return dx, xz, grad


def fold_fwd(w, z_out, z_in, dtype, threads=2):
    out = poisoned(*w.shape, dtype=dtype)
    _C.fold_gates_fwd(
        VALUE, CODES[w.dtype], CODES[dtype], ptr(w), 0, *w.shape, ptr(z_out), ptr(z_in), 0, 0, ptr(out), 0, threads
    )
    return out


def fold_bwd(g, w, z_out, z_in, threads=2, wanted=(True, True, True)):
    dtype = gate_dtype(w.dtype)
    made = (poisoned(*w.shape, dtype=w.dtype), poisoned(w.shape[0], dtype=dtype), poisoned(w.shape[1], dtype=dtype))
    dw, dz_out, dz_in = (t if w_ else None for t, w_ in zip(made, wanted, strict=True))
    z_out, z_in = (torch.ones(n, dtype=dtype) if z is None else z for z, n in zip((z_out, z_in), w.shape, strict=True))
    args = ptr(g), 0, ptr(w), 0, *w.shape, ptr(z_out), ptr(z_in), 0, 0, ptr(dw), 0, ptr(dz_out), ptr(dz_in), 0
    _C.fold_gates_bwd(VALUE, CODES[g.dtype], CODES[w.dtype], *args, threads)
    return dw, dz_out, dz_in


def words(seed: torch.Tensor, count: int, start: int, threads: int = 2) -> torch.Tensor:
    out = torch.full((count,), -1, dtype=torch.int32)
    _C.philox_words(ptr(seed), start, count, ptr(out), threads)
    return out.long() & 0xFFFFFFFF


def uniform(seed: torch.Tensor, count: int, start: int, threads: int = 2) -> torch.Tensor:
    out = poisoned(count)
    _C.philox_uniform(ptr(seed), start, count, ptr(out), threads)
    return out


def pairs() -> list[tuple[torch.dtype, torch.dtype]]:
    return [(a, b) for a in DTYPES for b in DTYPES if (a == torch.float64) == (b == torch.float64)]


def random_gates(n: int, dtype: torch.dtype, generator: torch.Generator | None = None) -> torch.Tensor:
    return (1.4 * torch.rand(n, generator=generator) - 0.2).clamp(0, 1).to(gate_dtype(dtype))


def gate_weights_fwd(rule, w, log_alpha, seed, dtype, threads=2):
    out = poisoned(*w.shape, dtype=dtype)
    _C.gate_weights_fwd(
        rule, CODES[w.dtype], CODES[dtype], ptr(w), w.numel(), ptr(log_alpha), ptr(seed), ptr(out), threads
    )
    return out


def gate_weights_bwd(rule, g, w, log_alpha, seed, threads=2, wanted=(True, True)):
    made = poisoned(*w.shape, dtype=w.dtype), poisoned(*w.shape, dtype=log_alpha.dtype)
    dw, grad = (t if asked else None for t, asked in zip(made, wanted, strict=True))
    dtypes = CODES[g.dtype], CODES[w.dtype]
    _C.gate_weights_bwd(
        rule, *dtypes, ptr(g), ptr(w), w.numel(), ptr(log_alpha), ptr(seed), ptr(dw), ptr(grad), threads
    )
    return dw, grad


def block_count(shape, block) -> int:
    return -(-shape[0] // block[0]) * -(-shape[1] // block[1])


def fold_blocks_fwd(w, block, z, dtype, threads=2):
    out = poisoned(*w.shape, dtype=dtype)
    _C.fold_blocks_fwd(VALUE, CODES[w.dtype], CODES[dtype], ptr(w), *w.shape, *block, ptr(z), 0, ptr(out), threads)
    return out


def fold_blocks_bwd(g, w, block, z, threads=2, wanted=(True, True)):
    made = poisoned(*w.shape, dtype=w.dtype), poisoned(block_count(w.shape, block), dtype=gate_dtype(w.dtype))
    dw, dz = (t if asked else None for t, asked in zip(made, wanted, strict=True))
    _C.fold_blocks_bwd(
        VALUE, CODES[g.dtype], CODES[w.dtype], ptr(g), ptr(w), *w.shape, *block, ptr(z), 0, ptr(dw), ptr(dz), 0, threads
    )
    return dw, dz


BLOCKS = [
    (1, 1),
    (4, 4),
    (2, 8),
    (3, 2),
    (3, 5),
    (1, 7),
    (16, 16),
    (64, 64),
    (1, 4000),
    (4000, 1),
    (33, 2049),
    (700, 2500),
    (2**62, 2**62),
]
