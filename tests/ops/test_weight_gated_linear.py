"""Gates on weights and on blocks of weights as an operator: gradcheck, opcheck, compile, what is saved;
values are in verification.
"""

import pytest
import torch

import dampr
from dampr import functional, reference, testing
from dampr.spec import hard_concrete

BLOCKS = [(1, 1), (2, 2), (3, 2), (1, 5), (4, 1), (9, 9)]


def _data(m, k, n, block, dtype=torch.float32):
    count = -(n // -block[0]) * -(k // -block[1])
    gate_dtype = torch.float64 if dtype == torch.float64 else torch.float32
    tensors = (
        torch.randn(m, k, dtype=dtype),
        torch.randn(n, k, dtype=dtype),
        torch.randn(n, dtype=dtype),
        torch.randn(count, dtype=gate_dtype),
    )
    return [t.requires_grad_() for t in tensors]


def test_block_gates_are_laid_out_row_by_row():
    spread = reference.expand_blocks(torch.arange(6), (4, 5), (2, 2))
    assert spread.tolist() == [[0, 0, 1, 1, 2], [0, 0, 1, 1, 2], [3, 3, 4, 4, 5], [3, 3, 4, 4, 5]]
    assert torch.equal(reference.expand_blocks(torch.arange(20), (4, 5), (1, 1)), torch.arange(20).view(4, 5))
    assert torch.equal(reference.expand_blocks(torch.arange(1), (4, 5), (8, 8)), torch.zeros(4, 5, dtype=torch.long))


@pytest.mark.parametrize("block", BLOCKS)
def test_gates_are_those_of_sample_gates(cpu_backend, block):
    n, k = 8, 12
    log_alpha = torch.randn(-(n // -block[0]) * -(k // -block[1]))
    z = reference.expand_blocks(functional.sample_gates(log_alpha, seed=9), (n, k), block)
    y = functional.gated_linear(torch.eye(k), torch.ones(n, k), weight_gate=log_alpha, block=block, seed=9)
    assert torch.equal(y, z.t())


@pytest.mark.parametrize("block", BLOCKS)
def test_gradcheck_in_float64(cpu_backend, block):
    data = _data(4, 5, 3, block, torch.float64)
    data[3].data.mul_(0.3)

    def call(x, weight, bias, gate):
        return functional.gated_linear(x, weight, bias, weight_gate=gate, block=block, seed=2)

    assert torch.autograd.gradcheck(call, data, eps=1e-7, atol=1e-5)


@pytest.mark.parametrize("block", BLOCKS)
def test_saved_for_backward_holds_inputs_and_the_seed_only_and_every_element_is_written(cpu_backend, block):
    data = _data(16, 24, 20, block)
    allowed, extra = {t.data_ptr() for t in data}, []

    def pack(t):
        if t.data_ptr() not in allowed and t.dtype != torch.int64 and t.numel():
            extra.append(tuple(t.shape))
        return t

    with testing.poisoned_empty(), torch.autograd.graph.saved_tensors_hooks(pack, lambda t: t):
        y = functional.gated_linear(*data[:3], weight_gate=data[3], block=block, seed=1)
        y.sum().backward()
    assert not extra
    assert not y.isnan().any()
    assert not any(t.grad.isnan().any() for t in data)


@pytest.mark.parametrize("block", [(1, 1), (2, 3)])
def test_opcheck(cpu_backend, block):
    x, weight, bias, gate = (t.detach() for t in _data(6, 8, 5, block))
    tail = gate, torch.tensor([3]), [float(v) for v in hard_concrete()], list(block)
    torch.library.opcheck(torch.ops.dampr.weight_gated_linear_fwd.default, (x, weight, bias, *tail))
    for needs in ([True] * 4, [False, True, False, False], [True, False, False, False]):
        torch.library.opcheck(
            torch.ops.dampr.weight_gated_linear_bwd.default, (torch.randn(6, 5), x, weight, bias, *tail, needs)
        )


# dynamo's own, of every autograd.Function
@pytest.mark.filterwarnings("ignore:.*should not be instantiated:DeprecationWarning")
@pytest.mark.parametrize("granularity", ["weight", (4, 4)])
def test_compiles_without_a_graph_break(granularity):
    layer, x = dampr.nn.GatedLinear(16, 12, granularity=granularity), torch.randn(5, 16)
    torch.manual_seed(1)
    expected = layer(x)
    torch._dynamo.reset()
    torch.manual_seed(1)
    y = torch.compile(layer, fullgraph=True, backend="aot_eager")(x)
    torch.testing.assert_close(y, expected)
    y.sum().backward()
    assert layer.gate.log_alpha.grad is not None


@pytest.mark.parametrize("block", [(1, 1), (4, 4)])
def test_autocast_rounds_the_gated_weight_once(cpu_backend, block):
    data = _data(32, 16, 8, block)
    with torch.autocast("cpu", torch.bfloat16):
        y = functional.gated_linear(*data[:3], weight_gate=data[3], block=block, seed=4)
    assert y.dtype == torch.bfloat16
    z = reference.expand_blocks(functional.sample_gates(data[3], seed=4), (8, 16), block)
    eye = functional.gated_linear(
        torch.eye(16).bfloat16(), data[1].detach().bfloat16(), weight_gate=data[3].detach(), block=block, seed=4
    )
    assert torch.equal(eye.t(), (data[1].detach().bfloat16() * z).bfloat16())
    y.float().sum().backward()
    assert all(t.grad.dtype == torch.float32 for t in data)


def test_zero_patterns_are_equal_on_every_cpu_backend():
    if dampr.backend_info()["cpp"].startswith("missing"):
        pytest.skip(dampr.backend_info()["cpp"])
    for block in ((1, 1), (3, 5)):
        gate = torch.randn(-(300 // -block[0]) * -(200 // -block[1])) * 3
        patterns = []
        for name in ("reference", "cpp"):
            with dampr.backend(name):
                patterns.append(
                    functional.gated_linear(
                        torch.eye(200), torch.ones(300, 200), weight_gate=gate, block=block, seed=2**61
                    )
                )
        assert torch.equal(patterns[0] == 0, patterns[1] == 0)
        assert torch.equal(patterns[0] == 1, patterns[1] == 1)
