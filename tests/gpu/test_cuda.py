"""What only a CUDA device can show; `make gpu` runs these, elsewhere they are skipped.

Needs torch, triton, numpy and pytest.
"""

import itertools

import pytest
import torch

import dampr
from dampr import functional, philox, testing
from dampr.testing import verify

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device"),
    pytest.mark.filterwarnings("default"),
]


def test_auto_picks_triton_on_cuda():
    assert dampr.ops.choose(torch.device("cuda"), torch.bfloat16)[0] == "triton"


OPS = [
    "noise",
    "sample_gates",
    "gated_linear",
    "weight_gated_linear",
    "gated_conv2d",
    "norm_gate",
    "dependency_generator",
]


@pytest.mark.parametrize("op", OPS)
def test_verification_of_every_backend_and_dtype(op):
    rows = verify.run(op)
    assert any(r.backend == "triton" and r.device == "cuda" for r in rows)
    assert [f for row in rows for f in row.failures] == []


@pytest.mark.parametrize(("rows", "n"), [(None, 1_000_003), (4096, 1024), (1023, 1021)])
def test_zeros_and_ones_are_where_the_cpu_has_them(rows, n):
    for seed in (0, 2**62 + 7):
        log_alpha = torch.randn(n, generator=torch.Generator().manual_seed(1)) * 3
        with dampr.backend("reference"):
            expected = functional.sample_gates(log_alpha, seed=seed, rows=rows)
        z = functional.sample_gates(log_alpha.cuda(), seed=seed, rows=rows).cpu()
        assert torch.equal(z == 0, expected == 0)
        assert torch.equal(z == 1, expected == 1)
        assert (z - expected).abs().max() <= 1e-6


def test_noise_beyond_two_to_the_thirty_first_elements():
    """rows * n passes 2^31; the last row has to be the one the index says."""
    rows, n = 2**21 + 3, 1025
    log_alpha = torch.zeros(n, device="cuda")
    z = functional.sample_gates(log_alpha, seed=5, rows=rows)
    last = philox.uniform(torch.tensor([5]), n, (rows - 1) * n)
    expected = dampr.reference.gate(torch.zeros(n), dampr.spec.hard_concrete(), last)
    assert torch.equal(z[-1].cpu() == 0, expected == 0)
    assert (z[-1].cpu() - expected).abs().max() <= 1e-6


@pytest.mark.parametrize(("granularity", "per_sample"), list(itertools.product(("output", "input"), (False, True))))
def test_a_training_step_neither_waits_for_the_host_nor_leaves_elements_unwritten(granularity, per_sample):
    layer = dampr.nn.GatedLinear(512, 256, granularity=granularity, per_sample=per_sample).cuda()
    x = torch.randn(300, 512, device="cuda", requires_grad=True)
    for _ in range(2):  # the first step compiles
        with testing.poisoned_empty(), torch.autocast("cuda", torch.bfloat16):
            y = layer(x)
        try:
            torch.cuda.set_sync_debug_mode("error")
            y = layer(x)
            y.backward(torch.ones_like(y))
        finally:
            torch.cuda.set_sync_debug_mode("default")
    with testing.poisoned_empty():
        layer(x).sum().backward()
    assert all(not p.grad.isnan().any() for p in (*layer.parameters(), x))


@pytest.mark.parametrize("per_sample", [False, True])
def test_results_repeat_to_the_bit(per_sample):
    layer = dampr.nn.GatedLinear(1024, 768, granularity="input", per_sample=per_sample).cuda()
    x, dy = torch.randn(4096, 1024, device="cuda"), torch.randn(4096, 768, device="cuda")
    runs = []
    for _ in range(3):
        torch.manual_seed(0)
        layer.zero_grad()
        y = layer(x)
        y.backward(dy)
        runs.append([y.detach().clone(), *(p.grad.clone() for p in layer.parameters())])
    assert all(torch.equal(a, b) for other in runs[1:] for a, b in zip(runs[0], other, strict=True))


ROUTES = [
    ("output", False, ("fold", "live")),
    ("input", False, ("fold", "live")),
    ("output", True, ("passes", "one_pass")),
    ("input", True, ("passes", "one_pass")),
    ("weight", False, ("fold", "small_m")),
]


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
@pytest.mark.parametrize(("granularity", "per_sample", "routes"), ROUTES)
def test_routes_agree(granularity, per_sample, routes, dtype):
    layer = dampr.nn.GatedLinear(512, 384, granularity=granularity, per_sample=per_sample).cuda().to(dtype)
    with torch.no_grad():
        layer.gate.log_alpha.uniform_(-6, 3)
    x, dy = torch.randn(48, 512, device="cuda", dtype=dtype), torch.randn(48, 384, device="cuda", dtype=dtype)
    results = []
    for route in routes:
        torch.manual_seed(0)
        layer.zero_grad()
        with dampr.ops.forced_route(route):
            y = layer(x)
            y.backward(dy)
        results.append([y.detach().float(), *(p.grad.float() for p in layer.parameters())])
    tolerance = 2e-2 if dtype == torch.bfloat16 else 1e-4
    for a, b in zip(*results, strict=True):
        assert (a - b).norm() <= tolerance * a.norm()
    assert torch.equal(results[0][0] == 0, results[1][0] == 0)


@pytest.mark.parametrize("per_sample", [False, True])
def test_cuda_graph_replays_draw_new_gates(per_sample):
    layer = dampr.nn.GatedLinear(64, 64, per_sample=per_sample).cuda()
    with torch.no_grad():
        layer.gate.log_alpha.zero_()
    x = torch.randn(8, 64, device="cuda")
    with torch.no_grad():
        for _ in range(3):
            layer(x)
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            y = layer(x)
        graph.replay()
        first = y.clone()
        graph.replay()
    assert not torch.equal(first, y)


@pytest.mark.parametrize("per_sample", [False, True])
def test_inductor_compiles_the_whole_step(per_sample):
    layer = dampr.nn.GatedLinear(256, 128, per_sample=per_sample).cuda()
    # seeds from eager's generator, not inductor's own
    compiled = torch.compile(layer, fullgraph=True, options={"fallback_random": True})
    x = torch.randn(64, 256, device="cuda")
    torch.manual_seed(0)
    expected = layer(x)
    torch.manual_seed(0)
    y = compiled(x)
    torch.testing.assert_close(y, expected, atol=1e-4, rtol=1e-4)
    y.sum().backward()
    assert layer.gate.log_alpha.grad is not None


def test_float64_falls_to_the_reference_and_says_so():
    name, reason = dampr.ops.choose(torch.device("cuda"), torch.float64)
    assert name == "reference"
    assert "float64" in reason


def test_fresh_layer_equals_dense_to_the_bit_in_evaluation():
    for dtype in (torch.float32, torch.bfloat16):
        dense = torch.nn.Linear(300, 500).cuda().to(dtype).eval()
        x = torch.randn(65, 300, device="cuda", dtype=dtype)
        for granularity in ("output", "input"):
            assert torch.equal(dampr.nn.GatedLinear.from_dense(dense, granularity=granularity)(x), dense(x))


def test_the_crossover_sweep_times_every_route_and_writes_a_table(monkeypatch, tmp_path):
    from benchmarks import crossover, run
    from dampr.kernels import dispatch

    monkeypatch.setitem(crossover.SIZE, "cuda", 256)
    monkeypatch.setitem(crossover.ROWS, "cuda", [16, 64])
    monkeypatch.setattr(verify, "passes", lambda *ops: True)
    assert run.main(["crossover", "--rounds", "2", "--out", str(tmp_path)]) == 0
    (written,) = tmp_path.glob("dispatch-*.json")
    assert written.stem == f"dispatch-{run.device_name()}"
    assert f"results/{run.device_name()}/linear-crossover.jsonl" in dispatch.read(written).source
    text = (tmp_path / "linear-crossover.jsonl").read_text()
    for route in ("fold", "live", "one_pass", "passes", "small_m"):
        assert f'"route": "{route}"' in text
    assert "90% of blocks closed" in text


def test_a_route_is_chosen_by_the_table_of_the_device():
    from dampr.kernels.dispatch import thresholds
    from dampr.ops.backend_triton import host, routes

    problem = (64, 4096, 4096, torch.bfloat16, "weight", False)
    device = torch.zeros(1, device="cuda").device
    assert host.device_name(device) == torch.cuda.get_device_name()
    assert routes.route(*problem, device) == routes.route_by(thresholds(torch.cuda.get_device_name()), *problem)


def on_both(layer, x, call):
    """Outputs and gradients of every parameter on the CPU and on the GPU; the layer stays on the GPU."""
    results = []
    for device in ("cpu", "cuda"):
        layer.to(device).zero_grad()
        y = call(layer, x.to(device))
        y.square().mean().backward()
        results.append([t.detach().cpu() for t in (y, *(p.grad for p in layer.parameters()))])
    for a, b in zip(*results, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-3, atol=1e-4)


def assert_it_waits_for_no_host(layer, x, call):
    for mode in ("default", "error"):  # the first step compiles
        torch.cuda.set_sync_debug_mode(mode)
        try:
            with torch.autocast("cuda", torch.bfloat16):
                y = call(layer, x)
            y.backward(torch.ones_like(y))
        finally:
            torch.cuda.set_sync_debug_mode("default")


@pytest.mark.parametrize("per_sample", [False, True])
def test_gates_of_heads_do_not_wait_for_the_host_and_give_what_the_cpu_gives(per_sample):
    def call(layer, x):
        return layer(x, x, x, need_weights=False)[0]

    layer = dampr.nn.GatedMultiheadAttention(256, 8, batch_first=True, per_sample=per_sample)
    x = torch.randn(4, 33, 256)
    layer.gate.log_alpha.data.uniform_(-3, 3)
    on_both(layer.eval(), x, call)
    assert_it_waits_for_no_host(layer.train(), x.cuda(), call)


def test_a_norm_of_open_statistics_does_not_wait_for_the_host_and_gives_what_the_cpu_gives():
    layer, x = dampr.nn.GatedLayerNorm(257, statistics="open"), torch.randn(8, 33, 257)
    layer.gate.log_alpha.data.uniform_(-6, 3)
    on_both(layer.eval(), x, lambda layer, x: layer(x))
    assert_it_waits_for_no_host(layer.train(), x.cuda(), lambda layer, x: layer(x))


@pytest.mark.parametrize("kind", ["GatedLSTM", "GatedGRU", "GatedRNN"])
@pytest.mark.parametrize("how", [{}, {"num_layers": 2, "bidirectional": True}])
def test_recurrent_layers_give_what_the_cpu_gives(kind, how):
    # no noise, for cuDNN has gradients in training mode alone
    layer = getattr(dampr.nn, kind)(48, 64, gate="diffmask", **how)
    layer.gate.alpha.data.uniform_(-1, 1)
    with torch.backends.cudnn.flags(enabled=True, allow_tf32=False):
        on_both(layer, torch.randn(7, 5, 48), lambda layer, x: layer(x)[0])


def test_more_output_features_than_a_second_grid_axis_has_tiles():
    layer, x = dampr.nn.GatedLinear(2, 3_000_000, bias=False).cuda(), torch.randn(3, 2, device="cuda")
    layer.gate.log_alpha.data.normal_()
    with dampr.ops.forced_route("fold"):
        y = layer.eval()(x)
        y.backward(torch.ones_like(y))
    torch.testing.assert_close(y, x @ layer.weight.t() * layer.gate(), rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(layer.weight.grad, layer.gate()[:, None] * x.sum(0), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("per_sample", [False, True])
def test_a_relu_that_a_norm_takes_in_does_not_wait_for_the_host_and_gives_what_separate_layers_give(per_sample):
    def converted():
        torch.manual_seed(0)
        net = torch.nn.Sequential(
            torch.nn.Conv2d(3, 32, 3), torch.nn.BatchNorm2d(32), torch.nn.ReLU(), torch.nn.Conv2d(32, 4, 1)
        )
        return dampr.convert(net, example_inputs=torch.randn(2, 3, 9, 9), per_sample=per_sample).cuda().train()

    net, apart, x = converted(), converted(), torch.randn(8, 3, 17, 17, device="cuda")
    assert net[1].followed
    apart[1].activation, apart[1].followed = None, False
    results = []
    with torch.backends.cudnn.flags(enabled=True, allow_tf32=False):
        for model in (net, apart):
            torch.manual_seed(1)
            y = model(x)
            results.append([y.detach(), *torch.autograd.grad(y.square().mean(), list(model.parameters()))])
    for a, b in zip(*results, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-3, atol=1e-4)
    assert_it_waits_for_no_host(net, x, lambda model, x: model(x))
