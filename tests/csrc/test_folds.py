"""Gates folded into weights in C++, those of rows and columns, of blocks and of each weight, against PyTorch."""

from __future__ import annotations

import pytest
import torch

from dampr import reference, spec

from .calls import (
    _C,
    BLOCKS,
    CODES,
    DTYPES,
    RULE,
    SHAPES,
    SPECS,
    VALUE,
    assert_as_good,
    block_count,
    draw,
    fold_blocks_bwd,
    fold_blocks_fwd,
    fold_bwd,
    fold_fwd,
    gate_dtype,
    gate_weights_bwd,
    gate_weights_fwd,
    gates_fwd,
    pairs,
    poisoned,
    ptr,
    random_gates,
    random_log_alpha,
    random_seed,
)


@pytest.mark.parametrize("sides", ["both", "out", "in", "none"])
@pytest.mark.parametrize(("first", "second"), pairs(), ids=str)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_fold_matches_pytorch(sides: str, first: torch.dtype, second: torch.dtype, shape: tuple[int, int]) -> None:
    n_out, n_in = shape
    w = torch.randn(shape).to(first)
    z_out = random_gates(n_out, first) if sides in ("both", "out") else None
    z_in = random_gates(n_in, first) if sides in ("both", "in") else None
    by_row = torch.ones(n_out, 1, dtype=gate_dtype(first)) if z_out is None else z_out[:, None]
    by_column = torch.ones(n_in, dtype=gate_dtype(first)) if z_in is None else z_in
    assert torch.equal(fold_fwd(w, z_out, z_in, second), (w.to(by_row.dtype) * by_row * by_column).to(second))

    g, w = torch.randn(shape).to(first), torch.randn(shape).to(second)
    dw, dz_out, dz_in = fold_bwd(g, w, z_out, z_in)
    gs, ws = g.to(by_row.dtype), w.to(by_row.dtype)
    assert torch.equal(dw, (gs * by_row * by_column).to(second))
    product, product_wide = gs * ws, g.double() * w.double()
    for name, dz, by, dim in (("dz_out", dz_out, by_column, 1), ("dz_in", dz_in, by_row, 0)):
        sizes = product_wide.abs().sum(dim)
        terms = float(sizes.max()) if len(sizes) else 0.0
        assert_as_good(name, dz, (product * by).sum(dim), (product_wide * by.double()).sum(dim), terms)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
def test_a_backward_pass_can_fold_the_weight_as_well(dtype) -> None:
    g, w = torch.randn(70, 33).to(dtype), torch.randn(70, 33).to(dtype)
    gates = torch.float64 if dtype == torch.float64 else torch.float32
    z_out = torch.rand(70, dtype=gates)
    z_in = torch.rand(33, dtype=gates)
    z = torch.rand(18 * 9, dtype=gates)
    folded = torch.empty_like(w)
    code, dw = CODES[dtype], torch.empty_like(w)
    _C.fold_gates_bwd(
        VALUE, code, code, ptr(g), 0, ptr(w), 0, 70, 33, ptr(z_out), ptr(z_in), 0, 0, ptr(dw), 0, 0, 0, ptr(folded), 2
    )
    torch.testing.assert_close(folded, (w.to(gates) * z_out[:, None] * z_in).to(dtype))
    _C.fold_blocks_bwd(VALUE, code, code, ptr(g), ptr(w), 70, 33, 4, 4, ptr(z), 0, ptr(dw), 0, ptr(folded), 2)
    assert torch.equal(folded, (w.to(gates) * reference.expand_blocks(z, (70, 33), (4, 4))).to(dtype))
    log_alpha, seed = torch.randn(70 * 33, dtype=gates), torch.tensor([3])
    _C.gate_weights_bwd(
        RULE, code, code, ptr(g), ptr(w), w.numel(), ptr(log_alpha), ptr(seed), ptr(dw), 0, 2, ptr(folded)
    )
    again = torch.empty_like(w)
    _C.gate_weights_fwd(RULE, code, code, ptr(w), w.numel(), ptr(log_alpha), ptr(seed), ptr(again), 2)
    assert torch.equal(folded, again)


KINDS = [(torch.float32, torch.float32), (torch.float64, torch.float64), (torch.float32, torch.bfloat16)]


@pytest.mark.parametrize("rows", [False, True])
@pytest.mark.parametrize("columns", [False, True])
@pytest.mark.parametrize(("dtype", "out_dtype"), KINDS)
def test_drawing_and_folding_at_once_is_the_one_after_the_other(
    rows: bool, columns: bool, dtype: torch.dtype, out_dtype: torch.dtype
) -> None:
    n_out, n_in, rule, gate = 70, 33, SPECS["two_thirds"], torch.float64 if dtype == torch.float64 else torch.float32
    w, g, b, g_b = (torch.randn(shape) for shape in ((n_out, n_in), (n_out, n_in), (n_out,), (n_out,)))
    w, g, b, g_b = w.to(dtype), g.to(out_dtype), b.to(gate), g_b.to(gate)
    la = [torch.randn(n).to(gate) if wanted else None for n, wanted in ((n_out, rows), (n_in, columns))]
    seeds = [torch.tensor([5 + i]) if t is not None else None for i, t in enumerate(la)]
    z = [None if t is None else torch.empty_like(t) for t in la]
    for t, seed, out in zip(la, seeds, z, strict=True):
        if t is not None:
            _C.gates_fwd(rule, CODES[gate], ptr(t), ptr(seed), 1, len(t), ptr(out), 1)
    head = CODES[dtype], CODES[out_dtype]
    sizes = n_out, n_in, *map(ptr, la), *map(ptr, seeds)
    out, b_out = torch.empty(n_out, n_in, dtype=out_dtype), torch.empty(n_out, dtype=out_dtype)
    own = (b, g_b) if rows else (None, None)
    _C.fold_gates_fwd(rule, *head, ptr(w), ptr(own[0]), *sizes, ptr(out), ptr(b_out), 2)
    assert torch.equal(out, fold_fwd(w, *z, out_dtype))
    if rows:
        assert torch.equal(b_out, (b * z[0]).to(out_dtype))
    dw, folded = torch.empty_like(w), torch.empty_like(w)
    db, dout, din = (
        None if not there else torch.empty(n, dtype=gate)
        for n, there in ((n_out, rows), (n_out, rows), (n_in, columns))
    )
    grads = *map(ptr, (dw, db, dout, din)), ptr(folded)
    _C.fold_gates_bwd(rule, CODES[out_dtype], CODES[dtype], ptr(g), ptr(own[1]), ptr(w), ptr(own[0]), *sizes, *grads, 2)
    expected, *dz = fold_bwd(g, w, *z)
    assert torch.equal(dw, expected)
    assert torch.equal(folded, fold_fwd(w, *z, dtype))
    if rows:
        assert torch.equal(db, g_b * z[0])
        dz[0] += b * g_b
    for t, seed, d, found in zip(la, seeds, dz, (dout, din), strict=True):
        if t is not None:
            right = torch.empty_like(t)
            _C.gates_bwd(rule, CODES[gate], ptr(t), ptr(seed), 1, len(t), ptr(d), ptr(right), 1)
            assert torch.equal(found, right)


@pytest.mark.parametrize("block", [(4, 4), (16, 16), (70, 1), (3, 50)])
@pytest.mark.parametrize(("dtype", "out_dtype"), KINDS)
def test_drawing_and_folding_blocks_at_once_is_the_one_after_the_other(
    block: tuple[int, int], dtype: torch.dtype, out_dtype: torch.dtype
) -> None:
    n_out, n_in, rule, gate = 70, 33, SPECS["two_thirds"], torch.float64 if dtype == torch.float64 else torch.float32
    w, g, seed = torch.randn(n_out, n_in).to(dtype), torch.randn(n_out, n_in).to(out_dtype), torch.tensor([5])
    log_alpha = torch.randn(-(n_out // -block[0]) * -(n_in // -block[1])).to(gate)
    z, out = torch.empty_like(log_alpha), torch.empty(n_out, n_in, dtype=out_dtype)
    _C.gates_fwd(rule, CODES[gate], ptr(log_alpha), ptr(seed), 1, len(log_alpha), ptr(z), 1)
    _C.fold_blocks_fwd(
        rule, CODES[dtype], CODES[out_dtype], ptr(w), n_out, n_in, *block, ptr(log_alpha), ptr(seed), ptr(out), 2
    )
    assert torch.equal(out, fold_blocks_fwd(w, block, z, out_dtype))
    dw = torch.empty_like(w)
    folded = torch.empty_like(w)
    grad = torch.empty_like(log_alpha)
    right = torch.empty_like(log_alpha)
    made = ptr(log_alpha), ptr(seed), ptr(dw), ptr(grad), ptr(folded)
    _C.fold_blocks_bwd(rule, CODES[out_dtype], CODES[dtype], ptr(g), ptr(w), n_out, n_in, *block, *made, 2)
    expected, dz = fold_blocks_bwd(g, w, block, z)
    assert torch.equal(dw, expected)
    assert torch.equal(folded, fold_blocks_fwd(w, block, z, dtype))
    _C.gates_bwd(rule, CODES[gate], ptr(log_alpha), ptr(seed), 1, len(log_alpha), ptr(dz), ptr(right), 1)
    assert torch.equal(grad, right)


def test_fold_bwd_writes_only_what_is_asked_for() -> None:
    g, w, z_out, z_in = torch.randn(70, 33), torch.randn(70, 33), torch.rand(70), torch.rand(33)
    whole = fold_bwd(g, w, z_out, z_in)
    for wanted in ((True, False, False), (False, True, False), (False, False, True), (False, False, False)):
        for made, expected in zip(fold_bwd(g, w, z_out, z_in, wanted=wanted), whole, strict=True):
            assert made is None or torch.equal(made, expected)


@pytest.mark.parametrize("rule", SPECS.values(), ids=SPECS)
@pytest.mark.parametrize(("first", "second"), pairs(), ids=str)
@pytest.mark.parametrize("count", [0, 1, 5, 513, 2053, 40_003])
def test_gate_weights_match_the_reference(
    rule: spec.GateSpec, first: torch.dtype, second: torch.dtype, count: int
) -> None:
    wide_dtype = gate_dtype(first)
    log_alpha, seed = random_log_alpha(count, wide_dtype), random_seed()
    same, wide = log_alpha.clone().requires_grad_(), log_alpha.double().requires_grad_()
    z_same, z_wide = draw(rule, same, seed, 1)[0], draw(rule, wide, seed, 1)[0]

    w = torch.randn(count).to(first)
    out, expected = gate_weights_fwd(rule, w, log_alpha, seed, second), (w.to(wide_dtype) * z_same).to(second)
    assert_as_good("out", out, expected, w.double() * z_wide.detach())
    assert torch.equal(out == 0, expected == 0)
    assert torch.equal(out[z_same == 1], w.to(wide_dtype).to(second)[z_same == 1])

    g, w = torch.randn(count).to(first), torch.randn(count).to(second)
    gs, ws = g.to(wide_dtype), w.to(wide_dtype)
    dw, grad = gate_weights_bwd(rule, g, w, log_alpha, seed)
    assert_as_good("dw", dw, (gs * z_same).to(second), g.double() * z_wide.detach())
    assert torch.equal(dw == 0, (gs * z_same).to(second) == 0)
    if rule.rule == spec.BINARY:
        assert torch.equal(grad, torch.zeros_like(grad))
        return
    (grad_same,) = torch.autograd.grad(z_same, same, ws * gs)
    (grad_wide,) = torch.autograd.grad(z_wide, wide, w.double() * g.double())
    assert_as_good("dlog_alpha", grad, grad_same, grad_wide)


def test_gate_weights_round_once() -> None:
    w, log_alpha, seed = torch.randn(30_011), random_log_alpha(30_011), random_seed()
    for rule in SPECS.values():
        wide = gate_weights_fwd(rule, w, log_alpha, seed, torch.float32)
        assert torch.equal(wide, w * gates_fwd(rule, log_alpha, seed, 1)[0])
        for dtype in (torch.bfloat16, torch.float16):
            assert torch.equal(gate_weights_fwd(rule, w, log_alpha, seed, dtype), wide.to(dtype))


def test_gate_weights_bwd_writes_only_what_is_asked_for() -> None:
    g, w, log_alpha, seed = torch.randn(4100), torch.randn(4100), random_log_alpha(4100), random_seed()
    whole = gate_weights_bwd(SPECS["two_thirds"], g, w, log_alpha, seed)
    for wanted in ((True, False), (False, True), (False, False)):
        part = gate_weights_bwd(SPECS["two_thirds"], g, w, log_alpha, seed, wanted=wanted)
        for made, expected, asked in zip(part, whole, wanted, strict=True):
            assert (made is not None) == asked
            assert made is None or torch.equal(made, expected)


@pytest.mark.parametrize(("first", "second"), pairs(), ids=str)
@pytest.mark.parametrize("block", BLOCKS, ids=str)
def test_fold_blocks_match_pytorch(block: tuple[int, int], first: torch.dtype, second: torch.dtype) -> None:
    for shape in (*SHAPES, (16, 64), (70, 4200), (3000, 3)):
        rows, columns = (torch.arange(n) // b for n, b in zip(shape, block, strict=True))
        index = rows[:, None] * -(-shape[1] // block[1]) + columns  # [n_out, n_in]
        z = random_gates(block_count(shape, block), first)
        w = torch.randn(shape).to(first)
        assert torch.equal(fold_blocks_fwd(w, block, z, second), (w.to(z.dtype) * z[index]).to(second))

        g, w = torch.randn(shape).to(first), torch.randn(shape).to(second)
        dw, dz = fold_blocks_bwd(g, w, block, z)
        assert torch.equal(dw, (g.to(z.dtype) * z[index]).to(second))
        product = g.to(z.dtype) * w.to(z.dtype)
        dz_same = torch.zeros_like(z).index_add(0, index.flatten(), product.flatten())
        truth = torch.zeros_like(z, dtype=torch.float64).index_add(
            0, index.flatten(), (g.double() * w.double()).flatten()
        )
        sizes = torch.zeros_like(truth).index_add(0, index.flatten(), product.double().abs().flatten())
        assert_as_good(f"dz {shape}", dz, dz_same, truth, terms=float(sizes.max()) if len(sizes) else 0.0)


def test_fold_blocks_bwd_writes_only_what_is_asked_for() -> None:
    g, w, z = torch.randn(70, 33), torch.randn(70, 33), torch.rand(18 * 9)
    whole = fold_blocks_bwd(g, w, (4, 4), z)
    for wanted in ((True, False), (False, True), (False, False)):
        for made, expected, asked in zip(fold_blocks_bwd(g, w, (4, 4), z, wanted=wanted), whole, wanted, strict=True):
            assert (made is not None) == asked
            assert made is None or torch.equal(made, expected)


@pytest.mark.parametrize("dtype", DTYPES)
def test_a_product_may_be_written_over_the_gradient_it_is_made_of(dtype: torch.dtype) -> None:
    """The same bits as into memory of its own, for every kernel that offers it; rows wider than a tile included."""
    rule, seed, threads, code = SPECS["two_thirds"], random_seed(), 2, CODES[dtype]
    n_out, n_in, block = 37, 2500, (4, 8)
    w, g, gates = torch.randn(n_out, n_in).to(dtype), torch.randn(n_out, n_in).to(dtype), gate_dtype(dtype)
    z_out, z_in = random_gates(n_out, dtype), random_gates(n_in, dtype)
    z, log_alpha, each = (
        random_gates(block_count((n_out, n_in), block), dtype),
        *(random_log_alpha(n, gates) for n in (n_in, n_out * n_in)),
    )

    def run(over: bool) -> list[torch.Tensor]:
        results = []
        for kernel in ("fold", "blocks", "rows", "weights"):
            given = g.clone()
            dw = given if over else poisoned(n_out, n_in, dtype=dtype)
            sums = [poisoned(n, dtype=gates) for n in (n_out, n_in, len(z), len(each))]
            if kernel == "fold":
                made = ptr(z_out), ptr(z_in), 0, 0, ptr(dw), 0, ptr(sums[0]), ptr(sums[1]), 0
                _C.fold_gates_bwd(VALUE, code, code, ptr(given), 0, ptr(w), 0, n_out, n_in, *made, threads)
            elif kernel == "blocks":
                made = ptr(z), 0, ptr(dw), ptr(sums[2]), 0
                _C.fold_blocks_bwd(VALUE, code, code, ptr(given), ptr(w), n_out, n_in, *block, *made, threads)
            elif kernel == "rows":
                _C.gate_rows_bwd(
                    rule,
                    code,
                    ptr(w),
                    ptr(given),
                    n_out,
                    n_in,
                    ptr(log_alpha),
                    ptr(seed),
                    ptr(dw),
                    0,
                    ptr(sums[1]),
                    threads,
                )
            else:
                _C.gate_weights_bwd(
                    rule,
                    code,
                    code,
                    ptr(given),
                    ptr(w),
                    w.numel(),
                    ptr(each),
                    ptr(seed),
                    ptr(dw),
                    ptr(sums[3]),
                    threads,
                )
            results += [dw, *(s for s in sums if not s.isnan().all())]
        return results

    for apart, over in zip(run(False), run(True), strict=True):
        assert torch.equal(apart, over)
