"""gated_linear and sample_gates as operators: every backend against float64, gradcheck, opcheck, compile,
and what is saved.
"""

import itertools
from types import SimpleNamespace

import pytest
import torch
from torch.nn import functional as F

import dampr
from dampr import functional, testing
from dampr.ops import GateArgs
from dampr.spec import hard_concrete
from dampr.testing import verify, verify_linear

PLACEMENTS = {"none": (False, False), "input": (True, False), "output": (False, True), "both": (True, True)}


def _data(shape, gates, bias=True, dtype=torch.float32, requires_grad=True):
    m, k, n = shape
    on_in, on_out = PLACEMENTS[gates]
    data = {"x": torch.randn(m, k, dtype=dtype), "weight": torch.randn(n, k, dtype=dtype) / max(k, 1) ** 0.5}
    if bias:
        data["bias"] = torch.randn(n, dtype=dtype)
    gate_dtype = torch.float64 if dtype == torch.float64 else torch.float32
    if on_in:
        data["input_gate"] = torch.randn(k, dtype=gate_dtype)
    if on_out:
        data["output_gate"] = torch.randn(n, dtype=gate_dtype)
    return {name: t.requires_grad_(requires_grad) for name, t in data.items()}


def test_every_op_on_every_cpu_backend_passes_verification():
    rows = verify.run()
    assert {(r.op, r.backend) for r in rows} >= {
        (op, "reference") for op in ("sample_gates", "gated_linear", "weight_gated_linear")
    }
    assert [f for row in rows for f in row.failures] == []
    assert sum(row.cases for row in rows) > 300


def test_verification_on_a_gpu_reaches_every_tile_and_route():
    from dampr.kernels import configs
    from dampr.kernels.dispatch import thresholds

    reached = set()
    for case in verify_linear.linear_cases("cuda"):
        m, k, n = case.shape
        for dtype in ("fp32", "bf16"):
            reached.add(configs.gemm_kind(m, n, k, dtype, 90))
        reached.add("one pass" if configs.fits_one_pass(m, n, k, thresholds()) else "passes")
    assert reached >= {"large", "small", "odd", "fp32", "one pass", "passes"}


def test_verification_can_fail(monkeypatch):
    """A backend that is off by a part in ten thousand does not pass."""
    right = dampr.ops.backends._module("reference")[0]
    wrong = SimpleNamespace(**{name: getattr(right, name) for name in ("gated_linear_bwd", "unavailable")})
    wrong.gated_linear_fwd = lambda *a: tuple(t * (1 + 1e-4) for t in right.gated_linear_fwd(*a))
    monkeypatch.setitem(dampr.ops.backends._modules, "cpp", (wrong, ""))
    monkeypatch.setattr(dampr.ops.backends, "_selected", {})
    row = verify_linear.verify(verify.Row("gated_linear", "cpp", "cpu", "float32"), torch.float32)
    assert not row.ok
    assert all(": y: max error" in failure for failure in row.failures)


@pytest.mark.parametrize(("gates", "per_sample"), list(itertools.product(PLACEMENTS, (False, True))))
@pytest.mark.parametrize("bias", [True, False])
def test_gradcheck_in_float64(cpu_backend, gates, per_sample, bias):
    data = _data((4, 5, 3), gates, bias, torch.float64)
    for name in ("input_gate", "output_gate"):
        if name in data:
            data[name].data.mul_(0.3)

    def call(*tensors):
        return functional.gated_linear(**dict(zip(data, tensors, strict=True)), seed=2, per_sample=per_sample)

    assert torch.autograd.gradcheck(call, tuple(data.values()), eps=1e-7, atol=1e-5)


@pytest.mark.parametrize("per_sample", [False, True])
def test_no_element_is_left_unwritten(cpu_backend, per_sample):
    data = _data((33, 8, 16), "both")
    with testing.poisoned_empty():
        y = functional.gated_linear(**data, seed=5, per_sample=per_sample)
        y.sum().backward()
    assert not y.isnan().any()
    for name, t in data.items():
        assert not t.grad.isnan().any(), name


@pytest.mark.parametrize("per_sample", [False, True])
def test_gates_are_those_of_sample_gates(cpu_backend, per_sample):
    """Rows of the identity show each gate itself: same seed, same draw, to the bit."""
    n = 12
    log_alpha = torch.randn(n)
    eye = torch.eye(n)
    z = functional.sample_gates(log_alpha, seed=9, rows=n if per_sample else None)
    expected = torch.diag(z.diagonal() if per_sample else z)
    assert torch.equal(functional.gated_linear(eye, eye, input_gate=log_alpha, seed=9, per_sample=per_sample), expected)
    assert torch.equal(
        functional.gated_linear(eye, eye, output_gate=log_alpha, seed=9, per_sample=per_sample), expected
    )


def test_input_and_output_gates_use_two_streams_of_one_seed(cpu_backend):
    log_alpha = torch.zeros(4096)
    both = functional.gated_linear(
        torch.eye(4096)[:64], torch.eye(4096), input_gate=log_alpha, output_gate=log_alpha, seed=3
    ).sum(0)[:64]
    z = functional.sample_gates(log_alpha, seed=3)[:64]
    assert not torch.allclose(both, z * z)
    assert ((both == 0) >= (z == 0)).all()


def test_backends_agree_exactly_in_which_gates_are_zero_and_one():
    if dampr.backend_info()["cpp"].startswith("missing"):
        pytest.skip(dampr.backend_info()["cpp"])
    for constants, rows, seed in itertools.product(
        ({}, {"beta": 0.4}, {"gamma": -0.5, "zeta": 1.7}), (None, 37), (0, 1, 2**62)
    ):
        log_alpha = torch.randn(100_003 if rows is None else 2_003) * 3
        drawn = []
        for name in ("reference", "cpp"):
            with dampr.backend(name):
                drawn.append(functional.sample_gates(log_alpha, seed=seed, rows=rows, spec=hard_concrete(**constants)))
        assert torch.equal(drawn[0] == 0, drawn[1] == 0)
        assert torch.equal(drawn[0] == 1, drawn[1] == 1)
        assert (drawn[0] - drawn[1]).abs().max() <= 1e-6
    assert (drawn[0] == 0).any()
    assert (drawn[0] == 1).any()


def test_float64_decides_like_float32(cpu_backend):
    log_alpha = torch.randn(200_000) * 2
    z32, z64 = functional.sample_gates(log_alpha, seed=8), functional.sample_gates(log_alpha.double(), seed=8)
    assert torch.equal(z32 == 0, z64 == 0)
    assert torch.equal(z32 == 1, z64 == 1)


@pytest.mark.parametrize("threads", [1, 2, 3])
def test_results_do_not_depend_on_the_number_of_threads(threads):
    if dampr.backend_info()["cpp"].startswith("missing"):
        pytest.skip(dampr.backend_info()["cpp"])
    x, log_alpha, dz = torch.randn(513, 130), torch.randn(130), torch.randn(513, 130)
    from dampr.ops.backend_cpp import gates

    def everything():
        w = torch.randn(257, 130, generator=torch.Generator().manual_seed(1))
        gate = GateArgs(log_alpha, torch.tensor([5]), hard_concrete(), True)
        out = gates.gate_rows_bwd(x, dz, gate, dx=True, xz=True, dlog_alpha=True)
        return *out, gates.sample_gates_bwd(dz, gate, 513), gates.gate_rows(w, gate._replace(per_sample=False))

    before = torch.get_num_threads()
    try:
        torch.set_num_threads(1)
        torch.manual_seed(0)
        one = everything()
        torch.set_num_threads(threads)
        torch.manual_seed(0)
        assert all(torch.equal(a, b) for a, b in zip(one, everything(), strict=True))
    finally:
        torch.set_num_threads(before)


@pytest.mark.parametrize("per_sample", [False, True])
@pytest.mark.parametrize("gates", ["input", "output", "both"])
def test_saved_for_backward_holds_inputs_and_seeds_only(cpu_backend, gates, per_sample):
    data = _data((64, 40, 24), gates)  # more rows than the weight has: gates per batch are in the weight
    allowed = {t.data_ptr() for t in data.values()}
    extra = []

    def pack(t):
        if t.data_ptr() not in allowed and t.dtype != torch.int64 and t.numel():
            extra.append(tuple(t.shape))
        return t

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda t: t):
        functional.gated_linear(**data, seed=1, per_sample=per_sample)
    # A learning per-sample output gate needs the activation before it; nothing else of that size is ever kept.
    assert extra == ([(64, 24)] if per_sample and gates != "input" else [])


def test_ungated_call_equals_the_dense_function_to_the_bit(cpu_backend):
    x, w, b = torch.randn(3, 17, 40), torch.randn(24, 40), torch.randn(24)
    assert torch.equal(functional.gated_linear(x, w, b), F.linear(x, w, b))


@pytest.mark.parametrize("per_sample", [False, True])
def test_leading_dimensions_are_rows(cpu_backend, per_sample):
    data = _data((30, 8, 5), "both", requires_grad=False)
    flat = functional.gated_linear(**data, seed=4, per_sample=per_sample)
    data["x"] = data["x"].view(2, 5, 3, 8)
    assert torch.equal(functional.gated_linear(**data, seed=4, per_sample=per_sample), flat.view(2, 5, 3, 5))
    data["x"] = data["x"].reshape(30, 8)[0]
    assert functional.gated_linear(**data, seed=4, per_sample=per_sample).shape == (5,)


@pytest.mark.parametrize("per_sample", [False, True])
def test_autocast_computes_in_bfloat16_and_returns_float32_gradients(cpu_backend, per_sample):
    data = _data((32, 16, 8), "both")
    with torch.autocast("cpu", torch.bfloat16):
        y = functional.gated_linear(**data, seed=4, per_sample=per_sample)
    assert y.dtype == torch.bfloat16
    y.float().square().sum().backward()
    reference = {name: t.detach().clone().requires_grad_() for name, t in data.items()}
    functional.gated_linear(**reference, seed=4, per_sample=per_sample).square().sum().backward()
    for name, t in data.items():
        assert t.grad.dtype == torch.float32
        assert (t.grad - reference[name].grad).norm() <= 0.05 * reference[name].grad.norm(), name


def _op_arguments(per_sample):
    data = _data((6, 8, 5), "both", requires_grad=False)
    seed, spec = torch.tensor([3]), [float(v) for v in hard_concrete()]
    tensors = (data["x"], data["weight"], data["bias"], data["input_gate"], data["output_gate"], seed, seed)
    return tensors, spec, per_sample


@pytest.mark.parametrize("per_sample", [False, True])
def test_opcheck(cpu_backend, per_sample):
    tensors, spec, _ = _op_arguments(per_sample)
    keep = per_sample
    torch.library.opcheck(torch.ops.dampr.gated_linear_fwd.default, (*tensors, spec, per_sample, keep))
    pre = torch.randn(6, 5) if keep else torch.empty(0)
    for needs in ([True] * 5, [False, True, False, True, False]):
        torch.library.opcheck(
            torch.ops.dampr.gated_linear_bwd.default, (torch.randn(6, 5), *tensors, pre, spec, per_sample, needs)
        )
    log_alpha, seed = torch.randn(7), torch.tensor([3])
    for rows, shape in ((None, (7,)), (4, (4, 7))):
        torch.library.opcheck(torch.ops.dampr.sample_gates_fwd.default, (log_alpha, seed, rows, spec))
        torch.library.opcheck(
            torch.ops.dampr.sample_gates_bwd.default, (torch.randn(shape), log_alpha, seed, rows, spec)
        )


@pytest.mark.parametrize(("granularity", "per_sample"), list(itertools.product(("output", "input"), (False, True))))
# dynamo's own, of every autograd.Function
@pytest.mark.filterwarnings("ignore:.*should not be instantiated:DeprecationWarning")
def test_compiles_without_a_graph_break_and_computes_the_same(granularity, per_sample):
    layer = dampr.nn.GatedLinear(16, 12, granularity=granularity, per_sample=per_sample)
    x = torch.randn(5, 16)

    def step(layer, x):
        y = layer(x)
        (y.square().sum() + 1e-3 * dampr.penalty(layer)).backward()
        grads = [p.grad.clone() for p in layer.parameters()]
        layer.zero_grad()
        return y.detach(), *grads

    torch.manual_seed(1)
    eager = step(layer, x)
    torch._dynamo.reset()
    compiled = torch.compile(layer, fullgraph=True, backend="aot_eager")
    torch.manual_seed(1)
    y = compiled(x)
    (y.square().sum() + 1e-3 * dampr.penalty(layer)).backward()
    for a, b in zip(eager, (y.detach(), *(p.grad for p in layer.parameters())), strict=True):
        torch.testing.assert_close(a, b)


def test_activation_checkpointing_draws_the_same_gates_again():
    from torch.utils.checkpoint import checkpoint

    layer, x = dampr.nn.GatedLinear(16, 12, per_sample=True), torch.randn(5, 16)
    grads = []
    for wrap in (lambda f, x: f(x), lambda f, x: checkpoint(f, x, use_reentrant=False)):
        torch.manual_seed(3)
        layer.zero_grad()
        wrap(layer, x).square().sum().backward()
        grads.append([p.grad.clone() for p in layer.parameters()])
    assert all(torch.equal(a, b) for a, b in zip(*grads, strict=True))


def test_torch_func_gradients_work(cpu_backend):
    data = _data((4, 6, 3), "both", requires_grad=False)
    x = data.pop("x")

    def loss(params):
        return functional.gated_linear(x, **params, seed=1).square().sum()

    grads = torch.func.grad(loss)(data)
    leaves = {n: t.clone().requires_grad_() for n, t in data.items()}
    loss(leaves).backward()
    for name, grad in grads.items():
        torch.testing.assert_close(grad, leaves[name].grad)


def test_flop_counter_counts_the_dense_products():
    from torch.utils.flop_counter import FlopCounterMode

    layer, x = dampr.nn.GatedLinear(16, 12), torch.randn(5, 16, requires_grad=True)
    with FlopCounterMode(display=False) as counter:
        layer(x).sum().backward()
    assert counter.get_total_flops() == 3 * 2 * 5 * 16 * 12
