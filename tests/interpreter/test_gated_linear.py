"""Forward and every gradient against float64 on every route, hard shapes and layouts.

The rule: error <= 2 x the error of plain PyTorch in the same dtype + 1e-6 x the largest value of the result.
"""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch

from dampr.ops import GateArgs, GatePair
from dampr.ops import backend_triton as backend
from dampr.reference import gated_linear
from dampr.spec import GateSpec, hard_concrete

SHAPES = [(0, 5, 3), (3, 0, 4), (3, 4, 0), (1, 1, 1), (5, 7, 3), (33, 65, 17), (70, 40, 130), (4, 8, 12), (80, 48, 64)]
GATES = {"none": (False, False), "input": (True, False), "output": (False, True), "both": (True, True)}
ROUTES = ["fold", "live", "one_pass", "passes"]
NAMES = ("dx", "dweight", "dbias", "dinput_log_alpha", "doutput_log_alpha")
SPEC = hard_concrete()


class Problem:
    """Inputs of one gated layer, its float64 truth, and the same in plain PyTorch in the working dtype."""

    def __init__(
        self,
        M: int,
        N: int,
        K: int,
        gates: str,
        bias: bool,
        dtypes: tuple[torch.dtype, torch.dtype] = (torch.float32,) * 2,
    ):
        has_input, has_output = GATES[gates]
        dtype, weight_dtype = dtypes
        self.x, self.dy = torch.randn(M, K).to(dtype), torch.randn(M, N).to(dtype)
        self.weight = torch.randn(N, K).to(weight_dtype)
        self.bias = torch.randn(N).to(weight_dtype) if bias else None
        self.input_log_alpha = 2 * torch.randn(K) if has_input else None
        self.output_log_alpha = 2 * torch.randn(N) if has_output else None
        self.seeds = torch.randint(0, 2**63 - 1, (1,)), torch.randint(0, 2**63 - 1, (1,))

    @property
    def tensors(self) -> tuple[torch.Tensor | None, ...]:
        return self.x, self.weight, self.bias, self.input_log_alpha, self.output_log_alpha

    def fused_args(
        self, per_sample: bool, spec: GateSpec = SPEC
    ) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor | None, GatePair]:
        seeds = self.seeds if spec.rule == SPEC.rule else (None, None)
        gates = GatePair.of(self.input_log_alpha, self.output_log_alpha, *seeds, spec, per_sample)
        return self.x, self.weight, self.bias, gates

    def plain(self, per_sample: bool, double: bool) -> list[torch.Tensor | None]:
        """[y, dx, dweight, dbias, dinput_log_alpha, doutput_log_alpha] by autograd through the reference."""
        leaves = [
            None if t is None else (t.double() if double else t).detach().clone().requires_grad_() for t in self.tensors
        ]
        y = gated_linear(*leaves, *self.seeds, SPEC, per_sample)
        wanted = [t for t in leaves if t is not None]
        grads = iter(torch.autograd.grad(y, wanted, self.dy.to(y.dtype), materialize_grads=True))
        return [y.detach(), *(None if t is None else next(grads) for t in leaves)]

    def fused(self, per_sample: bool) -> list[torch.Tensor]:
        args = self.fused_args(per_sample)
        y, pre = backend.gated_linear_fwd(*args, per_sample and self.output_log_alpha is not None)
        needs = [t is not None for t in self.tensors]
        return [y, *backend.gated_linear_bwd(self.dy, *args, pre, needs)]


def check(problem: Problem, per_sample: bool) -> None:
    truth, plain, fused = problem.plain(per_sample, True), problem.plain(per_sample, False), problem.fused(per_sample)
    for name, ref, same_dtype, got in zip(("y", *NAMES), truth, plain, fused, strict=True):
        if ref is None or same_dtype is None:
            assert got is None, name
            continue
        assert got.shape == ref.shape, name
        assert got.dtype == same_dtype.dtype, name
        if ref.numel() == 0:
            continue
        error = (got.double() - ref).abs().max()
        allowed = 2 * (same_dtype.double() - ref).abs().max() + 1e-6 * ref.abs().max()
        assert error <= allowed, f"{name}: error {error:.3e}, allowed {allowed:.3e}"


@pytest.fixture(params=ROUTES)
def per_sample(request: pytest.FixtureRequest) -> Iterator[bool]:
    """False for the fold and the live route; per sample with the gates in the GEMM,
    then with gating passes around the vendor GEMM.
    """
    with backend.forced_route(request.param):
        yield request.param in ("one_pass", "passes")


@pytest.mark.parametrize("gates", sorted(GATES))
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_matches_float64(shape: tuple[int, int, int], gates: str, per_sample: bool) -> None:
    check(Problem(*shape, gates, True), per_sample)


@pytest.mark.parametrize("gates", sorted(GATES))
@pytest.mark.parametrize("shape", [(3, 4, 0), (5, 7, 3), (16, 48, 32)], ids=str)
def test_without_a_bias(shape: tuple[int, int, int], gates: str, per_sample: bool) -> None:
    check(Problem(*shape, gates, False), per_sample)


@pytest.mark.parametrize("weight_dtype", [torch.float16, torch.float32])
@pytest.mark.parametrize("shape", [(33, 17, 65), (32, 48, 64)], ids=str)
def test_half_precision_and_autocast(shape: tuple[int, int, int], weight_dtype: torch.dtype, per_sample: bool) -> None:
    check(Problem(*shape, "both", True, (torch.float16, weight_dtype)), per_sample)


def test_layouts_that_are_not_contiguous(per_sample: bool) -> None:
    M, N, K = 9, 16, 32
    problem = Problem(M, N, K, "both", True)
    problem.x = torch.randn(M, K + 7)[:, 5 : 5 + K]
    problem.weight = torch.randn(K, N).t()
    problem.dy = torch.ones(()).expand(M, N)  # y.sum()
    check(problem, per_sample)
    problem.x = torch.randn(K, M).t()
    problem.weight = torch.randn(2 * N, K)[::2]
    problem.dy = torch.randn(M, 2 * N)[:, N:]  # torch.cat
    problem.output_log_alpha = torch.randn(2 * N)[::2]
    check(problem, per_sample)


def test_long_sums_are_split(per_sample: bool) -> None:
    check(Problem(300, 6, 20, "both", True), per_sample)


@pytest.mark.parametrize("skip", range(5))
def test_only_what_is_needed_is_computed(skip: int, per_sample: bool) -> None:
    problem = Problem(6, 8, 12, "both", True)
    args = problem.fused_args(per_sample)
    _, pre = backend.gated_linear_fwd(*args, per_sample)
    for needs in ([i != skip for i in range(5)], [i == skip for i in range(5)]):
        everything = problem.fused(per_sample)[1:]
        grads = backend.gated_linear_bwd(problem.dy, *args, pre, needs)
        for need, grad, full in zip(needs, grads, everything, strict=True):
            assert torch.equal(grad, full) if need else grad is None


def test_pre_is_the_output_before_its_gate(per_sample: bool) -> None:
    problem = Problem(6, 8, 12, "both", True)
    *tensors, _ = problem.tensors
    expected = gated_linear(*tensors, None, *problem.seeds, SPEC, per_sample)
    args = problem.fused_args(per_sample)
    _, pre = backend.gated_linear_fwd(*args, True)
    torch.testing.assert_close(pre, expected, atol=1e-5, rtol=1e-5)
    assert backend.gated_linear_fwd(*args, False)[1].shape == (0,)


def test_a_rule_without_noise_is_the_same_for_every_sample() -> None:
    problem, spec = Problem(6, 8, 12, "both", True), hard_concrete("median")
    expected = gated_linear(*problem.tensors, None, None, spec, True)
    args = problem.fused_args(True, spec)
    y, pre = backend.gated_linear_fwd(*args, False)
    torch.testing.assert_close(y, expected, atol=1e-5, rtol=1e-5)
    assert pre.shape == (0,)
    leaves = [t.clone().requires_grad_() for t in problem.tensors if t is not None]
    expected_grads = torch.autograd.grad(gated_linear(*leaves, None, None, spec, True), leaves, problem.dy)
    grads = backend.gated_linear_bwd(problem.dy, *args, pre, [True] * 5)
    for got, want in zip(grads, expected_grads, strict=True):
        torch.testing.assert_close(got, want, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("n", [48, 37])
def test_tiles_do_not_change_a_draw(n: int, per_sample: bool) -> None:
    M, eye, ones = 70, torch.eye(n), torch.ones(70, n)
    log_alpha, seed = 2 * torch.randn(n), torch.tensor([2**62 + 5])
    z = backend.sample_gates_fwd(GateArgs(log_alpha, seed, SPEC), M if per_sample else None).expand(M, n)
    for log_alphas in ((log_alpha, None), (None, log_alpha)):
        y, _ = backend.gated_linear_fwd(ones, eye, None, GatePair.of(*log_alphas, seed, seed, SPEC, per_sample), False)
        assert torch.equal(y, z)


def test_runs_are_reproducible(per_sample: bool) -> None:
    problem = Problem(33, 20, 24, "both", True)
    for first, second in zip(problem.fused(per_sample), problem.fused(per_sample), strict=True):
        assert torch.equal(first, second)


def test_more_output_features_than_a_second_grid_axis_has_tiles(monkeypatch: pytest.MonkeyPatch) -> None:
    grids = []
    monkeypatch.setattr(backend.host, "launch", lambda kernel, grid, *args, **sizes: grids.append(grid))
    weight = torch.empty(3_000_000, 1)
    gates = GatePair.of(None, torch.empty(3_000_000), None, torch.zeros(1, dtype=torch.int64), SPEC)
    backend.fold_weight_fwd(weight, None, gates, torch.float32)
    backend.fold_weight_bwd(weight, None, weight, None, gates, (True, False, False, True))
    assert [len(grid) for grid in grids] == [1, 1, 1]
