"""norm_gate as an operator: every backend against float64, gradcheck, opcheck, compile, running statistics,
and what is saved.
"""

import itertools
from contextlib import nullcontext

import pytest
import torch
from torch import nn
from torch.nn import functional as F
from torch.utils.flop_counter import FlopCounterMode

import dampr
from dampr import functional, reference, testing
from dampr.spec import hard_concrete
from dampr.testing import verify

C = 6
SHAPES = [(9, C), (4, C, 5), (4, C, 3, 5)]


def _data(shape, dtype=torch.float32, requires_grad=True):
    wide = torch.float64 if dtype == torch.float64 else torch.float32
    data = {"x": torch.randn(shape, dtype=dtype), "gate": torch.randn(shape[1], dtype=wide)}
    data |= {"weight": torch.randn(shape[1], dtype=wide), "bias": torch.randn(shape[1], dtype=wide)}
    return {name: t.requires_grad_(requires_grad) for name, t in data.items()}


def _running(dtype=torch.float32):
    return torch.randn(C, dtype=dtype), torch.rand(C, dtype=dtype) + 0.5


def test_every_cpu_backend_passes_verification():
    rows = verify.run("norm_gate")
    assert {(r.backend, r.dtype) for r in rows} >= {("reference", "float32")}
    assert [f for row in rows for f in row.failures] == []
    assert all(row.cases > 500 for row in rows)


@pytest.mark.parametrize("activation", [None, "relu"])
@pytest.mark.parametrize(("training", "per_sample"), list(itertools.product((False, True), (False, True))))
@pytest.mark.parametrize("shape", [(5, 3), (2, 3, 4), (2, 3, 2, 3)])
def test_gradcheck_in_float64(cpu_backend, shape, training, per_sample, activation):
    data = _data(shape, torch.float64)
    running = torch.randn(3).double(), torch.rand(3).double() + 0.5

    def call(*tensors):
        statistics = (None, None) if training else running
        how = {"training": training, "seed": 2, "per_sample": per_sample, "activation": activation}
        return functional.gated_batch_norm(*tensors, *statistics, **how)

    assert torch.autograd.gradcheck(call, tuple(data.values()), eps=1e-7, atol=1e-5)


@pytest.mark.parametrize("last", [False, True])
@pytest.mark.parametrize("training", [False, True])
@pytest.mark.parametrize("per_sample", [False, True])
def test_no_element_is_left_unwritten(cpu_backend, per_sample, training, last):
    data = _data((3, C, 5, 7))
    x = data["x"].contiguous(memory_format=torch.channels_last) if last else data["x"]
    with testing.poisoned_empty():
        y = functional.gated_batch_norm(
            **(data | {"x": x}), **_named(_running()), training=training, seed=5, per_sample=per_sample
        )
        y.sum().backward()
    assert not y.isnan().any()
    for name, t in data.items():
        assert not t.grad.isnan().any(), name


def _named(running):
    return dict(zip(("running_mean", "running_var"), running, strict=True))


@pytest.mark.parametrize("last", [False, True])
def test_the_memory_format_is_kept(cpu_backend, last):
    x = (
        torch.randn(2, C, 4, 4)
        .contiguous(memory_format=torch.channels_last if last else torch.contiguous_format)
        .requires_grad_()
    )
    y = functional.gated_batch_norm(x, torch.zeros(C), training=True, seed=1)
    (dx,) = torch.autograd.grad(y.square().sum(), x)
    for t in (y, dx):
        assert t.is_contiguous(memory_format=torch.channels_last) is last


@pytest.mark.parametrize("per_sample", [False, True])
def test_gates_are_those_of_sample_gates_and_closed_channels_are_zero(cpu_backend, per_sample):
    data = _data((5, C, 3, 3), requires_grad=False)
    data["gate"][0] = -20
    z = functional.sample_gates(data["gate"], seed=9, rows=5 if per_sample else None).view(-1, C, 1, 1)
    y = functional.gated_batch_norm(**data, training=True, seed=9, per_sample=per_sample)
    expected = F.batch_norm(data["x"], None, None, data["weight"], data["bias"], True) * z
    torch.testing.assert_close(y, expected, atol=1e-5, rtol=1e-5)
    assert y[(z == 0).expand_as(y)].eq(0).all()
    assert (z == 0).any()


@pytest.mark.parametrize("momentum", [0.0, 0.1, 1.0])
@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_running_statistics_are_those_of_torch(cpu_backend, dtype, shape, momentum):
    data = _data(shape, dtype, requires_grad=False)
    data["x"] = data["x"] * 3 + 7
    own, torchs = _running(dtype), _running(dtype)
    for a, b in zip(own, torchs, strict=True):
        b.copy_(a)
    for _ in range(3):
        functional.gated_batch_norm(**data, **_named(own), training=True, momentum=momentum, seed=1)
        F.batch_norm(data["x"], *torchs, training=True, momentum=momentum)
    for a, b in zip(own, torchs, strict=True):
        torch.testing.assert_close(a, b, atol=0, rtol=1e-13 if dtype == torch.float64 else 5e-7)
    before = [t.clone() for t in own]
    functional.gated_batch_norm(**data, **_named(own), training=False, seed=1)
    functional.gated_batch_norm(**(data | {"x": data["x"][:0]}), **_named(own), training=True, seed=1)
    assert all(torch.equal(a, b) for a, b in zip(own, before, strict=True)), (
        "evaluation and empty batches change nothing"
    )


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("shape", [(2000, 2), (8, 2, 250), (8, 2, 10, 25)])
@pytest.mark.parametrize("outlier", [False, True])
def test_a_large_mean_costs_no_digits_of_the_variance(cpu_backend, shape, dtype, outlier):
    x = torch.randn(shape, dtype=torch.float64) + 1e4
    if outlier:
        x.view(-1)[0] = -1e5
    x = x.to(dtype)
    mean, var = torch.zeros(2, dtype=dtype), torch.zeros(2, dtype=dtype)
    functional.gated_batch_norm(
        x, torch.zeros(2, dtype=dtype), None, None, mean, var, training=True, momentum=1.0, seed=1
    )
    true_var, true_mean = torch.var_mean(x.double(), [i for i in range(x.dim()) if i != 1])
    epsilon = torch.finfo(dtype).eps
    torch.testing.assert_close(mean.double(), true_mean, atol=0, rtol=max(2 * epsilon, 1e-13))
    torch.testing.assert_close(
        var.double(), true_var, atol=0, rtol=1e3 * epsilon if cpu_backend == "reference" else 1e-11 + 4 * epsilon
    )


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize("parameters", ["float32", "same"])
def test_half_precision_with_float32_or_half_parameters_is_batch_norms(cpu_backend, dtype, parameters):
    wide = torch.float32 if parameters == "float32" else dtype
    data = _data((4, C, 5, 5), dtype)
    data = {name: t.detach().to(wide).requires_grad_() if name in ("weight", "bias") else t for name, t in data.items()}
    own, torchs = ([t.to(wide) for t in (torch.zeros(C), torch.ones(C))] for _ in range(2))
    y = functional.gated_batch_norm(**data, **_named(own), training=True, seed=3, per_sample=True, activation="relu")
    assert y.dtype == dtype
    y.float().square().sum().backward()
    plain = {name: t.detach().clone().requires_grad_() for name, t in data.items()}
    z = functional.sample_gates(plain["gate"], seed=3, rows=4).view(4, C, 1, 1)
    expected = F.relu(F.batch_norm(plain["x"], *torchs, plain["weight"], plain["bias"], True) * z)
    expected.float().square().sum().backward()
    testing_tolerance = 4 * torch.finfo(dtype).eps
    assert (y - expected).norm() <= testing_tolerance * expected.norm()
    for name, t in data.items():
        assert t.grad.dtype == t.dtype
        assert (t.grad - plain[name].grad).float().norm() <= 2 * testing_tolerance * plain[name].grad.float().norm(), (
            name
        )
    for a, b in zip(own, torchs, strict=True):
        assert a.dtype == b.dtype == wide
        torch.testing.assert_close(a, b, atol=1e-6, rtol=float(torch.finfo(wide).eps) * 2)


def test_autocast_leaves_the_dtype_alone_as_for_batch_norm(cpu_backend):
    for dtype in (torch.float32, torch.bfloat16):
        data = _data((4, C, 5, 5), dtype)
        with torch.autocast("cpu", torch.bfloat16):
            y = functional.gated_batch_norm(**data, training=True, seed=4, per_sample=True)
            assert y.dtype == F.batch_norm(data["x"], None, None, data["weight"], data["bias"], True).dtype == dtype
        y.sum().backward()
        assert data["weight"].grad.dtype == data["gate"].grad.dtype == torch.float32


def test_not_a_number_stays_visible(cpu_backend):
    x = torch.randn(4, C, 3, 3)
    x[1, 2, 0, 0] = float("nan")
    y = functional.gated_batch_norm(x, torch.full((C,), 9.0), training=True, seed=1, activation="relu")
    assert y[:, 2].isnan().all()
    assert not y[:, :2].isnan().any()


@pytest.mark.parametrize("needed", ["x", "gate", "weight", "bias"])
@pytest.mark.parametrize("training", [False, True])
def test_a_gradient_is_the_same_whatever_else_is_asked_for(cpu_backend, needed, training):
    data, running = _data((4, C, 3, 5)), _running()
    grads = []
    for only in (data, {needed: data[needed]}):
        leaves = {name: t.detach().clone().requires_grad_(name in only) for name, t in data.items()}
        y = functional.gated_batch_norm(
            **leaves, **_named(running), training=training, momentum=0.0, seed=1, per_sample=True
        )
        y.square().sum().backward()
        grads.append(leaves[needed].grad)
    assert torch.equal(*grads)


@pytest.mark.parametrize("threads", [1, 2, 3])
@pytest.mark.parametrize("last", [False, True])
def test_results_do_not_depend_on_the_number_of_threads(threads, last):
    if dampr.backend_info()["cpp"].startswith("missing"):
        pytest.skip(dampr.backend_info()["cpp"])
    data = _data((7, 70, 37, 13))
    if last:
        data["x"] = data["x"].detach().contiguous(memory_format=torch.channels_last).requires_grad_()
    dy = torch.randn(data["x"].shape)

    def everything():
        mean, var = torch.zeros(70), torch.ones(70)
        how = {"training": True, "seed": 5, "per_sample": True, "activation": "relu"}
        y = functional.gated_batch_norm(**data, running_mean=mean, running_var=var, **how)
        return y, mean, var, *torch.autograd.grad(y, list(data.values()), dy)

    before = torch.get_num_threads()
    try:
        torch.set_num_threads(1)
        one = everything()
        torch.set_num_threads(threads)
        assert all(torch.equal(a, b) for a, b in zip(one, everything(), strict=True))
    finally:
        torch.set_num_threads(before)


@pytest.mark.parametrize("per_sample", [False, True])
@pytest.mark.parametrize("training", [False, True])
def test_saved_for_backward_holds_the_input_and_nothing_else_of_its_size(cpu_backend, training, per_sample):
    data, running = _data((8, C, 6, 6)), _running()
    allowed = {t.data_ptr() for t in (*data.values(), *running)}
    extra = []

    def pack(t):
        if t.data_ptr() not in allowed and t.dtype != torch.int64 and t.numel():
            extra.append(tuple(t.shape))
        return t

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda t: t):
        functional.gated_batch_norm(
            **data, **_named(running), training=training, seed=1, per_sample=per_sample, activation="relu"
        )
    assert extra == ([(C,), (C,)] if training else []), "mean and variance of the batch"


@pytest.mark.parametrize("training", [False, True])
@pytest.mark.parametrize("shape", SHAPES)
def test_opcheck(cpu_backend, shape, training):
    data = _data(shape, requires_grad=False)
    tensors = data["x"], data["weight"], data["bias"], data["gate"], torch.tensor([3])
    statistics, spec = _running(), [float(v) for v in hard_concrete()]
    given = (None, None) if training else statistics
    for per_sample, relu in ((True, True), (False, False)):
        how = 1e-5, spec, per_sample, relu
        torch.library.opcheck(torch.ops.dampr.norm_gate_fwd.default, (*tensors, *given, *how))
        for needs in ([True] * 4, [True, False, False, False], [False, True, False, True]):
            args = torch.randn(shape), *tensors, *statistics, *how, training, needs
            torch.library.opcheck(torch.ops.dampr.norm_gate_bwd.default, args)
    torch.library.opcheck(
        torch.ops.dampr.norm_gate_fwd.default, (tensors[0], None, None, *tensors[3:], *given, 1e-5, spec, True, True)
    )


@pytest.mark.parametrize("kind", [dampr.nn.GatedBatchNorm1d, dampr.nn.GatedBatchNorm2d])
@pytest.mark.parametrize(("per_sample", "activation"), list(itertools.product((False, True), (None, "relu"))))
# dynamo's own, of every autograd.Function
@pytest.mark.filterwarnings("ignore:.*should not be instantiated:DeprecationWarning")
def test_compiles_without_a_graph_break_and_computes_the_same(kind, per_sample, activation):
    x = torch.randn(5, C) if kind is dampr.nn.GatedBatchNorm1d else torch.randn(5, C, 4, 4)
    results = []
    for compiled in (False, True):
        layer = kind(C, per_sample=per_sample, activation=activation)
        torch._dynamo.reset()
        run = torch.compile(layer, fullgraph=True, backend="aot_eager") if compiled else layer
        torch.manual_seed(1)
        y = run(x)
        (y.square().sum() + 1e-3 * layer.penalty()).backward()
        results.append(
            [
                y.detach(),
                *(p.grad for p in layer.parameters()),
                layer.running_mean,
                layer.running_var,
                layer.num_batches_tracked,
            ]
        )
    for a, b in zip(*results, strict=True):
        torch.testing.assert_close(a, b)


def test_torch_func_gradients_work(cpu_backend):
    data = _data((4, C, 3, 3), requires_grad=False)
    x = data.pop("x")

    def loss(params):
        return (
            functional.gated_batch_norm(x, **params, training=True, seed=1, per_sample=True, activation="relu")
            .square()
            .sum()
        )

    grads = torch.func.grad(loss)(data)
    leaves = {n: t.clone().requires_grad_() for n, t in data.items()}
    loss(leaves).backward()
    for name, grad in grads.items():
        torch.testing.assert_close(grad, leaves[name].grad)


def test_the_reference_is_batch_norm_gates_and_relu():
    data = _data((4, C, 3, 3), requires_grad=False)
    z = functional.sample_gates(data["gate"], seed=3, rows=4).view(4, C, 1, 1)
    seed, spec = torch.tensor([3]), hard_concrete()
    y = reference.norm_gate(data["x"], data["weight"], data["bias"], data["gate"], seed, None, 1e-5, spec, True, True)
    norm = nn.BatchNorm2d(C)
    norm.weight.data, norm.bias.data = data["weight"], data["bias"]
    torch.testing.assert_close(y, F.relu(norm(data["x"]) * z))


def _everything(data, running, looks_on=False, looks_back=False, **how):
    """The node's name, y, every gradient, and the running statistics that came of it."""
    kept = [t.clone() for t in running]
    with FlopCounterMode(display=False) if looks_on else nullcontext():
        y = functional.gated_batch_norm(**data, **_named(kept), training=True, seed=5, momentum=0.3, **how)
    dy = torch.linspace(-1, 2, y.numel(), dtype=y.dtype).view(y.shape)
    with FlopCounterMode(display=False) if looks_back else nullcontext():
        grads = torch.autograd.grad(y, [t for t in data.values() if t is not None], dy, retain_graph=True)
    again = torch.autograd.grad(y, [t for t in data.values() if t is not None], dy)
    assert all(torch.equal(a, b) for a, b in zip(grads, again, strict=True)), "nothing that is kept is written to"
    return type(y.grad_fn).__name__, [y.detach(), *grads, *kept]


@pytest.mark.skipif(dampr.backend_info()["cpp"].startswith("missing"), reason="no extension")
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
@pytest.mark.parametrize(("per_sample", "activation"), list(itertools.product((False, True), (None, "relu"))))
@pytest.mark.parametrize("bare", [False, True])
def test_one_call_computes_what_the_operators_do_to_the_bit(bare, per_sample, activation, dtype):
    data, running = _data((4, C, 3, 5), dtype), _running(torch.float64 if dtype == torch.float64 else torch.float32)
    if bare:
        data |= {"weight": None, "bias": None}
    how = {"per_sample": per_sample, "activation": activation}
    name, found = _everything(data, running, **how)
    assert name == "_FusedNormBackward"
    for looks_on in (False, True):
        other, expected = _everything(data, running, looks_on, True, **how)
        assert other == ("_NormGateBackward" if looks_on else name)
        for a, b in zip(found[:-2], expected[:-2], strict=True):
            assert torch.equal(a, b)
        torch.testing.assert_close(found[-2:], expected[-2:])  # those of the operators are moved by torch


@pytest.mark.parametrize("kept", ["strided", "half", "inference", "absent"])
def test_running_statistics_of_any_kind_are_moved(cpu_backend, kept):
    data, (mean, var) = _data((4, C, 3, 5), requires_grad=False), _running()
    expected, expected_var = mean.clone(), var.clone()
    functional.gated_batch_norm(**data, running_mean=expected, running_var=expected_var, training=True, seed=5)
    with torch.inference_mode() if kept == "inference" else nullcontext():
        own = (
            torch.stack([mean, mean], 1)[:, 0]
            if kept == "strided"
            else mean.bfloat16()
            if kept == "half"
            else mean.clone()
        )
        assert own.is_inference() == (kept == "inference")
        own = None if kept == "absent" else own
        functional.gated_batch_norm(**data, running_mean=own, running_var=var, training=True, seed=5)
        if own is not None:
            torch.testing.assert_close(
                own.float(), expected, **({"rtol": 1e-2, "atol": 1e-2} if kept == "half" else {})
            )
        torch.testing.assert_close(var, expected_var)


def test_autograd_knows_that_running_statistics_were_written_to(cpu_backend):
    data, running = _data((4, C, 3, 3)), _running()
    before = [t._version for t in running]
    y = functional.gated_batch_norm(**data, **_named(running), seed=5)
    functional.gated_batch_norm(**data, **_named(running), seed=5, training=True)
    assert all(t._version > version for t, version in zip(running, before, strict=True))
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        y.sum().backward()


@pytest.mark.parametrize(
    "how", [{}, {"momentum": None}, {"momentum": 0.0}, {"track_running_stats": False}, {"affine": False}], ids=str
)
def test_a_layer_counts_and_moves_as_torchs_own(cpu_backend, how):
    torch.manual_seed(2)
    own, torchs = dampr.nn.GatedBatchNorm2d(C, activation="relu", **how), nn.BatchNorm2d(C, **how)
    for _ in range(3):
        x = torch.randn(4, C, 3, 3) + 2
        own(x), torchs(x)
    for (name, a), (_, b) in zip(own.named_buffers(), torchs.named_buffers(), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-6, msg=name)


X, GATE = torch.zeros(4, C), torch.zeros(C)


@pytest.mark.parametrize(
    ("error", "message", "arguments"),
    [
        (TypeError, r"x=None: expected a torch\.Tensor", {"x": None}),
        (TypeError, r"x\.dtype=torch\.int64: expected", {"x": X.long()}),
        (ValueError, r"x\.shape=\(4,\): expected \(B, C\)", {"x": X[:, 0]}),
        (ValueError, r"gate\.shape=\(3,\): expected \(6,\), one gate per channel", {"gate": GATE[:3]}),
        (TypeError, r"gate\.dtype=torch\.float16", {"gate": GATE.half()}),
        (ValueError, r"weight\.shape=\(3,\): expected \(6,\), one entry per channel", {"weight": GATE[:3]}),
        (TypeError, r"bias=1: expected a torch\.Tensor", {"bias": 1}),
        (TypeError, r"bias\.dtype=torch\.float64: expected a narrower one", {"bias": GATE.double()}),
        (ValueError, r"running_mean\.shape=\(1,\): expected", {"running_mean": GATE[:1]}),
        (ValueError, r"running_var\.device=meta: expected cpu, the device of x", {"running_var": GATE.to("meta")}),
        (ValueError, r"training=False without running_mean and running_var", {"training": False}),
        (ValueError, r"x\.shape=\(1, 6\): expected more than one value per channel", {"x": X[:1]}),
        (ValueError, r"momentum=1\.5: expected a number in \[0, 1\]", {"momentum": 1.5}),
        (
            ValueError,
            r"eps=-1: expected a finite number of at least 0",
            {"eps": -1, "training": False, "running_mean": GATE, "running_var": GATE},
        ),
        (ValueError, r"eps=0\.0: expected a finite number above 0", {"eps": 0.0}),
        (ValueError, r"eps=nan: expected a finite number", {"eps": float("nan")}),
        (ValueError, r"activation='gelu': expected one of \[None, 'relu'\]", {"activation": "gelu"}),
        (ValueError, r"seed=None: expected an int", {"seed": None}),
    ],
)
def test_wrong_arguments_are_named(error, message, arguments):
    with pytest.raises(error, match=message):
        functional.gated_batch_norm(**({"x": X, "gate": GATE, "training": True, "seed": 1} | arguments))
