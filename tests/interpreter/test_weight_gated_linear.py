"""Gates on weights and on blocks of weights: forward and every gradient against float64 on every route,
hard shapes and layouts.
"""

from __future__ import annotations

import pytest
import torch

from dampr import testing
from dampr.ops import GateArgs
from dampr.ops import backend_triton as backend
from dampr.reference import gate_values
from dampr.spec import GateSpec, hard_concrete

SHAPES = [(0, 5, 3), (3, 0, 4), (3, 4, 0), (1, 1, 1), (5, 7, 3), (33, 65, 17), (20, 40, 130), (20, 48, 64)]
WAYS = [
    *((route, (1, 1)) for route in ("fold", "small_m")),
    *(("fold", block) for block in ((4, 4), (3, 5), (16, 1), (1, 8), (200, 300))),
]
NAMES = ("y", "dx", "dweight", "dbias", "dlog_alpha")
SPEC = hard_concrete()
Block = tuple[int, int]


class Problem:
    """Inputs of one layer with a gate for each block of weights."""

    def __init__(
        self, M: int, N: int, K: int, block: Block, bias: bool = True, dtype: torch.dtype = torch.float32
    ) -> None:
        self.block, self.seed = block, torch.randint(0, 2**63 - 1, (1,))
        self.x, self.dy = torch.randn(M, K).to(dtype), torch.randn(M, N).to(dtype)
        self.weight, self.bias = torch.randn(N, K), torch.randn(N) if bias else None
        self.log_alpha = 2 * torch.randn(-(N // -block[0]) * -(K // -block[1]))

    @property
    def tensors(self) -> tuple[torch.Tensor | None, ...]:
        return self.x, self.weight, self.bias, self.log_alpha

    def plain(self, dtype: torch.dtype, spec: GateSpec = SPEC) -> list[torch.Tensor | None]:
        """[y, dx, dweight, dbias, dlog_alpha] by autograd; gates in float64 if ``dtype`` is, else in float32."""
        exact = torch.float64 if dtype == torch.float64 else torch.float32
        leaves = [
            None if t is None else t.detach().to(d).requires_grad_()
            for t, d in zip(self.tensors, (dtype, *[exact] * 3), strict=True)
        ]
        x, weight, bias, log_alpha = leaves
        y = x @ (weight * self.expand(gate_values(log_alpha, spec, self.seed))).to(dtype).t()
        y = y if bias is None else y + bias.to(dtype)
        wanted = [t for t in leaves if t is not None]
        grads = iter(torch.autograd.grad(y, wanted, self.dy.to(dtype), materialize_grads=True))
        return [y.detach(), *(None if t is None else next(grads) for t in leaves)]

    def expand(self, z: torch.Tensor) -> torch.Tensor:
        """Flat gates as a matrix like the weight."""
        (N, K), (R, C) = self.weight.shape, self.block
        rows, cols = torch.arange(N) // R, torch.arange(K) // C
        return z[rows[:, None] * -(K // -C) + cols[None, :]]

    def fused(self, spec: GateSpec = SPEC) -> list[torch.Tensor | None]:
        args = self.x, self.weight, self.bias, self.gate(spec), self.block
        y = backend.weight_gated_linear_fwd(*args)
        needs = [t is not None for t in self.tensors]
        return [y, *backend.weight_gated_linear_bwd(self.dy, *args, needs)]

    def gate(self, spec: GateSpec = SPEC) -> GateArgs:
        return GateArgs(self.log_alpha, self.seed if spec.rule == SPEC.rule else None, spec)


def check(problem: Problem, spec: GateSpec = SPEC) -> None:
    dtype = problem.x.dtype
    for name, out, truth, plain in zip(
        NAMES, problem.fused(spec), problem.plain(torch.float64, spec), problem.plain(dtype, spec), strict=True
    ):
        if truth is None or plain is None:
            assert out is None, name
            continue
        assert out is not None, name
        assert out.dtype == plain.dtype, name
        testing.assert_close(name, out, truth, plain, dtype)


@pytest.fixture(params=WAYS, ids=lambda way: f"{way[0]}-{way[1][0]}x{way[1][1]}")
def block(request: pytest.FixtureRequest):
    with backend.forced_route(request.param[0]):
        yield request.param[1]


@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_matches_float64(shape: tuple[int, int, int], block: Block) -> None:
    check(Problem(*shape, block))


@pytest.mark.parametrize("shape", [(3, 4, 0), (5, 7, 3), (16, 48, 32)], ids=str)
def test_without_a_bias(shape: tuple[int, int, int], block: Block) -> None:
    check(Problem(*shape, block, bias=False))


@pytest.mark.parametrize("shape", [(33, 17, 65), (16, 48, 64)], ids=str)
def test_autocast(shape: tuple[int, int, int], block: Block) -> None:
    check(Problem(*shape, block, dtype=torch.float16))


@pytest.mark.parametrize("rule", ["paper", "median", "binary"])
def test_rules_without_noise(rule: str, block: Block) -> None:
    problem = Problem(6, 20, 12, block)
    if rule != "binary":  # whose gates are constants
        check(problem, hard_concrete(rule))
    z = problem.expand(gate_values(problem.log_alpha, hard_concrete(rule)))
    expected = torch.nn.functional.linear(problem.x, problem.weight * z, problem.bias)
    torch.testing.assert_close(problem.fused(hard_concrete(rule))[0], expected, atol=1e-5, rtol=1e-5)


def test_layouts_that_are_not_contiguous(block: Block) -> None:
    M, N, K = 9, 16, 32
    problem = Problem(M, N, K, block)
    problem.x = torch.randn(M, K + 7)[:, 5 : 5 + K]
    problem.weight = torch.randn(K, N).t()
    problem.dy = torch.ones(()).expand(M, N)  # y.sum()
    check(problem)
    problem.x = torch.randn(K, M).t()
    problem.weight = torch.randn(2 * N, K)[::2]
    problem.dy = torch.randn(M, 2 * N)[:, N:]  # torch.cat
    problem.log_alpha = torch.randn(problem.log_alpha.numel(), 2)[:, 0]
    check(problem)


def test_leading_dimensions(block: Block) -> None:
    problem = Problem(6, 8, 12, block)
    y, dx, *_ = problem.fused()
    problem.x, problem.dy = problem.x.view(2, 3, 12), problem.dy.view(2, 3, 8)
    for got, flat in zip(problem.fused()[:2], (y, dx), strict=True):
        assert torch.equal(got, flat.view(2, 3, -1))


@pytest.mark.parametrize("skip", range(4))
def test_only_what_is_needed_is_computed(skip: int, block: Block) -> None:
    problem = Problem(6, 8, 12, block)
    everything = problem.fused()[1:]
    for needs in ([i != skip for i in range(4)], [i == skip for i in range(4)]):
        grads = backend.weight_gated_linear_bwd(problem.dy, *problem.tensors[:3], problem.gate(), block, needs)
        for need, grad, full in zip(needs, grads, everything, strict=True):
            assert torch.equal(grad, full) if need else grad is None


@pytest.mark.parametrize(("N", "K"), [(37, 48), (37, 37), (12, 33)])
def test_gates_are_those_of_their_indices_to_the_bit(N: int, K: int, block: Block) -> None:
    """y = I W~^T with W = 1: every gate in its place, zeros and ones where the reference has them."""
    problem = Problem(K, N, K, block, bias=False)
    problem.x, problem.weight = torch.eye(K), torch.ones(N, K)
    y = problem.fused()[0]
    z = backend.sample_gates_fwd(problem.gate(), None)
    assert torch.equal(y.t(), problem.expand(z))
    truth = problem.expand(gate_values(problem.log_alpha, SPEC, problem.seed))
    assert torch.equal(y.t() == 0, truth == 0)
    assert torch.equal(y.t() == 1, truth == 1)


def test_a_large_block_is_summed_in_splits() -> None:
    check(Problem(4, 300, 20, (300, 20)))
    check(Problem(4, 300, 20, (150, 7)))


def test_runs_are_reproducible(block: Block) -> None:
    problem = Problem(33, 20, 24, block)
    for first, second in zip(problem.fused(), problem.fused(), strict=True):
        assert torch.equal(first, second)
