"""fold_weight, fold_blocks and gate_activations: proper operators on every backend, right to float64,
nothing extra kept.
"""

from __future__ import annotations

import pytest
import torch

import dampr
from dampr import functional, ops, reference
from dampr.ops import GateArgs, GatePair
from dampr.spec import hard_concrete
from dampr.testing import compare
from tests.backends import ON_CPU

SPEC, SEED = hard_concrete(), torch.tensor([2**62 + 5])
SHAPES = [
    ((5, 7), 1),
    ((4, 6, 5, 3), 1),
    ((2, 3, 4, 8), 3),
    ((3, 5, 4), 2),
    ((6, 2), 0),
    ((0, 4, 3, 3), 1),
    ((2, 70, 9, 9), 1),
    ((300, 6, 7), 1),
]


def layouts_of(x: torch.Tensor) -> list[torch.Tensor]:
    found = [x, torch.stack((x, x), -1)[..., 0]]
    if x.dim() == 4:
        found.append(x.contiguous(memory_format=torch.channels_last))
    return found


@pytest.mark.parametrize("backend", ON_CPU)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16, torch.float16])
@pytest.mark.parametrize(("shape", "dim"), SHAPES, ids=str)
@pytest.mark.parametrize("per_sample", [False, True])
def test_gated_activations_match_float64(backend, dtype, shape, dim, per_sample) -> None:
    if per_sample and dim == 0:
        pytest.skip("samples are the first dimension")
    torch.manual_seed(0)
    gate_dtype = torch.float64 if dtype == torch.float64 else torch.float32
    log_alpha, dy = torch.randn(shape[dim]).to(gate_dtype), torch.randn(shape).to(dtype)

    def by_autograd(kind: torch.dtype, x: torch.Tensor) -> list[torch.Tensor]:
        leaves = [
            x.to(kind).requires_grad_(),
            log_alpha.to(torch.float64 if kind == torch.float64 else gate_dtype).clone().requires_grad_(),
        ]
        z = reference.gate_values(leaves[1], SPEC, SEED, shape[0] if per_sample else None)
        y = (leaves[0] * reference.along(z, leaves[0], dim)).to(kind)
        return [y.detach(), *torch.autograd.grad(y, leaves, dy.to(kind), materialize_grads=True)]

    for x in layouts_of(torch.randn(shape).to(dtype)):
        leaf, gate = x.detach().requires_grad_(), log_alpha.clone().requires_grad_()
        with dampr.backend(backend):
            y = functional.gate_activations(leaf, gate, dim=dim, seed=SEED, per_sample=per_sample)
            grads = torch.autograd.grad(y, (leaf, gate), dy, materialize_grads=True)
        assert y.dtype == dtype
        truth, plain = by_autograd(torch.float64, x.detach().double()), by_autograd(dtype, x.detach().clone())
        for name, out, t, b in zip(("y", "dx", "dgate"), (y, *grads), truth, plain, strict=True):
            result = compare(name, out, t, b, dtype)
            assert result.ok, str(result)


@pytest.mark.parametrize("backend", ON_CPU)
@pytest.mark.parametrize("where", ["input", "output", "both"])
def test_folding_is_an_operator(backend, where) -> None:
    weight, bias = torch.randn(6, 8), torch.randn(6)
    in_la = torch.randn(8) if where != "output" else None
    out_la = torch.randn(6) if where != "input" else None
    seeds = (None if in_la is None else SEED, None if out_la is None else SEED)
    spec, bias = [float(v) for v in SPEC], bias if out_la is not None else None
    with dampr.backend(backend):
        args = weight, bias, in_la, out_la, *seeds, spec
        torch.library.opcheck(torch.ops.dampr.fold_weight_fwd.default, (*args, torch.float32))
        for needs in ([True] * 4, [True, False, False, True]):
            torch.library.opcheck(torch.ops.dampr.fold_weight_bwd.default, (torch.randn(6, 8), bias, *args, needs))
        blocks = weight, torch.randn(6), SEED, spec, [2, 4]
        torch.library.opcheck(torch.ops.dampr.fold_blocks_fwd.default, (*blocks, torch.float32))
        torch.library.opcheck(torch.ops.dampr.fold_blocks_bwd.default, (torch.randn(6, 8), *blocks, [True, True]))
        for x, dim in (
            (torch.randn(2, 6, 3, 3), 1),
            (torch.randn(2, 6, 3, 3).contiguous(memory_format=torch.channels_last), 1),
            (torch.randn(4, 6), 1),
        ):
            for each in (False, True):
                gates = torch.randn(6), SEED, spec, dim, each
                torch.library.opcheck(torch.ops.dampr.gate_activations_fwd.default, (x, *gates))
                torch.library.opcheck(
                    torch.ops.dampr.gate_activations_bwd.default, (torch.randn_like(x), x, *gates, [True, True])
                )


@pytest.mark.parametrize("backend", ON_CPU)
def test_gradients_by_finite_differences(backend) -> None:
    weight, bias, gate = torch.randn(4, 6).double(), torch.randn(4).double(), torch.randn(4).double() * 0.3
    with dampr.backend(backend):
        leaves = [t.requires_grad_() for t in (weight, bias, gate)]
        torch.autograd.gradcheck(
            lambda w, b, g: ops.fold_weight(w, b, GatePair.of(None, g, None, SEED, SPEC), torch.float64), leaves
        )
        block_gate = (torch.randn(6).double() * 0.3).requires_grad_()
        torch.autograd.gradcheck(
            lambda w, g: ops.fold_blocks(w, GateArgs(g, SEED, SPEC), (2, 2), torch.float64), (leaves[0], block_gate)
        )
        x = torch.randn(3, 4, 5).double().requires_grad_()
        for each in (False, True):
            torch.autograd.gradcheck(
                lambda a, g, each=each: functional.gate_activations(a, g, seed=5, per_sample=each), (x, leaves[2])
            )


def test_the_fold_keeps_nothing_but_its_inputs() -> None:
    weight, gate, kept = torch.randn(8, 9, requires_grad=True), torch.randn(8, requires_grad=True), []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: kept.append(t) or t, lambda t: t):
        ops.fold_weight(weight, None, GatePair.of(None, gate, None, SEED, SPEC), torch.float32)
    assert {t.data_ptr() for t in kept} == {weight.data_ptr(), gate.data_ptr(), SEED.data_ptr()}


@pytest.mark.skipif("cpp" not in ON_CPU, reason="needs the extension")
def test_results_do_not_depend_on_the_number_of_threads() -> None:
    x, gate, dy = torch.randn(40, 64, 14, 14), torch.randn(64), torch.randn(40, 64, 14, 14)
    before, found = torch.get_num_threads(), []
    try:
        for threads in (1, 2, 3):
            torch.set_num_threads(threads)
            for t in (x, x.contiguous(memory_format=torch.channels_last)):
                leaf = gate.clone().requires_grad_()
                functional.gate_activations(t, leaf, seed=3).backward(dy)
                found.append(leaf.grad)
    finally:
        torch.set_num_threads(before)
    assert all(torch.equal(found[i], found[i % 2]) for i in range(len(found)))


@pytest.mark.parametrize(
    ("message", "call"),
    {
        r"dim=3: expected an integer in \[-2, 2\)": lambda x, g: functional.gate_activations(x, g, dim=3, seed=1),
        r"per_sample=True with dim=0": lambda x, g: functional.gate_activations(x, g, dim=0, seed=1, per_sample=True),
        r"gate\.shape=\(5,\): expected \(4,\), one gate per index of dimension 1": lambda x, g: (
            functional.gate_activations(x, torch.ones(5), seed=1)
        ),
        r"seed=None": lambda x, g: functional.gate_activations(x, g),
        r"x\.dtype=torch.int64: expected a floating": lambda x, g: functional.gate_activations(x.long(), g, seed=1),
        r"gate\.dtype=torch.bfloat16": lambda x, g: functional.gate_activations(x, g.bfloat16(), seed=1),
        r"gate\.shape=\(4,\): expected \(3,\), one gate per channel": lambda x, g: functional.gated_affine(
            g, torch.ones(3), None, seed=1
        ),
    }.items(),
)
def test_wrong_arguments_are_named(message, call) -> None:
    with pytest.raises((ValueError, TypeError), match=message):
        call(torch.randn(3, 4), torch.randn(4))
